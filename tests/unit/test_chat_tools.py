"""Tools and formats of answers: what a request may say of them, and what the engine is told."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import xgrammar
from xgrammar.testing import _is_grammar_accept_string

from triptych.chat.request import parse, write
from triptych.chat.structure import ANY_OBJECT, ResponseFormat, structural_tag
from triptych.chat.tools import MAX_SCHEMA_BYTES, NamedTool, Tool, ToolCall
from triptych.errors import InvalidRequest

USER = {"role": "user", "content": "hi"}
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
PAINT = {"type": "function", "function": {"name": "paint", "parameters": COLOUR}}
WASH = {"type": "function", "function": {"name": "wash", "description": "Wash it."}}
CALL = {"id": "c1", "type": "function", "function": {"name": "paint", "arguments": '{"a": 1}'}}
SCHEMA = {"name": "colour", "schema": COLOUR}


def body(**fields: Any) -> bytes:
    return json.dumps({"messages": [USER], **fields}).encode()


def of_function(**fields: Any) -> dict:
    return {"type": "function", "function": {**PAINT["function"], **fields}}


def test_tools() -> None:
    request = parse(body(tools=[PAINT, WASH]))
    assert request.tools == (
        Tool("paint", parameters=COLOUR),
        Tool("wash", description="Wash it."),
    )
    assert (request.tool_choice, request.parallel_tool_calls) == ("auto", True)
    assert parse(body()).tool_choice == "none"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("none", "none"),
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "wash"}}, NamedTool("wash")),
    ],
)
def test_a_choice_of_tools(given: object, read: object) -> None:
    request = parse(body(tools=[PAINT, WASH], tool_choice=given, parallel_tool_calls=False))
    assert (request.tool_choice, request.parallel_tool_calls) == (read, False)
    assert parse(write(request)) == request


def test_turns_with_calls_and_their_results() -> None:
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0}]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
        {"role": "assistant", "content": "It is done.", "tool_calls": None, "annotations": None},
    ]
    request = parse(body(messages=turns))
    assert request.messages[1].content == ""
    assert request.messages[1].tool_calls == (ToolCall("c1", "paint", {"a": 1}),)
    assert (request.messages[2].role, request.messages[2].tool_call_id) == ("tool", "c1")
    assert parse(write(request)) == request


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, ResponseFormat(ANY_OBJECT)),
        (
            {"type": "json_schema", "json_schema": {**SCHEMA, "strict": True, "description": "d"}},
            ResponseFormat(COLOUR, "colour"),
        ),
    ],
)
def test_a_response_format(given: dict, read: object) -> None:
    request = parse(body(response_format=given))
    assert request.response_format == read
    assert parse(write(request)) == request


def schema(**fields: Any) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {**SCHEMA, **fields}}}


PLACE = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "where", "said"),
    [
        ({"tools": {}}, "tools", "must be a list of tools"),
        ({"tools": []}, "tools", "must not be empty"),
        ({"tools": [PAINT] * 2}, "tools[1].function.name", "another tool's"),
        ({"tools": [of_function(name=f"f{n}") for n in range(129)]}, "tools", "at most 128"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is required"),
        ({"tools": [of_function(name="a b")]}, "tools[0].function.name", "letters"),
        ({"tools": [of_function(name="")]}, "tools[0].function.name", "must not be empty"),
        ({"tools": [of_function(extra=1)]}, "tools[0].function.extra", "unknown field"),
        ({"tools": [{**PAINT, "extra": 1}]}, "tools[0].extra", "unknown field"),
        ({"tools": [of_function(strict="yes")]}, "tools[0].function.strict", "true or false"),
        ({"tools": [of_function(parameters=[])]}, "tools[0].function.parameters", "an object"),
        (
            {"tools": [of_function(parameters={"a": {"$ref": "http://a/b"}})]},
            "tools[0].function.parameters",
            "http://a/b",
        ),
        ({"tool_choice": "auto"}, "tool_choice", "needs tools"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls", "needs tools"),
        ({"tools": [PAINT], "parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
        ({"tools": [PAINT], "tool_choice": "any"}, "tool_choice", "auto, required"),
        ({"tools": [PAINT], "tool_choice": 7}, "tool_choice", "auto, required"),
        ({"tools": [PAINT], "tool_choice": WASH}, "tool_choice.function.description", "unknown"),
        (
            {"tools": [PAINT], "tool_choice": {"function": {"name": "wash"}}},
            "tool_choice.function.name",
            "must be one of paint",
        ),
        (
            {"tools": [PAINT], "tool_choice": {"type": "allowed_tools"}},
            "tool_choice.type",
            "allowed_tools",
        ),
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {}}, "response_format.type", "is required"),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "text, json_object"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "unknown field"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "is required",
        ),
        (schema(schema=None), PLACE, "is required"),
        (schema(schema=True), PLACE, "a JSON schema"),
        (schema(name=""), "response_format.json_schema.name", "must not be empty"),
        (schema(name="n" * 65), "response_format.json_schema.name", "64"),
        (schema(extra=1), "response_format.json_schema.extra", "unknown field"),
        (schema(schema={"enum": ["x" * MAX_SCHEMA_BYTES]}), PLACE, str(MAX_SCHEMA_BYTES)),
        (schema(schema={"$ref": "other.json"}), PLACE, "other.json"),
        (
            {"messages": [{**USER, "tool_calls": [CALL]}]},
            "messages[0].tool_calls",
            "role 'user'",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "must be"),
        (
            {"messages": [{"role": "assistant", "tool_calls": []}]},
            "messages[0].tool_calls",
            "must not be empty",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "id": ""}]}]},
            "messages[0].tool_calls[0].id",
            "must not be empty",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [
                {"id": "c", "function": {"name": "f", "arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "a JSON object",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_at_its_place(fields: dict, where: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse(body(**fields))
    assert error.value.where == where
    assert said in error.value.what
    assert len(str(error.value)) < 400


# The structural tag, held against XGrammar itself.


def accepts(text: str, tools: list[dict], choice: object = "auto", **options: Any) -> bool:
    fields = {"tools": tools, "tool_choice": choice, **options}
    request = parse(body(**{name: value for name, value in fields.items() if value is not None}))
    tag = structural_tag(
        request.tools,
        request.tool_choice,
        parallel=request.parallel_tool_calls,
        response_format=request.response_format,
    )
    if not tag:
        return True
    return _is_grammar_accept_string(xgrammar.Grammar.from_structural_tag(tag), text)


def call(name: str, **arguments: Any) -> str:
    written = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{written}\n</tool_call>"


RED, GREEN, WASHED = call("paint", colour="red"), call("paint", colour="green"), call("wash")
NAMED = {"type": "function", "function": {"name": "paint"}}
STRICT = of_function(strict=True)
AS_JSON = {"type": "json_schema", "json_schema": SCHEMA}


@pytest.mark.parametrize(
    ("tools", "options", "good", "bad"),
    [
        ([PAINT], {"choice": "none"}, [RED, "text"], []),
        ([PAINT], {}, [RED, GREEN, "text"], []),
        (
            [PAINT, WASH],
            {"choice": "required"},
            [RED, WASHED, f"{RED}\n{WASHED}"],
            ["", "text", GREEN, f"text {RED}", call("other"), call("wash", a=1)],
        ),
        (
            [PAINT, WASH],
            {"choice": "required", "parallel_tool_calls": False},
            [RED, WASHED],
            [f"{RED}\n{WASHED}"],
        ),
        ([PAINT, WASH], {"choice": NAMED}, [RED], [WASHED, GREEN, f"{RED}\n{RED}", "text"]),
        (
            [STRICT, WASH],
            {},
            ["text", f"text {RED}", f"{RED}\n{WASHED}", call("wash", a=1)],
            [GREEN, call("other")],
        ),
        ([PAINT], {"parallel_tool_calls": False}, ["text", RED, GREEN], [f"{RED}\n{RED}"]),
        (
            [PAINT],
            {"response_format": AS_JSON},
            ['{"colour": "red"}', RED, f"{RED}\n{RED}"],
            ["text", '{"colour": "green"}', GREEN],
        ),
        ([PAINT], {"choice": "required", "response_format": AS_JSON}, [RED], ['{"colour": "red"}']),
    ],
)
def test_what_the_engine_may_write(
    tools: list[dict], options: dict, good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not accepts(text, tools, **options)] == []
    assert [text for text in bad if accepts(text, tools, **options)] == []


def test_a_tag_is_short() -> None:
    """Each schema stands in it once."""
    tools = [of_function(name=f"f{number}") for number in range(128)]
    request = parse(body(tools=tools, tool_choice="required"))
    tag = structural_tag(request.tools, "required", parallel=True, response_format=None)
    assert len(tag) < 2 * len(msgspec.json.encode(tools))
