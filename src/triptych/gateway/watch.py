"""Answers that never come.

Triton says nothing to those who wait for a stage whose process has died, or hangs. So whoever waits
long is looked after: the stage that writes answers is asked for something small, the end of a
generation that nobody knows. `triptych serve` sees dead stages itself, and sooner; before another
tritonserver nobody else does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Iterator

from triptych import contract
from triptych_client.conversation import Conversation
from triptych_client.errors import DeadlineExceeded, TriptychClientError, Unavailable
from triptych_client.grpc_transport import AsyncGrpcTransport

logger = logging.getLogger("triptych.gateway")

SILENT_S = 5.0
"""How long nothing may come before one looks after it, in seconds, and between two looks."""
PATIENCE = 3
"""Looks in a row that may go unanswered: a stage may be busy, and one that is dead says so."""


class Waiting:
    """One conversation whose next piece is waited for."""

    def __init__(self, conversation: Conversation, ensemble: str) -> None:
        self.conversation = conversation
        self.ensemble = ensemble
        self.since = time.monotonic()
        self.fault: Unavailable | None = None
        """Why nothing more will come; then the conversation has been closed."""

    def moved(self) -> None:
        """A piece has come."""
        self.since = time.monotonic()


class Watch:
    """Looks after conversations; belongs to the running event loop.

    Args:
        transport: The way to Triton.
    """

    def __init__(self, transport: AsyncGrpcTransport) -> None:
        self._transport = transport
        self._waiting: set[Waiting] = set()
        self._unanswered: dict[str, int] = {}
        """Looks in a row, by ensemble."""
        self._task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def over(self, conversation: Conversation, ensemble: str) -> Iterator[Waiting]:
        """Look after ``conversation`` while the context is open."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        waiting = Waiting(conversation, ensemble)
        self._waiting.add(waiting)
        try:
            yield waiting
        finally:
            self._waiting.discard(waiting)

    async def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(SILENT_S)
            before = time.monotonic() - SILENT_S
            silent = [waiting for waiting in self._waiting if waiting.since < before]
            for ensemble in {waiting.ensemble for waiting in silent}:
                if (fault := await self._look(ensemble)) is not None:
                    logger.warning("%s: %s", ensemble, fault.what)
                    await self._end([each for each in silent if each.ensemble == ensemble], fault)

    async def _look(self, ensemble: str) -> Unavailable | None:
        """Why ``ensemble`` writes no answers; None: it does, as far as can be seen."""
        try:
            decoder = (await self._transport.outputs(ensemble))[contract.CHUNK]
            await self._transport.abort(decoder, f"watch.{uuid.uuid4().hex}")
        except DeadlineExceeded:
            self._unanswered[ensemble] = self._unanswered.get(ensemble, 0) + 1
            if self._unanswered[ensemble] < PATIENCE:
                return None
            return Unavailable("the stage that writes the answer does not react")
        except (TriptychClientError, KeyError) as error:
            logger.info("%s: %s", ensemble, error)
            return Unavailable("the stage that writes the answer is gone")
        self._unanswered.pop(ensemble, None)
        return None

    async def _end(self, silent: list[Waiting], fault: Unavailable) -> None:
        for waiting in silent:
            if waiting in self._waiting:
                waiting.fault = fault
        await asyncio.gather(
            *(waiting.conversation.close() for waiting in silent if waiting.fault is fault)
        )
