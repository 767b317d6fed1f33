"""Work that outlives whoever asked for it: telling the server that an answer is not wanted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeAlias, TypeVar

T = TypeVar("T")
Work: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


def drive(work: Coroutine[Any, Any, T]) -> T:
    """Drive a coroutine over a blocking transport, which never suspends."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    work.close()
    raise RuntimeError("a blocking transport has suspended")


class Handle(Protocol):
    """Something that will happen."""

    def cancel(self) -> None:
        """Let it not happen, if it has not yet."""
        ...


class Background(Protocol):
    """Does work to its end or at a later time, and can be waited for."""

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work`` to its end, though the caller be cancelled."""
        ...

    def after(self, seconds: float, work: Work) -> Handle:
        """Do ``work`` in a while.

        Raises:
            RuntimeError: The interpreter is ending.
        """
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    async def drain(self) -> None:
        """Wait until nothing is being done."""
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

    def after(self, seconds: float, work: Work) -> Handle:
        """As `Background` says."""
        timer = threading.Timer(seconds, lambda: drive(work()))
        timer.daemon = True
        timer.start()
        return timer

    async def sleep(self, seconds: float) -> None:
        """As `Background` says."""
        time.sleep(seconds)  # noqa: ASYNC251  where this class serves there is no loop

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
        await asyncio.shield(self._start(work))

    def after(self, seconds: float, work: Work) -> Handle:
        """As `Background` says."""
        return asyncio.get_running_loop().call_later(seconds, lambda: self._start(work()))

    async def sleep(self, seconds: float) -> None:
        """As `Background` says."""
        await asyncio.sleep(seconds)

    async def drain(self) -> None:
        """As `Background` says."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
