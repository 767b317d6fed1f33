"""SGLang itself, from its own environment: the promises of every engine, and its tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from babbler import make_babbler
from engine_contract import SLOTS, EngineContract
from engine_sampling import SamplingContract
from engine_tokens import TokensContract
from reference import HuggingFaceReference
from triptych import families
from triptych.engines.base import Engine
from triptych.engines.sglang import SglangEngine
from triptych.families import Family
from triptych.settings import DecodeSettings

pytestmark = [
    pytest.mark.engine,
    # One loop for all tests, since the engine lives on the one that started it.
    pytest.mark.asyncio(loop_scope="module"),
]

PYTHON = Path(__file__).parents[2] / ".venvs" / "sglang" / "bin" / "python"


class Sglang(SglangEngine):
    python = PYTHON


@pytest.fixture(scope="module")
def family(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return families.load(make_babbler(checkpoint, tmp_path_factory.mktemp("babbler") / "model"))


@pytest.fixture(scope="module")
def reference(family: Family) -> HuggingFaceReference:
    return HuggingFaceReference(family.checkpoint.path)


def sglang(family: Family, **settings: Any) -> SglangEngine:
    model = str(family.checkpoint.path)
    return Sglang(DecodeSettings(model=model, max_num_seqs=SLOTS, **settings), family)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(family: Family) -> AsyncIterator[Engine]:
    engine = sglang(family)
    await engine.start()
    yield engine
    await engine.stop()


class TestSglang(EngineContract, SamplingContract, TokensContract):
    pass
