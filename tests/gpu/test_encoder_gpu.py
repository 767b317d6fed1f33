"""The encoder on a GPU: the same numbers as on the CPU, and answers that stay on the device."""

from __future__ import annotations

import pytest
import torch

from triptych import families
from triptych.encode import Encoder
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
