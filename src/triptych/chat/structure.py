"""What an answer must look like: ``response_format``, and the calls of tools that must come.

Both go to the engine as it draws, so that an answer cannot break them: a JSON schema, or one of
XGrammar's structural tags, which also say where in a text the JSON stands.

Sources: https://platform.openai.com/docs/api-reference/chat/create (``response_format``);
https://xgrammar.mlc.ai/docs/tutorials/structural_tag.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from triptych.chat.fields import Fields, wrong
from triptych.chat.tool_calls import CLOSE, OPEN
from triptych.chat.tools import NamedTool, Schema, Tool, ToolChoice, read_schema
from triptych.errors import InvalidValue

ANY_OBJECT: Schema = {"type": "object"}
NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a tool that has no ``parameters``."""


class ResponseFormat(msgspec.Struct, frozen=True):
    """JSON that the answer must be."""

    schema: Schema
    """`ANY_OBJECT` where the caller asked for ``json_object``."""
    name: str | None = None
    """The caller's own, of a schema."""


def read_response_format(fields: Fields) -> ResponseFormat | None:
    """The ``response_format``; None: the answer is text.

    Raises:
        InvalidValue: It is of no type that there is, or its schema is none.
    """
    value = fields.take("response_format")
    if value is None:
        return None
    outer = Fields(value, "response_format")
    kind = outer.need("type")
    found = None
    if kind == "json_schema":
        found = _read_json_schema(Fields(outer.need("json_schema"), outer.path("json_schema")))
    elif kind == "json_object":
        found = ResponseFormat(ANY_OBJECT)
    elif kind != "text":
        raise wrong(outer.path("type"), "must be one of text, json_object, json_schema", kind)
    outer.close()
    return found


def write_response_format(wanted: ResponseFormat) -> dict[str, Any]:
    """``wanted`` as OpenAI's JSON; `read_response_format` reads it back."""
    if wanted.name is None:
        return {"type": "json_object"}
    inner = {"name": wanted.name, "schema": wanted.schema}
    return {"type": "json_schema", "json_schema": inner}


def structural_tag(
    tools: Sequence[Tool],
    choice: ToolChoice,
    *,
    parallel: bool,
    response_format: ResponseFormat | None,
) -> str:
    """The structural tag of an answer that may or must call tools; empty: anything may come.

    A model that may call (``auto``) is held to a schema only where a tool is ``strict``, where one
    call must be the last, or where all but calls must be JSON. One that must call is held to the
    schema in any case, since what it is made to write should be of use.
    """
    if choice == "none" or not tools:
        return ""
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.name == choice.name]
    single = isinstance(choice, NamedTool) or not parallel
    calls: dict[str, Any] = {
        "type": "tags_with_separator",
        "separator": "\n",
        "tags": [_tag(tool.name, _parameters(tool)) for tool in tools],
        "at_least_one": True,
        "stop_after_first": single,
    }
    if choice != "auto":
        wanted = calls
    elif response_format is not None:
        written = {"type": "json_schema", "json_schema": response_format.schema}
        wanted = {"type": "or", "elements": [written, calls]}
    elif single or any(tool.strict for tool in tools):
        wanted = {
            "type": "triggered_tags",
            "triggers": [OPEN],
            "tags": [
                _tag(tool.name, _parameters(tool) if tool.strict else ANY_OBJECT) for tool in tools
            ],
            "stop_after_first": single,
        }
    else:
        return ""
    return msgspec.json.encode({"type": "structural_tag", "format": wanted}).decode()


def _parameters(tool: Tool) -> Schema:
    return NO_ARGUMENTS if tool.parameters is None else {**ANY_OBJECT, **tool.parameters}


def _tag(name: str, parameters: Schema) -> dict[str, Any]:
    """One call, as `triptych.chat.tool_calls` reads it."""
    return {
        "type": "tag",
        "begin": f'{OPEN}\n{{"name": "{name}", "arguments": ',
        "content": {"type": "json_schema", "json_schema": parameters},
        "end": f"}}\n{CLOSE}",
    }


def _read_json_schema(fields: Fields) -> ResponseFormat:
    name = fields.filled("name")
    if len(name) > 64:
        raise wrong(fields.path("name"), "must have at most 64 characters", name)
    fields.string("description")
    # Held in either case: an answer that may break it would be of no use to whoever asks for it.
    fields.boolean("strict", default=False)
    schema = fields.take("schema")
    if schema is None:
        raise InvalidValue("is required", where=fields.path("schema"))
    found = ResponseFormat(read_schema(schema, fields.path("schema")), name)
    fields.close()
    return found
