"""SGLang itself, from its own environment: the promises of every engine, and its tokens."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch
from tokenizers import Tokenizer

from babbler import make_reciter
from engine_contract import SLOTS, EngineContract, long, words
from engine_sampling import SamplingContract
from engine_tokens import TokensContract
from generations import changed, collect, generation, picture, text
from sglang_engine import Sglang, run, sglang
from triptych import families
from triptych.engines.base import Engine
from triptych.engines.sglang_scratch import LOADS
from triptych.errors import Cancelled, ConfigurationError, ContextTooLong, Unavailable
from triptych.families import Family
from triptych.settings import DecodeSettings

pytestmark = [
    pytest.mark.engine,
    # One loop for all tests, since the engine lives on the one that started it.
    pytest.mark.asyncio(loop_scope="module"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(family: Family) -> AsyncIterator[Engine]:
    async with sglang(family, max_num_seqs=SLOTS) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small(family: Family, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """Reads prompts by 64 tokens, and has room for a part of the model's context."""
    file = tmp_path_factory.mktemp("small") / "engine.json"
    file.write_text(json.dumps({"chunked_prefill_size": 64, "max_total_tokens": 2000}))
    async with sglang(family, engine_args=str(file)) as engine:
        yield engine


class TestSglang(EngineContract, SamplingContract, TokensContract):
    pass


async def test_a_picture_seen_before_is_known_by_its_hash(engine: Engine, family: Family) -> None:
    ids = words(family, pictures=1) + words(family) * 3
    this, that = (
        generation(family, ids, *zip(picture(family, seed), strict=True)) for seed in (98, 99)
    )
    first = await collect(engine, *this)
    again = await collect(engine, changed(this[0]), this[1])
    other = await collect(engine, *that)

    cached = [
        deltas[-1].usage.cached_tokens for deltas in (first, again, other) if deltas[-1].usage
    ]
    assert cached[1] > this[0].length - len(words(family))
    assert cached[0] < this[0].items[0].position + 1
    assert cached[2] < this[0].items[0].position + 1
    assert text(first) == text(again) != text(other)


async def test_pictures_anywhere_in_a_prompt_that_is_read_in_chunks(
    engine: Engine, small: Engine, family: Family
) -> None:
    """A chunk may hold no picture, a part of one, or the ends of two."""
    pictures = [picture(family, 7, 40, 40), picture(family, 8, 8, 6)]
    one, rest = words(family, pictures=1), words(family) * 12
    cases = [
        generation(family, ids, *zip(*pictures[:count], strict=True))
        for ids, count in (
            (one + rest, 1),
            (rest + one, 1),
            (one + words(family) * 3 + one, 2),
            (rest + words(family, pictures=2) + rest, 2),
        )
    ]
    whole = [text(await collect(engine, *case)) for case in cases]
    alone = [text(await collect(small, changed(prompt), media)) for prompt, media in cases]
    together = await asyncio.gather(
        *(collect(small, changed(prompt), media) for prompt, media in cases)
    )
    assert alone == [text(deltas) for deltas in together] == whole


async def test_a_context_that_memory_has_no_room_for_is_shorter(
    small: Engine, family: Family
) -> None:
    """Its longest prompt is served, and a longer one refused."""
    length = small.context_length
    assert 1900 < length <= 2000 < family.context_length
    ids = words(family)
    ids = (ids * (length // len(ids) + 1))[:length]
    assert len(await collect(small, *generation(family, ids[1:], max_tokens=9))) == 1
    with pytest.raises(ContextTooLong, match=str(length)):
        await collect(small, *generation(family, ids))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_embeddings_beyond_all_measure_leave_the_engine_alive(
    engine: Engine, family: Family, temperature: float
) -> None:
    prompt, [(item, tensor)] = generation(
        family,
        words(family, pictures=1),
        *zip(picture(family, 3), strict=True),
        temperature=temperature,
    )
    huge = torch.full_like(tensor, torch.finfo(torch.float32).max)
    huge[::2] *= -1
    assert (await collect(engine, prompt, [(item, huge)]))[-1].finish_reason
    assert text(await collect(engine, *generation(family, words(family))))


async def test_characters_of_several_bytes_are_never_cut(checkpoint: Path, tmp_path: Path) -> None:
    said = "é€😀"
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    cycle = tokenizer.encode(said).ids
    family = families.load(make_reciter(checkpoint, tmp_path / "model", cycle))
    async with sglang(family) as engine:
        prompt, _ = generation(family, cycle, max_tokens=2 * len(cycle), logprobs=True)
        deltas = await collect(engine, prompt)
        stopped = await collect(engine, changed(prompt, stop=("€",)))

    assert text(deltas) == 2 * said
    assert all(set(delta.text) <= set(said) for delta in deltas)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert b"".join(entry.raw or entry.token.encode() for entry in entries) == 2 * said.encode()
    assert text(stopped) == "é"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "No such file"),
        ('{"max_total_token": 64}', r"'max_total_token'.*'max_total_tokens'"),
        ('{"tp_size": "two"}', "refuses its configuration: tp_size is 'two'"),
    ],
)
async def test_wrong_engine_arguments_are_named(
    family: Family, tmp_path: Path, content: str | None, named: str
) -> None:
    before = children()
    file = tmp_path / "engine.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigurationError, match=named):
        async with sglang(family, engine_args=str(file)):
            pass
    assert not children() - before


