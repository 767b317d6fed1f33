"""Tools and formats of answers through the gateway, by the official SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator

import jsonschema
import openai
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from gateways import MODEL, before, picture, text
from triptych.gateway import Gateway
from triptych.server import Server
from triptych_client import Client

pytestmark = pytest.mark.server

SCENE = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "triangle"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["shape", "count"],
    "additionalProperties": False,
}
PAINT = {
    "type": "function",
    "function": {"name": "paint", "description": "Paint it.", "parameters": SCENE},
}
WASH = {"type": "function", "function": {"name": "wash"}}
CALLS = (
    'So.\n<tool_call>\n{"name": "paint", "arguments": {"shape": "circle", "count": 2}}\n'
    '</tool_call>\n<tool_call>\n{"name": "wash", "arguments": {}}\n</tool_call>'
)
ASSISTANT = [{"role": "user", "content": "Paint!"}, {"role": "assistant", "content": CALLS}]
"""The echo says a conversation back, and so whatever calls stand in it."""


# The echo has no mind to call tools, but writes what it read.


@pytest.mark.parametrize("stream", [False, True])
def test_calls_in_an_answer_are_told_as_calls(sdk: openai.OpenAI, stream: bool) -> None:
    options = {"model": MODEL, "messages": ASSISTANT, "tools": [PAINT, WASH]}
    if stream:
        with sdk.chat.completions.stream(**options) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = sdk.chat.completions.create(**options).choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = [
        (call.function.name, json.loads(call.function.arguments))
        for call in choice.message.tool_calls or []
    ]
    assert calls == [("paint", {"shape": "circle", "count": 2}), ("wash", {})]
    assert len({call.id for call in choice.message.tool_calls or []}) == 2
    content = choice.message.content or ""
    assert "So.\n" in content
    assert '"name": "paint", "description": "Paint it."' in content, "the prompt showed the tool"
    assert '"circle", "count"' not in content.partition("</tools>")[2]


@pytest.mark.parametrize("choice", ["none", None])
def test_without_tools_nothing_is_a_call(sdk: openai.OpenAI, choice: str | None) -> None:
    extra = {"tools": [PAINT, WASH], "tool_choice": choice} if choice else {}
    answer = sdk.chat.completions.create(model=MODEL, messages=ASSISTANT, **extra).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.tool_calls is None
    assert CALLS in (answer.message.content or "")
    assert "<tools>" not in (answer.message.content or "")


def test_the_result_of_a_call_goes_back(sdk: openai.OpenAI) -> None:
    """The assistant's turn as the SDK has it, then what the tool said, with a picture."""
    first = sdk.chat.completions.create(model=MODEL, messages=ASSISTANT, tools=[PAINT, WASH])
    message = first.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"result of {call.function.name}"}
        for call in message.tool_calls or []
    ]
    again = sdk.chat.completions.create(
        model=MODEL,
        messages=[
            ASSISTANT[0],
            {"role": "assistant", "content": None, "tool_calls": message.tool_calls},
            results[0],
            {**results[1], "content": [text("see"), picture()]},
        ],
        tools=[PAINT, WASH],
    )
    content = again.choices[0].message.content or ""
    assert "image 0" in content
    assert "<tool_response>\nresult of paint\n</tool_response>" in content
    calls = [call.function.arguments for call in again.choices[0].message.tool_calls or []]
    assert json.loads(calls[0]) == {"shape": "circle", "count": 2}


def test_the_library_tells_calls_too(echo_server: Server) -> None:
    with Client(f"localhost:{echo_server.grpc_port}") as client:
        options = {"model": MODEL, "tools": [PAINT, WASH]}
        chunks = list(client.chat(ASSISTANT, **options))
        answer = client.chat(ASSISTANT, stream=False, **options)
    assert [call.name for call in answer.tool_calls] == ["paint", "wash"]
    assert json.loads(answer.tool_calls[0].arguments) == {"shape": "circle", "count": 2}
    assert answer.finish_reason == "tool_calls"
    pieces = [piece for chunk in chunks for piece in chunk.tool_calls]
    assert "".join(piece.arguments for piece in pieces if piece.index == 0) == (
        answer.tool_calls[0].arguments
    )


@pytest.mark.parametrize(
    ("options", "code", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value",
         "tools[0].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "unknown_field",
         "tools[0].type"),
        ({"tools": [PAINT], "tool_choice": "required"}, "unknown_field", "tool_choice"),
        ({"tools": [PAINT], "tool_choice": {"type": "function", "function": {"name": "paint"}}},
         "unknown_field", "tool_choice"),
        ({"tools": [PAINT], "parallel_tool_calls": False}, "unknown_field", "tool_choice"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a", "description":
          "<|image_pad|>"}}]}, "invalid_value", "tools[0]"),
        ({"response_format": {"type": "json_object"}}, "unknown_field", "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
         "invalid_value", "response_format.json_schema.schema"),
    ],
    ids=range(9),
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_cannot_do_is_refused_at_its_place(
    sdk: openai.OpenAI, options: dict, code: str, param: str, stream: bool
) -> None:
    """The echo is held to no schema."""
    with pytest.raises(openai.BadRequestError) as error:
        sdk.chat.completions.create(model=MODEL, messages=ASSISTANT, stream=stream, **options)
    assert (error.value.code, error.value.param) == (code, param)


# vLLM writes what a schema allows, whatever the model knows.

engine = pytest.mark.engine
ASK = [{"role": "user", "content": [picture(), text("What is in the picture?")]}]


class Scene(BaseModel):
    """What the SDK and LangChain make a schema of."""

    shape: str
    count: int


@pytest.fixture(scope="module")
def vllm(vllm_server: Server) -> Iterator[Gateway]:
    with before(vllm_server) as gateway:
        yield gateway


@pytest.fixture
def real(vllm: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{vllm.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@engine
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_about_a_picture_fulfils_a_schema(real: openai.OpenAI, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "scene", "schema": SCENE}}
    options = {"model": "chat_vllm", "messages": ASK, "response_format": form, "temperature": 1}
    for seed in range(3):
        answer = real.chat.completions.create(stream=stream, seed=seed, **options)
        if stream:
            said = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            said = answer.choices[0].message.content
        jsonschema.validate(json.loads(said), SCENE)


@engine
def test_any_json_object(real: openai.OpenAI) -> None:
    answer = real.chat.completions.create(
        model="chat_vllm", messages=ASK, response_format={"type": "json_object"}, max_tokens=200
    )
    said = answer.choices[0].message.content or ""
    assert said.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(said), dict)


@engine
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "paint"}}], ids=["any", "one"]
)
def test_a_call_that_must_come(real: openai.OpenAI, choice: object, stream: bool) -> None:
    options = {"model": "chat_vllm", "messages": ASK, "tools": [PAINT], "tool_choice": choice}
    options |= {"parallel_tool_calls": False, "temperature": 1, "seed": 3}
    if stream:
        with real.chat.completions.stream(**options) as events:
            answer = events.get_final_completion().choices[0]
    else:
        answer = real.chat.completions.create(**options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert not answer.message.content
    [call] = answer.message.tool_calls or []
    assert call.function.name == "paint"
    jsonschema.validate(json.loads(call.function.arguments), SCENE)


@engine
def test_a_completion_fulfils_a_schema(real: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "scene", "schema": SCENE}}
    answer = real.completions.create(
        model="chat_vllm",
        prompt="A scene: ",
        max_tokens=200,
        extra_body={"response_format": form},
    )
    jsonschema.validate(json.loads(answer.choices[0].text), SCENE)


@engine
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("schema", "said"),
    [({"type": "nosuch"}, "nosuch"), ({"type": "integer", "multipleOf": 7}, "keywords")],
)
def test_a_schema_that_cannot_be_held_is_refused(
    real: openai.OpenAI, schema: dict, said: str, stream: bool
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=said) as error:
        real.chat.completions.create(
            model="chat_vllm", messages=ASK, response_format=form, stream=stream
        )
    assert error.value.param == "response_format.json_schema.schema"
    bad = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError) as error:
        real.chat.completions.create(model="chat_vllm", messages=ASK, tools=[bad], stream=stream)
    assert error.value.param == "tools"


@engine
def test_langchain_gets_a_call_and_a_structure(vllm: Gateway) -> None:
    @tool
    def paint(shape: bool, count: bool) -> str:
        """Paint it."""
        return f"{count} × {shape}"

    model = ChatOpenAI(
        base_url=f"{vllm.url}/v1", api_key="none", model="chat_vllm", max_retries=0, temperature=0
    )
    answer = model.bind_tools([paint], tool_choice="paint").invoke("Paint a circle.")
    [call] = answer.tool_calls
    assert call["name"] == "paint"
    assert call["args"].keys() == {"shape", "count"}
    structured = model.with_structured_output(SCENE | {"title": "scene"}, method="json_schema")
    jsonschema.validate(structured.invoke("A scene."), SCENE)
