"""OpenAI's objects that are answered.

Source: https://platform.openai.com/docs/api-reference/chat and
https://platform.openai.com/docs/api-reference/completions.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from triptych.chat.chunks import ChoiceLogprobs, FinishReason, Stages, Usage


class Error(Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    """Kind of error, by its status: ``invalid_request_error``, ``server_error``, …."""
    param: str | None
    """JSON path of the field at fault, such as ``messages[0].content[1].image_url.url``."""
    code: str
    """Name of the error, such as ``media_too_large``."""


class ErrorResponse(Struct, frozen=True):
    """The answer to a request that is not served; in a stream, its last event."""

    error: Error


class Function(Struct, frozen=True):
    """What is to be called."""

    name: str
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(Struct, frozen=True):
    """A call that the model asks for."""

    id: str
    function: Function
    type: Literal["function"] = "function"


class AssistantMessage(Struct, frozen=True):
    """An answer's message."""

    content: str | None
    """Null where there are calls and nothing else."""
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class CompletionChoice(Struct, frozen=True):
    """One answer."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason | None
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """The answer to a request that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Seconds since the epoch."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    triptych: Stages | UnsetType = UNSET
    """What the stages took; not with several answers."""


class TextLogprobs(Struct, frozen=True):
    """Log probabilities of a text's tokens, a list entry for each."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    """The likeliest tokens at each place, and the one that was drawn."""
    text_offset: list[int]
    """Where each token begins in the choice's whole text, in characters."""


class TextChoice(Struct, frozen=True):
    """How one prompt goes on, or what one event adds to that."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: TextLogprobs | None = None


class Completion(Struct, frozen=True, kw_only=True):
    """How prompts go on; in a stream, what one event adds."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Seconds since the epoch."""
    model: str
    choices: list[TextChoice]
    """``n`` for the first prompt, then ``n`` for the second, …"""
    usage: Usage | UnsetType | None = UNSET


class Model(Struct, frozen=True, kw_only=True):
    """A name that goes into ``model``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """When the gateway started, seconds since the epoch."""
    owned_by: str = "triptych"
    root: str
    """The ensemble behind it."""


class ModelList(Struct, frozen=True, kw_only=True):
    """What there is to ask."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(Struct, frozen=True):
    """The answer to a look at the gateway's health."""

    status: Literal["ok"] = "ok"
