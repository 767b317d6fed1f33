"""One answer, or several side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from triptych.chat import chunks
from triptych.errors import InternalError
from triptych_client.answers import Chunk

Pieces = AsyncGenerator[Chunk, None]


async def merged(answers: Sequence[Pieces]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The pieces of all, each with the place of its answer, in the order in which they come.

    Closing it closes every answer.

    Raises:
        TriptychClientError: What ended one of them, which ends all.
    """
    if len(answers) == 1:
        async with aclosing(answers[0]) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    # One place each: an answer that nobody reads is not to be written any faster.
    queue: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue(len(answers))

    async def read(index: int, answer: Pieces) -> None:
        end = None
        try:
            async with aclosing(answer):
                async for piece in answer:
                    await queue.put((index, piece))
        except Exception as error:
            end = error
        await queue.put(end)

    tasks = [asyncio.create_task(read(*pair)) for pair in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            entry = await queue.get()
            if isinstance(entry, Exception):
                raise entry
            if entry is None:
                left -= 1
            else:
                yield entry
    finally:
        await _end(tasks)


async def collect(answers: Sequence[Pieces]) -> list[chunks.Chunk]:
    """Every answer, whole: what is not streamed comes in one chunk.

    Raises:
        TriptychClientError: What ended one of them, which ends all.
    """
    tasks = [asyncio.create_task(_whole(answer)) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _whole(answer: Pieces) -> chunks.Chunk:
    async with aclosing(answer):
        pieces = [piece.json async for piece in answer]
    if len(pieces) != 1:
        raise InternalError(f"an answer that is not streamed came in {len(pieces)} chunks")
    return chunks.decode(pieces[0])


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
