"""A chat as KServe's protobuf messages, and Triton's answers read back. Needs no network.

Source: https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from triptych_client import errors
from triptych_client.requests import ABORT, CHUNK, REQUEST, REQUEST_TENSORS, Call
from triptych_client.transport import Address, Input

OPTIONS = {
    # A request carries whole pictures and clips; the server has limits of its own.
    "grpc.max_send_message_length": -1,
    "grpc.max_receive_message_length": -1,
    # Whoever waits for a server to start should not wait for gRPC's patience.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
}

_STATUS: dict[grpc.StatusCode, type[errors.TriptychClientError]] = {
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.InvalidRequest,
}


def channel_options(address: Address) -> list[tuple[str, int]]:
    """How to open a channel to ``address``."""
    options = OPTIONS | ({"grpc.enable_http_proxy": 0} if address.is_local else {})
    return list(options.items())


def chat_request(call: Call) -> Any:
    """The ``ModelInferRequest`` of a chat."""
    inputs = [Input(REQUEST, "BYTES", (1,), call.body)]
    if call.tensors:
        inputs.append(Input(REQUEST_TENSORS, "UINT8", (len(call.tensors),), call.tensors))
    request = infer_request(call.model, inputs)
    request.id = call.id
    for name, value in call.parameters.items():
        if isinstance(value, int):
            request.parameters[name].int64_param = value
        else:
            request.parameters[name].string_param = value
    return request


def abort_request(model: str, request_id: str) -> Any:
    """The ``ModelInferRequest`` that ends a generation."""
    request = service_pb2.ModelInferRequest(model_name=model)
    request.parameters[ABORT].string_param = request_id
    return request


def infer_request(model: str, inputs: Sequence[Input]) -> Any:
    """The ``ModelInferRequest`` of any model."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for tensor in inputs:
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        # One element of BYTES: its length in four bytes, little-endian, then itself.
        length = len(tensor.data).to_bytes(4, "little") if tensor.datatype == "BYTES" else b""
        request.raw_input_contents.append(length + tensor.data)
    return request


def outputs_of(response: Any) -> dict[str, bytes]:
    """The outputs in a ``ModelStreamInferResponse``; none: it only marks the end.

    Raises:
        TriptychClientError: It carries the server's error.
    """
    if response.error_message:
        raise errors.from_text(response.error_message)
    found = response.infer_response
    return {
        output.name: bytes(raw[4:] if output.datatype == "BYTES" else raw)
        for output, raw in zip(found.outputs, found.raw_output_contents, strict=False)
    }


def chunk_of(response: Any) -> bytes | None:
    """The CHUNK in a ``ModelStreamInferResponse``; None: it only marks the end.

    Raises:
        TriptychClientError: It carries the server's error, or no such tensor.
    """
    outputs = outputs_of(response)
    if outputs and CHUNK not in outputs:
        raise errors.InvalidRequest(
            f"the model answers with {', '.join(outputs)}, which is no chat"
        )
    return outputs.get(CHUNK)


def error_of(error: grpc.RpcError, address: Address, timeout: float | None, *, begun: bool) -> Any:
    """The client's error for gRPC's.

    Args:
        error: What the call raised.
        address: Where it went.
        timeout: What it was given, in seconds.
        begun: Whether the server had begun to answer.
    """
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded(f"the answer was not whole within {timeout:g} s")
    if code is grpc.StatusCode.UNAVAILABLE:
        if begun:
            return errors.ConnectionFailed(f"the connection to {address} broke: {details}")
        reason = details.rpartition("last error: ")[2].rpartition(f"{_port(address)}: ")[2]
        if reason == "Socket closed":
            reason += f"; if that is the HTTP port, give http://{address.host}"
        return errors.ConnectionFailed(f"{address.hint} ({reason})")
    found = errors.from_text(details)
    if isinstance(found, errors.InternalError) and code in _STATUS:
        return _STATUS[code](details)
    return found


def _port(address: Address) -> str:
    return address.host.rpartition(":")[2]
