"""The client in its two forms, each a thin skin over `Conversation`."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from functools import cached_property
from types import TracebackType
from typing import Literal, Self, Unpack, overload

from triptych_client.answers import Answer, Chunk
from triptych_client.background import drive
from triptych_client.conversation import Conversation, Server
from triptych_client.encoded import Encoded, encode
from triptych_client.messages import Message, Part, user
from triptych_client.requests import (
    DEFAULT_MODEL,
    DEFAULT_TIMEOUT_S,
    Call,
    Sampling,
    build_call,
)
from triptych_client.transport import ModelInfo, Transport, parse_address

_SERVERS: weakref.WeakSet[Server] = weakref.WeakSet()


@atexit.register
def _end_open_answers() -> None:
    """What a program leaves open as it ends.

    A loop that an exception has left is one: its traceback keeps it. Later, as the interpreter
    takes its modules apart, gRPC can no longer start a call and would wait for ever.
    """
    for server in list(_SERVERS):
        drive(server.end_all())


class Client:
    """A way to one server, which threads may share.

    ::

        with Client("localhost:8001") as client:
            for chunk in client.chat([user("How many circles?", image("a.png"))]):
                print(chunk.text, end="", flush=True)

    Args:
        address: ``host:port`` or ``grpc://host:port`` (``grpcs`` for TLS) speaks gRPC;
            ``http://host:port`` (``https``) speaks HTTP through Triton's generate extension.

    Raises:
        ValueError: The address is none of these.
    """

    def __init__(self, address: str = "localhost:8001") -> None:
        self._server = Server(_transport(address))
        _SERVERS.add(self._server)

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: Literal[True] = True,
        model: str = DEFAULT_MODEL,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        **sampling: Unpack[Sampling],
    ) -> ChatStream: ...

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: Literal[False],
        model: str = DEFAULT_MODEL,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        **sampling: Unpack[Sampling],
    ) -> Answer: ...

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: bool = True,
        model: str = DEFAULT_MODEL,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        **sampling: Unpack[Sampling],
    ) -> ChatStream | Answer:
        """Ask, and get the answer piece by piece or, with ``stream=False``, whole.

        Args:
            messages: The conversation; a string is one user message.
            stream: Whether the answer comes in pieces.
            model: The ensemble that answers.
            timeout: Seconds for the whole answer; None: no limit.
            **sampling: ``max_tokens``, ``temperature``, … as OpenAI's API has them.

        Raises:
            InvalidValue: The messages cannot be written as JSON.
            TriptychClientError: With ``stream=False``, what `ChatStream` raises.
        """
        call = build_call(messages, model=model, stream=stream, timeout=timeout, sampling=sampling)
        answer = ChatStream(Conversation(self._server, call))
        return answer if stream else answer.collect()

    def embed(
        self, part: Part, *, model: str = DEFAULT_MODEL, timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> Encoded:
        """What the encoder makes of a medium; the API takes it in the medium's place.

        Args:
            part: Of `image`, `video` or `audio`.
            model: The ensemble whose encoder it is.
            timeout: Seconds for each of the two stages; None: no limit.

        Raises:
            InvalidRequest: The client speaks HTTP, which has no raw tensors.
            TriptychClientError: What is wrong with the medium, or with the server.
        """
        return drive(encode(self._server.transport, _embed_call(part, model, timeout)))

    def ready(self, model: str = DEFAULT_MODEL) -> bool:
        """Whether the server and the model take requests; False also where there is no server."""
        return drive(self._server.transport.ready(model))

    def models(self) -> list[ModelInfo]:
        """All models that the server has loaded.

        Raises:
            ConnectionFailed: There is no server.
        """
        return drive(self._server.transport.models())

    def close(self) -> None:
        """End the answers that are not over, and let go of the connections."""
        drive(self._server.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ChatStream:
    """An answer as it is written; the request leaves when it is entered or first read.

    ::

        for chunk in client.chat("Hello"):          # leaving the loop cancels the rest
            print(chunk.text, end="")

        with client.chat("Hello") as stream:        # leaving the block cancels the rest
            for chunk in stream: ...

        client.chat("Hello").text                   # the whole

    Reading raises the error that ended the answer. `cancel` may be called from another thread;
    the loop then ends and `cancelled` is true.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    @property
    def request_id(self) -> str:
        """Triton's id of the request, which is in the server's log."""
        return self._conversation.call.id

    @property
    def cancelled(self) -> bool:
        """Whether it was ended from here before it was whole."""
        return self._conversation.cancelled

    @property
    def text(self) -> str:
        """The whole text; reads to the end."""
        return self.collect().text

    def collect(self) -> Answer:
        """The whole answer; reads to the end. Of a cancelled one, what had arrived.

        Raises:
            TriptychClientError: What ended the answer.
        """
        return drive(self._conversation.rest())

    def cancel(self) -> None:
        """End it, on the server too. Does nothing once it has ended."""
        drive(self._conversation.close())

    def __iter__(self) -> Iterator[Chunk]:
        try:
            while (chunk := drive(self._conversation.next())) is not None:
                yield chunk
        finally:
            self.cancel()

    def __enter__(self) -> Self:
        self._conversation.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


