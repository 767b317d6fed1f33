"""Answers as OpenAI's ``chat.completion.chunk``, the JSON of the CHUNK tensor.

Source of the format: https://platform.openai.com/docs/api-reference/chat-streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from triptych.chat.tool_calls import CallPiece, Found, ToolCallReader
from triptych.contract import Modality, Prompt

FinishReason = Literal["stop", "length", "tool_calls"]

Octets = bytes
"""The built-in type, where a field of OpenAI's takes its name."""

LOGPROB_FLOOR = -9999.0
"""What OpenAI writes for a token of no probability: JSON has no minus infinity."""


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    """Natural logarithm of the probability."""
    bytes: list[int] | None
    """The token's own bytes in UTF-8, which may be a part of a character."""

    @classmethod
    def of(cls, token: str, logprob: float, raw: Octets | None = None) -> TopLogprob:
        """An entry from an engine's numbers; without ``raw`` the bytes are those of ``token``."""
        return cls(token, max(logprob, LOGPROB_FLOOR), _octets(token, raw))


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token of the answer, and what else could have stood there."""

    token: str
    logprob: float
    """Natural logarithm of the probability."""
    bytes: list[int] | None
    """The token's own bytes in UTF-8, which may be a part of a character."""
    top_logprobs: list[TopLogprob]
    """As many as the request's ``top_logprobs``, likeliest first."""

    @classmethod
    def of(
        cls,
        token: str,
        logprob: float,
        top: Sequence[TopLogprob] = (),
        raw: Octets | None = None,
    ) -> TokenLogprob:
        """An entry from an engine's numbers; without ``raw`` the bytes are those of ``token``."""
        return cls(token, max(logprob, LOGPROB_FLOOR), _octets(token, raw), list(top))


class ChoiceLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of the tokens that one chunk adds."""

    content: list[TokenLogprob]


class FunctionDelta(msgspec.Struct, frozen=True):
    """What one chunk adds to a call's function."""

    name: str | UnsetType = UNSET
    """In the first piece of a call alone."""
    arguments: str = ""
    """JSON, as the model writes it."""


class ToolCallDelta(msgspec.Struct, frozen=True):
    """What one chunk adds to a call of a tool."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    """In the first piece of a call alone, as ``type``."""
    type: Literal["function"] | UnsetType = UNSET

    @classmethod
    def of(cls, piece: CallPiece) -> ToolCallDelta:
        """An entry from what was read of the model's text."""
        if not piece.id:
            return cls(piece.index, FunctionDelta(arguments=piece.arguments))
        function = FunctionDelta(piece.name, piece.arguments)
        return cls(piece.index, function, piece.id, "function")


