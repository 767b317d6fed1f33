"""What Linux says of a process: what it does, how it ended, and whose it is. Read from /proc."""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path
from typing import Literal

Doing = Literal["gone", "stopped", "idle", "busy"]
"""gone: it has ended, whether its parent has taken note of that or not.
stopped: by a signal such as SIGSTOP.
idle: every thread waits for something to happen.
busy: a thread runs, or waits for a processor, a disk or a debugger."""

_PREFIX = "triptych"
_ENDED, _STOPPED, _IDLE = "ZX", "T", "SI"
"""States of proc(5), ``/proc/pid/stat``."""
_STARTED, _EXIT_CODE = 19, 49
"""Fields of ``/proc/pid/stat``, counted from the one behind the name."""


def doing(pid: int) -> Doing:
    """What all threads of a process do, taken together.

    A process that owes a sign of life and is *busy* may be slow, or starved by others; one that is
    *idle* or *stopped* will not give it.
    """
    states = set()
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            if fields := _stat(f"/proc/{pid}/task/{thread}/stat"):
                states.add(fields[0])
    except OSError:
        return "gone"
    if states <= set(_ENDED):
        return "gone"
    if states & set(_STOPPED):
        return "stopped"
    return "idle" if states <= {*_ENDED, *_IDLE} else "busy"


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped it; cheaper than `doing`, which looks at every thread."""
    fields = _stat(f"/proc/{pid}/stat")
    return bool(fields) and fields[0] in _STOPPED


def is_gone(pid: int) -> bool:
    """Whether it has ended, as of `doing`."""
    fields = _stat(f"/proc/{pid}/stat")
    return not fields or fields[0] in _ENDED


def ending(pid: int) -> str:
    """How a process ended whose parent has not taken note of it yet; empty: nobody knows."""
    fields = _stat(f"/proc/{pid}/stat")
    if not fields or fields[0] not in _ENDED:
        return ""
    code = int(fields[_EXIT_CODE])  # as of waitpid(2)
    if number := code & 0x7F:
        return f"by {signal.Signals(number).name}"
    return f"with exit status {code >> 8}"


def started(pid: int) -> int:
    """When it began, in clock ticks since the boot; with ``pid`` this is one process for ever.

    Raises:
        ProcessLookupError: There is none.
    """
    fields = _stat(f"/proc/{pid}/stat")
    if not fields:
        raise ProcessLookupError(f"there is no process {pid}")
    return int(fields[_STARTED])


def owned_name() -> str:
    """How a name begins that nothing else has, and that says whose it is.

    It tells the namespace of process ids, this process in it, and when it began.
    """
    pid = os.getpid()
    return f"{_PREFIX}_{_namespace()}_{pid}_{started(pid)}_{uuid.uuid4().hex[:6]}_"


def is_orphaned(name: str) -> bool:
    """Whether it begins as of `owned_name`, by a process that has ended; no if nobody can tell."""
    try:
        prefix, namespace, pid, began, _ = name.split("_", 4)
        if prefix != _PREFIX or int(namespace) != _namespace():
            return False
        return is_gone(int(pid)) or started(int(pid)) != int(began)
    except ValueError:
        return False
    except ProcessLookupError:  # since the line above
        return True


def killed_for_memory() -> int:
    """How many processes the kernel has killed for want of memory, since it was booted."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _stat(path: str) -> list[str]:
    """The fields of a ``stat`` behind the name, the state first; empty: it is gone."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []
