from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from triptych import families
from triptych.contract import ITEM_ALIGNMENT, Item
from triptych.encode import Encoded, Encoder
from triptych.errors import InternalError, InvalidValue
from triptych.settings import EncoderSettings
from unit.qwen import WIDTH, picture, request, write_checkpoint

CPU = torch.device("cpu")
TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint")


@pytest.fixture(scope="module")
def family(directory):
    return families.load(directory)


@pytest.fixture
def passes():
    """(items, tokens) of every forward pass."""
    return []


@pytest.fixture
def encoder(directory, family, passes):
    return make_encoder(directory, family, passes)


def make_encoder(directory, family, passes, **settings):
    settings = EncoderSettings(model=str(directory), **settings)
    return Encoder(family, settings, CPU, on_batch=lambda *counts: passes.append(counts))


def embeddings(encoded):
    """Every item's embeddings, read as the ticket says."""
    assert isinstance(encoded, Encoded), encoded
    return [
        encoded.embeddings[item.offset : item.offset + item.nbytes]
        .view(getattr(torch, item.dtype))
        .view(item.shape)
        for item in encoded.ticket.items
    ]


def precomputed(tokens=4, grid=(1, 4, 4), dtype="float16", width=WIDTH):
    array = np.random.default_rng(0).random((tokens, width)).astype(dtype)
    item = Item("image", "mine", dtype, array.shape, 0, tokens, grid, precomputed=True)
    return item, array


def test_requests_share_a_pass_and_each_has_its_own(encoder, family, passes):
    media = [picture(family, 56 + 28 * index, 84, seed=index) for index in range(6)]
    requests = [request(*media[:1]), request(*media[1:4]), request(), request(*media[4:])]
    answers = encoder.encode(requests)
    assert passes == [(6, sum(item.tokens for item, _ in media))]
    assert [len(answer.ticket.items) for answer in answers] == [1, 3, 0, 2]
    together = [one for answer in answers for one in embeddings(answer)]
    for medium, ours in zip(media, together, strict=True):
        [alone] = embeddings(encoder.encode([request(medium)])[0])
        torch.testing.assert_close(ours, alone, **TOLERANCE)
    different = torch.stack([one.mean() for one in together])
    assert len(different.unique()) == len(media)


def test_layout_of_an_answer(directory, family, passes):
    """Aligned, in one piece, nothing of other memory in the gaps, and nothing after the end."""
    encoder = make_encoder(directory, family, passes, encoder_dtype="bfloat16")
    media = [picture(family, 84, 84, seed=index) for index in range(3)]
    [answer] = encoder.encode([request(*media)])
    items = answer.ticket.items
    assert [item.offset for item in items] == [0, 896, 1792]  # 9 × 48 × 2 bytes = 864
    assert all(item.offset % ITEM_ALIGNMENT == 0 for item in items)
    assert answer.embeddings.dtype == torch.uint8
    assert answer.embeddings.shape == (1792 + 864,)
    assert answer.embeddings.is_contiguous()
    assert answer.embeddings.untyped_storage().nbytes() == answer.embeddings.numel()
    assert answer.embeddings[864:896].count_nonzero() == 0
    for item, (source, _) in zip(items, media, strict=True):
        assert (item.dtype, item.shape, item.where) == ("bfloat16", (9, WIDTH), "tensor")
        assert (item.hash, item.grid_thw) == (source.hash, source.grid_thw)


def test_no_media_does_not_touch_the_tower(encoder, passes):
    [answer] = encoder.encode([request()])
    assert answer.ticket.items == []
    assert answer.embeddings.shape == (0,)
    assert encoder.encode([]) == []
    assert passes == []


def test_precomputed_embeddings_pass_through_in_their_place(encoder, family, passes):
    before, after = picture(family, 56, 84), picture(family, 84, 56)
    mine = precomputed()
    [answer] = encoder.encode([request(before, mine, after)])
    first, middle, last = embeddings(answer)
    assert np.array_equal(middle.numpy(), mine[1])
    assert [item.dtype for item in answer.ticket.items] == ["float32", "float16", "float32"]
    assert passes == [(2, before[0].tokens + after[0].tokens)]
    assert first.shape == (before[0].tokens, WIDTH)
    assert last.shape == (after[0].tokens, WIDTH)


def test_answer_does_not_alias_the_request(encoder):
    items, media = request(precomputed())
    [answer] = encoder.encode([(items, media)])
    copy = answer.embeddings.clone()
    media.zero_()
    assert torch.equal(answer.embeddings, copy)


def test_read_only_media(encoder, family):
    """Triton's buffers may be; nothing may be written there, or warned of."""
    items, media = request(picture(family, 56, 56))
    copy = media.clone()
    encoder.encode([(items, media)])
    assert torch.equal(media, copy)


