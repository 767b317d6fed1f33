"""The engine that says back what it was given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine_contract import SLOTS, EngineContract, about_a_picture, words
from generations import collect, generation, text
from triptych import families
from triptych.engines.base import Engine
from triptych.engines.echo import EchoEngine, checksum
from triptych.errors import Cancelled, ConfigurationError, Unavailable
from triptych.families import Family
from triptych.settings import DecodeSettings


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Family:
    return families.load(checkpoint)


def echo(family: Family, **settings: float) -> EchoEngine:
    model = str(family.checkpoint.path)
    return EchoEngine(DecodeSettings(model=model, max_num_seqs=SLOTS, **settings), family)


@pytest.fixture
async def engine(family: Family) -> AsyncIterator[Engine]:
    engine = echo(family, echo_token_delay_s=0.002)
    await engine.start()
    yield engine
    await engine.stop()


class TestEcho(EngineContract):
    pass


async def test_says_back_the_prompt_and_each_picture(engine: Engine, family: Family) -> None:
    prompt, media = about_a_picture(family, max_tokens=1000)
    lines = text(await collect(engine, prompt, media)).splitlines()

    assert lines[0].startswith(f"prompt: {prompt.length} tokens, crc32 ")
    assert lines[1] == f"image 0: 12×192 float32, crc32 {checksum(media[0][1]):08x}"
    assert lines[2].startswith("Is there a red circle?")


async def test_pauses_before_each_token(family: Family) -> None:
    engine = echo(family, echo_token_delay_s=0.05)
    await engine.start()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await collect(engine, *generation(family, words(family), max_tokens=4))
    assert loop.time() - begun >= 4 * 0.05


async def test_serves_only_between_start_and_stop(family: Family) -> None:
    engine = echo(family)
    case = generation(family, words(family))
    with pytest.raises(Unavailable):
        await collect(engine, *case)
    await engine.start()
    await engine.health()
    await engine.stop()
    await engine.stop()
    with pytest.raises(Unavailable):
        await engine.health()
    with pytest.raises(Unavailable):
        await collect(engine, *case)


async def test_stop_ends_what_runs(family: Family) -> None:
    engine = echo(family, echo_token_delay_s=10)
    await engine.start()
    tasks = [
        asyncio.create_task(collect(engine, *generation(family, words(family))))
        for _ in range(SLOTS + 1)
    ]
    await asyncio.sleep(0.01)
    await engine.stop()
    for end in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(end, Cancelled)


async def test_a_start_that_fails_can_be_stopped(family: Family, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((family.checkpoint.path / "config.json").read_bytes())
    (tmp_path / "preprocessor_config.json").write_bytes(
        (family.checkpoint.path / "preprocessor_config.json").read_bytes()
    )
    engine = echo(families.load(tmp_path))
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        await engine.start()
    await engine.stop()
