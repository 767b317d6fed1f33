"""vLLM itself: the promises of every engine, and Hugging Face's tokens."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from babbler import make_reciter
from collector import Collector
from engine_contract import SLOTS, EngineContract, long, words
from engine_sampling import SamplingContract
from engine_structure import StructureContract
from engine_tokens import TokensContract
from generations import changed, collect, generation, picture, text
from triptych import families
from triptych.engines.base import Engine
from triptych.engines.vllm import VllmEngine
from triptych.errors import Cancelled, ConfigurationError, Unavailable, UnknownField
from triptych.families import Family
from triptych.settings import DecodeSettings

pytestmark = [
    pytest.mark.engine,
    # One loop for all tests, since the engine lives on the one that started it.
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM's own warnings are not ours, and its process is a fork of this one.
    pytest.mark.filterwarnings("default"),
]


def vllm(family: Family, **settings: Any) -> VllmEngine:
    model = str(family.checkpoint.path)
    return VllmEngine(DecodeSettings(model=model, max_num_seqs=SLOTS, **settings), family)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(family: Family) -> AsyncIterator[Engine]:
    engine = vllm(family)
    await engine.start()
    yield engine
    await engine.stop()


class TestVllm(EngineContract, SamplingContract, StructureContract, TokensContract):
    pass


async def test_a_picture_seen_before_is_known_by_its_hash(engine: Engine, family: Family) -> None:
    # Blocks of the cache are 128 tokens, and only whole ones are kept.
    ids = words(family, pictures=1) + words(family) * 20
    this, that = (
        generation(family, ids, *zip(picture(family, seed), strict=True)) for seed in (98, 99)
    )
    first = await collect(engine, *this)
    again = await collect(engine, changed(this[0]), this[1])
    other = await collect(engine, *that)

    cached = [
        deltas[-1].usage.cached_tokens for deltas in (first, again, other) if deltas[-1].usage
    ]
    assert cached[1] >= 128
    assert cached[0] == cached[2] == 0
    assert text(first) == text(again) != text(other)


async def test_seeds_differ(engine: Engine, family: Family) -> None:
    prompt, _ = generation(family, words(family), temperature=1.0)
    said = {text(await collect(engine, changed(prompt, seed=seed))) for seed in range(8)}
    assert len(said) > 1


async def test_an_engine_that_serves_in_turn_refuses_priorities(
    engine: Engine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_has_priorities", False)
    prompt, _ = generation(family, words(family), max_tokens=2, priority=1)
    with pytest.raises(UnknownField, match="'fcfs', got 1") as refused:
        await collect(engine, prompt)
    assert refused.value.where == "priority"
    assert await collect(engine, changed(prompt, priority=0))


async def test_characters_of_several_bytes_are_never_cut(checkpoint: Path, tmp_path: Path) -> None:
    said = "é€😀"
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    cycle = tokenizer.encode(said).ids
    assert len(cycle) == len(said.encode()), "a token for each byte"
    family = families.load(make_reciter(checkpoint, tmp_path / "model", cycle))
    engine = vllm(family)
    await engine.start()
    try:
        prompt, _ = generation(family, cycle, max_tokens=2 * len(cycle), logprobs=True)
        deltas = await collect(engine, prompt)
        stopped = await collect(engine, changed(prompt, stop=("€",)))
    finally:
        await engine.stop()

    assert text(deltas) == 2 * said
    assert all(set(delta.text) <= set(said) for delta in deltas)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert b"".join(entry.raw or entry.token.encode() for entry in entries) == 2 * said.encode()
    assert text(stopped) == "é"


async def test_its_span_is_in_the_callers_trace(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    # vLLM sets it for its workers, and it would stay for the engines after this one.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
    with Collector() as collector:
        engine = vllm(family, otlp_endpoint=collector.url)
        await engine.start()
        try:
            prompt, _ = generation(family, words(family), max_tokens=3)
            traced = msgspec.structs.replace(prompt, traceparent=f"00-{trace}-{caller}-01")
            await collect(engine, traced)
            found = await asyncio.to_thread(collector.wait, "llm_request", seconds=60.0)
        finally:
            await engine.stop()
    span = found["llm_request"]
    assert span.trace_id.hex() == trace
    assert span.parent_span_id.hex() == caller
    told = {each.key: each.value.int_value for each in span.attributes}
    assert told["gen_ai.usage.completion_tokens"] == 3


async def test_unknown_engine_arguments_are_named(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    file.write_text(json.dumps({"max_model_length": 64}))
    engine = vllm(family, engine_args=str(file))
    with pytest.raises(ConfigurationError, match=r"'max_model_length'.*'max_model_len'"):
        await engine.start()
    await engine.stop()


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "No such file"), ("{", "truncated"), ("[1]", "array"), ('{"dtype": "int3"}', "int3")],
)
async def test_wrong_engine_arguments_are_named(
    family: Family, tmp_path: Path, content: str | None, named: str
) -> None:
    file = tmp_path / "engine.json"
    if content is not None:
        file.write_text(content)
    engine = vllm(family, engine_args=str(file))
    with pytest.raises(ConfigurationError, match=named):
        await engine.start()


async def test_an_engine_that_dies_is_reported_and_can_be_stopped(
    family: Family, tmp_path: Path
) -> None:
    file = tmp_path / "engine.json"
    file.write_text(json.dumps({"max_model_len": 1024}))
    before = children()
    engine = vllm(family, engine_args=str(file))
    await engine.start()
    assert engine.context_length == 1024, "the user's argument did not overrule ours"
    [process] = children() - before
    case = generation(family, words(family) * 20, max_tokens=500)
    running = asyncio.create_task(collect(engine, *case))
    await asyncio.sleep(0.1)
    os.kill(process, signal.SIGKILL)

    with pytest.raises(Unavailable, match="died"):
        await asyncio.wait_for(running, 10)
    with pytest.raises(Unavailable, match="died"):
        await engine.health()
    with pytest.raises(Unavailable, match="died"):
        await collect(engine, *generation(family, words(family)))
    await engine.stop()
    await engine.stop()
    assert not children() - before


async def test_stop_ends_what_runs_and_leaves_no_process(family: Family) -> None:
    before = children()
    engine = vllm(family)
    await engine.start()
    assert children() - before
    tasks = [asyncio.create_task(collect(engine, *long(family))) for _ in range(SLOTS + 1)]
    await asyncio.sleep(0.1)
    await engine.stop()
    for end in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(end, Cancelled | Unavailable)
    assert not children() - before
    with pytest.raises(Unavailable):
        await engine.health()


STARTED_AND_KILLED = """
import asyncio, os, signal, sys
from triptych import families
from triptych.engines.vllm import VllmEngine
from triptych.settings import DecodeSettings

async def main():
    engine = VllmEngine(DecodeSettings(model=sys.argv[1]), families.load(sys.argv[1]))
    await engine.start()
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_a_spawned_engine_dies_with_its_parent(family: Family, tmp_path: Path) -> None:
    # A forked one, which is the default on a CPU, is held to that by the tests of the server.
    program = tmp_path / "program.py"
    program.write_text(STARTED_AND_KILLED)
    environ = {**os.environ, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        program,
        family.checkpoint.path,
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    # The pipe is closed when the last process that holds it has ended.
    said, _ = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == -signal.SIGKILL, said.decode()


def children() -> set[int]:
    """Living processes under this one, but for Python's resource tracker, which has none's data."""
    found = psutil.Process().children(recursive=True)
    return {
        child.pid
        for child in found
        if child.status() != psutil.STATUS_ZOMBIE
        and not any("resource_tracker" in part for part in child.cmdline())
    }
