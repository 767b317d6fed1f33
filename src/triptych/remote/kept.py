"""Pixels of items whose embeddings nobody may have read yet."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from triptych.contract import Item

KEEP_S = 60.0
"""How long, in seconds: a reader gives up long before."""


@dataclass(frozen=True, slots=True)
class Sent:
    """An item that was encoded, and all that it takes to do so again."""

    item: Item
    pixels: memoryview = field(repr=False)
    server: str
    """Address of the server that encoded it."""


class Kept:
    """Items that were sent, by tokens that are good for one use; the oldest go first.

    Args:
        limit: Bytes of pixels.
        clock: Monotonic seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.nbytes = 0
        """Bytes of pixels held now."""
        self._limit = limit
        self._clock = clock
        self._sent: OrderedDict[str, tuple[float, Sent]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sent)

    def put(self, sent: Sent) -> str | None:
        """Keep an item; None: it is larger than all there may be."""
        if sent.pixels.nbytes > self._limit:
            return None
        token = secrets.token_hex(16)
        self._sent[token] = (self._clock() + KEEP_S, sent)
        self.nbytes += sent.pixels.nbytes
        while self.nbytes > self._limit:
            self.take(next(iter(self._sent)))
        return token

    def take(self, token: str) -> Sent | None:
        """The item of a token, which ends; None: it is not kept any more."""
        _, sent = self._sent.pop(token, (0.0, None))
        if sent:
            self.nbytes -= sent.pixels.nbytes
        return sent

    def expire(self) -> None:
        """Let go of what nobody can need any more."""
        now = self._clock()
        while self._sent:
            token, (ends, _) = next(iter(self._sent.items()))
            if ends > now:
                return
            self.take(token)
