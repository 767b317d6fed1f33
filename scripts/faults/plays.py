"""The faults, each with how it is played and what shows that somebody has noticed."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from faults.room import fill
from faults.served import Served

RESTART = r"starting again"
OUTAGE = r"is out of service"
WORKER = r"a media worker was ended or stopped"
STUBS = ("preprocess", "encoder", "decode")

Undo = Callable[[], None]


@dataclass(frozen=True)
class Play:
    """One fault.

    Args:
        name: On the command line.
        begin: Plays it, and returns how it is taken back; None: it cannot be played here.
        notice: Pattern of the line that says that it was noticed; empty: nobody has to notice.
        hidden: The server is ready all the same.
        lasts_s: Until it is taken back.
        last_words: Pattern of what the server says when it ends of it; empty: it does not end.
        engines: Those whose servers have what it is about; empty: all.
    """

    name: str
    begin: Callable[[Served], Undo | None]
    notice: str = RESTART
    hidden: bool = False
    lasts_s: float = 0.0
    last_words: str = ""
    engines: tuple[str, ...] = ()


def signals(role: str, number: signal.Signals) -> Callable[[Served], Undo]:
    """A signal to the processes of a role; of a stage's, to one."""

    def begin(served: Served) -> Undo:
        served.send(role, number)
        return _nothing

    return begin


def out_of_memory(served: Served) -> Undo | None:
    """Have the kernel kill decode's process for want of memory, in a control group without any."""
    [victim] = served.pids("decode")
    group = _memory_group()
    if group is None:
        return None
    # What it has already counts where it comes from; the first new page is too much.
    limit = group / "memory.max"
    limit = limit if limit.exists() else group / "memory.limit_in_bytes"
    limit.write_text(str(resource.getpagesize()))
    (group / "cgroup.procs").write_text(str(victim))

    def undo() -> None:
        for _ in range(100):
            with contextlib.suppress(OSError):
                group.rmdir()
                return
            time.sleep(0.05)

    return undo


def full_disk(served: Served) -> Undo | None:
    """Fill the disk that temporary files and the log are on."""
    return _filled(served, served.room.disk)


def full_shm(served: Served) -> Undo | None:
    """Fill /dev/shm."""
    return _filled(served, served.room.shm)


def take_port(served: Served) -> Undo:
    """Kill tritonserver and listen on its port before the next one does."""
    port = httpx.URL(served.at.http).port
    served.send("tritonserver", signal.SIGKILL)
    thief = socket.socket()
    thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    while True:
        try:
            thief.bind(("127.0.0.1", port))
            thief.listen()
            return thief.close
        except OSError:
            time.sleep(0.001)


def corrupt(model: Path) -> Callable[[Served], Undo]:
    """Cut the weights off, as a broken download does, and kill who has read them."""
    weights = model / "model.safetensors"

    def begin(served: Served) -> Undo:
        whole = weights.with_suffix(".whole")
        weights.rename(whole)
        weights.write_bytes(whole.read_bytes()[: 1 << 20])
        served.send("encoder", signal.SIGKILL)
        return lambda: os.replace(whole, weights)

    return begin


def kill_all_that_clean_up(served: Served) -> Undo:
    """Kill the supervisor and tritonserver, so that nobody is left to remove what they had."""
    for pid in (*served.pids("serve"), *served.pids("tritonserver")):
        os.kill(pid, signal.SIGKILL)
    return _nothing


def plays(model: Path) -> list[Play]:
    """All faults, in the order in which they are played.

    Args:
        model: The checkpoint that is served, which is damaged for a while.
    """
    kill, stop = signal.SIGKILL, signal.SIGSTOP
    vllm = ("vllm",)
    return [
        Play("kill-tritonserver", signals("tritonserver", kill)),
        *(Play(f"kill-{stub}", signals(stub, kill)) for stub in STUBS),
        Play("kill-engine", signals("engine", kill), OUTAGE, engines=vllm),
        Play("kill-worker", signals("worker", kill), "", hidden=True),
        Play("stop-tritonserver", signals("tritonserver", stop)),
        *(Play(f"stop-{stub}", signals(stub, stop)) for stub in STUBS),
        Play("stop-engine", signals("engine", stop), OUTAGE, engines=vllm),
        Play("stop-worker", signals("worker", stop), WORKER, hidden=True),
        Play("out-of-memory", out_of_memory),
        Play("full-disk", full_disk, "", hidden=True, lasts_s=3.0),
        Play("full-shm", full_shm, "", hidden=True, lasts_s=3.0),
        Play("port-taken", take_port, lasts_s=3.0),
        Play("corrupt-checkpoint", corrupt(model), lasts_s=6.0),
        Play("kill-serve", signals("serve", kill), last_words="."),
        Play("kill-serve-and-tritonserver", kill_all_that_clean_up, last_words="."),
        Play("corrupt-for-good", corrupt(model), last_words="given up after"),
    ]


def _nothing() -> None:
    """There is nothing to take back."""


def _filled(served: Served, folder: Path) -> Undo | None:
    if not served.room.is_own:
        return None
    return fill(folder).unlink


def _memory_group() -> Path | None:
    """A control group of its own that can limit memory, of either version."""
    root = Path("/sys/fs/cgroup")
    for parent in (root / "memory", root):
        group = parent / f"triptych-chaos-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / "memory.max").exists() or (group / "memory.limit_in_bytes").exists():
            return group
        group.rmdir()
    return None


def copy_of(model: Path, folder: Path) -> Path:
    """A copy of a checkpoint that may be damaged."""
    return Path(shutil.copytree(model, folder / model.name))
