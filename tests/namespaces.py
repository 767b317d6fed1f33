"""Hosts on one machine: network namespaces on a bridge, with links that can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SUBNET = "198.18.{}"
"""From the range that is set aside for tests of networks, RFC 2544."""


def ip(*arguments: str) -> str:
    """Run iproute2; its complaint is the exception's."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


class Host:
    """A network namespace with one address, and what runs in it."""

    def __init__(self, namespace: str, link: str, address: str) -> None:
        self.address = address
        self._namespace = namespace
        self._link = link
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        """Run a program here; its output goes to the end of ``log``."""
        with log.open("ab") as file:
            started = subprocess.Popen(
                ["ip", "netns", "exec", self._namespace, *command],
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._started.append(started)

    def kill(self) -> None:
        """End whatever runs here, at once."""
        while pids := ip("netns", "pids", self._namespace).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.01)  # for those that are not ours to wait for
        while self._started:
            self._started.pop().wait()

    def cut(self) -> None:
        """Take the link down: from now on nothing arrives, and nobody is told."""
        ip("link", "set", self._link, "down")

    def mend(self) -> None:
        """Put the link up again."""
        ip("link", "set", self._link, "up")


def bridge_of(number: int) -> Path:
    """The bridge of the run with that number, of which there may be several at a time."""
    return Path(f"/sys/class/net/trip{number % 250}")


@contextlib.contextmanager
def hosts(names: Sequence[str]) -> Iterator[list[Host]]:
    """Hosts that reach each other and the test, and are gone with all that runs in them.

    Raises:
        PermissionError: This machine does not let us.
    """
    if shutil.which("ip") is None:
        raise PermissionError("there is no ip (iproute2)")
    number = next(one for one in range(os.getpid() % 250, 500) if not bridge_of(one).exists()) % 250
    bridge = bridge_of(number).name
    with contextlib.ExitStack() as stack:
        ip("link", "add", "name", bridge, "type", "bridge")
        stack.callback(ip, "link", "del", bridge)
        ip("link", "set", bridge, "up")
        ip("address", "add", f"{SUBNET.format(number)}.1/24", "dev", bridge)
        made = []
        for place, name in enumerate(names, 2):
            namespace, link = f"triptych-{number}-{name}", f"{bridge}p{place}"
            address = f"{SUBNET.format(number)}.{place}"
            ip("netns", "add", namespace)
            stack.callback(ip, "netns", "del", namespace)
            ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            # With the namespace it would go too, but not before its last sockets have timed out.
            stack.callback(ip, "link", "del", link)
            host = Host(namespace, link, address)
            stack.callback(host.kill)
            ip("link", "set", link, "master", bridge, "up")
            ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", namespace, "link", "set", "eth0", "up")
            ip("-n", namespace, "link", "set", "lo", "up")
            made.append(host)
        yield made
