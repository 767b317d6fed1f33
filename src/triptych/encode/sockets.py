"""Listening on a Unix socket that only this user may reach. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from pathlib import Path

from triptych.encode import lookup

ABANDONED_AFTER_S = 60.0
"""Age of a directory from which it may belong to a server that was killed."""


def listen(address: Path) -> socket.socket:
    """A listening socket in a directory that is this user's alone.

    Raises:
        OSError: It cannot be made, or is somebody else's.
    """
    folder = address.parent
    make_private(folder)
    _sweep(folder.parent)
    address.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()
    listener.setblocking(False)
    return listener


def make_private(folder: Path) -> None:
    """Have a directory, in one of ours, that is this user's alone.

    Raises:
        OSError: It cannot be made, or is somebody else's.
    """
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)
    if not lookup.private(folder):
        raise PermissionError(f"{folder} is not this user's alone")


def remove(address: Path) -> None:
    """Remove a socket, and its directory if it was the last there."""
    address.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others still use it
        address.parent.rmdir()


def _sweep(root: Path) -> None:
    """Remove what servers that were killed have left."""
    for folder in root.glob("*/"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < ABANDONED_AFTER_S:
                continue
            if not any(_listened_to(address) for address in folder.glob(f"*{lookup.SUFFIX}")):
                shutil.rmtree(folder)


def _listened_to(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(os.fspath(address)) == 0
