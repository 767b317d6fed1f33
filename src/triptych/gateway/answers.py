"""Answers in OpenAI's forms: whole, or as server-sent events.

Source of the events: https://html.spec.whatwg.org/multipage/server-sent-events.html; JSON holds
no line break, so each is one ``data`` line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, cast

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from triptych.chat import chunks
from triptych.gateway import schema
from triptych.gateway.asked import Asked, override
from triptych.gateway.prompts import AskedText
from triptych_client.answers import Chunk

DONE = b"data: [DONE]\n\n"

_ENCODER = msgspec.json.Encoder()


def event(json: bytes) -> bytes:
    """One event of a stream."""
    return b"".join((b"data: ", json, b"\n\n"))


class Form(ABC):
    """How the answers to one request are written; each request has one of its own.

    Several answers stand under one id, that of the first, each with its index.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._first: chunks.Chunk | None = None
        self._usages: dict[int, chunks.Usage] = {}

    @property
    def usage(self) -> chunks.Usage | None:
        """What all the answers took, as far as they have come to their end."""
        usages = [usage for _, usage in sorted(self._usages.items())]
        return _total(usages, self._asked.n) if usages else None

    @abstractmethod
    def piece(self, index: int, piece: Chunk) -> bytes:
        """What the next piece of an answer is in a stream, as JSON."""

    @abstractmethod
    def last(self) -> bytes:
        """The usage, with which a stream ends where the caller asks."""

    @abstractmethod
    def whole(self, answers: Sequence[chunks.Chunk]) -> bytes:
        """The answers, each whole in its chunk, as one."""

    def _see(self, index: int, chunk: chunks.Chunk) -> chunks.Chunk:
        """Keep what is told at the end, and the first chunk, which is returned."""
        if isinstance(chunk.usage, chunks.Usage):
            self._usages[index] = chunk.usage
        self._first = self._first or chunk
        return self._first

    @property
    def _no_usage(self) -> UnsetType | None:
        """In a stream with usage OpenAI writes ``"usage": null`` in every chunk but the last."""
        return None if self._asked.include_usage else UNSET


class ChatForm(Form):
    """``chat.completion`` and ``chat.completion.chunk``."""

    _stages: chunks.Stages | UnsetType = UNSET

    def piece(self, index: int, piece: Chunk) -> bytes:
        """A chunk: that of the stages as it is, unless something of it must change."""
        if piece.usage is None and len(self._asked.bodies) == 1:
            return override(piece.json, {"usage": None} if self._asked.include_usage else {})
        chunk = chunks.decode(piece.json)
        first = self._see(index, chunk)
        self._stages = chunk.triptych
        written = replace(
            chunk,
            id=first.id,
            created=first.created,
            choices=[replace(choice, index=index) for choice in chunk.choices],
            usage=self._no_usage,
            triptych=UNSET,
        )
        return _ENCODER.encode(written)

    def last(self) -> bytes:
        """A chunk without a choice."""
        assert self._first is not None
        stages = self._stages if len(self._asked.bodies) == 1 else UNSET
        return _ENCODER.encode(replace(self._first, choices=[], usage=self.usage, triptych=stages))

    def whole(self, answers: Sequence[chunks.Chunk]) -> bytes:
        """The ``chat.completion``."""
        for index, answer in enumerate(answers):
            self._see(index, answer)
        first = answers[0]
        return _ENCODER.encode(
            schema.ChatCompletion(
                id=first.id,
                created=first.created,
                model=first.model,
                choices=[_choice(index, answer.choices[0]) for index, answer in enumerate(answers)],
                usage=self.usage,
                triptych=first.triptych if len(answers) == 1 else UNSET,
            )
        )


class TextForm(Form):
    """``text_completion``, whole and in pieces."""

    def __init__(self, asked: AskedText) -> None:
        super().__init__(asked)
        self._echoed = [
            prompt if asked.echo and isinstance(prompt, str) else ""
            for prompt in asked.prompts
            for _ in range(asked.n)
        ]
        """By answer, what its next piece begins with."""
        self._written = [0] * len(asked.bodies)
        """By answer, characters so far."""

    def piece(self, index: int, piece: Chunk) -> bytes:
        """A completion with what one answer adds."""
        chunk = chunks.decode(piece.json)
        self._see(index, chunk)
        return self._write([self._choice(index, chunk)], self._no_usage)

    def last(self) -> bytes:
        """A completion without a choice."""
        return self._write([], self.usage)

    def whole(self, answers: Sequence[chunks.Chunk]) -> bytes:
        """A completion with every answer."""
        for index, answer in enumerate(answers):
            self._see(index, answer)
        return self._write(
            [self._choice(index, answer) for index, answer in enumerate(answers)], self.usage
        )

    def _write(
        self, choices: list[schema.TextChoice], usage: chunks.Usage | UnsetType | None
    ) -> bytes:
        first = self._first
        assert first is not None
        return _ENCODER.encode(
            schema.Completion(
                id=first.id, created=first.created, model=first.model, choices=choices, usage=usage
            )
        )

    def _choice(self, index: int, chunk: chunks.Chunk) -> schema.TextChoice:
        [choice] = chunk.choices
        added = choice.delta.content
        text = self._echoed[index] + (added if isinstance(added, str) else "")
        self._echoed[index] = ""
        logprobs = None
        if choice.logprobs is not None:
            logprobs = _text_logprobs(choice.logprobs.content, self._written[index])
        self._written[index] += len(text)
        # There are no tools.
        reason = cast("Literal['stop', 'length'] | None", choice.finish_reason)
        return schema.TextChoice(index, text, reason, logprobs)


def _choice(index: int, choice: chunks.Choice) -> schema.CompletionChoice:
    calls = [_call(call) for call in choice.delta.tool_calls or ()]
    text = choice.delta.content or None
    message = schema.AssistantMessage(
        text if calls else text or "", tool_calls=calls if calls else UNSET
    )
    return schema.CompletionChoice(index, message, choice.finish_reason, choice.logprobs)


def _call(call: chunks.ToolCallDelta) -> schema.ToolCall:
    """A call of an answer that is whole, so that it is too."""
    function = schema.Function(str(call.function.name), call.function.arguments)
    return schema.ToolCall(str(call.id), function)


def _text_logprobs(entries: Sequence[chunks.TokenLogprob], start: int) -> schema.TextLogprobs:
    """OpenAI's older form, of tokens that begin after ``start`` characters."""
    offsets = []
    for entry in entries:
        offsets.append(start)
        start += len(entry.token)
    return schema.TextLogprobs(
        tokens=[entry.token for entry in entries],
        token_logprobs=[entry.logprob for entry in entries],
        top_logprobs=[
            {other.token: other.logprob for other in entry.top_logprobs}
            | {entry.token: entry.logprob}
            for entry in entries
        ],
        text_offset=offsets,
    )


def _total(usages: Sequence[chunks.Usage], n: int) -> chunks.Usage:
    """The usage of ``n`` answers to each prompt, whose tokens count once."""
    prompts = usages[::n]
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    details = [usage.prompt_tokens_details for usage in prompts if usage.prompt_tokens_details]
    return chunks.Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=chunks.PromptTokensDetails(
            **{
                name: sum(getattr(detail, name) for detail in details)
                for name in chunks.PromptTokensDetails.__struct_fields__
            }
        ),
    )
