"""What goes out: one chat as OpenAI's JSON, under a request id of its own."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import msgspec

from triptych_client.errors import InvalidValue
from triptych_client.messages import Message, user
from triptych_client.tensors import Layout

REQUEST = "REQUEST"
REQUEST_TENSORS = "TENSORS"
CHUNK = "CHUNK"
MEDIA = "MEDIA"
ITEMS = "ITEMS"
EMBEDDINGS = "EMBEDDINGS"
TICKET = "TICKET"
ABORT = "abort"
OUTPUTS = "outputs"
TRACEPARENT = "traceparent"
"""Names of the server's tensors, and of the parameters that end a generation, that say which
outputs are read and that tell the caller's place in a trace."""

DEFAULT_MODEL = "chat_vllm"
DEFAULT_TIMEOUT_S = 600.0


class StreamOptions(TypedDict, total=False):
    """Of a streamed answer."""

    include_usage: bool
    """True unless given: the last chunk tells the usage."""
    usage_with_finish: bool
    """The chunk with the finish reason tells it, which saves one."""


class Sampling(TypedDict, total=False):
    """How to draw tokens, and the other fields of a request, as OpenAI's API and vLLM have them."""

    max_tokens: int
    max_completion_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    stop: str | list[str]
    logprobs: bool
    top_logprobs: int
    n: int
    """1 is served."""
    tools: Sequence[Mapping[str, Any]]
    """Functions that the model may ask for, as OpenAI's API has them."""
    tool_choice: str | Mapping[str, Any]
    """``none``, ``auto``, ``required`` or a function; ``auto`` where there are tools."""
    parallel_tool_calls: bool
    response_format: Mapping[str, Any]
    """``json_object`` or ``json_schema``, where the engine can hold an answer to it."""
    priority: int
    """The lower goes first where requests wait; 0 unless given."""
    user: str
    metadata: dict[str, str]
    stream_options: StreamOptions


class Call(msgspec.Struct, frozen=True):
    """One chat on its way to a server."""

    model: str
    """The ensemble."""
    id: str
    """Triton's request id, unique, by which the generation can be ended."""
    body: bytes
    """The JSON for REQUEST."""
    timeout: float | None
    """Seconds for the whole answer, from when it is sent; None: no limit."""
    tensors: bytes = b""
    """TENSORS, pieces of which the JSON names; mostly empty."""
    traceparent: str = ""
    """The caller's place in a trace, as the W3C has it."""

    @property
    def parameters(self) -> dict[str, int | str]:
        """What goes beside the tensors; Triton's ``timeout`` is in microseconds."""
        found: dict[str, int | str] = {OUTPUTS: CHUNK}
        if self.timeout is not None:
            found["timeout"] = max(1, int(self.timeout * 1e6))
        if self.traceparent:
            found[TRACEPARENT] = self.traceparent
        return found

    def __repr__(self) -> str:
        sizes = f"{len(self.body)} bytes, {len(self.tensors)} of tensors"
        return f"Call({self.model!r}, {self.id!r}, {sizes})"


def build_call(
    messages: str | Sequence[Message],
    *,
    model: str,
    stream: bool,
    timeout: float | None,
    sampling: Mapping[str, Any],
) -> Call:
    """A request for ``model``.

    Args:
        messages: The conversation; a string is one user message.
        model: Name of the ensemble.
        stream: Whether the answer comes in pieces.
        timeout: Seconds for the whole answer; None: no limit.
        sampling: The other fields of the request, as they are: the server checks them.

    Raises:
        InvalidValue: Something in it is no JSON, or the timeout is not positive.
    """
    if timeout is not None and not timeout > 0:
        raise InvalidValue(f"must be positive, got {timeout}", where="timeout")
    if isinstance(messages, str):
        messages = [user(messages)]
    fields = {"model": model, "messages": messages, "stream": stream, **sampling}
    tensors = Layout()
    try:
        body = msgspec.json.encode(fields, enc_hook=tensors.place)
    except (TypeError, ValueError) as error:
        raise InvalidValue(f"the request cannot be written as JSON: {error}") from None
    return Call(model, uuid.uuid4().hex, body, timeout, tensors.join())