PROGRAM = """
import json, sys
from triptych import families
from triptych.engines import sglang_process
_, on_cpu = sglang_process._import()
from triptych.engines.sglang_arguments import build_arguments
from triptych.settings import DecodeSettings
model, files = json.load(sys.stdin)
family = families.load(model)
sides = []
for file in files:
    settings = DecodeSettings(model=model, engine_args=file)
    arguments, _ = build_arguments(settings, family, on_cpu=on_cpu)
    sides.append(arguments.disaggregation_mode)
print(json.dumps(sides))
"""


async def test_the_documented_sides_are_arguments_that_sglang_takes(
    family: Family, repository_root: Path, tmp_path: Path
) -> None:
    document = (repository_root / "docs" / "prefill-decode.md").read_text()
    examples = re.findall(r"^```json\n(.*?)^```", document.partition("## SGLang")[2], re.M | re.S)
    files = [tmp_path / f"{number}.json" for number in range(len(examples))]
    for file, example in zip(files, examples, strict=True):
        file.write_text(example)
    asked = [str(family.checkpoint.path), [str(file) for file in files]]
    assert await asyncio.to_thread(run, PROGRAM, asked) == ["prefill", "decode"]


async def test_an_environment_without_sglang_is_named(family: Family) -> None:
    engine = Sglang(DecodeSettings(model=str(family.checkpoint.path)), family)
    engine.python = Path(sys.executable)
    with pytest.raises(ConfigurationError, match="scripts/setup --engine sglang"):
        await engine.start()
    await engine.stop()


async def test_a_process_that_dies_is_reported_and_the_engine_can_be_stopped(
    family: Family,
) -> None:
    before, others = children(), temporary()
    engine = Sglang(DecodeSettings(model=str(family.checkpoint.path)), family)
    await engine.start()
    assert set(engine.pids) == children() - before
    running = asyncio.create_task(collect(engine, *long(family)))
    await asyncio.sleep(0.1)
    os.kill(engine.pids[-1], signal.SIGKILL)  # the detokeniser

    with pytest.raises(Unavailable, match="died"):
        await asyncio.wait_for(running, 10)
    with pytest.raises(Unavailable, match=r"died.*log says why"):
        await engine.health()
    with pytest.raises(Unavailable, match="died"):
        await collect(engine, *generation(family, words(family)))
    await engine.stop()
    await engine.stop()
    assert not children() - before
    assert temporary() == others


async def test_stop_ends_what_runs_and_leaves_nothing(family: Family) -> None:
    before, others = children(), temporary()
    async with sglang(family, max_num_seqs=SLOTS) as engine:
        [scratch] = temporary() - others
        assert shared(engine.pids) == {scratch / LOADS}
        tasks = [asyncio.create_task(collect(engine, *long(family))) for _ in range(SLOTS + 1)]
        await asyncio.sleep(0.1)
    for end in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(end, Cancelled | Unavailable)
    assert not children() - before
    assert temporary() == others
    with pytest.raises(Unavailable):
        await engine.health()


async def test_stop_ends_a_start(family: Family) -> None:
    before = children()
    engine = Sglang(DecodeSettings(model=str(family.checkpoint.path)), family)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(1.0)
    await asyncio.wait_for(engine.stop(), 20)
    with pytest.raises(Unavailable):
        await starting
    assert not children() - before


def temporary() -> set[Path]:
    """What this process has made for engines that are not stopped."""
    found = Path(tempfile.gettempdir()).glob("triptych_*sglang")
    return {path for path in found if f"_{os.getpid()}_" in path.name}


def shared(pids: Sequence[int]) -> set[Path]:
    """Shared memory that they have, and that has a name."""
    maps = {Path(file.path) for pid in pids for file in psutil.Process(pid).memory_maps()}
    folders = {Path("/dev/shm"), *temporary()}
    return {path for path in maps if path.parent in folders and path.exists()}


def children() -> set[int]:
    """Living processes under this one, but for Python's resource tracker."""
    found = psutil.Process().children(recursive=True)
    return {
        child.pid
        for child in found
        if child.status() != psutil.STATUS_ZOMBIE
        and not any("resource_tracker" in part for part in child.cmdline())
    }
