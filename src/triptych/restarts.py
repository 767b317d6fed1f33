"""How often, and after which pauses, what has ended is started again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

STEADY_S = 60.0
"""Seconds of service after which the failures before them do not count any more."""


class Restarts:
    """Counts the failures in a row of one thing.

    Args:
        pauses: Before each start in a row, seconds. The first is mostly 0: most failures are alone.
        clock: `time.monotonic`, but for tests.
    """

    def __init__(
        self, pauses: Sequence[float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pauses = pauses
        self._clock = clock
        self._since: float | None = None
        self.count = 0
        """Starts in a row."""

    @property
    def limit(self) -> int:
        """The most that there are."""
        return len(self._pauses)

    def serves(self) -> None:
        """It has started."""
        self._since = self._clock()

    def failed(self) -> float | None:
        """It has ended, or has not started: the pause until the next start; None: no more."""
        since, self._since = self._since, None
        if since is not None and self._clock() - since >= STEADY_S:
            self.count = 0
        if self.count == self.limit:
            return None
        self.count += 1
        return self._pauses[self.count - 1]


def doubling(count: int, longest: float) -> tuple[float, ...]:
    """``count`` pauses of 0, 1, 2, 4, … seconds, none longer than ``longest``."""
    return tuple(min(longest, float(2 ** (index - 1))) if index else 0.0 for index in range(count))
