"""Answers that are held to a schema: what every engine that takes one promises.

A test module inherits `StructureContract` and gives the fixtures ``engine`` and ``family``; the
model should be a babbler, which has no reason of its own to write JSON.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from engine_contract import need, words
from generations import collect, generation, text
from triptych.chat.structure import ANY_OBJECT, structural_tag
from triptych.chat.tool_calls import ToolCallReader
from triptych.chat.tools import NamedTool, Tool, ToolChoice
from triptych.engines.base import Engine
from triptych.errors import InvalidValue, TriptychError
from triptych.families import Family

SCENE = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "triangle"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "large": {"type": "boolean"},
        "at": {
            "type": "array",
            "items": {"type": "integer", "minimum": -9, "maximum": 9},
            "minItems": 2,
            "maxItems": 2,
        },
    },
    "required": ["shape", "count", "large", "at"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": SCENE,
    "value": {"enum": ["yes", "no", 7, None]},
    "list": {"type": "array", "items": {"$ref": "#/$defs/scene"}, "minItems": 1, "maxItems": 2,
             "$defs": {"scene": SCENE}},
    "choice": {"anyOf": [{"const": "none"}, SCENE]},
    "pattern": {"type": "string", "pattern": "^[a-f]{2,4}-[0-9]{3}$"},
}  # fmt: skip
HOSTILE: list[Any] = [
    {"$ref": "#"},
    {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    {"type": "string", "minLength": 10**9},
    {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    {"type": "string", "pattern": "(.*a.*){30}"},
    {"type": "integer", "minimum": 5, "maximum": 1},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"enum": []},
    {"not": {}},
]
"""No answer fulfils some of them, and of others no engine can tell soon."""
TOOLS = [Tool("paint", parameters=SCENE), Tool("wash")]


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


class StructureContract:
    @pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    async def test_an_answer_fulfils_its_schema(
        self, engine: Engine, family: Family, schema: dict[str, Any], temperature: float
    ) -> None:
        need(engine, "response_format")
        prompt, media = generation(
            family,
            words(family),
            json_schema=json.dumps(schema),
            temperature=temperature,
            seed=1,
            max_tokens=1000,
        )
        deltas = await collect(engine, prompt, media)
        assert deltas[-1].finish_reason == "stop"
        jsonschema.validate(json.loads(text(deltas)), schema)

    async def test_any_object_is_one(self, engine: Engine, family: Family) -> None:
        """It need not end: the babbler's may be as long as it likes."""
        need(engine, "response_format")
        schema = json.dumps(ANY_OBJECT)
        prompt, media = generation(family, words(family), json_schema=schema, max_tokens=20)
        deltas = await collect(engine, prompt, media)
        assert text(deltas).startswith("{")
        if deltas[-1].finish_reason == "stop":
            assert isinstance(json.loads(text(deltas)), dict)

    @pytest.mark.parametrize(
        ("schema", "said"),
        [
            ({"type": "nosuch"}, "nosuch"),
            ({"type": "string", "pattern": "("}, "parenthesis"),
            ({"$ref": "#/$defs/none"}, "none"),
            ({"type": "integer", "multipleOf": 7}, "keywords"),
            (deep(200), "nested too deeply"),
        ],
    )
    async def test_what_cannot_be_held_is_refused_at_its_place(
        self, engine: Engine, family: Family, schema: dict[str, Any], said: str
    ) -> None:
        need(engine, "response_format")
        prompt, media = generation(family, words(family), json_schema=json.dumps(schema))
        with pytest.raises(InvalidValue) as error:
            await collect(engine, prompt, media)
        assert error.value.where == "response_format.json_schema.schema"
        assert said in error.value.what
        assert ".cc" not in error.value.what

    @pytest.mark.parametrize("schema", HOSTILE, ids=str)
    async def test_no_schema_ends_the_engine(
        self, engine: Engine, family: Family, schema: Any
    ) -> None:
        need(engine, "response_format")
        written = json.dumps(schema)
        prompt, media = generation(family, words(family), json_schema=written, max_tokens=8)
        try:
            await collect(engine, prompt, media)
        except TriptychError as error:
            assert error.http_status < 500, error  # noqa: PT017 - it may be answered as well
        plain, media = generation(family, words(family), max_tokens=2)
        assert (await collect(engine, plain, media))[-1].finish_reason == "length"

    @pytest.mark.parametrize(
        ("choice", "parallel", "names"),
        [
            ("required", False, {"paint", "wash"}),
            (NamedTool("paint"), True, {"paint"}),
            (NamedTool("wash"), True, {"wash"}),
        ],
    )
    async def test_a_call_that_must_come_comes(
        self,
        engine: Engine,
        family: Family,
        choice: ToolChoice,
        parallel: bool,
        names: set[str],
    ) -> None:
        need(engine, "tool_choice")
        tag = structural_tag(TOOLS, choice, parallel=parallel, response_format=None)
        for seed in range(3):
            prompt, media = generation(
                family,
                words(family),
                structural_tag=tag,
                temperature=1.0,
                seed=seed,
                max_tokens=1000,
            )
            deltas = await collect(engine, prompt, media)
            assert deltas[-1].finish_reason == "stop"
            reader = ToolCallReader([tool.name for tool in TOOLS])
            found = reader.feed(text(deltas))
            assert not found.content
            [call] = found.calls
            assert call.name in names
            wanted = SCENE if call.name == "paint" else {"type": "object", "maxProperties": 0}
            jsonschema.validate(json.loads(call.arguments), wanted)

    async def test_tools_that_cannot_be_held_are_refused(
        self, engine: Engine, family: Family
    ) -> None:
        need(engine, "tool_choice")
        for parameters in ({"type": "nosuch"}, {"properties": {"a": {"allOf": [{}, {}]}}}):
            tool = Tool("paint", parameters=parameters)
            tag = structural_tag([tool], "required", parallel=True, response_format=None)
            prompt, media = generation(family, words(family), structural_tag=tag)
            with pytest.raises(InvalidValue) as error:
                await collect(engine, prompt, media)
            assert error.value.where == "tools"
