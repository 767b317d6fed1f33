"""A chat as Triton's generate extension carries it over HTTP. Needs no network.

Source: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_generate.md.
"""

from __future__ import annotations

import msgspec

from triptych_client import errors
from triptych_client.requests import ABORT, REQUEST, Call


class Event(msgspec.Struct, frozen=True):
    """One server-sent event: a response of the model, or the error that ended it."""

    CHUNK: str | None = None
    error: str | None = None


_EVENT = msgspec.json.Decoder(Event)


def chat_body(call: Call) -> bytes:
    """The JSON to post to the ensemble's ``generate_stream``."""
    return msgspec.json.encode({"id": call.id, REQUEST: call.body.decode(), **call.parameters})


def abort_body(request_id: str) -> bytes:
    """The JSON to post to the decode stage: what is no input becomes a request parameter."""
    return msgspec.json.encode({ABORT: request_id})


class EventReader:
    """Cuts a body into server-sent events, wherever the network has cut it.

    Works on bytes: decoders of text lines also split at U+2028 and its like, which JSON may hold.
    """

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads of the events that ``data`` completes."""
        self._rest += data
        *events, rest = self._rest.split(b"\n\n")
        self._rest = rest
        return [bytes(event.removeprefix(b"data: ")) for event in events if event]


def chunk_of(event: bytes) -> bytes:
    """The CHUNK in an event.

    Raises:
        TriptychClientError: It carries the server's error, or no such tensor.
    """
    try:
        read = _EVENT.decode(event)
    except msgspec.DecodeError as error:
        raise errors.InternalError(f"the server sent an unreadable event: {error}") from None
    if read.error is not None:
        raise errors.from_text(read.error)
    if read.CHUNK is None:
        raise errors.InvalidRequest(f"the model's answer is no chat: {event[:80]!r}")
    return read.CHUNK.encode()


def refusal(status: int, body: bytes) -> errors.TriptychClientError:
    """The error of a response whose status is not 200; the body may be an event or plain JSON."""
    try:
        text = _EVENT.decode(body.strip().removeprefix(b"data: ")).error
    except msgspec.DecodeError:
        text = None
    text = text or body[:200].decode("utf-8", "replace").strip() or f"HTTP status {status}"
    return errors.from_text(text, http_status=status)
