"""What each field of a request's sampling means, and how an engine says what it makes of it.

A field means the same whatever the engine. An engine declares each one that it takes, in
`Engine.sampling`; whatever it does not declare is refused by name when a request asks for it
(`check_sampling`), so that no engine passes over it. `triptych matrix --sampling` prints both.

Meanings are OpenAI's (https://platform.openai.com/docs/api-reference/chat), those of the
extensions vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import msgspec

from triptych.contract import Sampling
from triptych.errors import UnknownField

SHOWN = 64
"""Characters of a value that an error repeats."""


class Field(msgspec.Struct, frozen=True):
    """A field of a request, and what it means."""

    name: str
    """As in the request."""
    meaning: str
    carrier: str = ""
    """Field of `Sampling` that carries it, if that has another name."""

    def asked(self, sampling: Sampling) -> object | None:
        """The value, if it differs from the one that asks for nothing."""
        name = self.carrier or self.name
        value = getattr(sampling, name)
        return None if value == _NEUTRAL[name] else value


FIELDS: tuple[Field, ...] = (
    Field(
        "max_tokens",
        "tokens of the answer at most, the one that ends it included; "
        "also `max_completion_tokens`; not given: what is left of the context",
    ),
    Field("temperature", "divides the logits, after the penalties; 0: the likeliest token, always"),
    Field("top_p", "draws from the likeliest tokens that together reach this probability"),
    Field("top_k", "draws from so many of the likeliest tokens; 0 and -1: from all"),
    Field("min_p", "draws from tokens at least so many times as likely as the likeliest"),
    Field("presence_penalty", "taken off the logit of every token that the answer has"),
    Field(
        "frequency_penalty", "taken off the logit of a token once for each time the answer has it"
    ),
    Field(
        "repetition_penalty",
        "divides the logit of every token that prompt or answer has, multiplies a negative one",
    ),
    Field("seed", "a generator of the request's own, which starts here"),
    Field("stop", "the answer ends before the first of these strings"),
    Field(
        "logprobs",
        "the natural logarithm of each token's probability, before penalties and temperature",
    ),
    Field("top_logprobs", "so many of the likeliest tokens at each place, with theirs"),
    Field(
        "response_format",
        "the answer is a JSON object, or JSON that fulfils the schema",
        carrier="json_schema",
    ),
    Field(
        "tool_choice",
        "calls that must come, as `required` or a named function asks, or whose arguments must "
        "fulfil the schema, as of `strict` tools; `auto` asks no engine",
        carrier="structural_tag",
    ),
    Field(
        "priority",
        "whose turn it is in the queues of encoder and engine: the lower goes first, whenever it "
        "came; 0 unless given",
    ),
)
"""All that reach an engine; those that none is asked for are `triptych.chat.request.UNSERVED`."""

_NEUTRAL = {
    field.name: None if field.required else field.default
    for field in msgspec.structs.fields(Sampling)
}


class Support(msgspec.Struct, frozen=True):
    """What an engine makes of a field."""

    kind: Literal["supported", "mapped", "refused"]
    """``mapped``: by other means, or with a difference, which ``how`` tells."""
    how: str = ""
    """Of a refusal: why."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.how}" if self.how else self.kind


SUPPORTED = Support("supported")
UNDECLARED = Support("refused")

Declaration: TypeAlias = Mapping[str, Support]
"""By `Field.name`."""


def mapped(how: str) -> Support:
    """Served by other means, or with a difference."""
    return Support("mapped", how)


def refused(why: str) -> Support:
    """Refused by name, for a reason worth telling."""
    return Support("refused", why)


def check_sampling(engine: str, declared: Declaration, sampling: Sampling) -> None:
    """Refuse what a request asks for and its engine does not take.

    Raises:
        UnknownField: At the first such field, with the value and the reason.
    """
    for field in FIELDS:
        support = declared.get(field.name, UNDECLARED)
        if support.kind != "refused" or (value := field.asked(sampling)) is None:
            continue
        shown = msgspec.json.encode(value).decode()[:SHOWN]
        why = f": {support.how}" if support.how else ""
        raise UnknownField(
            f"the engine {engine} does not serve this field, got {shown}{why}", where=field.name
        )
