from __future__ import annotations

import time
from itertools import pairwise

import pytest

from triptych.contract import Prompt, PromptItem, Sampling
from triptych.stages.times import Times


def prompt(**times: float) -> Prompt:
    items = [PromptItem("image", 0, 4, "a", cached=True), PromptItem("image", 5, 4, "b")]
    return Prompt("i", 0, "m", [1] * 8, items, Sampling(1), **times)


def test_the_stages_follow_one_another_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = (100.0, 100.25, 101.25, 101.5, 103.5)
    arrived, decoded, encoded, first, last = moments
    times = Times()
    times.encoded = encoded
    for now in (first, last):  # the second token is not the first one
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        times.token()
    found = times.stages(prompt(arrived=arrived, decoded=decoded))
    took = (found.preprocess_ms, found.encode_ms, found.prefill_ms, found.decode_ms)
    assert took == tuple((after - before) * 1000 for before, after in pairwise(moments))
    assert (found.media, found.media_cached) == (2, 1)


def test_a_prompt_that_preprocess_did_not_make_has_no_stages_before_decode() -> None:
    times = Times()
    times.encoded = time.monotonic() - 1
    times.token()
    found = times.stages(prompt())
    assert (found.preprocess_ms, found.encode_ms) == (0, 0)
    assert found.prefill_ms >= 1000


def test_an_answer_without_a_token() -> None:
    found = Times().stages(prompt(arrived=time.monotonic() - 1))
    assert found.preprocess_ms >= 1000
    assert (found.encode_ms, found.prefill_ms, found.decode_ms) == (0, 0, 0)