def test_equal_media_are_encoded_once(encoder, family, passes):
    one, two = picture(family, 56, 56, seed=1), picture(family, 84, 56, seed=2)
    answers = encoder.encode([request(one, two), request(two), request(one, one)])
    assert passes == [(2, one[0].tokens + two[0].tokens)]
    first, second = embeddings(answers[0])
    assert torch.equal(embeddings(answers[1])[0], second)
    assert all(torch.equal(same, first) for same in embeddings(answers[2]))


def test_a_borrowed_hash_borrows_no_embeddings(encoder, family, passes):
    honest, other = picture(family, 56, 56, seed=1), picture(family, 56, 56, seed=2)
    forged = replace(other[0], hash=honest[0].hash), other[1]
    [forged_answer, honest_answer] = encoder.encode([request(forged), request(honest)])
    assert passes == [(2, 8)]
    [alone] = embeddings(encoder.encode([request(honest)])[0])
    torch.testing.assert_close(embeddings(honest_answer)[0], alone, **TOLERANCE)
    assert not torch.allclose(embeddings(forged_answer)[0], alone, **TOLERANCE)


def test_budget_of_tokens(directory, family, passes):
    encoder = make_encoder(directory, family, passes, max_encoder_tokens=10)
    sizes = [(56, 56), (56, 84), (56, 56), (112, 112), (56, 56)]
    media = [picture(family, *size, seed=index) for index, size in enumerate(sizes)]
    assert [item.tokens for item, _ in media] == [4, 6, 4, 16, 4]
    [answer] = encoder.encode([request(*media)])
    assert passes == [(2, 8), (2, 10), (1, 16)]  # small ones first
    assert [item.shape[0] for item in answer.ticket.items] == [4, 6, 4, 16, 4]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"grid_thw": None}, "needs image_grid_thw"),
        ({"tokens": 7}, "makes 4 tokens, got 7"),
        ({"shape": (56, 28, 3)}, "needs uint8"),
        ({"offset": 64 * 1000}, r"bytes 64000 to 73408 do not lie in MEDIA, which has 9408"),
        ({"offset": -64}, "the offset a multiple of 64"),
        ({"offset": 1}, "the offset a multiple of 64"),
    ],
    ids=str,
)
def test_a_faulty_item_fails_its_own_request_only(encoder, family, passes, changes, what):
    good = picture(family, 56, 84)
    items, media = request(picture(family, 56, 56))
    faulty = [replace(items[0], **changes)]
    first, second, third = encoder.encode([request(good), (faulty, media), request(good)])
    assert isinstance(second, InvalidValue)
    assert second.where == "items[0]"
    with pytest.raises(InvalidValue, match=what):
        raise second
    assert torch.equal(first.embeddings, third.embeddings)
    assert passes == [(1, 6)]


@pytest.mark.parametrize("shape", [(0, WIDTH), (-4, -WIDTH), (4,), ()])
def test_impossible_shapes(encoder, shape):
    item, array = precomputed()
    items, media = request((item, array))
    [answer] = encoder.encode([([replace(items[0], shape=shape)], media)])
    assert isinstance(answer, InvalidValue)


def test_a_pass_that_fails_is_found_out_alone(encoder, family, passes, monkeypatch, caplog):
    """Two requests survive the one that the tower cannot do; the cause is logged, not told."""
    good, bad = picture(family, 56, 56, seed=1), picture(family, 84, 84, seed=2)
    encode = encoder._tower.encode

    def failing(items, media):
        if any(item.hash == bad[0].hash for item in items):
            raise RuntimeError("out of something")
        return encode(items, media)

    monkeypatch.setattr(encoder._tower, "encode", failing)
    first, second = encoder.encode([request(good), request(good, bad)])
    assert embeddings(first)[0].shape == (4, WIDTH)
    assert isinstance(second, InternalError)
    assert (second.where, second.what) == ("items[1]", "the encoder failed on this item")
    assert "out of something" in caplog.text
    assert passes == [(1, 4)]


def test_a_tower_of_another_width_is_noticed(encoder, family, monkeypatch):
    monkeypatch.setattr(encoder._tower, "encode", lambda items, media: [torch.zeros(4, 3)])
    [answer] = encoder.encode([request(picture(family, 56, 56))])
    assert isinstance(answer, InternalError)


def test_nothing_is_kept_between_batches_without_a_cache(directory, family, passes):
    encoder = make_encoder(directory, family, passes, encoder_cache_mb=0)

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    encoder.encode([request(picture(family, 56, 56))])
    before = tensors()
    for seed in range(5):
        encoder.encode([request(picture(family, 56, 56, seed=seed))])
    assert tensors() <= before


def test_load_is_logged(directory, family, caplog):
    caplog.set_level("INFO", logger="triptych.encode")
    make_encoder(directory, family, [])
    assert "tower of Qwen2.5-VL" in caplog.text
    assert "on cpu in float32: 0." in caplog.text
