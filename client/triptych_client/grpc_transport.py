"""gRPC, blocking and asynchronous: the same calls, with and without ``await``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
    PAUSE_S,
    Address,
    Exchange,
    Input,
    ModelInfo,
    Transport,
)


class GrpcExchange(Exchange):
    """A chat on a stream of its own, which ends when the answer does."""

    def __init__(self, stream: Any, call: Call, address: Address, background: Background) -> None:
        self.ended = self.settled = False
        self._stream = stream
        self._call = call
        self._address = address
        self._background = background
        self._begun = False
        self._finished = False
        self._interrupted = False

    async def _read(self) -> Any:
        try:
            return next(self._stream, None)
        except grpc.RpcError:
            raise
        except BaseException:  # mostly Ctrl-C; gRPC cannot take a read up again
            self.ended = self._interrupted = True
            raise

    async def receive(self) -> bytes | None:
        """As `Exchange` says."""
        while (response := await self._next()) is not None:
            if (chunk := grpc_wire.chunk_of(response)) is not None:
                return chunk
        return None

    async def outputs(self) -> dict[str, bytes]:
        """All outputs, where it is no chat; read to the end, after an error too.

        Raises:
            TriptychClientError: As of `receive`.
        """
        found: dict[str, bytes] = {}
        fault: TriptychClientError | None = None
        try:
            while (response := await self._next()) is not None:
                try:
                    found |= grpc_wire.outputs_of(response)
                except TriptychClientError as error:
                    fault = error
        finally:
            await self.close()
        if fault is not None:
            raise fault
        return found

    async def _next(self) -> Any:
        """The next response; None: the stream is over."""
        if self.ended:
            return None
        try:
            if (response := await self._read()) is not None:
                self._begun = True
                self.settled = self.settled or bool(response.error_message)
                return response
        except grpc.RpcError as error:
            self.ended = self._finished = True
            if error.code() is grpc.StatusCode.UNAVAILABLE and not self._begun:
                self.settled = True
            raise grpc_wire.error_of(
                error, self._address, self._call.timeout, begun=self._begun
            ) from None
        self.ended = self.settled = self._finished = True
        return None

    async def close(self) -> None:
        """As `Exchange` says."""
        if self._interrupted and not self._finished:
            await self._background.sleep(PAUSE_S)
        if not self._finished:
            self._stream.cancel()


class AsyncGrpcExchange(GrpcExchange):
    """The same on an event loop."""

    _pending: asyncio.Future[Any] | None = None

    async def _read(self) -> Any:
        # A read that is cancelled cancels the whole call, so it goes on though its task does not.
        if self._pending is None:
            self._pending = asyncio.ensure_future(self._stream.read())
        try:
            response = await asyncio.shield(self._pending)
        except asyncio.CancelledError:
            if not self._pending.cancelled():
                raise
            self._pending = None
            return None  # the stream was cancelled, not the task that reads it
        except grpc.RpcError:
            self._pending = None
            raise
        self._pending = None
        return None if response is grpc.aio.EOF else response


class GrpcTransport(Transport):
    """A channel, and the calls of Triton's ``GRPCInferenceService``."""

    _api: Any = grpc
    _exchange: type[GrpcExchange] = GrpcExchange
    _background_type: type[Background] = ThreadBackground

    def __init__(self, address: Address) -> None:
        self.address = address
        self.background = self._background_type()
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
        # The deadline is kept by the conversation, which ends it more gently; this is the last
        # resort.
        limit = None if call.timeout is None else call.timeout + CONTROL_TIMEOUT_S
        stream = self._stream(grpc_wire.chat_request(call), timeout=limit)
        return self._exchange(stream, call, self.address, self.background)

    async def ready(self, model: str) -> bool:
        """As `Transport` says."""
        try:
            server = await self._unary("ServerReady", service_pb2.ServerReadyRequest())
            request = service_pb2.ModelReadyRequest(name=model)
            return bool(server.ready and (await self._unary("ModelReady", request)).ready)
        except TriptychClientError:
            return False

    async def models(self) -> list[ModelInfo]:
        """As `Transport` says; Triton's index of the repository is closed to most callers."""
        found = await self._unary("ModelStatistics", service_pb2.ModelStatisticsRequest())
        return [ModelInfo(model.name, model.version) for model in found.model_stats]

    async def outputs(self, ensemble: str) -> dict[str, str]:
        """As `Transport` says."""
        request = service_pb2.ModelConfigRequest(name=ensemble)
        config = (await self._unary("ModelConfig", request)).config
        return {
            tensor: step.model_name
            for step in config.ensemble_scheduling.step
            for tensor in step.output_map.values()
        }

    async def infer(
        self, model: str, inputs: Sequence[Input], timeout_s: float | None
    ) -> dict[str, bytes]:
        """As `Transport` says; as a stream, which every kind of model answers on."""
        call = Call(model, "", b"", timeout_s)
        stream = self._stream(grpc_wire.infer_request(model, inputs), timeout=timeout_s)
        return await self._exchange(stream, call, self.address, self.background).outputs()

    async def abort(self, model: str, request_id: str) -> None:
        """As `Transport` says."""
        call = Call(model, request_id, b"", CONTROL_TIMEOUT_S)
        request = grpc_wire.abort_request(model, request_id)
        stream = self._stream(request, timeout=CONTROL_TIMEOUT_S)
        answer = self._exchange(stream, call, self.address, self.background)
        while not answer.ended:  # dropped halfway it would be a cancel
            await answer.receive()

    async def close(self) -> None:
        """As `Transport` says."""
        await self.background.drain()
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
        await self.background.drain()
        await self._channel.close()
