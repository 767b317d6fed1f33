from __future__ import annotations

import gc
import shutil

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from triptych import families
from triptych.contract import ITEM_ALIGNMENT, Item
from triptych.encode import Encoded, Encoder
from triptych.encode.keys import content_key, revision
from triptych.errors import InternalError, InvalidValue, LeaseLost
from triptych.settings import EncoderSettings
from unit.qwen import WIDTH, clip, picture, request, write_checkpoint

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


def test_a_clip_over_the_budget_goes_in_parts(directory, family, passes):
    """Each step has 6 tokens; what the parts make is what the whole does."""
    encoder = make_encoder(directory, family, passes, max_encoder_tokens=12)
    long = clip(family, 7, 56, 84)
    [whole] = embeddings(make_encoder(directory, family, []).encode([request(long)])[0])
    seen = spied(encoder)
    [parts, other] = embeddings(encoder.encode([request(long, picture(family, 56, 56))])[0])
    assert seen == [[(56, 56, 3)], [(4, 56, 84, 3)], [(3, 56, 84, 3)]]
    assert passes == [(1, 4), (1, 24)]
    assert other.shape == (4, WIDTH)
    torch.testing.assert_close(parts, whole, **TOLERANCE)


@pytest.mark.parametrize("answers", [[True], [False]])
def test_between_two_parts_it_may_be_given_up(directory, family, passes, answers):
    encoder = make_encoder(directory, family, passes, max_encoder_tokens=12)
    items, media = request(clip(family, 7, 56, 84))
    array = media[: items[0].nbytes].view(items[0].shape)
    seen = spied(encoder)
    [entry] = encoder.encode_ahead([("key", items[0], array)], iter(answers).__next__)
    assert (entry is not None) == answers[0]
    assert len(seen) == (2 if answers[0] else 1)
    assert passes == ([(1, 24)] if answers[0] else [])


def spied(encoder):
    """The shapes of every forward pass from now on."""
    seen, tower = [], encoder._tower

    class Spy:
        def encode(self, items, media):
            seen.append([tuple(array.shape) for array in media])
            return tower.encode(items, media)

    encoder._tower = Spy()
    return seen


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


def lease(encoder, medium):
    """An item without pixels, as preprocess makes it of what the encoder told it."""
    [key] = encoder.cache._entries.keys() & {content_key(medium[0], medium[1].data)}
    entry = encoder.cache.use(key)
    token = encoder.cache.lease_entry(entry)
    encoder.cache.release(entry)
    return replace(medium[0], lease=token)


NOTHING = torch.empty(0, dtype=torch.uint8)


def test_a_medium_is_encoded_once_and_its_answers_are_identical(encoder, family, passes):
    one, two = picture(family, 56, 84, seed=1), picture(family, 84, 56, seed=2)
    [first] = encoder.encode([request(one)])
    again, both = encoder.encode([request(one), request(two, one)])
    assert passes == [(1, one[0].tokens), (1, two[0].tokens)]
    assert torch.equal(again.embeddings, first.embeddings)
    assert torch.equal(embeddings(both)[1], embeddings(first)[0])
    counters = encoder.cache.counters
    assert (counters.hits, counters.misses) == (2, 2)
    assert counters.seconds_saved > 0


def test_a_forged_hash_finds_and_plants_nothing(encoder, family, passes):
    """Neither does the forger get another's embeddings, nor the other the forger's."""
    honest, evil = picture(family, 56, 56, seed=1), picture(family, 56, 56, seed=2)
    forged = replace(evil[0], hash=honest[0].hash), evil[1]
    [planted] = encoder.encode([request(forged)])
    [answer] = encoder.encode([request(honest)])
    [evils] = encoder.encode([request(evil)])
    assert len(passes) == 2
    assert torch.equal(planted.embeddings, evils.embeddings)
    assert not torch.allclose(embeddings(answer)[0], embeddings(evils)[0], **TOLERANCE)


def test_the_same_bytes_read_otherwise_are_another_medium(encoder, family):
    wide, tall = picture(family, 56, 84), picture(family, 84, 56)
    tall = tall[0], wide[1].reshape(tall[1].shape)
    first, second = encoder.encode([request(wide), request(tall)])
    assert not torch.allclose(embeddings(first)[0], embeddings(second)[0], **TOLERANCE)


def test_a_lease_stands_for_pixels(encoder, family, passes):
    one, two = picture(family, 56, 84, seed=1), picture(family, 84, 56, seed=2)
    [first] = encoder.encode([request(one)])
    items, media = request(two)
    [answer] = encoder.encode([([*items, lease(encoder, one)], media)])
    assert passes == [(1, one[0].tokens), (1, two[0].tokens)]
    assert torch.equal(embeddings(answer)[1], embeddings(first)[0])
    [alone] = encoder.encode([([lease(encoder, one)], NOTHING)])
    assert torch.equal(alone.embeddings, first.embeddings)
    assert alone.ticket == first.ticket


