"""Shared memory and temporary files that dead servers have left, known by the names they have.

Triton removes its regions when it stops, and a supervisor those of a server that was killed. What
is left when both are killed, the next server on the machine removes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from triptych import processes

SHM = Path("/dev/shm")
TEMPORARY = Path(tempfile.gettempdir())


def region_prefix() -> str:
    """How the names of a new server's regions begin; no two servers' are the same."""
    return processes.owned_name()


def remove(prefix: str) -> None:
    """Remove the regions of a server all of whose processes have ended."""
    for region in SHM.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def sweep() -> list[str]:
    """Remove what belongs to processes that have ended; others', and what cannot be known, stay.

    Returns:
        The names of what was removed.
    """
    removed = []
    for path in [*SHM.iterdir(), *TEMPORARY.iterdir()]:
        if processes.is_orphaned(path.name) and _is_ours(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except FileNotFoundError:
        return False  # another server's sweep came first