class AsyncClient:
    """`Client` for asyncio: the same arguments, the same errors.

    ::

        async with AsyncClient("localhost:8001") as client:
            async for chunk in client.chat("Hello"):
                print(chunk.text, end="", flush=True)
            answer = await client.chat("Hello", stream=False)
    """

    def __init__(self, address: str = "localhost:8001") -> None:
        self._address = address
        parse_address(address)

    @cached_property
    def _server(self) -> Server:
        # gRPC's channel belongs to the event loop that runs when it is made.
        return Server(_transport(self._address, asynchronous=True))

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: Literal[True] = True,
        model: str = DEFAULT_MODEL,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        **sampling: Unpack[Sampling],
    ) -> AsyncChatStream: ...

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: Literal[False],
        model: str = DEFAULT_MODEL,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        **sampling: Unpack[Sampling],
    ) -> Awaitable[Answer]: ...

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: bool = True,
        model: str = DEFAULT_MODEL,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        **sampling: Unpack[Sampling],
    ) -> AsyncChatStream | Awaitable[Answer]:
        """As `Client.chat`; the answer in one piece is awaited, the one in pieces iterated."""
        call = build_call(messages, model=model, stream=stream, timeout=timeout, sampling=sampling)
        answer = AsyncChatStream(Conversation(self._server, call))
        return answer if stream else answer.collect()

    def embed(
        self, part: Part, *, model: str = DEFAULT_MODEL, timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> Awaitable[Encoded]:
        """As `Client.embed`."""
        return encode(self._server.transport, _embed_call(part, model, timeout))

    async def ready(self, model: str = DEFAULT_MODEL) -> bool:
        """As `Client.ready`."""
        return await self._server.transport.ready(model)

    async def models(self) -> list[ModelInfo]:
        """As `Client.models`."""
        return await self._server.transport.models()

    async def aclose(self) -> None:
        """As `Client.close`."""
        await self._server.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncChatStream:
    """`ChatStream` for asyncio; cancelling the task that reads it cancels the answer too."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    @property
    def request_id(self) -> str:
        """As `ChatStream.request_id`."""
        return self._conversation.call.id

    @property
    def cancelled(self) -> bool:
        """As `ChatStream.cancelled`."""
        return self._conversation.cancelled

    async def text(self) -> str:
        """The whole text; reads to the end."""
        return (await self.collect()).text

    async def collect(self) -> Answer:
        """As `ChatStream.collect`."""
        return await self._conversation.rest()

    async def cancel(self) -> None:
        """As `ChatStream.cancel`, from another task too."""
        await self._conversation.close()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        try:
            while (chunk := await self._conversation.next()) is not None:
                yield chunk
        finally:
            await self.cancel()

    async def __aenter__(self) -> Self:
        self._conversation.begin()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.cancel()


def _embed_call(part: Part, model: str, timeout: float | None) -> Call:
    sampling: Sampling = {"max_tokens": 1}
    return build_call([user(part)], model=model, stream=False, timeout=timeout, sampling=sampling)


def _transport(address: str, *, asynchronous: bool = False) -> Transport:
    """The transport for an address; only what it needs is imported."""
    where = parse_address(address)
    if where.scheme.startswith("http"):
        from triptych_client.http_transport import AsyncHttpTransport, HttpTransport

        return AsyncHttpTransport(where) if asynchronous else HttpTransport(where)
    from triptych_client.grpc_transport import AsyncGrpcTransport, GrpcTransport

    return AsyncGrpcTransport(where) if asynchronous else GrpcTransport(where)