def test_a_lost_lease_fails_its_own_request_only(encoder, family):
    one = picture(family, 56, 84)
    encoder.encode([request(one)])
    item = lease(encoder, one)
    first, second, third = encoder.encode([([item], NOTHING), ([item], NOTHING), request(one)])
    assert isinstance(second, LeaseLost)
    assert second.where == "items[0]"
    assert torch.equal(first.embeddings, third.embeddings)
    assert encoder.cache.counters.lost == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (56, 56, 3), "grid_thw": (1, 4, 4), "tokens": 4},
        {"shape": (84, 56, 3), "grid_thw": (1, 6, 4)},
    ],
    ids=["smaller", "turned"],
)
def test_a_lease_of_another_medium_is_refused(encoder, family, changes):
    one = picture(family, 56, 84)
    encoder.encode([request(one)])
    [answer] = encoder.encode([([replace(lease(encoder, one), **changes)], NOTHING)])
    assert isinstance(answer, InvalidValue)
    assert "the lease is of" in answer.what
    [fine] = encoder.encode([([lease(encoder, one)], NOTHING)])
    assert isinstance(fine, Encoded)


def test_nothing_stays_pinned(encoder, family):
    one = picture(family, 56, 84)
    encoder.encode([request(one)])
    encoder.encode([request(one, one), request(one), ([lease(encoder, one)], NOTHING)])
    [faulty] = encoder.encode([([replace(lease(encoder, one), grid_thw=(1, 2, 2))], NOTHING)])
    assert isinstance(faulty, InvalidValue)
    [entry] = encoder.cache._entries.values()
    assert entry.pins <= 1, "the faulty request's lease, until it runs out"


def test_what_must_not_be_kept_is_not(encoder, family, passes):
    one = picture(family, 56, 84)
    secret = replace(one[0], keep=False), one[1]
    encoder.encode([request(secret), request(secret)])
    encoder.encode([request(secret)])
    assert passes == [(1, one[0].tokens)] * 2
    assert encoder.cache.nbytes("device") == 0


def test_a_full_cache_serves_on(directory, family, passes):
    """Two pictures fit; five are asked for in turns, and every answer is its own picture's."""
    encoder = make_encoder(directory, family, passes)
    media = [picture(family, 56, 56, seed=seed) for seed in range(5)]
    encoder.cache._tiers["device"].limit = 2 * 4 * WIDTH * 4
    expected = [embeddings(encoder.encode([request(one)])[0])[0] for one in media]
    for turn in range(4):
        answers = encoder.encode([request(*media[turn:]), request(*reversed(media))])
        for got, wanted in zip(embeddings(answers[0]), expected[turn:], strict=True):
            torch.testing.assert_close(got, wanted, **TOLERANCE)
        for got, wanted in zip(embeddings(answers[1]), reversed(expected), strict=True):
            torch.testing.assert_close(got, wanted, **TOLERANCE)
        assert encoder.cache.nbytes("device") <= 2 * 4 * WIDTH * 4
    assert encoder.cache.counters.evictions["device"] >= 3
    assert encoder.cache.counters.refused > 0, "what the batch itself used had to stay"


def test_another_revision_is_another(directory, family, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(directory, copy)
    settings = ("cpu", "float32")
    before = revision(families.load(copy).checkpoint, settings)
    assert before == revision(families.load(copy).checkpoint, settings)
    assert before != revision(families.load(copy).checkpoint, ("cpu", "bfloat16"))
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert before != revision(families.load(copy).checkpoint, settings)
    config = copy / "config.json"
    changed = revision(families.load(copy).checkpoint, settings)
    config.write_text(config.read_text().replace("{", '{"extra": 1, ', 1))
    assert changed != revision(families.load(copy).checkpoint, settings)


def test_what_was_encoded_can_be_had_again_without_pixels(encoder, family, passes):
    items, media = request(picture(family, 56, 84, seed=1), picture(family, 84, 56, seed=2))
    [first] = encoder.encode([(items, media)])
    again = encoder.promise(items, first.keys)
    [second] = encoder.encode([(again, media[:0])])
    assert all(map(torch.equal, embeddings(second), embeddings(first)))
    assert len(passes) == 1
    [third] = encoder.encode([(again, media[:0])])
    assert isinstance(third, LeaseLost)


def test_what_was_not_kept_is_not_promised(encoder, family):
    item, pixels = picture(family, 56, 84)
    for medium in ((replace(item, keep=False), pixels), precomputed()):
        items, media = request(picture(family, 84, 84), medium)
        [answer] = encoder.encode([(items, media)])
        assert encoder.promise(items, answer.keys) is None
