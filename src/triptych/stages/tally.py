"""How much a server has in hand, over all its processes: what admission goes by.

    preprocess 0 ─┐  requests, tokens, requests with media
    preprocess 1 ─┼─▶ files in memory, one a process, in the server's own directory
    decode      ──┘

A process writes its own numbers, and preprocess adds everybody's up before it begins a request.
Between two processes a request is for a moment in nobody's hand; the sum is an estimate.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import time
from pathlib import Path

from triptych.encode import sockets

logger = logging.getLogger("triptych.stages")

SUFFIX = ".tally"
LOOK_S = 1.0
"""Seconds between two looks at which processes there are."""
_BYTES = 24


class Tally:
    """What this process has in hand; safe to change from any thread.

    Without a directory it counts for nobody, and says so in the log.

    Args:
        folder: The server's directory.
        instance: Triton's name of the model's instance.
    """

    def __init__(self, folder: Path, instance: str) -> None:
        self._lock = threading.Lock()
        self._path = folder / f"{instance}.{os.getpid()}{SUFFIX}"
        self._numbers = memoryview(bytearray(_BYTES)).cast("q")
        try:
            sockets.make_private(folder)
            self._path.write_bytes(bytes(_BYTES))
            with self._path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), _BYTES)
        except OSError as error:
            logger.warning("what %s has in hand is not counted: %s", instance, error)
        else:
            self._numbers = memoryview(self._map).cast("q")

    def add(self, requests: int, tokens: int, with_media: int = 0) -> None:
        """Change the numbers."""
        with self._lock:
            self._numbers[0] += requests
            self._numbers[1] += tokens
            self._numbers[2] += with_media

    @property
    def held(self) -> tuple[int, int]:
        """Requests and tokens of this process."""
        return self._numbers[0], self._numbers[1]

    def close(self) -> None:
        """Count no more."""
        with contextlib.suppress(OSError):  # it was never there, or others use the directory
            self._path.unlink()
            self._path.parent.rmdir()


class Tallies:
    """What all processes of a server have in hand. For one thread.

    Args:
        folder: The server's directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Path, memoryview] = {}
        self._next_look = 0.0

    def total(self) -> tuple[int, int]:
        """Requests and tokens."""
        rows = self._rows()
        return sum(row[0] for row in rows), sum(row[1] for row in rows)

    def with_media(self) -> int:
        """Requests with media, which are among the requests."""
        return sum(row[2] for row in self._rows())

    def _rows(self) -> list[memoryview]:
        if time.monotonic() >= self._next_look:
            self._look()
        return list(self._known.values())

    def _look(self) -> None:
        self._next_look = time.monotonic() + LOOK_S
        found = {path for path in self._folder.glob(f"*{SUFFIX}") if _lives(path)}
        for path in self._known.keys() - found:
            del self._known[path]
        for path in found - self._known.keys():
            with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
                shown = mmap.mmap(file.fileno(), _BYTES, prot=mmap.PROT_READ)
                self._known[path] = memoryview(shown).cast("q")


def _lives(path: Path) -> bool:
    """Whether the process is there that writes it; one that was killed leaves its file."""
    return Path("/proc", path.name.split(".")[-2]).exists()
