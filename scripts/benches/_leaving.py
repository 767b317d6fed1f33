"""The ways in which callers leave a server, and what they ask before they do."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
from PIL import Image

from benches._loads import photograph
from triptych import contract
from triptych_client import grpc_wire
from triptych_client.conversation import Conversation, Server
from triptych_client.errors import TriptychClientError
from triptych_client.grpc_transport import AsyncGrpcTransport
from triptych_client.requests import Call
from triptych_client.transport import Input

Stage = Literal["queued", "fetching", "decoding", "encoding", "prefill", "generating"]
STAGES: tuple[Stage, ...] = ("queued", "fetching", "decoding", "encoding", "prefill", "generating")
OF_DECODE: tuple[Stage, ...] = ("queued", "prefill", "generating")
OF_PREPROCESS: tuple[Stage, ...] = ("fetching", "decoding", "encoding")
ENSEMBLE, DECODE, PREPROCESS = "chat_echo", "decode_echo", "preprocess"
LONG_S = 60.0


async def _now() -> None:
    """Nothing to wait for."""


@dataclass(frozen=True)
class Asked:
    """A request under way."""

    leave: Callable[[], Coroutine[Any, Any, None]]
    """Leaves, and waits until the caller's side is over too."""
    due: Callable[[], Coroutine[Any, Any, None]] = _now
    """Waits until it is time to leave, where that is fixed."""


class Requests:
    """What is asked: in each stage it takes long. No two are the same.

    Args:
        silent: URL of a server that never answers.
    """

    def __init__(self, silent: str) -> None:
        self._silent = silent
        self._numbers = itertools.count(1)
        self._flat = _encoded(Image.new("RGB", (6000, 6000), (40, 90, 160)), "PNG")
        self._noise = photograph(2560)

    def of(self, stage: Stage) -> bytes:
        """A request that lasts in ``stage``."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": "word " * 200}]
        if stage == "fetching":
            parts.append(_picture(f"{self._silent}/{next(self._numbers)}"))
        elif stage == "decoding":
            # What follows a picture's end makes another file of it, with the same pixels.
            parts.append(_picture(_data("png", self._flat + next(self._numbers).to_bytes(4))))
        elif stage == "encoding":
            rolled = np.roll(self._noise, 5 * next(self._numbers), axis=0)
            parts.append(_picture(_data("jpeg", _encoded(Image.fromarray(rolled), "JPEG"))))
        body = {"messages": [{"role": "user", "content": parts}], "stream": True}
        return json.dumps({"model": ENSEMBLE, "max_tokens": 1000, **body}).encode()


class Way(ABC):
    """A way to ask, and to leave.

    Args:
        name: In the table.
        stages: Those that it can be left in.
    """

    stages: tuple[Stage, ...] = STAGES

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    async def ask(self, body: bytes, stage: Stage) -> Asked:
        """Ask, and return how to leave."""


class Library(Way):
    """The client library: a stream that is cancelled."""

    def __init__(self, name: str, server: Server) -> None:
        super().__init__(name)
        self.server = server

    async def ask(self, body: bytes, stage: Stage) -> Asked:
        """As `Way` says."""
        call = Call(ENSEMBLE, uuid.uuid4().hex, body, LONG_S)
        conversation = Conversation(self.server, call)
        reading = asyncio.create_task(_quietly(conversation.rest()))

        async def leave() -> None:
            await conversation.close()
            await reading

        return Asked(leave)


class Gateway(Way):
    """The OpenAI gateway: a connection that is cut."""

    def __init__(self, name: str, address: str) -> None:
        super().__init__(name)
        self._host, _, port = address.removeprefix("http://").partition(":")
        self._port = int(port)

    async def ask(self, body: bytes, stage: Stage) -> Asked:
        """As `Way` says."""
        _, writer = await asyncio.open_connection(self._host, self._port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

        async def leave() -> None:
            writer.transport.abort()

        return Asked(leave)


class Plain(Way):
    """A plain gRPC client of the ensemble, whose stream is read to its end in any case."""

    def __init__(self, name: str, transport: AsyncGrpcTransport) -> None:
        super().__init__(name)
        self._transport = transport

    def _open(self, body: bytes, timeout: float | None) -> tuple[str, asyncio.Task[None]]:
        call = Call(ENSEMBLE, uuid.uuid4().hex, body, timeout)
        exchange = self._transport.open(call)

        async def read() -> None:
            while not exchange.ended:
                await exchange.receive()

        return call.id, asyncio.create_task(_quietly(read()))


class Abort(Plain):
    """The abort channel."""

    async def ask(self, body: bytes, stage: Stage) -> Asked:
        """As `Way` says."""
        request_id, reading = self._open(body, None)

        async def leave() -> None:
            await self._transport.abort(DECODE, request_id)
            await reading

        return Asked(leave)


class Deadline(Plain):
    """Triton's ``timeout`` of the request, which passes while one waits to leave."""

    AFTER_S: ClassVar[dict[Stage, float]] = {
        "queued": 0.4,
        "fetching": 0.4,
        "decoding": 0.15,
        "encoding": 0.3,
        "prefill": 0.2,
        "generating": 1.0,
    }
    """When a request is in its stage, in seconds after it was sent."""

    async def ask(self, body: bytes, stage: Stage) -> Asked:
        """As `Way` says."""
        began = asyncio.get_running_loop().time()
        _, reading = self._open(body, self.AFTER_S[stage])

        async def leave() -> None:
            await reading

        async def due() -> None:
            await asyncio.sleep(began + self.AFTER_S[stage] - asyncio.get_running_loop().time())

        return Asked(leave, due)


class StageCancel(Way):
    """A gRPC stream to the stage itself that is cancelled, which Triton tells the stage."""

    stages = (*OF_DECODE, *OF_PREPROCESS)

    def __init__(self, name: str, transport: AsyncGrpcTransport) -> None:
        super().__init__(name)
        self._transport = transport

    async def ask(self, body: bytes, stage: Stage) -> Asked:
        """As `Way` says."""
        model, inputs = PREPROCESS, [Input(contract.REQUEST, "BYTES", (1,), body)]
        if stage in OF_DECODE:
            prepared = await self._transport.infer(PREPROCESS, inputs, LONG_S)
            ticket = contract.encode(contract.Ticket([]))
            model, inputs = (
                DECODE,
                [
                    Input(contract.PROMPT, "BYTES", (1,), prepared[contract.PROMPT]),
                    Input(contract.TICKET, "BYTES", (1, 1), ticket),
                ],
            )
        stream = self._transport._stream(grpc_wire.infer_request(model, inputs), timeout=None)

        async def read() -> None:
            async for _ in stream:
                pass

        reading = asyncio.create_task(read())

        async def leave() -> None:
            stream.cancel()
            with contextlib.suppress(BaseException):
                await reading

        return Asked(leave)


@asynccontextmanager
async def silence() -> AsyncIterator[str]:
    """A server that takes requests and never answers; its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while await reader.read(1 << 16):
                pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        server.close()


async def _quietly(work: Coroutine[Any, Any, Any]) -> None:
    with contextlib.suppress(TriptychClientError, msgspec.DecodeError):
        await work


def _data(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _encoded(image: Image.Image, form: str) -> bytes:
    with io.BytesIO() as file:
        image.save(file, form)
        return file.getvalue()
