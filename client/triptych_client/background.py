"""Work that outlives whoever asked for it: telling the server that an answer is not wanted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Protocol


class Background(Protocol):
    """Runs work to its end, and can be waited for."""

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work`` to its end, though the caller be cancelled."""
        ...

    async def drain(self) -> None:
        """Wait until none is left."""
        ...


class ThreadBackground(Background):
    """Where several threads share a client, one may close it while another still cancels."""

    def __init__(self) -> None:
        self._busy = 0
        self._changed = threading.Condition()

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """As `Background` says."""
        with self._changed:
            self._busy += 1
        try:
            await work
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    async def drain(self) -> None:
        """As `Background` says."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)


class TaskBackground(Background):
    """Where a task is cancelled, the work goes on in one of its own."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """As `Background` says."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def drain(self) -> None:
        """As `Background` says."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
