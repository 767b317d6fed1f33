"""What every engine must do, whatever runs in it: `Engine`'s promises as tests.

A test module inherits `EngineContract` and gives the fixture ``engine``: started, with two slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch

from generations import changed, collect, generation, picture, text
from triptych.contract import Prompt
from triptych.engines.base import Delta, Engine, Media
from triptych.engines.sampling import FIELDS, UNDECLARED, Field
from triptych.errors import (
    Cancelled,
    ContextTooLong,
    InvalidValue,
    UnknownField,
    UnsupportedMedium,
)
from triptych.families import Family

SLOTS = 2
"""`max_num_seqs` of the engine under test."""
ASKED: dict[str, Any] = {
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "priority": -1,
    "repetition_penalty": 1.5,
    "seed": 7,
    "stop": ("never said",),
    "logprobs": True,
    "top_logprobs": 1,
    "json_schema": '{"type": "object"}',
    "structural_tag": (
        '{"type": "structural_tag",'
        ' "format": {"type": "json_schema", "json_schema": {"type": "object"}}}'
    ),
}
"""A value of each field of `Sampling` that asks for something."""
HELLO = "Is there a red circle? Tell me all that you see, and where, and how large it is."


def words(family: Family, message: str = HELLO, pictures: int = 0) -> list[int]:
    """Token ids of a message, after so many placeholders of pictures."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(family.checkpoint.path / "tokenizer.json"))
    tokens = family.checkpoint.added_tokens
    start, end = tokens["<|vision_start|>"], tokens["<|vision_end|>"]
    shown = [start, tokens[family.placeholder("image")], end] * pictures
    return [*shown, *tokenizer.encode(message, add_special_tokens=False).ids]


def about_a_picture(family: Family, seed: int = 0, **sampling: Any) -> tuple[Prompt, Media]:
    embeddings, grid = picture(family, seed)
    return generation(family, words(family, pictures=1), [embeddings], [grid], **sampling)


def need(engine: Engine, field: str) -> None:
    """Skip what the engine refuses; that it does so by name is `EngineContract`'s to test."""
    if engine.sampling[field].kind == "refused":
        pytest.skip(f"{engine.name} refuses {field}")


async def first(deltas: Any, count: int) -> list[Delta]:
    """The first ``count`` deltas, without closing the iterator."""
    return [await anext(deltas) for _ in range(count)]


