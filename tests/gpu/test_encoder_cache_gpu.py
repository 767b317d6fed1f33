"""The cache on a GPU: what streams and evictions could spoil."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from msgspec.structs import replace

from triptych import families
from triptych.encode import Encoder
from triptych.encode.ahead import EncodeAhead
from triptych.encode.jobs import octets
from triptych.encode.keys import content_key
from triptych.settings import EncoderSettings
from unit.qwen import WIDTH, picture, request, write_checkpoint

pytestmark = pytest.mark.gpu

TOKENS = 16
NBYTES = TOKENS * WIDTH * 4
"""Of one picture of these tests, float32."""


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return families.load(write_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint"))


def make_encoder(family, device, **settings):
    settings = EncoderSettings(
        model=str(family.checkpoint.path), encoder_dtype="float32", **settings
    )
    return Encoder(family, settings, device)


@pytest.fixture(scope="module")
def media(family):
    found = [picture(family, 112, 112, seed=seed) for seed in range(24)]
    assert {item.tokens for item, _ in found} == {TOKENS}
    return found


@pytest.fixture(scope="module")
def expected(family, media):
    """From the CPU, without a cache."""
    encoder = make_encoder(family, torch.device("cpu"), encoder_cache_mb=0)
    return [encoder.encode([request(one)])[0].embeddings.view(torch.float32) for one in media]


def close(answer, wanted):
    torch.testing.assert_close(
        answer.embeddings.view(torch.float32).cpu(), wanted, atol=1e-4, rtol=0
    )


def test_evicted_to_the_host_and_back(cuda, family, media, expected):
    encoder = make_encoder(family, cuda, encoder_host_cache_mb=1)
    encoder.cache._tiers["device"].limit = 4 * NBYTES
    for _ in range(3):
        for one, wanted in zip(media, expected, strict=True):
            [answer] = encoder.encode([request(one)])
            assert answer.embeddings.device == cuda
            close(answer, wanted)
    assert encoder.cache.counters.misses == len(media)
    assert encoder.cache.nbytes("device") <= 4 * NBYTES
    assert encoder.cache.nbytes("host") == (len(media) - 4) * NBYTES
    kept = list(encoder.cache._entries.values())
    assert {entry.embeddings.device.type for entry in kept if entry.tier == "host"} == {"cpu"}


def test_the_cache_holds_as_much_memory_as_it_says(cuda, family, media):
    encoder = make_encoder(family, cuda)
    encoder.encode([request(*media)])
    encoder.cache._tiers["device"].limit = 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    encoder.cache._make_room("device", 0)
    assert before - torch.cuda.memory_allocated() == len(media) * NBYTES


def test_answers_are_right_while_another_thread_encodes_and_evicts(cuda, family, media, expected):
    """Two streams, a cache of six for 24 pictures, three seconds."""
    encoder = make_encoder(family, cuda)
    encoder.cache._tiers["device"].limit = 6 * NBYTES
    ahead = EncodeAhead(encoder, 64)
    end, answered, told = time.monotonic() + 3, 0, []
    try:
        turn = 0
        while time.monotonic() < end:
            turn += 1
            index = (7 * turn) % len(media)
            item, pixels = media[index]
            leased, done = [], threading.Event()

            def tell(entry, leased=leased, done=done):
                leased.append(encoder.cache.lease_entry(entry) if entry else None)
                done.set()

            tensor = torch.from_numpy(pixels)
            ahead.submit(content_key(item, octets(tensor)), item, tensor, tell)
            other = (5 * turn) % len(media)
            [beside] = encoder.encode([request(media[other])])
            close(beside, expected[other])
            assert done.wait(10)
            told += leased
            if leased[0]:
                asked = [replace(item, lease=leased[0])], torch.empty(0, dtype=torch.uint8)
                [answer] = encoder.encode([asked])
                close(answer, expected[index])
                answered += 1
    finally:
        ahead.stop()
    assert answered > 100
    assert encoder.cache.counters.evictions["device"] > 100
