"""vLLM that fetches embeddings itself: what happens to leases, and that a failure is one request's.

That its tokens are the same, the tests of the families show.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace

from babbler import make_babbler
from by_ticket import ByTicket, vllm
from checkpoints import tiny_llava_next_video
from engine_contract import SLOTS, EngineContract, about_a_picture, first, long, words
from generations import changed, collect, generation, picture, text
from handover import MIB, SECRET, owner
from triptych import families
from triptych.contract import Prompt, Ticket
from triptych.engines.base import Media
from triptych.engines.claim import Claim
from triptych.engines.echo import EchoEngine
from triptych.engines.vllm import VllmEngine
from triptych.errors import (
    Cancelled,
    ConfigurationError,
    InvalidValue,
    LeaseLost,
    TriptychError,
    Unavailable,
)
from triptych.families import Family
from triptych.settings import DecodeSettings

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM's own warnings are not ours, and its process is a fork of this one.
    pytest.mark.filterwarnings("default"),
]

TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def family(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return families.load(make_babbler(checkpoint, tmp_path_factory.mktemp("babbler") / "model"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(family: Family) -> AsyncIterator[ByTicket]:
    settings = {"max_num_seqs": SLOTS, "handover_timeout_s": TIMEOUT_S}
    async with vllm(family, "connector", **settings) as engine:
        yield engine


class TestConnector:
    """Of every engine's promises, those that have to do with media."""

    test_each_has_its_own = EngineContract.test_each_generation_has_its_own_pictures
    test_in_their_order = EngineContract.test_several_pictures_in_their_order
    test_abort_ends = EngineContract.test_abort_ends_a_generation
    test_logprobs = EngineContract.test_logprobs


def seen(family: Family, seed: int, **sampling: Any) -> tuple[Prompt, Media]:
    """A request about a picture that fills more than a block of vLLM's prefix cache."""
    ids = words(family, pictures=1) + words(family) * 20
    return generation(family, ids, *zip(picture(family, seed), strict=True), **sampling)


async def test_what_the_prefix_cache_has_is_not_fetched(engine: ByTicket, family: Family) -> None:
    prompt, media = seen(family, 98)
    once = await collect(engine, prompt, media)
    ticket = engine.far.hand_over(media)
    engine.far.ask("corrupt", ticket.items[0].nixl.address)  # type: ignore[union-attr]
    again = await collect(engine, changed(prompt), Claim(ticket))
    assert again[-1].usage is not None
    assert again[-1].usage.cached_tokens >= 128
    assert text(again) == text(once)
    engine.far.leases(0)


async def test_the_same_picture_in_many_requests_at_once(engine: ByTicket, family: Family) -> None:
    prompt, media = about_a_picture(family, 97)
    expected = text(await collect(engine, prompt, media))
    cases = [changed(prompt) for _ in range(4 * SLOTS)]
    answers = await asyncio.gather(*(collect(engine, case, media) for case in cases))
    assert {text(deltas) for deltas in answers} == {expected}
    engine.far.leases(0)


async def test_more_pictures_than_vllm_keeps(engine: ByTicket, family: Family) -> None:
    """Twice round, so that each was evicted by the others and is fetched anew."""
    cases = [
        generation(family, words(family, pictures=1), [tensor], [grid])
        for tensor, grid in (picture(family, seed, rows=40, columns=60) for seed in range(8))
    ]
    said = [text(await collect(engine, changed(prompt), media)) for prompt, media in cases]
    assert len(set(said)) == len(said)
    for (prompt, media), answer in zip(cases, said, strict=True):
        again = changed(prompt, seed=1)
        assert text(await collect(engine, again, media)) == answer
    engine.far.leases(0)


@asynccontextmanager
async def altered(engine: ByTicket, media: Media, **fields: Any) -> AsyncIterator[Ticket]:
    ticket = engine.far.hand_over(media)
    [item] = ticket.items
    assert item.nixl is not None
    span = replace(item.nixl, **fields)
    (agent,) = ticket.agents.values()
    yield Ticket([replace(item, nixl=span)], {span.agent: agent})
    await engine.give_back(Claim(ticket))


def expired(engine: ByTicket, media: Media) -> AbstractAsyncContextManager[Ticket]:
    return altered(engine, media, generation=1)


def forged(engine: ByTicket, media: Media) -> AbstractAsyncContextManager[Ticket]:
    return altered(engine, media, agent="encoder-forged")


@asynccontextmanager
async def damaged(engine: ByTicket, media: Media) -> AsyncIterator[Ticket]:
    ticket = engine.far.hand_over(media)
    engine.far.ask("corrupt", ticket.items[0].nixl.address + 1000)  # type: ignore[union-attr]
    yield ticket


@asynccontextmanager
async def orphaned(engine: ByTicket, media: Media) -> AsyncIterator[Ticket]:
    with owner(16 * MIB) as brief:
        ticket = brief.hand_over(media)
        brief.process.kill()
        brief.process.join()
    yield ticket