class Delta(msgspec.Struct, frozen=True):
    """What one chunk adds to the answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class Choice(msgspec.Struct, frozen=True):
    """The one answer of a request: ``n`` is always 1."""

    delta: Delta
    index: int = 0
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


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
    """What an answer took stage by stage, and what it was spared. Ours, not OpenAI's.

    Waiting counts with the stage that is waited for; together it is the whole time in the server.
    """

    preprocess_ms: float
    """Until the last medium was fetched and decoded."""
    encode_ms: float
    """From there until the embeddings were with the engine; nearly 0 where there are none."""
    prefill_ms: float
    """From there to the first token."""
    decode_ms: float
    """From there to the last."""
    media: int
    """Pictures, clips and sounds in the request."""
    media_cached: int
    """Of these, those whose embeddings the encoder had."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """One ``chat.completion.chunk``."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    """Seconds since the epoch."""
    model: str
    choices: list[Choice]
    """Empty in the chunk that carries the usage of a stream."""
    usage: Usage | UnsetType | None = UNSET
    triptych: Stages | UnsetType = UNSET
    """Goes with the usage."""
    kv_transfer_params: dict[str, Any] | UnsetType = UNSET
    """What another engine needs to go on with this prompt's keys and values; vLLM's extension.
    Goes with the finish reason."""


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Chunk)


def decode(data: bytes | str) -> Chunk:
    """Read a CHUNK back.

    Raises:
        msgspec.DecodeError: It is not one.
    """
    return _DECODER.decode(data)


class ChunkWriter:
    """Writes the chunks of one answer, in order; the first delta names the role.

    A stream is ``delta``…, then ``end``; a request without ``stream`` has its whole text in the
    end. Where the prompt has tools, calls are read out of the text.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._begun = False
        # In a stream with usage OpenAI writes ``"usage": null`` in every chunk but the last.
        self._no_usage: UnsetType | None = UNSET
        if prompt.include_usage and not prompt.usage_with_finish:
            self._no_usage = None
        self._reader = ToolCallReader(prompt.tools) if prompt.tools else None

    def count(self, completion_tokens: int, *, cached_tokens: int = 0) -> Usage:
        """The usage of an answer of ``completion_tokens`` tokens to this prompt."""
        taken: dict[Modality, int] = {"image": 0, "video": 0, "audio": 0}
        for item in self._prompt.items:
            taken[item.modality] += item.tokens
        return Usage(
            prompt_tokens=self._prompt.length,
            completion_tokens=completion_tokens,
            total_tokens=self._prompt.length + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=cached_tokens,
                image_tokens=taken["image"],
                video_tokens=taken["video"],
                audio_tokens=taken["audio"],
            ),
        )

    def delta(self, text: str, logprobs: Sequence[TokenLogprob] | None = None) -> bytes:
        """A chunk that adds ``text``."""
        return self._write(self._choice(text, logprobs, None), self._no_usage)

    def end(
        self,
        reason: FinishReason,
        usage: Usage,
        *,
        text: str = "",
        logprobs: Sequence[TokenLogprob] | None = None,
        stages: Stages | UnsetType = UNSET,
        kv_transfer: dict[str, Any] | None = None,
    ) -> list[bytes]:
        """The last chunks: one with the last text and the finish reason, and the usage.

        OpenAI's clients look for a stream's usage in a chunk of its own, which is one send more.
        """
        prompt = self._prompt
        choice = self._choice(text, logprobs, reason)
        if prompt.stream and prompt.include_usage and not prompt.usage_with_finish:
            last = self._write(None, usage, stages)
            return [self._write(choice, None, kv_transfer=kv_transfer), last]
        if prompt.include_usage or (prompt.stream and prompt.usage_with_finish):
            return [self._write(choice, usage, stages, kv_transfer=kv_transfer)]
        return [self._write(choice, UNSET, kv_transfer=kv_transfer)]

    def _choice(
        self,
        text: str,
        logprobs: Sequence[TokenLogprob] | None,
        reason: FinishReason | None,
    ) -> Choice:
        found = self._read(text, last=reason is not None)
        if reason == "stop" and self._reader and self._reader.count:
            reason = "tool_calls"
        calls = [ToolCallDelta.of(piece) for piece in found.calls] or UNSET
        silent = not found.content and (calls or reason is not None)
        delta = Delta(
            role=UNSET if self._begun else "assistant",
            content=UNSET if silent and self._begun else found.content,
            tool_calls=calls,
        )
        self._begun = True
        entries = None if logprobs is None else ChoiceLogprobs(list(logprobs))
        return Choice(delta, logprobs=entries, finish_reason=reason)

    def _read(self, text: str, *, last: bool) -> Found:
        """The text's content and calls; with the last of it all that was held back."""
        if self._reader is None:
            return Found(text, [])
        found = self._reader.feed(text)
        if not last:
            return found
        rest = self._reader.end()
        return Found(found.content + rest.content, found.calls + rest.calls)

    def _write(
        self,
        choice: Choice | None,
        usage: Usage | UnsetType | None,
        stages: Stages | UnsetType = UNSET,
        kv_transfer: dict[str, Any] | None = None,
    ) -> bytes:
        return _ENCODER.encode(
            Chunk(
                id=self._prompt.id,
                created=self._prompt.created,
                model=self._prompt.model,
                choices=[] if choice is None else [choice],
                usage=usage,
                triptych=stages,
                kv_transfer_params=kv_transfer or UNSET,
            )
        )


def _octets(token: str, raw: Octets | None) -> list[int]:
    return list(token.encode("utf-8", "replace") if raw is None else raw)
