"""One request's answer over HTTP, from its first byte to its end, whatever end that is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from triptych.errors import Cancelled, InternalError, TriptychError, Unavailable
from triptych.gateway import answers, choices
from triptych.gateway.asked import Asked
from triptych.gateway.faults import FAULTS, Fault, error_json
from triptych.gateway.observe import Record
from triptych_client.answers import Chunk

logger = logging.getLogger("triptych.gateway")

SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would gather the pieces
}


class Answering(Response):
    """Asks Triton and answers, while it watches for the caller's going away.

    What is wrong before the first piece of the answer is raised, so that it has a status of its
    own; what goes wrong later is an event of the stream, which then ends without ``[DONE]``.

    Args:
        asked: The request.
        form: How its answers are written.
        pieces: Its answers, one each for ``asked.bodies``; they begin when they are read.
        record: What is seen of the request.
        closing: Set when answers that still run must end.
    """

    def __init__(
        self,
        asked: Asked,
        form: answers.Form,
        pieces: list[choices.Pieces],
        record: Record,
        closing: asyncio.Event,
    ) -> None:
        super().__init__()
        self._asked = asked
        self._form = form
        self._pieces = pieces
        self._record = record
        self._closing = closing
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it.

        Raises:
            TriptychError: It cannot be answered, and nothing has been sent yet.
            TriptychClientError: Likewise.
        """
        work = asyncio.create_task(self._stream(send) if self._asked.stream else self._whole(send))
        try:
            ended = await _first(work, _gone(receive), self._closing.wait())
            if ended != 0:
                await _stop(work)
                end = Cancelled("the caller went away") if ended == 1 else _stopping()
                await self._break(end, send)
            else:
                await work
        finally:
            await _stop(work)
            self._record.usage = self._form.usage

    async def _whole(self, send: Send) -> None:
        body = self._form.whole(await choices.collect(self._pieces))
        await self._start(send, {"content-type": "application/json"}, len(body))
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        async with aclosing(choices.merged(self._pieces)) as pieces:
            first = self._form.piece(*await anext(pieces))
            self._record.first()
            await self._start(send, SSE_HEADERS)
            await _send_event(send, answers.event(first))
            fault = await self._stream_rest(pieces, send)
        # Last of all, since whoever has read it may go.
        if fault is not None:
            await self._break(fault, send)
            return
        if self._asked.include_usage:
            await _send_event(send, answers.event(self._form.last()))
        await _send_event(send, answers.DONE, more=False)

    async def _stream_rest(
        self, pieces: AsyncGenerator[tuple[int, Chunk], None], send: Send
    ) -> Fault | None:
        """What comes after the first piece; returns what it broke off with."""
        try:
            async for piece in pieces:
                await _send_event(send, answers.event(self._form.piece(*piece)))
        except FAULTS as error:
            return error
        except Exception:
            logger.exception("request %s failed", self._record.request_id)
            return InternalError("see the log")
        return None

    async def _start(self, send: Send, headers: dict[str, str], length: int | None = None) -> None:
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        if length is not None:
            pairs.append((b"content-length", str(length).encode()))
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": pairs})

    async def _break(self, fault: Fault, send: Send) -> None:
        """End early: by a status where nothing has been sent, else by an event."""
        if not self._started:
            raise fault
        self._record.status = fault.http_status
        if self._asked.stream:
            error = error_json(fault, self._record.request_id)
            await _send_event(send, answers.event(error), more=False)


async def _send_event(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def _gone(receive: Receive) -> None:
    """Until the caller has gone; the request itself has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(work: asyncio.Task[None], *others: Coroutine[Any, Any, Any]) -> int:
    """Which ends first: 0 is the work."""
    tasks = [work, *(asyncio.create_task(other) for other in others)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(index for index, task in enumerate(tasks) if task.done())
    finally:
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks[1:], return_exceptions=True)


async def _stop(work: asyncio.Task[None]) -> None:
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


def _stopping() -> TriptychError:
    return Unavailable("the server is stopping")
