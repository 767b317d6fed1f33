"""The generations that run: an engine on its event loop, and who may end them.

Knows nothing of Triton; `triptych.stages.decode` brings requests and takes answers.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, TypeVar

from triptych.contract import Again, Prompt, Ticket
from triptych.engines.base import Delta, Engine, Media
from triptych.engines.claim import Claim
from triptych.errors import Cancelled, InternalError
from triptych.stages import claims
from triptych.stages.arrival import within
from triptych.stages.outbox import Outbox, Sender

logger = logging.getLogger("triptych.stages.decode")

STOP_TIMEOUT_S = 20.0
"""Seconds that the engine has to stop in; Triton gives 30 to the whole server."""

Result = TypeVar("Result")


class Generations:
    """Runs an engine's event loop in a thread, and one task there for each generation.

    Args:
        engine: Not started yet.
        sender: Takes the deltas.
        encode_again: See `triptych.stages.claims`.
    """

    def __init__(
        self,
        engine: Engine,
        sender: Sender,
        encode_again: Callable[[Again], Ticket] | None = None,
    ) -> None:
        self._engine = engine
        self._encode_again = encode_again
        self._sender = sender
        self._aborts = Aborts()
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}
        """By Triton request id. As all that follows, touched on the loop only."""
        self._left_over: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="triptych-engine", daemon=True
        )

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The engine's."""
        return self._loop

    def start(self) -> None:
        """Start the engine.

        Raises:
            TriptychError: What `Engine.start` raises; then everything is stopped again.
        """
        self._thread.start()
        try:
            self._call(self._engine.start()).result()
        except BaseException:
            self.stop()
            raise

    def begin(self, request_id: str, prompt: Prompt, media: Media, outbox: Outbox) -> None:
        """Begin a generation, from any thread.

        Args:
            request_id: Triton's, which `abort` names; may be empty.
            prompt: As preprocess made it.
            media: The prompt's embeddings; given up once the engine has them.
            outbox: Gets the deltas, and is told to the sender.
        """
        task: list[asyncio.Task[None]] = []
        claim = media if isinstance(media, Claim) else None

        def create() -> None:
            work = self._generate(request_id, prompt, media, outbox)
            task.append(self._loop.create_task(work))
            self._tasks.setdefault(request_id, set()).add(task[0])
            task[0].add_done_callback(lambda done: self._ended(request_id, done, outbox, claim))

        def cancel() -> None:
            self._loop.call_soon_threadsafe(lambda: task[0].cancel())

        outbox.on_cancel = cancel
        self._loop.call_soon_threadsafe(create)
        self._sender.open(outbox)

    def abort(self, request_id: str) -> None:
        """End every generation of a Triton request id, from any thread.

        If there is none, one that comes within `Aborts.KEEP_S` ends at once: the request may still
        be on its way through preprocess and encoder.
        """
        self._loop.call_soon_threadsafe(self._abort, request_id)

    def stop(self) -> None:
        """End every generation, the engine and the thread; a second call does nothing."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            try:
                self._call(self._stop()).result(STOP_TIMEOUT_S)
            except Exception:
                logger.exception("the engine did not stop cleanly")
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _call(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _generate(
        self, request_id: str, prompt: Prompt, media: Media, outbox: Outbox
    ) -> None:
        try:
            if self._aborts.claim(request_id):
                raise Cancelled("the request was aborted before its generation began")
            finished = False
            deltas = self._deltas(prompt, media)
            del media
            async with (
                within(prompt.deadline, "while its answer was generated"),
                aclosing(deltas),
            ):
                async for delta in deltas:
                    finished = delta.finish_reason is not None
                    self._sender.put(outbox, delta)
            if not finished:
                raise InternalError("the engine ended the answer without a reason")
        except Exception as error:
            self._sender.fail(outbox, error)

    def _deltas(self, prompt: Prompt, media: Media) -> AsyncGenerator[Delta, None]:
        if isinstance(media, Claim) and self._encode_again is not None:
            return claims.generate(self._engine, self._encode_again, prompt, media)
        return self._engine.generate(prompt, media)

    def _abort(self, request_id: str) -> None:
        tasks = self._tasks.get(request_id)
        if not tasks:
            self._aborts.remember(request_id)
            return
        for task in tasks:
            task.cancel()

    def _ended(
        self, request_id: str, task: asyncio.Task[None], outbox: Outbox, claim: Claim | None
    ) -> None:
        # Here, since a task that is cancelled before its first step runs nothing of its own.
        if task.cancelled():
            self._sender.fail(outbox, Cancelled("the generation was ended"))
        if claim is not None and not claim.taken:
            self._left_over.add(
                left := self._loop.create_task(claims.give_back(self._engine, claim))
            )
            left.add_done_callback(self._left_over.discard)
        tasks = self._tasks[request_id]
        tasks.discard(task)
        if not tasks:
            del self._tasks[request_id]
            self._aborts.finished(request_id)

    async def _stop(self) -> None:
        tasks = [task for tasks in self._tasks.values() for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._left_over)
        await self._engine.stop()


class Aborts:
    """Aborts that came before their generation.

    An abort of a generation that has just ended is no error and must not wait for the next request
    of that id, so the ids that ended are remembered too.
    """

    KEEP_S = 60.0
    """Seconds that an id is remembered."""
    LIMIT = 4096
    """Ids that are remembered, of each kind."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: OrderedDict[str, float] = OrderedDict()
        self._ended: OrderedDict[str, float] = OrderedDict()

    def remember(self, request_id: str) -> None:
        """Keep the abort for a generation that is still to come."""
        self._expire()
        if request_id not in self._ended:
            self._add(self._waiting, request_id)

    def claim(self, request_id: str) -> bool:
        """Whether the generation that begins now was aborted before; an abort counts once."""
        self._expire()
        self._ended.pop(request_id, None)
        return self._waiting.pop(request_id, None) is not None

    def finished(self, request_id: str) -> None:
        """A generation has ended."""
        self._expire()
        if request_id:
            self._add(self._ended, request_id)

    def _add(self, ids: OrderedDict[str, float], request_id: str) -> None:
        ids[request_id] = self._clock() + self.KEEP_S
        ids.move_to_end(request_id)
        if len(ids) > self.LIMIT:
            ids.popitem(last=False)

    def _expire(self) -> None:
        now = self._clock()
        for ids in (self._waiting, self._ended):
            while ids and next(iter(ids.values())) <= now:
                ids.popitem(last=False)
