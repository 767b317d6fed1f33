"""The engines that run here, also one that fetches embeddings, asked as one that is given them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

from handover import MIB, SECRET, Owner, owner
from sglang_engine import sglang
from triptych.contract import Prompt
from triptych.engines.base import Delta, Engine, Media
from triptych.engines.claim import Claim
from triptych.engines.vllm import VllmEngine
from triptych.families import Family
from triptych.settings import DecodeSettings

INGESTS = ["inline", "connector"]
ENGINES = [*INGESTS, "sglang"]
"""vLLM by the ways in which it is given embeddings, and SGLang."""


class ByTicket:
    """Hands media to an encoder's end first, and the engine a claim on them."""

    def __init__(self, engine: Engine, far: Owner) -> None:
        self.engine = engine
        self.far = far

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def generate(self, prompt: Prompt, media: Media) -> AsyncGenerator[Delta, None]:
        """As `Engine.generate`, with what a stage does around it."""
        if not media:
            claim: Media = []
        elif isinstance(media, Claim):
            claim = media
        else:
            claim = Claim(self.far.hand_over(media))
        try:
            async with aclosing(self.engine.generate(prompt, claim)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            if isinstance(claim, Claim):
                await self.engine.give_back(claim)


@asynccontextmanager
async def vllm(family: Family, ingest: str, **settings: Any) -> AsyncIterator[Any]:
    """A started vLLM, which is given its embeddings in one way or the other."""
    model = str(family.checkpoint.path)
    engine = VllmEngine(
        DecodeSettings(model=model, embedding_ingest=ingest, handover_key=SECRET, **settings),
        family,
    )
    try:
        if ingest == "inline":
            await engine.start()
            yield engine
            return
        with owner(256 * MIB) as far:
            await engine.start()
            yield ByTicket(engine, far)
            far.leases(0)
    finally:
        await engine.stop()


def started(family: Family, name: str) -> AbstractAsyncContextManager[Any]:
    """One of `ENGINES`."""
    return sglang(family) if name == "sglang" else vllm(family, name)
