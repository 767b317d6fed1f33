"""What preprocess has sent leases of, for as long as it may be asked for one of them once more."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from triptych.chat.messages import MediaPart

MAX_BYTES = 32 << 20
"""Of parts, ``data:`` URIs and all. Mostly a request is with the encoder before the next comes."""
_OVERHEAD = 1024
"""About what a part takes besides its URL, bytes."""


@dataclass(frozen=True, slots=True)
class Given:
    """One lease's medium."""

    part: MediaPart
    hash: str
    """Of what was loaded, since a URL may give something else the next time."""

    @property
    def nbytes(self) -> int:
        """About what it takes, bytes."""
        return len(self.part.url) + _OVERHEAD


class Leased:
    """The media of the leases that were sent last, within a bound of bytes. Of one thread."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._given: OrderedDict[str, Given] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._given)

    def remember(self, lease: str, part: MediaPart, hash: str) -> None:
        """Note what a lease is of; the oldest are forgotten for it, and the newest is kept."""
        self._given[lease] = given = Given(part, hash)
        self._bytes += given.nbytes
        while self._bytes > self._max_bytes and len(self._given) > 1:
            self._bytes -= self._given.popitem(last=False)[1].nbytes

    def take(self, lease: str) -> Given | None:
        """What a lease was of, once; None: it was never sent, or long ago."""
        given = self._given.pop(lease, None)
        if given is not None:
            self._bytes -= given.nbytes
        return given
