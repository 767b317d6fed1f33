"""How much a server has in hand, over all its processes: what admission goes by.

    preprocess 0 ─┐  requests, tokens, requests with media, bytes of media
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
from typing import NamedTuple

from triptych.encode import sockets

logger = logging.getLogger("triptych.stages")

SUFFIX = ".tally"
LOOK_S = 1.0
"""Seconds between two looks at which processes there are."""


class InHand(NamedTuple):
    """What a request, a process or a server has to do."""

    requests: int = 0
    tokens: int = 0
    """Of prompts and of the answers asked for."""
    with_media: int = 0
    """Requests with media, which are among the requests."""
    media_bytes: int = 0
    """As they came, of media that are being loaded."""


_BYTES = 8 * len(InHand._fields)


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

    def hold(self, amount: InHand) -> Hold:
        """Have so much more in hand, until the hold is closed."""
        self._add(amount)
        return Hold(self, amount)

    @property
    def held(self) -> InHand:
        """What this process has in hand."""
        return InHand(*self._numbers)

    def _add(self, amount: InHand, sign: int = 1) -> None:
        with self._lock:
            for place, number in enumerate(amount):
                self._numbers[place] += sign * number

    def close(self) -> None:
        """Count no more."""
        with contextlib.suppress(OSError):  # it was never there, or others use the directory
            self._path.unlink()
            self._path.parent.rmdir()


class Hold:
    """One request's part of a `Tally`; safe to use from any thread."""

    def __init__(self, tally: Tally, amount: InHand) -> None:
        self._tally = tally
        self._amount = amount
        self._lock = threading.Lock()

    def received(self, nbytes: int) -> None:
        """So many bytes of media came; after `close` they are nobody's."""
        with self._lock:
            if self._amount.requests:
                self._tally._add(InHand(media_bytes=nbytes))
                self._amount = self._amount._replace(media_bytes=self._amount.media_bytes + nbytes)

    def close(self) -> None:
        """Have it in hand no more; a second call does nothing."""
        with self._lock:
            self._tally._add(self._amount, -1)
            self._amount = InHand()


class Tallies:
    """What all processes of a server have in hand. For one thread.

    Args:
        folder: The server's directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Path, memoryview] = {}
        self._next_look = 0.0

    def total(self) -> InHand:
        """Everybody's, added up."""
        if time.monotonic() >= self._next_look:
            self._look()
        return InHand(*map(sum, zip(InHand(), *self._known.values(), strict=True)))

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
