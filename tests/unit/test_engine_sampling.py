"""What the fields of sampling mean, and who refuses them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine_contract import ASKED
from triptych import matrix
from triptych.chat.request import UNSERVED, ChatRequest
from triptych.contract import Sampling
from triptych.engines.base import Engine
from triptych.engines.echo import EchoEngine
from triptych.engines.sampling import (
    FIELDS,
    SUPPORTED,
    Support,
    check_sampling,
    mapped,
    refused,
)
from triptych.errors import UnknownField

NAMES = [field.name for field in FIELDS]
EVERYTHING = Sampling(**ASKED)


def test_every_field_has_one_meaning() -> None:
    carriers = [field.carrier or field.name for field in FIELDS]
    assert sorted(carriers) == sorted(Sampling.__struct_fields__)
    assert len(set(NAMES)) == len(NAMES)
    assert all(field.meaning for field in FIELDS)


def test_what_no_engine_is_asked_for_has_none() -> None:
    assert not set(NAMES) & set(UNSERVED)
    assert not set(ChatRequest.__struct_fields__) & set(UNSERVED)


@pytest.mark.parametrize("engine", [*matrix.ENGINES, EchoEngine], ids=lambda engine: engine.name)
def test_engines_declare_fields_that_there_are(engine: type[Engine]) -> None:
    assert set(engine.sampling) <= set(NAMES)
    assert "max_tokens" in engine.sampling, "every request asks for it"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_declared_is_refused_by_name(name: str) -> None:
    declared = dict.fromkeys(set(NAMES) - {name}, SUPPORTED)
    with pytest.raises(UnknownField, match="the engine slow does not serve") as error:
        check_sampling("slow", declared, EVERYTHING)
    assert error.value.where == name


@pytest.mark.parametrize("support", [SUPPORTED, mapped("another name")])
def test_what_is_declared_passes(support: Support) -> None:
    check_sampling("fast", dict.fromkeys(NAMES, support), EVERYTHING)


def test_what_a_request_does_not_ask_for_is_not_refused() -> None:
    check_sampling("slow", {"max_tokens": SUPPORTED}, Sampling(max_tokens=4))


@pytest.mark.parametrize(
    ("fields", "shown"),
    [({"min_p": 0.25}, "got 0.25: no such thing"), ({"stop": ("x" * 500,)}, 'got ["xxx')],
)
def test_a_refusal_shows_the_value_and_the_reason(fields: dict[str, Any], shown: str) -> None:
    declared = {"max_tokens": SUPPORTED, "min_p": refused("no such thing")}
    with pytest.raises(UnknownField) as error:
        check_sampling("slow", declared, msgspec.structs.replace(Sampling(max_tokens=4), **fields))
    assert shown in error.value.what
    assert len(error.value.what) < 200
