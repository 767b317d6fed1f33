"""Keys and values from elsewhere: who takes them, and in what form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine_contract import words
from generations import generation
from triptych import families
from triptych.chat import chunks
from triptych.contract import KV_TRANSFER, Prompt
from triptych.engines import sglang
from triptych.engines.echo import EchoEngine
from triptych.engines.sglang import SglangEngine
from triptych.engines.trtllm import TrtllmEngine
from triptych.engines.vllm import VllmEngine
from triptych.errors import InvalidValue, UnknownField
from triptych.families import Family
from triptych.settings import DecodeSettings

MEETING = {"bootstrap_host": "a", "bootstrap_port": 8998, "bootstrap_room": 3}


class Taker(EchoEngine):
    transfers = True


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Family:
    return families.load(checkpoint)


def prompt(family: Family, transfer: dict[str, Any]) -> Prompt:
    made, _ = generation(family, words(family))
    return msgspec.structs.replace(made, kv_transfer=transfer)


@pytest.mark.parametrize(
    ("engine_type", "allowed", "why"),
    [(EchoEngine, True, "the engine echo"), (Taker, False, "allow_kv_transfer"), (Taker, True, "")],
)
def test_they_are_taken_where_engine_and_server_do(
    family: Family, engine_type: type[EchoEngine], allowed: bool, why: str
) -> None:
    settings = DecodeSettings(model=str(family.checkpoint.path), allow_kv_transfer=allowed)
    engine = engine_type(settings, family)
    asked = prompt(family, MEETING)
    if not why:
        assert engine.admit(asked, ()) == {}
        return
    with pytest.raises(UnknownField, match=why) as error:
        engine.admit(asked, ())
    assert error.value.where == KV_TRANSFER
    assert engine.admit(prompt(family, {}), ()) == {}


def test_which_engines_do() -> None:
    engines = (VllmEngine, SglangEngine, TrtllmEngine)
    assert [engine.transfers for engine in engines] == [True, True, False]


def test_sglang_is_told_where_its_sides_meet(family: Family) -> None:
    assert sglang._transfer(prompt(family, MEETING)) == MEETING
    assert sglang._transfer(prompt(family, {})) == {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bootstrap_room": -1}, "bootstrap_room"),
        ({"bootstrap_port": "8998"}, "bootstrap_port"),
        ({"rid": "x"}, "rid"),
    ],
)
def test_sglang_is_told_nothing_else(family: Family, change: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidValue, match=named) as error:
        sglang._transfer(prompt(family, {**MEETING, **change}))
    assert error.value.where == KV_TRANSFER


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_gives_goes_with_the_finish_reason(family: Family, stream: bool) -> None:
    asked = msgspec.structs.replace(prompt(family, {}), stream=stream)
    writer = chunks.ChunkWriter(asked)
    first, *rest = map(
        chunks.decode, writer.end("length", writer.count(1), text="a", kv_transfer=MEETING)
    )
    assert first.kv_transfer_params == MEETING
    assert first.choices[0].finish_reason == "length"
    assert [chunk.kv_transfer_params for chunk in rest] == [msgspec.UNSET] * stream
