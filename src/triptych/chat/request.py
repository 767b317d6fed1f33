"""The body of OpenAI's ``POST /v1/chat/completions``, checked and typed.

In place of ``messages`` it may have a ``prompt``, text or token ids, which the model then goes on
with as it is, without its chat template: what ``POST /v1/completions`` is to be made of.

Every field that is not read here is refused by its name, so that nothing a caller asks for is
lost silently. ``model``, ``user`` and ``metadata`` ask for nothing: the first is repeated in the
answer (Triton's model name chooses the model), the others are the caller's own labels and are
only checked. Of an object with a name twice the last value counts, as in OpenAI's servers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import msgspec

from triptych.chat.fields import Fields, as_list, show, wrong
from triptych.chat.messages import MediaPart, Message, read_messages, write_message
from triptych.chat.structure import (
    ResponseFormat,
    read_response_format,
    write_response_format,
)
from triptych.chat.tools import Tool, ToolChoice, read_tools, write_choice, write_tool
from triptych.errors import InvalidRequest, InvalidValue

INT32_MIN, INT32_MAX = -(1 << 31), (1 << 31) - 1
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20

UNSERVED = [
    "add_generation_prompt",
    "add_special_tokens",
    "allowed_token_ids",
    "audio",
    "bad_words",
    "best_of",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "echo",
    "function_call",
    "functions",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "ignore_eos",
    "include_reasoning",
    "include_stop_str_in_output",
    "kv_transfer_params",
    "length_penalty",
    "logit_bias",
    "media_io_kwargs",
    "min_tokens",
    "mm_processor_kwargs",
    "modalities",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_logprobs",
    "reasoning_effort",
    "request_id",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "safety_identifier",
    "service_tier",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop_token_ids",
    "store",
    "structured_outputs",
    "suffix",
    "truncate_prompt_tokens",
    "use_beam_search",
    "verbosity",
    "web_search_options",
]
"""Fields of OpenAI and vLLM that are known and not served."""

_LONE_SURROGATE = re.compile(
    rb"(?<!\\)(?:\\\\)*(\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|[c-fC-F]))"
)


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request for one answer. None is what the caller did not give."""

    messages: tuple[Message, ...] = ()
    """Empty where there is a ``prompt``."""
    prompt: str | tuple[int, ...] | None = None
    """Text or token ids that the answer goes on with, in place of ``messages``."""
    model: str | None = None
    temperature: float | None = None
    """0 to 2; 0 is greedy."""
    top_p: float | None = None
    """Above 0, to 1."""
    top_k: int | None = None
    """0 is off; a caller may write -1 too."""
    min_p: float | None = None
    """0 to 1."""
    presence_penalty: float | None = None
    """-2 to 2."""
    frequency_penalty: float | None = None
    """-2 to 2."""
    repetition_penalty: float | None = None
    """Above 0, to 2; 1 is off."""
    seed: int | None = None
    """64 bits, signed."""
    stop: tuple[str, ...] = ()
    """At most `MAX_STOPS`, none empty."""
    max_tokens: int | None = None
    """``max_completion_tokens`` or ``max_tokens``, at least 1."""
    logprobs: bool = False
    top_logprobs: int = 0
    """0 to `MAX_TOP_LOGPROBS`."""
    stream: bool = False
    include_usage: bool = True
    """False only where ``stream_options.include_usage`` is."""
    usage_with_finish: bool = False
    """Whether a stream tells its usage in the chunk with the finish reason, not in one more."""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "none"
    """``auto`` where there are tools, unless given."""
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    """None: text."""
    priority: int | None = None
    """32 bits, signed; the lower goes first."""
    user: str | None = None
    metadata: dict[str, str] = {}

    @property
    def media(self) -> Iterator[MediaPart]:
        """Every medium of every turn, in order."""
        for message in self.messages:
            yield from message.media


def parse(data: bytes | str) -> ChatRequest:
    """Read a request.

    Raises:
        InvalidRequest: The JSON is broken; the text has the position in bytes.
        InvalidValue: A field is of the wrong type or out of its range.
        UnknownField: A field that the API does not have, or that is not served.
    """
    fields = Fields(decode(data), "", UNSERVED)
    prompt = _read_prompt(fields)
    messages = read_messages(fields.need("messages")) if prompt is None else ()
    stream = fields.boolean("stream", default=False)
    logprobs, top_logprobs = _read_logprobs(fields)
    top_k = fields.integer("top_k", -1, INT32_MAX)
    include_usage, usage_with_finish = _read_usage(fields, stream=stream)
    tools, tool_choice, parallel = read_tools(fields)
    request = ChatRequest(
        messages=messages,
        prompt=prompt,
        model=fields.string("model", longest=256),
        temperature=fields.number("temperature", 0, 2),
        top_p=fields.number("top_p", 0, 1, above=True),
        top_k=0 if top_k == -1 else top_k,
        min_p=fields.number("min_p", 0, 1),
        presence_penalty=fields.number("presence_penalty", -2, 2),
        frequency_penalty=fields.number("frequency_penalty", -2, 2),
        repetition_penalty=fields.number("repetition_penalty", 0, 2, above=True),
        seed=fields.integer("seed", INT64_MIN, INT64_MAX),
        stop=_read_stop(fields),
        max_tokens=_read_max_tokens(fields),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        stream=stream,
        include_usage=include_usage,
        usage_with_finish=usage_with_finish,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel,
        response_format=read_response_format(fields),
        priority=fields.integer("priority", INT32_MIN, INT32_MAX),
        user=fields.string("user", longest=256),
        metadata=_read_metadata(fields),
    )
    if (fields.integer("n", 1, INT32_MAX) or 1) != 1:
        raise InvalidValue("only 1 answer a request is served", where="n")
    fields.close()
    return request


