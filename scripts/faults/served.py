"""One ``triptych serve --openai``: its processes, whether it is ready, and what it has left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import psutil

from faults.room import Room
from triptych import processes

STUB = "triton_python_backend_stub"
PROBE_S = 1.0
"""For the answer to a probe; Kubernetes' default."""
PROBE_PAUSE_S = 0.1
_MARK = "_TRIPTYCH_CHAOS"
"""Environment variable by which every process of a server is known, whoever its parent is."""


class Ready(msgspec.Struct):
    """What ``triptych serve --json`` prints."""

    model: str
    http: str
    grpc: str
    openai: str


class Probe:
    """Asks again and again whether something is ready, as an orchestrator would.

    Args:
        url: What to ask.
    """

    def __init__(self, url: str) -> None:
        self.ready = True
        self.unready: list[float] = []
        """When it was not, `time.monotonic` seconds."""
        self._url = url
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(trust_env=False, timeout=PROBE_S) as client:
            while not self._stopping.wait(PROBE_PAUSE_S):
                try:
                    self.ready = client.get(self._url).is_success
                except httpx.TransportError:
                    self.ready = False
                if not self.ready:
                    self.unready.append(time.monotonic())


class Served:
    """A server with the OpenAI API, in a room.

    Args:
        room: Where it runs.
        *flags: Of ``triptych serve``.
    """

    def __init__(self, room: Room, *flags: str) -> None:
        self.room = room
        self.lines: list[tuple[float, str]] = []
        """stderr, each line with when it came, `time.monotonic` seconds."""
        self._mark = uuid.uuid4().hex
        program = str(Path(sys.executable).with_name("triptych"))
        ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics", "openai")]
        self.process = subprocess.Popen(
            room.command([program, "serve", "--openai", "--json", *ports, *flags]),
            env={**os.environ, _MARK: self._mark, "TMPDIR": str(room.folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._probes: list[Probe] = []

    def wait_ready(self) -> Ready:
        """Wait for the first time that it is ready.

        Raises:
            RuntimeError: It does not get ready.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError("the server did not start:\n" + self.said())
        self.at = msgspec.json.decode(line, type=Ready)
        gateway = self.at.openai.removesuffix("/v1")
        self._probes = [
            Probe(f"{self.at.http}/v2/models/{self.at.model}/ready"),
            Probe(f"{gateway}/health/ready"),
        ]
        return self.at

    def said(self, since: float = 0.0) -> str:
        """Its last words on stderr."""
        return "\n".join(line for when, line in self.lines if when >= since)[-4000:]

    def said_when(self, pattern: str, since: float = 0.0) -> float | None:
        """When it first said what matches ``pattern``, `time.monotonic` seconds."""
        return next((when for when, _ in self._matching(pattern, since)), None)

    def lines_with(self, pattern: str, since: float = 0.0) -> list[str]:
        """The lines that match ``pattern``."""
        return [line for _, line in self._matching(pattern, since)]

    def ready(self) -> bool:
        """Whether both Triton and the gateway say so."""
        return all(probe.ready for probe in self._probes)

    def unready_since(self, when: float) -> float | None:
        """From when on, after ``when``, both have said at least once that they are not."""
        first = [next((at for at in probe.unready if at >= when), None) for probe in self._probes]
        return None if None in first else max(at for at in first if at is not None)

    def pids(self, role: str) -> list[int]:
        """The processes that play a role now.

        Args:
            role: ``serve``, ``tritonserver``, ``engine``, ``worker``, or a model, for its stubs.
        """
        if role == "serve":
            return [self.process.pid]
        return [found.pid for found in self._family() if _role(found) == role]

    def send(self, role: str, number: signal.Signals) -> None:
        """Send a signal to a process of a role; of workers, to all, since one may have no work."""
        for pid in self.pids(role)[: None if role == "worker" else 1]:
            os.kill(pid, number)

    def left(self) -> list[str]:
        """Processes and shared memory that no server in service uses; for a person."""
        mine = {found.pid for found in self._family()} | {self.process.pid}
        found = [
            f"process {process.pid} {process.name()}"
            for process in self._marked()
            if process.pid not in mine
        ]
        servers, prefix = self.pids("tritonserver"), "none"
        if len(servers) > 1:
            found.append(f"{len(servers)} tritonservers")
        elif servers:
            prefix = _region_prefix(servers[0])
            found += [
                f"process {process.pid} {process.name()} twice" for process in self._doubles()
            ]
        found += [
            f"shared memory {region.name}"
            for region in self.room.shm.iterdir()
            if region.name.startswith("triptych") and not region.name.startswith(prefix)
        ]
        return found

    def alive(self) -> bool:
        """Whether any process of it is."""
        return bool(self._marked())

    def stop(self) -> int:
        """End it as Ctrl-C does; its exit code."""
        self._rest()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end; its exit code."""
        self._rest()
        try:
            return self.process.wait(90)
        finally:
            self._close()

    def kill(self) -> None:
        """End every process of it that is left, at once; a second call does nothing."""
        self._rest()
        for process in self._marked():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        self._reader.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def _matching(self, pattern: str, since: float) -> Iterator[tuple[float, str]]:
        for when, line in list(self.lines):
            if when >= since and re.search(pattern, line):
                yield when, line

    def _rest(self) -> None:
        while self._probes:
            self._probes.pop().stop()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with contextlib.suppress(ValueError):  # closed
            for line in self.process.stderr:
                self.lines.append((time.monotonic(), line.rstrip("\n")))

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children(recursive=True)
            return [found for found in below if not processes.is_gone(found.pid)]
        return []

    def _marked(self) -> list[psutil.Process]:
        """Every process that has inherited the mark, orphans too; not who waits to be reaped."""
        return [
            process
            for process in psutil.process_iter()
            if _environ(process).get(_MARK) == self._mark and not processes.is_gone(process.pid)
        ]

    def _doubles(self) -> Iterator[psutil.Process]:
        """Stubs of an instance that has another one, engines beside an engine."""
        seen = set()
        for found in self._family():
            words = found.cmdline()
            name = words[-2] if STUB in "".join(words[:1]) and len(words) > 2 else ""
            if name and name in seen:
                yield found
            seen.add(name)


def _role(process: psutil.Process) -> str:
    try:
        words, name = process.cmdline(), process.name()
    except psutil.NoSuchProcess:
        return ""
    if name == "tritonserver":
        return "tritonserver"
    if words and words[0].endswith(STUB) and len(words) > 2:
        return words[-2].rsplit("_", 2)[0].partition("_")[0]
    if "triptych.media.worker" in words:
        return "worker"
    return "engine" if "EngineCore" in name + " ".join(words) else ""


def _region_prefix(server: int) -> str:
    words = psutil.Process(server).cmdline()
    return next(word for word in words if "shm-region-prefix-name" in word).rpartition("=")[2]


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}
