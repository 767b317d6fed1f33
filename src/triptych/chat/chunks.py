"""Answers as OpenAI's ``chat.completion.chunk``, the JSON of the CHUNK tensor.

Source of the format: https://platform.openai.com/docs/api-reference/chat-streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from triptych.contract import Modality, Prompt

FinishReason = Literal["stop", "length"]

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


class Delta(msgspec.Struct, frozen=True):
    """What one chunk adds to the answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


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

    A stream is ``delta``…, then ``finish``, then ``usage`` where ``prompt.include_usage``; a
    request without ``stream`` gets one ``whole``.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._begun = False
        # In a stream with usage OpenAI writes ``"usage": null`` in every chunk but the last.
        self._no_usage: UnsetType | None = None if prompt.include_usage else UNSET

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

    def finish(
        self,
        reason: FinishReason,
        usage: Usage | None = None,
        *,
        text: str = "",
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> bytes:
        """The chunk with the finish reason; the last text may come with it and save a send.

        ``usage`` goes into this chunk only if it is given here; OpenAI's clients look for it in
        the chunk that `usage` writes.
        """
        choice = self._choice(text, logprobs, reason)
        return self._write(choice, self._no_usage if usage is None else usage)

    def usage(self, usage: Usage, stages: Stages | UnsetType = UNSET) -> bytes:
        """The last chunk of a stream: no choice, only what it took."""
        return self._write(None, usage, stages)

    def whole(
        self,
        text: str,
        reason: FinishReason,
        usage: Usage,
        logprobs: Sequence[TokenLogprob] | None = None,
        stages: Stages | UnsetType = UNSET,
    ) -> bytes:
        """The only chunk of an answer that is not streamed."""
        choice = self._choice(text, logprobs, reason)
        if not self._prompt.include_usage:
            return self._write(choice, UNSET)
        return self._write(choice, usage, stages)

    def _choice(
        self,
        text: str,
        logprobs: Sequence[TokenLogprob] | None,
        reason: FinishReason | None,
    ) -> Choice:
        if not self._begun:
            self._begun = True
            delta = Delta("assistant", text)
        else:
            delta = Delta(content=text) if text or reason is None else Delta()
        entries = None if logprobs is None else ChoiceLogprobs(list(logprobs))
        return Choice(delta, logprobs=entries, finish_reason=reason)

    def _write(
        self,
        choice: Choice | None,
        usage: Usage | UnsetType | None,
        stages: Stages | UnsetType = UNSET,
    ) -> bytes:
        return _ENCODER.encode(
            Chunk(
                id=self._prompt.id,
                created=self._prompt.created,
                model=self._prompt.model,
                choices=[] if choice is None else [choice],
                usage=usage,
                triptych=stages,
            )
        )


def _octets(token: str, raw: Octets | None) -> list[int]:
    return list(token.encode("utf-8", "replace") if raw is None else raw)
