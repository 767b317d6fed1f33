"""Answers in OpenAI's two forms: server-sent events, and one ``chat.completion``.

Source of the events: https://html.spec.whatwg.org/multipage/server-sent-events.html; JSON holds
no line break, so each is one ``data`` line.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from triptych.chat import chunks
from triptych.gateway import choices
from triptych.gateway.schema import AssistantMessage, ChatCompletion, CompletionChoice

DONE = b"data: [DONE]\n\n"

_ENCODER = msgspec.json.Encoder()


def event(json: bytes) -> bytes:
    """One event of a stream."""
    return b"".join((b"data: ", json, b"\n\n"))


def completion(answers: Sequence[chunks.Chunk]) -> bytes:
    """The ``chat.completion`` of one or more answers, each whole in its chunk."""
    first = answers[0]
    usages = [answer.usage for answer in answers if isinstance(answer.usage, chunks.Usage)]
    return _ENCODER.encode(
        ChatCompletion(
            id=first.id,
            created=first.created,
            model=first.model,
            choices=[_choice(index, answer.choices[0]) for index, answer in enumerate(answers)],
            usage=choices.total(usages) if usages else None,
            triptych=first.triptych if len(answers) == 1 else UNSET,
        )
    )


def _choice(index: int, choice: chunks.Choice) -> CompletionChoice:
    text = choice.delta.content
    message = AssistantMessage(text if isinstance(text, str) else "")
    return CompletionChoice(index, message, choice.finish_reason, choice.logprobs)
