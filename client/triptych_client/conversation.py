"""One chat from its first byte to its end, whatever end that is. Needs no network of its own."""

from __future__ import annotations

import logging
import weakref

from triptych_client.answers import Answer, Chunk, read_chunk, whole
from triptych_client.errors import TriptychClientError, Unavailable
from triptych_client.requests import CHUNK, Call
from triptych_client.transport import Exchange, Transport

logger = logging.getLogger("triptych_client")


class Server:
    """A transport, and what has been learned of the server behind it."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._decoders: dict[str, str | None] = {}
        self._live: weakref.WeakSet[Conversation] = weakref.WeakSet()

    def begin(self, conversation: Conversation) -> Exchange:
        """Send a conversation's request."""
        self._live.add(conversation)
        return self.transport.open(conversation.call)

    async def end_all(self) -> None:
        """End the conversations that are not over."""
        for conversation in list(self._live):
            await conversation.close()

    async def close(self) -> None:
        """End what is not over, then let go of the connections."""
        await self.end_all()
        await self.transport.close()

    async def abort(self, call: Call) -> None:
        """End the generation of ``call``, which nobody waits for any more. Raises nothing.

        Triton tells a running step of an ensemble nothing of its caller's end, so the step that
        generates has to be told directly.
        """
        try:
            if call.model not in self._decoders:
                makers = await self.transport.outputs(call.model)
                self._decoders[call.model] = makers.get(CHUNK)
            if decoder := self._decoders[call.model]:
                await self.transport.abort(decoder, call.id)
        except (TriptychClientError, RuntimeError, ValueError) as error:
            # The client may be closed by now; and its user can do nothing about it.
            logger.warning("the answer to %s may go on unread: %s", call.id, error)


class Conversation:
    """One chat.

    Whatever ends it before its answer is whole (`close`, an exception where it is read, a
    timeout) ends it on the server too.
    """

    def __init__(self, server: Server, call: Call) -> None:
        self.call = call
        self._server = server
        self._exchange: Exchange | None = None
        self._chunks: list[Chunk] = []
        self._error: TriptychClientError | None = None
        self._closed = False

    @property
    def answer(self) -> Answer:
        """What has arrived so far."""
        return whole(self._chunks)

    @property
    def cancelled(self) -> bool:
        """Whether it was closed before its answer was whole."""
        return self._closed and self._error is None and not self._is_whole

    @property
    def _is_whole(self) -> bool:
        return any(chunk.finish_reason for chunk in reversed(self._chunks))

    def begin(self) -> Exchange:
        """Send the request, if that has not been done."""
        if self._exchange is None:
            self._exchange = self._server.begin(self)
        return self._exchange

    async def next(self) -> Chunk | None:
        """The next piece; None: the answer is whole, or was cancelled.

        Raises:
            TriptychClientError: What went wrong, on the server or on the way to it.
        """
        if self._error is not None:
            raise self._error
        if self._closed:
            return None
        try:
            data = await self.begin().receive()
            if data is not None:
                self._chunks.append(read_chunk(data))
                return self._chunks[-1]
            if not self._is_whole and not self._closed:
                raise Unavailable("the server ended the stream before the answer was whole")
        except TriptychClientError as error:
            if self._closed:  # from elsewhere, while this waited
                return None
            self._error = error
            await self.close()
            raise
        except BaseException:
            await self.close()
            raise
        await self.close()
        return None

    async def rest(self) -> Answer:
        """Read to the end.

        Raises:
            TriptychClientError: As of `next`.
        """
        while await self.next() is not None:
            pass
        return self.answer

    async def close(self) -> None:
        """End it, on the server too unless it has ended there. More than once does nothing."""
        if not self._closed:
            self._closed = True
            if self._exchange is not None:
                await self._server.transport.shield(self._end(self._exchange))

    async def _end(self, exchange: Exchange) -> None:
        await exchange.close()
        if not exchange.ended:
            await self._server.abort(self.call)
