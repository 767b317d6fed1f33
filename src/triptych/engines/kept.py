"""An engine that is started anew when it dies or hangs, so that its stage need not be.

    stage ──▶ KeptEngine ──▶ the engine of now
                  └─ keeper: it died, or hangs ─▶ end it, tell who waits ─▶ start the next

Much cheaper than a new process: nothing is imported again, and the other stages keep their caches
and what they are doing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from triptych import processes
from triptych.contract import Prompt
from triptych.engines.base import Delta, Engine, Media
from triptych.engines.claim import Claim
from triptych.errors import TriptychError, Unavailable
from triptych.restarts import Restarts

if TYPE_CHECKING:
    from triptych.families.base import Family
    from triptych.settings import DecodeSettings

logger = logging.getLogger("triptych.engines")

LOOK_S = 0.5
"""Seconds between two looks at the engine."""
STUCK_S = 10.0
"""Seconds without a token of any answer after which an engine hangs, if it does nothing either."""
PAUSES_S = (0.0, 1.0, 4.0)
"""Before each start in a row, seconds; when none is left, it is given up."""


class KeptEngine(Engine):
    """Engines of one kind, one after the other.

    A generation that an engine's end cuts off ends with `Unavailable`, and so does one that comes
    while there is none.

    Args:
        engine_type: Whose engines.
        settings: The stage's.
        family: The model's.
        on_outage: Told why there is no engine now, and "" when there is one again; on the loop.
        on_end: Told when none will be started any more; on the loop.
    """

    name = "kept"

    def __init__(
        self,
        engine_type: type[Engine],
        settings: DecodeSettings,
        family: Family,
        *,
        on_outage: Callable[[str], None] = lambda why: None,
        on_end: Callable[[TriptychError], None] = lambda error: None,
    ) -> None:
        self.ingests = engine_type.ingests
        super().__init__(settings, family)
        self._type = engine_type
        self._on_outage = on_outage
        self._on_end = on_end
        self._engine: Engine = engine_type(settings, family)
        self._outage: Unavailable | None = Unavailable("the engine is not running")
        self._live: set[asyncio.Task[Any]] = set()
        """Of the generations under way, those who read them."""
        self._cut: set[asyncio.Task[Any]] = set()
        """Those of them whose engine has ended."""
        self._moved = 0.0
        """When one of them last moved, `time.monotonic` seconds."""
        self._keeper: asyncio.Task[None] | None = None

    @property
    def context_length(self) -> int:
        """The engine's."""
        return self._engine.context_length

    async def start(self) -> None:
        """Start the first engine; that it does not start is for the caller to deal with."""
        await self._engine.start()
        self._outage = None
        self._keeper = asyncio.create_task(self._keep())

    async def generate(self, prompt: Prompt, media: Media) -> AsyncGenerator[Delta, None]:
        """Generate with the engine of now."""
        await self.health()
        engine = self._engine
        if not self._live:
            self._moved = time.monotonic()
        task = asyncio.current_task()
        assert task is not None
        self._live.add(task)
        deltas = engine.generate(prompt, media)
        del media
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    self._moved = time.monotonic()
                    yield delta
        except asyncio.CancelledError:
            if task not in self._cut:
                raise
            self._cut.discard(task)
            task.uncancel()
            raise Unavailable("the engine died during the generation") from None
        finally:
            self._live.discard(task)

    async def abort(self, prompt_id: str) -> None:
        """End a generation, if the engine of now has it."""
        await self._engine.abort(prompt_id)

    async def give_back(self, claim: Claim) -> None:
        """By the engine of now."""
        await self.health()
        await self._engine.give_back(claim)

    async def health(self) -> None:
        """Whether there is an engine."""
        if self._outage is not None:
            raise self._outage

    async def stop(self) -> None:
        """Start no more engines, and end the last one."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])
        if self._outage is None:
            self._outage = Unavailable("the engine is stopped")
        await self._engine.stop()

    async def _keep(self) -> None:
        """Replace the engine whenever that is needed, until it is of no use any more."""
        restarts = Restarts(PAUSES_S)
        while True:
            restarts.serves()
            fault: TriptychError | None = await self._fault()
            while fault is not None:
                self._lose(fault)
                await self._end()
                pause = restarts.failed()
                if pause is None:
                    self._on_end(fault)
                    return
                await asyncio.sleep(pause)
                fault = await self._begin()

    async def _fault(self) -> TriptychError:
        """Wait until the engine cannot serve; why."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._engine.health()
            except TriptychError as error:
                return error
            if why := self._hangs():
                return Unavailable(why)

    def _hangs(self) -> str:
        pids = self._engine.pids
        if any(processes.is_stopped(pid) for pid in pids):
            return "a process of the engine is stopped"
        waits = self._live and time.monotonic() - self._moved > STUCK_S
        if waits and pids and all(processes.doing(pid) == "idle" for pid in pids):
            return f"the engine has not moved for {STUCK_S:g} s"
        return ""

    def _lose(self, fault: TriptychError) -> None:
        logger.error("no engine: %s", fault.what)
        self._outage = Unavailable(f"{fault.what}; another is being started")
        self._on_outage(fault.what)

    async def _end(self) -> None:
        """End what is left of the engine, and who still waits for it, since it may not do so."""
        for task in self._live:
            self._cut.add(task)
            task.cancel()
        for pid in self._engine.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            await self._engine.stop()
        except Exception:
            logger.exception("the engine that died did not stop cleanly")

    async def _begin(self) -> TriptychError | None:
        """Start the next engine; why it does not start."""
        begun = time.monotonic()
        self._engine = self._type(self.settings, self.family)
        try:
            await self._engine.start()
        except TriptychError as error:
            return error
        except Exception as error:
            logger.exception("the engine did not start")
            return Unavailable(f"the engine did not start: {error}")
        logger.info("there is an engine again after %.1f s", time.monotonic() - begun)
        self._outage = None
        self._on_outage("")
        return None
