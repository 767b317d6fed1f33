"""What comes back: pieces of an answer as they arrive, and the whole.

The JSON is OpenAI's ``chat.completion.chunk``:
https://platform.openai.com/docs/api-reference/chat-streaming.
"""

from __future__ import annotations

import msgspec

from triptych_client.errors import InternalError


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, those that came from a cache or from media."""

    cached_tokens: int = 0
    image_tokens: int = 0
    video_tokens: int = 0
    audio_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request, as the model counted them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class Stages(msgspec.Struct, frozen=True):
    """What an answer took stage by stage, together the whole time in the server."""

    preprocess_ms: float = 0.0
    """Until the last medium was fetched and decoded."""
    encode_ms: float = 0.0
    """From there until the embeddings were with the engine."""
    prefill_ms: float = 0.0
    """From there to the first token."""
    decode_ms: float = 0.0
    """From there to the last."""
    media: int = 0
    """Pictures, clips and sounds in the request."""
    media_cached: int = 0
    """Of these, those whose embeddings the encoder had."""


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that could have stood in a place."""

    token: str
    logprob: float
    """Natural logarithm of the probability."""
    bytes: list[int] | None = None
    """The token's own bytes in UTF-8, which may be a part of a character."""


class TokenLogprob(TopLogprob, frozen=True):
    """One token of the answer, and what else could have stood there."""

    top_logprobs: list[TopLogprob] = []
    """As many as ``top_logprobs`` asked for, likeliest first."""


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a tool that the model asks for; in a `Chunk`, a piece of one."""

    index: int
    """Of the call in the answer."""
    id: str = ""
    """By which its result is given back; of the pieces, the first alone has it and ``name``."""
    name: str = ""
    arguments: str = ""
    """JSON, as the model wrote it."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of an answer."""

    text: str = ""
    """What it adds to the answer."""
    tool_calls: list[ToolCall] = []
    """What it adds to calls of tools."""
    finish_reason: str | None = None
    """Set in the piece that ends the text: ``stop``, ``length`` where a limit cut it, or
    ``tool_calls``."""
    usage: Usage | None = None
    """Set in the last piece."""
    stages: Stages | None = None
    """Goes with the usage."""
    logprobs: list[TokenLogprob] | None = None
    """Of the tokens in ``text``, if the request asked for them."""
    id: str
    """Of the whole answer, ``chatcmpl-…``."""
    model: str
    created: int
    """Seconds since the epoch."""
    json: bytes = b""
    """The chunk as the server wrote it."""

    def __repr__(self) -> str:
        return f"Chunk({self.text!r}, finish_reason={self.finish_reason!r}, usage={self.usage!r})"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer."""

    text: str
    tool_calls: list[ToolCall] = []
    finish_reason: str | None
    """``stop``, ``length`` where a limit cut it, or ``tool_calls``; None: it was cancelled on the
    way."""
    usage: Usage | None
    """None: the request asked for none, or the answer was cancelled."""
    stages: Stages | None = None
    """Goes with the usage."""
    logprobs: list[TokenLogprob] | None = None
    id: str
    model: str
    created: int
    """Seconds since the epoch."""


def whole(chunks: list[Chunk]) -> Answer:
    """The answer that ``chunks``, in order, add up to."""
    first = chunks[0] if chunks else Chunk(id="", model="", created=0)
    logprobs = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    return Answer(
        text="".join(chunk.text for chunk in chunks),
        tool_calls=_joined([piece for chunk in chunks for piece in chunk.tool_calls]),
        finish_reason=next((c.finish_reason for c in chunks if c.finish_reason), None),
        usage=next((chunk.usage for chunk in reversed(chunks) if chunk.usage), None),
        stages=next((chunk.stages for chunk in reversed(chunks) if chunk.stages), None),
        logprobs=logprobs if any(chunk.logprobs is not None for chunk in chunks) else None,
        id=first.id,
        model=first.model,
        created=first.created,
    )


def read_chunk(data: bytes) -> Chunk:
    """Read a CHUNK.

    Raises:
        InternalError: It is not one.
    """
    try:
        wire = _DECODER.decode(data)
    except msgspec.DecodeError as error:
        raise InternalError(f"the server sent a CHUNK that cannot be read: {error}") from None
    choice = wire.choices[0] if wire.choices else _Choice()
    return Chunk(
        text=choice.delta.content or "",
        tool_calls=[
            ToolCall(call.index, call.id, call.function.name, call.function.arguments)
            for call in choice.delta.tool_calls
        ],
        finish_reason=choice.finish_reason,
        usage=wire.usage,
        stages=wire.triptych,
        logprobs=choice.logprobs.content if choice.logprobs else None,
        id=wire.id,
        model=wire.model,
        created=wire.created,
        json=data,
    )


def _joined(pieces: list[ToolCall]) -> list[ToolCall]:
    """The calls that ``pieces``, in order, add up to."""
    calls: dict[int, ToolCall] = {}
    for piece in pieces:
        if before := calls.get(piece.index):
            piece = msgspec.structs.replace(before, arguments=before.arguments + piece.arguments)
        calls[piece.index] = piece
    return list(calls.values())


class _Function(msgspec.Struct, frozen=True):
    name: str = ""
    arguments: str = ""


class _Call(msgspec.Struct, frozen=True):
    index: int
    id: str = ""
    function: _Function = _Function()


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    tool_calls: list[_Call] = []


class _Logprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob] | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Wire(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[_Choice]
    usage: Usage | None = None
    triptych: Stages | None = None


_DECODER = msgspec.json.Decoder(_Wire)