def write(request: ChatRequest) -> bytes:
    """The JSON of ``request``: `parse` gives an equal one back."""
    body: dict[str, Any] = {
        name: value
        for name in request.__struct_fields__
        if (value := getattr(request, name)) not in (None, (), {}) and name not in _WRITTEN_APART
    }
    if request.prompt is None:
        body["messages"] = [write_message(message) for message in request.messages]
    if request.logprobs:
        body["top_logprobs"] = request.top_logprobs
    if request.stream:
        body["stream_options"] = {
            "include_usage": request.include_usage,
            "usage_with_finish": request.usage_with_finish,
        }
    if request.tools:
        body["tools"] = [write_tool(tool) for tool in request.tools]
        body["tool_choice"] = write_choice(request.tool_choice)
        body["parallel_tool_calls"] = request.parallel_tool_calls
    if request.response_format is not None:
        body["response_format"] = write_response_format(request.response_format)
    return msgspec.json.encode(body)


_WRITTEN_APART = (
    "messages",
    "top_logprobs",
    "include_usage",
    "usage_with_finish",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
)


def decode(data: bytes | str) -> object:
    """The JSON of a request.

    Raises:
        InvalidRequest: It is broken; the text has the position in bytes.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    try:
        return msgspec.json.decode(raw)
    except RecursionError:
        raise InvalidRequest("the JSON is nested too deeply") from None
    except (msgspec.MsgspecError, ValueError) as error:
        if (place := _utf8_fault(raw)) is not None:  # msgspec does not say where
            raise InvalidRequest(f"the JSON is not valid UTF-8 (byte {place})") from None
        if fault := _LONE_SURROGATE.search(raw):
            what = f"half a surrogate pair (byte {fault.start(1)})"
        elif "truncated" in str(error):
            what = f"it ends too early (byte {len(raw)})"
        else:
            what = str(error).removeprefix("JSON is malformed: ")
        raise InvalidRequest(f"the JSON is broken: {what}") from None


def _utf8_fault(raw: bytes) -> int | None:
    """The first byte that is wrong."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def _read_prompt(fields: Fields) -> str | tuple[int, ...] | None:
    """The raw prompt, in place of what makes one by the chat template."""
    value = fields.take("prompt")
    if value is None:
        return None
    for name in ("messages", "tools"):
        if fields.take(name) is not None:
            raise InvalidValue("must not be given with a prompt", where=name)
    if isinstance(value, str):
        if not value:
            raise wrong("prompt", "must not be empty", value)
        return value
    ids = as_list(value, "prompt", "token ids") if isinstance(value, list) else None
    if ids is None:
        raise wrong("prompt", "must be a string or a list of token ids", value)
    for index, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= INT32_MAX:
            raise wrong(f"prompt[{index}]", f"must be an integer from 0 to {INT32_MAX}", token)
    return tuple(cast("list[int]", ids))


def _read_logprobs(fields: Fields) -> tuple[bool, int]:
    logprobs = fields.boolean("logprobs", default=False)
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not logprobs:
        raise wrong("top_logprobs", "needs logprobs to be true", top)
    return logprobs, top or 0


def _read_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise wrong("stop", f"must be a string or a list of at most {MAX_STOPS} strings", value)
    if len(stops) > MAX_STOPS:
        raise wrong("stop", f"must have at most {MAX_STOPS} strings", value)
    for index, stop in enumerate(stops):
        if not isinstance(stop, str) or not stop:
            where = "stop" if isinstance(value, str) else f"stop[{index}]"
            raise wrong(where, "must be a string that is not empty", stop)
    return tuple(stops)


def _read_max_tokens(fields: Fields) -> int | None:
    older = fields.integer("max_tokens", 1, INT32_MAX)
    newer = fields.integer("max_completion_tokens", 1, INT32_MAX)
    if older is not None and newer is not None and older != newer:
        raise InvalidValue(
            f"max_tokens={older} and max_completion_tokens={newer} disagree; give one",
            where="max_completion_tokens",
        )
    return older if newer is None else newer


def _read_usage(fields: Fields, *, stream: bool) -> tuple[bool, bool]:
    value = fields.take("stream_options")
    if value is None:
        return True, False
    if not stream:
        raise InvalidValue("is served only with stream=true", where="stream_options")
    options = Fields(value, "stream_options", ("continuous_usage_stats", "include_obfuscation"))
    include = options.boolean("include_usage", default=True)
    with_finish = options.boolean("usage_with_finish", default=False)
    options.close()
    return include, with_finish


def _read_metadata(fields: Fields) -> dict[str, str]:
    value = fields.take("metadata")
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > 16:
        raise wrong("metadata", "must be an object of at most 16 strings", value)
    for key, text in value.items():
        if len(key) > 64:
            raise wrong("metadata", "must have names of at most 64 characters", key)
        if not isinstance(text, str) or len(text) > 512:
            raise wrong("metadata", f"{show(key)} must be a string of at most 512 characters", text)
    return value