@pytest.mark.parametrize(
    ("spoil", "seed", "error", "message"),
    [
        (expired, 80, LeaseLost, "no longer holds"),
        (damaged, 81, Unavailable, "damaged"),
        (forged, 82, InvalidValue, "are those of"),
        (orphaned, 83, Unavailable, "send the request again"),
    ],
)
async def test_a_failed_fetch_is_one_request_s(
    engine: ByTicket,
    family: Family,
    spoil: Callable[[ByTicket, Media], AbstractAsyncContextManager[Ticket]],
    seed: int,
    error: type[TriptychError],
    message: str,
) -> None:
    beside, theirs = about_a_picture(family, 95, max_tokens=64)
    expected = text(await collect(engine, beside, theirs))
    going_on = asyncio.create_task(collect(engine, changed(beside), theirs))
    prompt, media = about_a_picture(family, seed)
    async with spoil(engine, media) as ticket:
        with pytest.raises(error, match=message):
            await collect(engine, prompt, Claim(ticket))
    assert text(await going_on) == expected
    assert text(await collect(engine, changed(prompt), media))
    engine.far.leases(0)


async def test_values_that_are_not_finite_are_refused(engine: ByTicket, family: Family) -> None:
    prompt, [(item, tensor)] = about_a_picture(family, 93)
    with pytest.raises(InvalidValue, match="not finite"):
        await collect(engine, prompt, [(item, tensor / 0)])
    assert text(await collect(engine, changed(prompt), [(item, tensor)]))
    engine.far.leases(0)


@pytest.mark.parametrize("wrong", ["tokens", "width", "hash", "number"])
async def test_a_ticket_that_does_not_fit_the_prompt_never_gets_to_the_engine(
    engine: ByTicket, family: Family, wrong: str
) -> None:
    prompt, media = about_a_picture(family, 92)
    [(item, tensor)] = media
    other = {
        "tokens": [(replace(item, shape=tensor[1:].shape), tensor[1:])],
        "width": [(replace(item, shape=tensor[:, 1:].shape), tensor[:, 1:])],
        "hash": [(replace(item, hash="00"), tensor)],
        "number": [*media, *media],
    }[wrong]
    with pytest.raises(InvalidValue):
        await collect(engine, prompt, other)
    engine.far.leases(0)


async def test_who_is_aborted_while_waiting_for_a_slot_gives_its_lease_back(
    engine: ByTicket, family: Family
) -> None:
    running = [engine.generate(*long(family)) for _ in range(SLOTS)]
    for deltas in running:
        await first(deltas, 1)
    prompt, media = about_a_picture(family, 91)
    waiting = asyncio.create_task(collect(engine, prompt, media))
    await asyncio.sleep(0.2)
    engine.far.leases(1)
    await engine.abort(prompt.id)
    with pytest.raises(Cancelled):
        await waiting
    engine.far.leases(0)
    for deltas in running:
        await deltas.aclose()


async def test_who_is_cancelled_at_once_gives_its_lease_back(
    engine: ByTicket, family: Family
) -> None:
    tasks = [asyncio.create_task(collect(engine, *about_a_picture(family, 90))) for _ in range(20)]
    for place, task in enumerate(tasks):
        await asyncio.sleep(0.001 * (place % 4))
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    engine.far.leases(0)
    await engine.health()


async def test_who_is_preempted_begins_anew_with_its_embeddings(
    engine: ByTicket, family: Family, tmp_path: Path
) -> None:
    """The prompts fit in together, the answers do not: all of them want 28 blocks."""
    arguments = tmp_path / "engine.json"
    arguments.write_text(json.dumps({"num_gpu_blocks_override": 14, "block_size": 32}))
    cases = [about_a_picture(family, seed, max_tokens=160) for seed in range(4)]
    expected = [text(await collect(engine, *case)) for case in cases]
    settings = {"engine_args": str(arguments), "max_model_len": 400, "handover_buffer_mb": 1}
    async with vllm(family, "connector", **settings) as short:
        answers = await asyncio.gather(
            *(collect(short, changed(prompt), media) for prompt, media in cases)
        )
        assert [text(deltas) for deltas in answers] == expected


def configured(family: Family, **settings: Any) -> VllmEngine:
    model = str(family.checkpoint.path)
    given = {"embedding_ingest": "connector", "handover_key": SECRET, **settings}
    return VllmEngine(DecodeSettings(model=model, **given), family)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ec_transfer_config": {"ec_connector": "x"}}, "ec_transfer_config"),
        ({"worker_extension_cls": "x.Y"}, "worker_extension_cls"),
        ({"tensor_parallel_size": 2}, "only worker"),
    ],
)
async def test_an_engine_that_cannot_fetch_does_not_start(
    family: Family, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    file = tmp_path / "engine.json"
    file.write_text(json.dumps(arguments))
    engine = configured(family, engine_args=str(file))
    with pytest.raises(ConfigurationError, match=message):
        await engine.start()
    await engine.stop()


async def test_a_family_whose_pixels_the_engine_wants_is_refused(tmp_path: Path) -> None:
    engine = configured(families.load(tiny_llava_next_video(tmp_path / "model")))
    with pytest.raises(ConfigurationError, match="pixels of LLaVA-NeXT-Video"):
        await engine.start()
    await engine.stop()


async def test_an_engine_that_only_takes_embeddings_is_refused(family: Family) -> None:
    settings = DecodeSettings(model=str(family.checkpoint.path), embedding_ingest="connector")
    with pytest.raises(ConfigurationError, match="the engine echo has no embedding_ingest"):
        EchoEngine(settings, family)
