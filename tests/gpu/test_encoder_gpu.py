"""The encoder on a GPU: the same numbers as on the CPU, and answers that stay on the device."""

from __future__ import annotations

import pytest
import torch

from triptych import families
from triptych.encode import Encoder, replay
from triptych.encode.replay import AFTER
from triptych.settings import EncoderSettings
from unit.qwen import WIDTH, clip, picture, request, write_checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return families.load(write_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint"))


def make_encoder(family, device, **settings):
    return Encoder(
        family, EncoderSettings(model=str(family.checkpoint.path), **settings), torch.device(device)
    )


def as_float(encoded):
    """Every item's embeddings, on the CPU, end to end without the gaps: (tokens, width)."""
    parts = [
        encoded.embeddings[item.offset : item.offset + item.nbytes]
        .view(getattr(torch, item.dtype))
        .view(item.shape)
        for item in encoded.ticket.items
    ]
    return torch.cat(parts).cpu().float()


@pytest.fixture(scope="module")
def requests(family):
    sizes = [(300, 200), (56, 56), (448, 420), (10, 1000), (448, 448), (300, 200)]
    media = [picture(family, *size, seed=seed) for seed, size in enumerate(sizes)]
    return [request(*media[:2]), request(media[2]), request(*media[3:])]


def test_float32_is_as_on_the_cpu(cuda, family, requests):
    """1e-4: the GPU multiplies in another order; TensorFloat-32 is off."""
    assert not torch.backends.cuda.matmul.allow_tf32
    on_gpu = make_encoder(family, cuda, encoder_dtype="float32").encode(requests)
    on_cpu = make_encoder(family, "cpu").encode(requests)
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert one.embeddings.device == cuda
        assert one.ticket == other.ticket
        torch.testing.assert_close(as_float(one), as_float(other), atol=1e-4, rtol=0)


def test_bfloat16_is_the_default_and_close(cuda, family, requests):
    on_gpu = make_encoder(family, cuda).encode(requests)
    on_cpu = make_encoder(family, "cpu").encode(requests)
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert {item.dtype for item in one.ticket.items} == {"bfloat16"}
        exact, rounded = as_float(other), as_float(one)
        assert (exact - rounded).norm() < 0.03 * exact.norm()


def test_pixels_are_normalised_to_the_same_bits(cuda, family):
    _, pixels = picture(family, 300, 200)
    patches = [
        family.load_tower(device, torch.float32).patchify(torch.from_numpy(pixels).to(device)).cpu()
        for device in (torch.device("cpu"), cuda)
    ]
    assert torch.equal(*patches)


def test_clips(cuda, family):
    item, pixels = clip(family, 5, 56, 140)
    results = []
    for device in (torch.device("cpu"), cuda):
        tower = family.load_tower(device, torch.float32)
        with torch.inference_mode():
            [embeddings] = tower.encode([item], [torch.from_numpy(pixels).to(device)])
        assert embeddings.shape == (item.tokens, WIDTH)
        results.append(embeddings.cpu())
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)


def test_passes_that_come_again_are_replayed_with_the_same_bits(cuda, family):
    """Other pictures of the same sizes each time; one pass is too large to be worth it."""
    encoder = make_encoder(family, cuda, encoder_cache_mb=0, encoder_graph_tokens=120)
    plain = make_encoder(family, cuda, encoder_cache_mb=0, encoder_graph_tokens=0)
    for seed in range(8):
        batch = [
            request(picture(family, 300, 200, seed=seed), picture(family, 56, 56, seed=seed)),
            request(clip(family, 5, 56, 140)),
        ]
        large = [request(picture(family, 600, 600, seed=seed))]
        for requests in (batch, batch[::-1], large):
            ours, theirs = encoder.encode(requests), plain.encode(requests)
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one.embeddings, other.embeddings)
    assert encoder._tower.replayed == 2 * 8 - (AFTER - 1)
    assert len(encoder._tower._graphs) == 1


def test_graphs_beyond_those_kept_are_let_go(cuda, family, monkeypatch):
    monkeypatch.setattr(replay, "KEPT", 2)
    encoder = make_encoder(family, cuda, encoder_cache_mb=0)
    plain = make_encoder(family, cuda, encoder_cache_mb=0, encoder_graph_tokens=0)
    sizes = [(56, 56), (84, 56), (112, 56), (56, 56)]
    for turn in range(2 * AFTER):
        for side, size in enumerate(sizes):
            asked = [request(picture(family, *size, seed=10 * turn + side))]
            [one], [other] = encoder.encode(asked), plain.encode(asked)
            assert torch.equal(one.embeddings, other.embeddings)
    assert len(encoder._tower._graphs) == 2
