"""The tools of a request: functions that the model may ask its caller to call.

Source of the format: https://platform.openai.com/docs/api-reference/chat/create, ``tools``,
``tool_choice`` and ``parallel_tool_calls``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from triptych.chat.fields import Fields, as_list, show, wrong
from triptych.errors import InvalidValue, UnknownField

MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 1 << 16
"""Of one JSON schema, as JSON."""

Schema = dict[str, Any]
"""A JSON schema, as the caller wrote it."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may ask for."""

    name: str
    description: str | None = None
    parameters: Schema | None = None
    """JSON schema of the arguments; None: there are none."""
    strict: bool = False
    """Whether arguments that break ``parameters`` must not come."""


class NamedTool(msgspec.Struct, frozen=True):
    """A choice of one tool, which the answer then is a call of."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the model asked for in an earlier turn."""

    id: str
    name: str
    arguments: dict[str, Any]


def read_tools(fields: Fields) -> tuple[tuple[Tool, ...], ToolChoice, bool]:
    """The tools, which of them must be called, and whether several may be at once.

    Raises:
        InvalidValue: One of the three is wrong, or one of the last two stands without tools.
    """
    value = fields.take("tools")
    tools = () if value is None else _read_tools(value, "tools")
    choice, parallel = fields.take("tool_choice"), fields.take("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        raise wrong("parallel_tool_calls", "must be true or false", parallel)
    for name, given in (("tool_choice", choice), ("parallel_tool_calls", parallel)):
        if given not in (None, "none") and not tools:
            raise wrong(name, "needs tools", given)
    names = [tool.name for tool in tools]
    return tools, _read_choice(choice, names), parallel is not False


def read_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    """The ``tool_calls`` of an assistant's turn."""
    found = as_list(value, where, "calls")
    return tuple(_read_call(entry, f"{where}[{index}]") for index, entry in enumerate(found))


def read_schema(value: object, where: str) -> Schema:
    """A JSON schema: an object that refers to nothing outside of itself, and is not too long.

    Raises:
        InvalidValue: It is none. What an engine makes of its words is the engine's to say.
    """
    if not isinstance(value, dict):
        raise wrong(where, "must be an object, a JSON schema", value)
    size = len(msgspec.json.encode(value))
    if size > MAX_SCHEMA_BYTES:
        raise InvalidValue(
            f"must have at most {MAX_SCHEMA_BYTES} bytes as JSON, got {size}", where=where
        )
    if outside := _outside(value):
        raise InvalidValue(f"must refer to itself alone, got $ref {show(outside)}", where=where)
    return value


def show_tool(tool: Tool) -> dict[str, Any]:
    """``tool`` as chat templates take it: OpenAI's JSON, less what is not the model's to read."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    return {"type": "function", "function": function}


def write_tool(tool: Tool) -> dict[str, Any]:
    """``tool`` as OpenAI's JSON; `read_tools` reads it back."""
    written = show_tool(tool)
    return {**written, "function": {**written["function"], "strict": tool.strict}}


def write_choice(choice: ToolChoice) -> object:
    """``choice`` as OpenAI's JSON."""
    if isinstance(choice, NamedTool):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def write_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """``calls`` as OpenAI's JSON, the arguments a string."""
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": msgspec.json.encode(call.arguments).decode(),
            },
        }
        for call in calls
    ]


def _read_tools(value: object, where: str) -> tuple[Tool, ...]:
    found = as_list(value, where, "tools")
    if len(found) > MAX_TOOLS:
        raise wrong(where, f"must have at most {MAX_TOOLS} tools", value)
    tools = [_read_tool(entry, f"{where}[{index}]") for index, entry in enumerate(found)]
    for index, tool in enumerate(tools):
        if any(tool.name == other.name for other in tools[:index]):
            raise wrong(
                f"{where}[{index}].function.name", "must not be another tool's too", tool.name
            )
    return tuple(tools)


def _read_tool(value: object, where: str) -> Tool:
    function, outer = _function(value, where)
    tool = Tool(
        name=_name(function),
        description=function.string("description"),
        parameters=None
        if (schema := function.take("parameters")) is None
        else read_schema(schema, function.path("parameters")),
        strict=function.boolean("strict", default=False),
    )
    function.close()
    outer.close()
    return tool


def _read_choice(value: object, names: Sequence[str]) -> ToolChoice:
    if value is None:
        return "auto" if names else "none"
    if value == "none" or value == "auto" or value == "required":
        return value
    if not isinstance(value, dict):
        raise wrong("tool_choice", "must be one of none, auto, required, or name a function", value)
    function, outer = _function(value, "tool_choice")
    name = _name(function)
    function.close()
    outer.close()
    if name not in names:
        raise wrong(function.path("name"), f"must be one of {', '.join(names)}", name)
    return NamedTool(name)


def _read_call(value: object, where: str) -> ToolCall:
    function, outer = _function(value, where)
    outer.take("index")  # what was put together from a stream may have kept it
    call_id = outer.filled("id")
    name, text = _name(function), function.text("arguments")
    function.close()
    outer.close()
    try:
        arguments = msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError):
        raise wrong(function.path("arguments"), "must be a JSON object as a string", text) from None
    return ToolCall(call_id, name, arguments)


def _function(value: object, where: str) -> tuple[Fields, Fields]:
    """The fields of ``function``, and those around it, of a thing whose type is that."""
    outer = Fields(value, where)
    kind = outer.take("type") or "function"
    if kind != "function":
        raise UnknownField(
            f"only the type 'function' is served, got {show(kind)}", where=outer.path("type")
        )
    return Fields(outer.need("function"), outer.path("function")), outer


def _name(function: Fields) -> str:
    name = function.filled("name")
    if not _NAME.fullmatch(name):
        rule = "must be 1 to 64 letters, digits, _ or -"
        raise wrong(function.path("name"), rule, name)
    return name


def _outside(schema: object) -> str | None:
    """A ``$ref`` to another document, anywhere in ``schema``."""
    waiting = [schema]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, dict):
            target = entry.get("$ref")
            if isinstance(target, str) and not target.startswith("#"):
                return target
            waiting += entry.values()
        elif isinstance(entry, list):
            waiting += entry
    return None
