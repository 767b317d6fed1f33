"""Generations whose embeddings the engine fetches itself: what is lost, and what is left over.

The engine says only when it has failed to fetch. Then they are encoded once more, as
`triptych.stages.again` does where this stage fetches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from triptych.contract import Again, Prompt, Ticket
from triptych.engines.base import Delta, Engine
from triptych.engines.claim import Claim
from triptych.errors import TriptychError, Unavailable

logger = logging.getLogger("triptych.stages.decode")


async def generate(
    engine: Engine, encode_again: Callable[[Again], Ticket], prompt: Prompt, claim: Claim
) -> AsyncGenerator[Delta, None]:
    """As `Engine.generate`; a claim that cannot be redeemed is renewed, once.

    Args:
        engine: Fetches what claims are for.
        encode_again: See `triptych.stages.again`; blocks.
        prompt: The prompt.
        claim: Its media.
    """
    began = False
    try:
        async with aclosing(engine.generate(prompt, claim)) as deltas:
            async for delta in deltas:
                began = True
                yield delta
        return
    except Unavailable as error:
        if began or not claim.taken or claim.ticket.again is None:
            raise
        lost = error
    await engine.health()
    await _renew(claim, claim.ticket.again, lost, encode_again)
    async with aclosing(engine.generate(prompt, claim)) as deltas:
        async for delta in deltas:
            yield delta


async def give_back(engine: Engine, claim: Claim) -> None:
    """End the leases of a claim that the engine has not seen, without fail."""
    try:
        await engine.give_back(claim)
    except TriptychError as error:
        logger.warning("embeddings that nobody reads wait for their deadline: %s", error)


async def _renew(
    claim: Claim, again: Again, lost: Unavailable, encode_again: Callable[[Again], Ticket]
) -> None:
    try:
        ticket = await asyncio.get_running_loop().run_in_executor(None, encode_again, again)
    except TriptychError as error:
        logger.warning("%s; encoding again failed: %s", lost, error)
        raise lost from error
    logger.warning("%s; encoded again", lost)
    claim.renew(ticket)
