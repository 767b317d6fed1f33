"""Shared memory that dead servers have left, known by the names it has.

Triton removes its regions when it stops, and a supervisor those of a server that was killed. What
is left when both are killed, the next server on the machine removes.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from triptych import processes

SHM = Path("/dev/shm")
_PREFIX = "triptych"


def region_prefix() -> str:
    """How the names of a new server's regions begin; no two servers' are the same.

    It tells whose they are: the namespace of process ids, this process in it, and when it began.
    """
    pid = os.getpid()
    return f"{_PREFIX}_{_namespace()}_{pid}_{processes.started(pid)}_{uuid.uuid4().hex[:6]}_"


def remove(prefix: str) -> None:
    """Remove the regions of a server all of whose processes have ended."""
    for region in SHM.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def sweep() -> list[str]:
    """Remove regions whose supervisor has ended; others', and what cannot be known, stay.

    Returns:
        The names of what was removed.
    """
    removed = []
    for region in SHM.glob(f"{_PREFIX}_*"):
        if _is_orphan(region.name) and region.stat().st_uid == os.geteuid():
            region.unlink(missing_ok=True)
            removed.append(region.name)
    return removed


def _is_orphan(name: str) -> bool:
    try:
        _, namespace, pid, started, _ = name.split("_", 4)
        if int(namespace) != _namespace():
            return False
        owner, began = int(pid), int(started)
    except ValueError:
        return False
    try:
        return processes.started(owner) != began
    except ProcessLookupError:
        return True


def _namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
