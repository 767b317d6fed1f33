"""The body of ``POST /v1/completions``, as requests for Triton: one an answer.

The stages take a raw ``prompt`` in place of ``messages`` and are otherwise asked as for a chat, so
what completions have of their own is put in those words here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from triptych.chat.fields import Fields, wrong
from triptych.chat.request import MAX_TOP_LOGPROBS, decode
from triptych.errors import InvalidValue, UnknownField
from triptych.gateway import asked
from triptych.gateway.choices import Pieces
from triptych_client.errors import TriptychClientError

MAX_ANSWERS = 128
"""Prompts times ``n`` at most: each is a generation of its own."""
MAX_TOKENS = 16
"""Of an answer unless the caller says, as OpenAI has it."""

OF_CHATS = (
    "max_completion_tokens",
    "messages",
    "parallel_tool_calls",
    "tool_choice",
    "tools",
    "top_logprobs",
)
"""Fields that the stages would take."""

Prompt = str | list[Any]
"""Text or token ids; the ids are the stages' to check."""


class AskedText(asked.Asked, frozen=True, kw_only=True):
    """One request for one or more prompts to be gone on with."""

    prompts: list[Prompt]
    echo: bool
    """Whether an answer begins with its prompt."""


def read(body: bytes) -> AskedText:
    """What a body asks for.

    Raises:
        InvalidRequest: It is no JSON; the position is in the text.
        InvalidValue: A field that the gateway reads is wrong; the others the stages check.
        UnknownField: A field that is not served, or is another route's.
    """
    whole = decode(body)
    fields = Fields(whole, "")
    assert isinstance(whole, dict)
    for name in OF_CHATS:
        if whole.get(name) is not None:
            raise UnknownField("is of /v1/chat/completions alone", where=name)
    if whole.get("suffix") is not None:
        raise UnknownField("this field is not served", where="suffix")
    model, prompts = asked.model(fields.take("model")), _prompts(fields.need("prompt"))
    draws = asked.choices(whole.get("n"), whole.get("seed"))
    if len(draws) * len(prompts) > MAX_ANSWERS:
        raise InvalidValue(
            f"{len(prompts)} prompts with {len(draws)} answers each, the limit is {MAX_ANSWERS} "
            "answers",
            where="prompt",
        )
    best_of = fields.integer("best_of", 1, asked.MAX_CHOICES)
    if best_of not in (None, len(draws)):
        raise wrong("best_of", f"is served only where it is n, {len(draws)},", best_of)
    top = fields.integer("logprobs", 0, MAX_TOP_LOGPROBS)
    echo = fields.boolean("echo", default=False)
    _check_echo(prompts, top, echo=echo)
    options, include_usage = asked.stream_options(whole.get("stream"), whole.get("stream_options"))
    common = {**whole, **options}
    if common.get("max_tokens") is None:
        common["max_tokens"] = MAX_TOKENS
    for name in ("best_of", "echo", "logprobs", "suffix", *OF_CHATS):
        common.pop(name, None)
    if top is not None:
        common |= {"logprobs": True, "top_logprobs": top}
    return AskedText(
        model=model,
        stream=whole.get("stream") is True,
        include_usage=include_usage,
        bodies=[
            msgspec.json.encode({**common, "prompt": prompt, **draw})
            for prompt in prompts
            for draw in draws
        ],
        n=len(draws),
        prompts=prompts,
        echo=echo,
    )


async def placed(pieces: Pieces, index: int) -> Pieces:
    """``pieces``, whose faults name the prompt at ``index`` and not the only one there is.

    Raises:
        TriptychClientError: As of ``pieces``.
    """
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                yield piece
        except TriptychClientError as error:
            if error.where.startswith("prompt"):
                error.where = f"prompt[{index}]{error.where.removeprefix('prompt')}"
            raise


def _prompts(value: object) -> list[Prompt]:
    """One or several, each text or token ids."""
    rule = "must be a string, a list of token ids, or a list of such"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong("prompt", rule, value)
    if not value:
        raise InvalidValue("must not be empty", where="prompt")
    if isinstance(value[0], str | list):
        for index, prompt in enumerate(value):
            if not isinstance(prompt, type(value[0])):
                raise wrong(f"prompt[{index}]", "must be of the same type as the others", prompt)
        return value
    return [value]


def _check_echo(prompts: Sequence[Prompt], top: int | None, *, echo: bool) -> None:
    if not echo:
        return
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidValue("is served only for prompts that are text", where="echo")
    if top is not None:
        raise wrong("logprobs", "is not served together with echo", top)
