"""Servers that speak Triton's gRPC and do as the model ``encoder`` does, or as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from triptych import contract
from triptych.contract import Item, Items, NixlAgent, Ticket, TicketItem
from triptych.remote.call import Call

WIDTH = 16
"""Of the embeddings, bytes."""


class FakeEncoder(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Its embeddings are the pixels' first bytes, over and over."""

    def __init__(self) -> None:
        self.ready = True
        self.silent = False
        """Whether it says nothing at all."""
        self.failure: tuple[grpc.StatusCode, str] | None = None
        """What it answers to every request with items."""
        self.dead = False
        """Whether it answers requests without items likewise."""
        self.extra = 0
        """Embeddings that it makes too many."""
        self.seen: list[str] = []
        """Hashes of the items that came, in order."""
        self.wrong: list[str] = []
        """Requests that the real one would refuse."""
        self.gate = asyncio.Event()
        """While it is clear, items wait."""
        self.gate.set()
        self.address = ""
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0, credentials: Any = None) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        place = f"127.0.0.1:{port}"
        port = (
            self._server.add_secure_port(place, credentials)
            if credentials
            else self._server.add_insecure_port(place)
        )
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def kill(self) -> None:
        if self._server:
            await self._server.stop(0)
            self._server = None

    async def restart(self) -> None:
        await self.kill()
        await self.start(int(self.address.rpartition(":")[2]))

    async def ModelReady(self, request: Any, context: Any) -> Any:
        assert request.name == "encoder"
        if self.silent:
            await asyncio.Event().wait()
        return service_pb2.ModelReadyResponse(ready=self.ready)

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        media, listing = request.raw_input_contents
        items = contract.decode(listing[4:], Items).items
        if any(item.offset or item.nbytes != len(media) for item in items):
            self.wrong.append(f"{items} with {len(media)} bytes")
        self.seen += [item.hash for item in items]
        if self.failure and (items or self.dead):
            await context.abort(*self.failure)
        if self.silent:
            await asyncio.Event().wait()
        await self.gate.wait()
        return self._answer(request, items, media)

    def _answer(self, request: Any, items: list[Item], media: bytes) -> Any:
        made = {contract.TICKET: _element(contract.encode(self._ticket(request, items)))}
        if contract.EMBEDDINGS in {output.name for output in request.outputs}:
            made[contract.EMBEDDINGS] = b"".join(embeddings(item, media) for item in items)
        response = service_pb2.ModelInferResponse(model_name="encoder")
        for name, data in made.items():
            datatype, shape = (
                ("BYTES", [1, 1]) if name == contract.TICKET else ("UINT8", [1, len(data)])
            )
            response.outputs.add(name=name, datatype=datatype, shape=shape)
            response.raw_output_contents.append(data)
        return response

    def _ticket(self, request: Any, items: list[Item]) -> Ticket:
        shape = [(item.tokens + self.extra, WIDTH) for item in items]
        made = [
            TicketItem(item.modality, item.hash, "uint8", extent, 0)
            for item, extent in zip(items, shape, strict=True)
        ]
        return Ticket(made, {self.address: NixlAgent(b"how to reach it", b"proof")})


@asynccontextmanager
async def encoders(count: int) -> AsyncIterator[list[FakeEncoder]]:
    """So many, on free ports."""
    made = [FakeEncoder() for _ in range(count)]
    try:
        for one in made:
            await one.start()
        yield made
        assert [one.wrong for one in made] == [[]] * count
    finally:
        for one in made:
            await one.kill()


def call(name: str, tokens: int = 4, *, inline: bool = True) -> Call:
    """An item whose content is its name."""
    pixels = (name.encode() * 84)[:84]
    item = Item("image", name, "uint8", (4, 7, 3), 64, tokens)
    return Call(item, memoryview(pixels), inline)


def embeddings(item: Item, media: bytes) -> bytes:
    """What is made of the item."""
    whole = np.resize(np.frombuffer(media, np.uint8), item.tokens * WIDTH)
    return bytes(whole.tobytes())


def _element(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data
