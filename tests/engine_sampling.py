"""What sampling means, held by every engine that draws tokens: `sampling.FIELDS` as tests.

A test module inherits `SamplingContract` and gives the fixtures ``engine`` and ``reference``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engine_contract import need, words
from generations import changed, collect, generation, text, whole
from reference import HuggingFaceReference
from triptych.engines.base import Engine
from triptych.engines.token_bytes import token_bytes
from triptych.families import Family

LENGTH = 16


def penalised(model: Any, prompt: Sequence[int], **penalties: float) -> list[int]:
    """The likeliest tokens after the penalties, by the formulas of `sampling.FIELDS`."""
    drawn: list[int] = []
    for _ in range(LENGTH):
        ids = torch.tensor([[*prompt, *drawn]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        seen = ids.unique()
        factor = penalties.get("repetition_penalty", 1.0)
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
        times = torch.bincount(torch.tensor(drawn, dtype=torch.long), minlength=len(logits))
        logits -= penalties.get("frequency_penalty", 0.0) * times
        logits -= penalties.get("presence_penalty", 0.0) * (times > 0)
        drawn.append(int(logits.argmax()))
    return drawn


class SamplingContract:
    @pytest.mark.parametrize(
        "narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0.0}]
    )
    async def test_the_likeliest_token_alone_is_greedy(
        self, engine: Engine, family: Family, narrow: dict[str, Any]
    ) -> None:
        need(engine, next(iter(narrow)))
        prompt, _ = generation(family, words(family), max_tokens=LENGTH)
        greedy = text(await collect(engine, prompt))
        free = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}
        drawn = changed(prompt, **{**free, **narrow})
        assert text(await collect(engine, drawn)) == greedy

    async def test_the_warmer_the_more_varied(self, engine: Engine, family: Family) -> None:
        prompt, _ = generation(family, words(family), max_tokens=LENGTH)
        said = {}
        for temperature in (0.01, 2.0):
            said[temperature] = {
                text(await collect(engine, changed(prompt, temperature=temperature)))
                for _ in range(4)
            }
        assert len(said[0.01]) == 1
        assert len(said[2.0]) > 1

    @pytest.mark.parametrize(
        ("penalty", "value"),
        [
            ("presence_penalty", 2.0),
            ("presence_penalty", -2.0),
            ("frequency_penalty", 2.0),
            ("frequency_penalty", -2.0),
            ("repetition_penalty", 2.0),
            ("repetition_penalty", 0.5),
        ],
    )
    async def test_penalties_are_those_of_the_formula(
        self,
        engine: Engine,
        family: Family,
        reference: HuggingFaceReference,
        penalty: str,
        value: float,
    ) -> None:
        need(engine, penalty)
        ids = words(family)
        wanted = penalised(reference.model, ids, **{penalty: value})
        prompt, _ = generation(family, ids, max_tokens=LENGTH, **{penalty: value})
        said = text(await collect(engine, prompt))
        assert whole(said) == whole(reference.tokenizer.decode(wanted, skip_special_tokens=True))

    async def test_logprobs_are_the_models_own(
        self, engine: Engine, family: Family, reference: HuggingFaceReference
    ) -> None:
        """Before temperature: whatever is drawn, the first place looks the same."""
        need(engine, "top_logprobs")
        ids = words(family)
        with torch.inference_mode():
            logits = reference.model(input_ids=torch.tensor([ids])).logits[0, -1]
        wanted = logits.log_softmax(0).topk(5)
        pieces = reference.tokenizer.convert_ids_to_tokens(wanted.indices.tolist())
        for temperature in (0.0, 0.5, 1.5):
            prompt, _ = generation(
                family, ids, max_tokens=1, temperature=temperature, logprobs=True, top_logprobs=5
            )
            [entry] = [entry for delta in await collect(engine, prompt) for entry in delta.logprobs]
            assert [other.raw or other.token.encode() for other in entry.top] == [
                token_bytes(piece) for piece in pieces
            ]
            got = torch.tensor([other.logprob for other in entry.top])
            torch.testing.assert_close(got, wanted.values, atol=1e-3, rtol=1e-3)