class EngineContract:
    async def test_deltas_are_one_answer(self, engine: Engine, family: Family) -> None:
        prompt, media = about_a_picture(family)
        *before, last = await collect(engine, prompt, media)

        assert before, "the answer came in one piece"
        assert all(delta.finish_reason is None and delta.usage is None for delta in before)
        assert last.finish_reason in {"stop", "length"}
        assert last.usage is not None
        assert last.usage.prompt_tokens == prompt.length
        assert last.usage.completion_tokens == sum(delta.tokens for delta in [*before, last])

    @pytest.mark.parametrize("limit", [1, 2, 7])
    async def test_max_tokens(self, engine: Engine, family: Family, limit: int) -> None:
        deltas = await collect(engine, *generation(family, words(family), max_tokens=limit))
        assert deltas[-1].finish_reason == "length"
        assert sum(delta.tokens for delta in deltas) == limit

    async def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(
        self, engine: Engine, family: Family
    ) -> None:
        prompt, _ = generation(family, words(family))
        whole = text(await collect(engine, prompt))
        stop = whole[len(whole) // 2 :][:3]
        deltas = await collect(engine, changed(prompt, stop=("never said", stop)))

        assert text(deltas) == whole[: whole.index(stop)]
        assert deltas[-1].finish_reason == "stop"

    @pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
    async def test_a_field_is_served_or_refused_by_name(
        self, engine: Engine, family: Family, field: Field
    ) -> None:
        carrier = field.carrier or field.name
        asked = {"max_tokens": 4, carrier: ASKED[carrier]}
        prompt, _ = generation(family, words(family), **asked)
        if engine.sampling.get(field.name, UNDECLARED).kind == "refused":
            with pytest.raises(UnknownField) as error:
                await collect(engine, prompt)
            assert error.value.where == field.name
        else:
            assert (await collect(engine, prompt))[-1].finish_reason

    async def test_the_same_seed_draws_the_same(self, engine: Engine, family: Family) -> None:
        need(engine, "seed")
        prompt, _ = generation(family, words(family), temperature=1.0, seed=7)
        said = {text(await collect(engine, changed(prompt))) for _ in range(3)}
        assert len(said) == 1

    async def test_logprobs(self, engine: Engine, family: Family) -> None:
        need(engine, "top_logprobs")
        prompt, media = about_a_picture(family, logprobs=True, top_logprobs=1)
        for delta in await collect(engine, prompt, media):
            assert len(delta.logprobs) == delta.tokens
            for entry in delta.logprobs:
                assert entry.logprob <= 0
                # Greedy: what is drawn is the likeliest.
                assert [other.token for other in entry.top] == [entry.token]

    async def test_no_logprobs_unless_asked(self, engine: Engine, family: Family) -> None:
        deltas = await collect(engine, *about_a_picture(family))
        assert not any(delta.logprobs for delta in deltas)

    async def test_each_generation_has_its_own_pictures(
        self, engine: Engine, family: Family
    ) -> None:
        cases = [about_a_picture(family, seed) for seed in range(6)]
        alone = [text(await collect(engine, prompt, media)) for prompt, media in cases]
        together = await asyncio.gather(
            *(collect(engine, changed(prompt), media) for prompt, media in cases)
        )
        assert [text(deltas) for deltas in together] == alone
        assert len(set(alone)) == len(alone), "the pictures made no difference"

    async def test_several_pictures_in_their_order(self, engine: Engine, family: Family) -> None:
        pictures = [picture(family, 1), picture(family, 2, rows=4, columns=10)]
        ids = words(family, pictures=2)
        said = []
        for order in (pictures, pictures[::-1]):
            prompt, media = generation(family, ids, *zip(*order, strict=True))
            said.append(text(await collect(engine, prompt, media)))
        assert said[0] != said[1]

    async def test_abort_ends_a_generation(self, engine: Engine, family: Family) -> None:
        prompt, media = long(family)
        deltas = engine.generate(prompt, media)
        await first(deltas, 2)
        await engine.abort(prompt.id)
        with pytest.raises(Cancelled):
            await asyncio.wait_for(drain(deltas), 5)

    async def test_abort_of_what_is_not_there_does_nothing(self, engine: Engine) -> None:
        await engine.abort("chatcmpl-nobody")

    @pytest.mark.parametrize("ending", ["abort", "close", "cancel"])
    async def test_slots_are_free_again_at_once(
        self, engine: Engine, family: Family, ending: str
    ) -> None:
        running = [long(family) for _ in range(3 * SLOTS)]
        tasks = [asyncio.create_task(collect(engine, *case)) for case in running[1:]]
        deltas = engine.generate(*running[0])
        await first(deltas, 2)
        if ending == "abort":
            for prompt, _ in running:
                await engine.abort(prompt.id)
        else:
            for task in tasks:
                task.cancel()
        if ending == "close":
            await deltas.aclose()
        else:
            await engine.abort(running[0][0].id)
        ended = await asyncio.gather(*tasks, return_exceptions=True)

        assert {type(end) for end in ended} <= {Cancelled, asyncio.CancelledError}
        short = generation(family, words(family), max_tokens=2)
        await asyncio.wait_for(collect(engine, *short), 2)

    async def test_more_generations_than_slots(self, engine: Engine, family: Family) -> None:
        cases = [generation(family, words(family), max_tokens=5) for _ in range(8 * SLOTS)]
        answers = await asyncio.gather(*(collect(engine, *case) for case in cases))
        assert len({text(deltas) for deltas in answers}) == 1

    async def test_the_lower_priority_goes_first(self, engine: Engine, family: Family) -> None:
        """Both slots are taken; who came last, and has the lower number, gets the next one."""
        need(engine, "priority")
        ended: list[int] = []

        async def ask(priority: int, max_tokens: int) -> None:
            prompt, _ = generation(family, words(family), max_tokens=max_tokens, priority=priority)
            await collect(engine, prompt)
            ended.append(priority)

        running = [asyncio.create_task(ask(0, 300)) for _ in range(SLOTS)]
        await asyncio.sleep(0.2)
        waiting = []
        for priority in (9, 5, -2):
            waiting.append(asyncio.create_task(ask(priority, 4)))
            await asyncio.sleep(0.05)
        await asyncio.gather(*running, *waiting)
        assert [priority for priority in ended if priority] == [-2, 5, 9]

    @pytest.mark.parametrize(
        "fault",
        ["none", "too many", "too few tokens", "too narrow", "too wide", "dtype", "no grid",
         "wrong grid", "another's", "not finite", "another modality"],
    )  # fmt: skip
    async def test_wrong_embeddings_are_refused_and_the_engine_goes_on(
        self, engine: Engine, family: Family, fault: str
    ) -> None:
        prompt, media = about_a_picture(family)
        with pytest.raises((InvalidValue, UnsupportedMedium)):
            await collect(engine, prompt, spoiled(media, fault))
        await engine.health()
        assert text(await collect(engine, changed(prompt), media))

    async def test_a_prompt_that_fills_the_context_is_refused(
        self, engine: Engine, family: Family
    ) -> None:
        ids = words(family)
        ids = (ids * (family.context_length // len(ids) + 1))[: family.context_length]
        with pytest.raises(ContextTooLong, match=str(len(ids))):
            await collect(engine, *generation(family, ids))

    async def test_a_prompt_that_nearly_fills_the_context(
        self, engine: Engine, family: Family
    ) -> None:
        ids = words(family)
        ids = (ids * (family.context_length // len(ids) + 1))[: family.context_length - 3]
        deltas = await collect(engine, *generation(family, ids, max_tokens=100))
        assert deltas[-1].finish_reason in {"length", "stop"}
        assert sum(delta.tokens for delta in deltas) <= 3


def long(family: Family) -> tuple[Prompt, Media]:
    """A generation that would take its time."""
    return generation(family, words(family) * 100, max_tokens=2000)


async def drain(deltas: Any) -> None:
    async for _ in deltas:
        pass


def spoiled(media: Media, fault: str) -> Sequence[tuple[Any, torch.Tensor]]:
    """The media of one picture, made wrong."""
    [(item, tensor)] = media
    tokens, width = tensor.shape

    def other(**fields: Any) -> Any:
        return msgspec.structs.replace(item, **fields)

    wrong = {
        "none": [],
        "too many": [(item, tensor), (item, tensor)],
        "too few tokens": [(item, tensor[:-1])],
        "too narrow": [(other(shape=(tokens, width - 1)), tensor[:, :-1])],
        "too wide": [(other(shape=(tokens, 2 * width)), torch.cat([tensor, tensor], 1))],
        "dtype": [(item, tensor.half())],
        "no grid": [(other(grid_thw=None), tensor)],
        "wrong grid": [(other(grid_thw=(1, 2, 2)), tensor)],
        "another's": [(other(hash="00"), tensor)],
        "not finite": [(item, tensor / 0)],
        "another modality": [(other(modality="audio"), tensor)],
    }
    return wrong[fault]
