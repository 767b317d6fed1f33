"""Whether a chat would be answered.

Triton calls itself ready though a model's process has died, so only an answer is proof: one that
was given a moment ago, or one of a single token that is asked for now.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing

import msgspec

from triptych.errors import Unavailable
from triptych.gateway.backend import Backend
from triptych.gateway.faults import FAULTS, NotReady, public

logger = logging.getLogger("triptych.gateway")

FRESH_S = 1.0
"""How long an answer proves that there will be another, in seconds."""
REFUSED_S = 1.0
"""How long no answer proves that there will be none, in seconds."""
PROBE_TIMEOUT_S = 10.0
PROBE_ID = "health"
"""How the probes' request ids begin, in Triton's log."""


class Readiness:
    """Asks, but no oftener than needed, however often it is asked.

    Args:
        backend: Triton.
        model: The ensemble that must answer; empty: every one that is loaded.
    """

    def __init__(self, backend: Backend, model: str) -> None:
        self._backend = backend
        self._model = model
        self._lock = asyncio.Lock()
        self._refused = (0.0, NotReady("not asked yet"))
        self._state = "ready"

    async def check(self) -> None:
        """Return if a chat would be answered.

        Raises:
            NotReady: Why it would not.
        """
        async with self._lock:
            when, refusal = self._refused
            if time.monotonic() - when < REFUSED_S:
                raise refusal
            try:
                await self._ask_all()
            except FAULTS as error:
                # To a probe even a wrong value is a state of the server.
                self._refused = (time.monotonic(), NotReady(public(error, PROBE_ID)))
                self._tell(f"not ready: {error.code}: {error.what}")
                raise self._refused[1] from None
            self._tell("ready")

    def _tell(self, state: str) -> None:
        """Log what has changed: probes come every second."""
        if state != self._state:
            self._state = state
            logger.warning("%s", state)

    async def _ask_all(self) -> None:
        ensembles = [self._model] if self._model else await self._backend.ensembles()
        if not ensembles:
            raise Unavailable("no model that chats is loaded")
        await asyncio.gather(*(self._ask(ensemble) for ensemble in ensembles))

    async def _ask(self, ensemble: str) -> None:
        answered = self._backend.answered.get(ensemble)
        if answered is not None and time.monotonic() - answered < FRESH_S:
            return
        body = msgspec.json.encode(
            {
                "model": ensemble,
                "messages": [{"role": "user", "content": "Hello"}],
                "max_tokens": 1,
                "temperature": 0,
            }
        )
        pieces = self._backend.chat(ensemble, body, PROBE_ID, PROBE_TIMEOUT_S)
        async with aclosing(pieces):
            async for _ in pieces:
                pass
