"""gRPC, blocking and asynchronous: the same calls, with and without ``await``."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from triptych_client import grpc_wire
from triptych_client.background import Background, TaskBackground, ThreadBackground
from triptych_client.errors import TriptychClientError
from triptych_client.requests import Call
from triptych_client.transport import (
    CONTROL_TIMEOUT_S,
    Address,
    Exchange,
    ModelInfo,
    Transport,
)


class GrpcExchange(Exchange):
    """A chat on a stream of its own, which ends when the answer does."""

    def __init__(self, stream: Any, call: Call, address: Address) -> None:
        self.ended = False
        self._stream = stream
        self._call = call
        self._address = address
        self._begun = False
        self._closed = False

    async def _read(self) -> Any:
        return next(self._stream, None)

    async def receive(self) -> bytes | None:
        """As `Exchange` says."""
        try:
            while (response := await self._read()) is not None:
                self._begun = True
                if response.error_message:
                    self.ended = True
                if (chunk := grpc_wire.chunk_of(response)) is not None:
                    return chunk
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and not self._begun:
                self.ended = True  # it has never arrived
            raise grpc_wire.error_of(
                error, self._address, self._call.timeout, begun=self._begun
            ) from None
        self.ended = not self._closed
        return None

    async def close(self) -> None:
        """As `Exchange` says."""
        self._closed = True
        self._stream.cancel()


class AsyncGrpcExchange(GrpcExchange):
    """The same on an event loop."""

    async def _read(self) -> Any:
        try:
            response = await self._stream.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                return None  # the stream was cancelled, not the task that reads it
            raise
        return None if response is grpc.aio.EOF else response


class GrpcTransport(Transport):
    """A channel, and the calls of Triton's ``GRPCInferenceService``."""

    _api: Any = grpc
    _exchange: type[GrpcExchange] = GrpcExchange
    _background_type: type[Background] = ThreadBackground

    def __init__(self, address: Address) -> None:
        self.address = address
        self._background = self._background_type()
        self._channel = self._connect()
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        # Triton takes a stream of requests. Ours hold one, which is the same on the wire, and
        # spares a thread for each call; without threads calls can be made until the very end of
        # the interpreter.
        self._stream = self._channel.unary_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )

    def _connect(self) -> Any:
        options = grpc_wire.channel_options(self.address)
        if self.address.scheme == "grpcs":
            credentials = grpc.ssl_channel_credentials()
            return self._api.secure_channel(self.address.host, credentials, options)
        return self._api.insecure_channel(self.address.host, options)

    async def _unary(self, name: str, request: Any) -> Any:
        try:
            return await self._call(getattr(self._stub, name), request)
        except grpc.RpcError as error:
            raise grpc_wire.error_of(error, self.address, CONTROL_TIMEOUT_S, begun=False) from None

    async def _call(self, method: Any, request: Any) -> Any:
        return method(request, timeout=CONTROL_TIMEOUT_S)

    def open(self, call: Call) -> GrpcExchange:
        """As `Transport` says."""
        stream = self._stream(grpc_wire.chat_request(call), timeout=call.timeout)
        return self._exchange(stream, call, self.address)

    async def ready(self, model: str) -> bool:
        """As `Transport` says."""
        try:
            server = await self._unary("ServerReady", service_pb2.ServerReadyRequest())
            request = service_pb2.ModelReadyRequest(name=model)
            return bool(server.ready and (await self._unary("ModelReady", request)).ready)
        except TriptychClientError:
            return False

    async def models(self) -> list[ModelInfo]:
        """As `Transport` says."""
        index = await self._unary("RepositoryIndex", service_pb2.RepositoryIndexRequest())
        return [ModelInfo(m.name, m.version, m.state, m.reason) for m in index.models]

    async def outputs(self, ensemble: str) -> dict[str, str]:
        """As `Transport` says."""
        request = service_pb2.ModelConfigRequest(name=ensemble)
        config = (await self._unary("ModelConfig", request)).config
        return {
            tensor: step.model_name
            for step in config.ensemble_scheduling.step
            for tensor in step.output_map.values()
        }

    async def abort(self, model: str, request_id: str) -> None:
        """As `Transport` says."""
        call = Call(model, request_id, b"", CONTROL_TIMEOUT_S)
        request = grpc_wire.abort_request(model, request_id)
        stream = self._stream(request, timeout=CONTROL_TIMEOUT_S)
        await self._exchange(stream, call, self.address).receive()

    async def shield(self, work: Coroutine[Any, Any, None]) -> None:
        """As `Transport` says."""
        await self._background.run(work)

    async def close(self) -> None:
        """As `Transport` says."""
        await self._background.drain()
        self._channel.close()


class AsyncGrpcTransport(GrpcTransport):
    """The same on an event loop."""

    _api = grpc.aio
    _exchange = AsyncGrpcExchange
    _background_type = TaskBackground

    async def _call(self, method: Any, request: Any) -> Any:
        return await method(request, timeout=CONTROL_TIMEOUT_S)

    async def close(self) -> None:
        """As `Transport` says."""
        await self._background.drain()
        await self._channel.close()
