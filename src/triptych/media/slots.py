"""Who may go on next where only so many can."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class Slots:
    """A semaphore that lets the most urgent go first. It belongs to one event loop.

    Args:
        count: How many hold one at a time.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._ids = itertools.count()

    async def acquire(self, priority: int = 0) -> None:
        """Wait for a slot: the lowest priority has the next one, of equals who came first."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        entry = (priority, next(self._ids), turn)
        heapq.heappush(self._waiting, entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
            else:
                self.release()  # it had come just then
            raise

    def release(self) -> None:
        """Give a slot back."""
        if self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            turn.set_result(None)
        else:
            self._free += 1
