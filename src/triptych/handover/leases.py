"""What waits in an arena for its reader, and until when."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """One request's part of an arena."""

    generation: int
    """Its name."""
    offset: int
    """Of the header, in the arena."""
    ends: float
    """On the clock of `Leases`."""


class Leases:
    """The leases of one arena. Not for several threads at a time.

    Args:
        lease_s: How long each lasts, in seconds.
        clock: Monotonic seconds.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        # Far from those of the process before, whose tickets may still be about, and below 2⁵³:
        # every JSON library reads them.
        self._next = secrets.randbits(52)
        self._by_generation: OrderedDict[int, Lease] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_generation)

    def open(self, offset: int) -> Lease:
        """A new lease of what begins at ``offset``."""
        lease = Lease(self._next, offset, self._clock() + self._lease_s)
        self._next += 1
        self._by_generation[lease.generation] = lease
        return lease

    def close(self, generation: int) -> Lease | None:
        """End a lease; None: it has ended already."""
        return self._by_generation.pop(generation, None)

    def expired(self) -> list[Lease]:
        """End the leases whose time is up. All last equally long, so the oldest come first."""
        now = self._clock()
        ended = []
        while self._by_generation:
            oldest = next(iter(self._by_generation.values()))
            if oldest.ends > now:
                break
            ended.append(self._by_generation.popitem(last=False)[1])
        return ended

    def all(self) -> list[Lease]:
        """End every lease."""
        ended = list(self._by_generation.values())
        self._by_generation.clear()
        return ended
