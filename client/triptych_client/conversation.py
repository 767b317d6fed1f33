"""One chat from its first byte to its end, whatever end that is. Needs no network of its own."""

from __future__ import annotations

import logging
import threading
import weakref

from triptych_client.answers import Answer, Chunk, read_chunk, whole
from triptych_client.background import Handle
from triptych_client.errors import DeadlineExceeded, TriptychClientError, Unavailable
from triptych_client.requests import CHUNK, Call
from triptych_client.transport import PAUSE_S, Exchange, Transport

logger = logging.getLogger("triptych_client")

GRACE_S = 1.0
"""Seconds from an abort to the end of the stream, after which the connection is cut."""


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

    Whatever ends it before its answer is whole (`close`, an exception where it is read, the
    timeout) ends it on the server: an abort, then the stream is read to the end that this brings.
    Only where no end comes is the connection cut, because a gRPC stream that is cancelled just as
    its last response goes out can crash or wedge Triton (its issues 7368 and 8034).
    """

    def __init__(self, server: Server, call: Call) -> None:
        self.call = call
        self._server = server
        self._background = server.transport.background
        self._exchange: Exchange | None = None
        self._chunks: list[Chunk] = []
        self._error: TriptychClientError | None = None
        self._lock = threading.Lock()
        """Guards the two that follow: `close` may come from another thread."""
        self._reading = False
        self._closed = False
        self._expired = False
        self._deadline: Handle | None = None
        self._patience: Handle | None = None

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
            if self.call.timeout is not None:
                self._deadline = self._background.after(self.call.timeout, self._expire)
        return self._exchange

    async def next(self) -> Chunk | None:
        """The next piece; None: the answer is whole, or was cancelled.

        Raises:
            TriptychClientError: What went wrong, on the server or on the way to it.
        """
        if self._error is not None:
            raise self._error
        with self._lock:
            self._reading = not self._closed
        if not self._reading:
            self._leave()
            return None
        exchange = self.begin()
        try:
            chunk = await self._receive(exchange)
        except TriptychClientError as error:
            if not self._closed:
                self._error = error
                await self.close()
                raise
            chunk = None
        except BaseException:
            await self.close()
            raise
        if self._closed:  # from elsewhere, while this waited
            await self._drain(exchange)
            self._leave()
            return None
        if chunk is None:
            await self.close()
        return chunk

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
        with self._lock:
            if self._closed:
                return
            self._closed = True
            is_read_elsewhere = self._reading
        if self._deadline is not None:
            self._deadline.cancel()
        if self._exchange is not None:
            await self._background.run(self._end(self._exchange, is_read_elsewhere))

    async def _receive(self, exchange: Exchange) -> Chunk | None:
        try:
            data = await exchange.receive()
        finally:
            self._reading = False
        if data is not None:
            self._chunks.append(read_chunk(data))
            return self._chunks[-1]
        if not self._is_whole and not self._closed:
            raise Unavailable("the server ended the stream before the answer was whole")
        return None

    async def _expire(self) -> None:
        if not self._closed:
            self._expired = True
            await self.close()

    def _leave(self) -> None:
        """Tell a reader why the conversation was closed, if it was not the reader's doing."""
        if self._expired and not self._is_whole:
            self._error = DeadlineExceeded(
                f"the answer was not whole within {self.call.timeout:g} s"
            )
            raise self._error

    async def _end(self, exchange: Exchange, is_read_elsewhere: bool) -> None:
        if not self._is_whole and not exchange.settled:
            await self._server.abort(self.call)
        if not exchange.ended:
            try:
                self._patience = self._background.after(GRACE_S, exchange.close)
            except RuntimeError:  # no thread can be started as the interpreter ends
                await self._background.sleep(PAUSE_S)
                await exchange.close()
        if not is_read_elsewhere:
            await self._drain(exchange)

    async def _drain(self, exchange: Exchange) -> None:
        """Read to the end that is on its way."""
        try:
            while not exchange.ended:
                try:
                    await exchange.receive()
                except TriptychClientError as error:  # of the abort, mostly
                    logger.debug("%s ended with: %s", self.call.id, error)
        finally:
            if self._patience is not None:
                self._patience.cancel()
            await exchange.close()
