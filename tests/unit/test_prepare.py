from __future__ import annotations

import asyncio
import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from reference import HuggingFaceReference
from triptych import contract, families
from triptych.contract import Items, Prompt
from triptych.errors import (
    InvalidRequest,
    InvalidValue,
    MediaError,
    MediaTooLarge,
    MediaUnreadable,
)
from triptych.media.base import Loaded
from triptych.media.loader import MediaLoader
from triptych.settings import PreprocessSettings
from triptych.stages.prepare import Preparer, assemble


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def part(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def text(words):
    return {"type": "text", "text": words}


def body(messages, **fields):
    return json.dumps({"messages": messages, **fields}).encode()


class Loader:
    """Loads what the test says, when the test says; counts what is under way."""

    def __init__(self, load):
        self._load = load
        self.running = 0
        self.cancelled = 0

    async def load(self, modality, url, *, where, options=None):
        self.running += 1
        try:
            return await self._load(url, where, options)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def close(self):
        pass


def loaded(shape=(1, 1, 3), *, fill=0, tokens=1):
    return Loaded("image", np.full(shape, fill, np.uint8), f"{fill:02x}", tokens, (1, 2, 2))


@pytest.fixture(scope="module")
def family(checkpoint):
    return families.load(checkpoint)


@pytest.fixture
def preparer(checkpoint, family):
    def make(load, **settings):
        loader = Loader(load)
        return Preparer(PreprocessSettings(model=str(checkpoint), **settings), family, loader)

    return make


@pytest.fixture(scope="module")
def hugging_face(checkpoint):
    return HuggingFaceReference(checkpoint)


CONVERSATIONS = {
    "none": ([{"role": "user", "content": "hello"}], []),
    "one": ([{"role": "user", "content": [0, "what is it?"]}], [(60, 40)]),
    "several": (
        [{"role": "user", "content": [0, "and", 1, 2, "?"]}],
        [(60, 40), (8, 8), (200, 30)],
    ),
    "turns": (
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": ["a", 0]},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": [1, "b"]},
        ],
        [(33, 77), (300, 100)],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_ids_and_grids_equal_those_of_hugging_face(checkpoint, family, hugging_face, name):
    turns, dimensions = CONVERSATIONS[name]
    images = [picture(*size, seed) for seed, size in enumerate(dimensions)]

    def content(turn):
        if isinstance(turn["content"], str):
            return turn
        parts = [part(images[p]) if isinstance(p, int) else text(p) for p in turn["content"]]
        return {**turn, "content": parts}

    messages = [content(turn) for turn in turns]
    expected = hugging_face.prepare(messages, images)
    settings = PreprocessSettings(model=str(checkpoint), media_workers=1)
    preparer = Preparer(settings, family, MediaLoader(settings, family))
    try:
        begun = preparer.begin(body(messages))
        prepared = await preparer.load(begun) if images else preparer.without_media(begun)
    finally:
        await preparer.close()
    prompt = contract.decode(prepared.prompt, Prompt)
    items = contract.decode(prepared.items, Items).items
    assert prompt.token_ids == expected.compact_ids
    assert prompt.expanded() == expected.input_ids
    assert [item.grid_thw for item in items] == expected.grids
    assert prepared.media.dtype == np.uint8
    assert prepared.media.shape == (1, max((i.offset + i.nbytes for i in items), default=0))
    assert [item.hash for item in prompt.items] == [item.hash for item in items]


def test_one_medium_is_not_copied():
    medium = loaded((4, 5, 3), fill=7)
    media, items = assemble([medium])
    assert np.shares_memory(media, medium.array)
    assert media.shape == (1, 60)
    assert items.items == [medium.item(0)]


def test_media_are_laid_out_aligned_and_in_order():
    first, second, third = loaded((4, 5, 3), fill=1), loaded((8, 8, 1), fill=2), loaded(fill=3)
    floats = Loaded("audio", np.arange(5, dtype=np.float32), "f", 1, dtype="float32")
    media, items = assemble([first, second, floats, third])
    assert [item.offset for item in items.items] == [0, 64, 128, 192]
    assert media.shape == (1, 195)
    assert (media[0, :60] == 1).all()
    assert (media[0, 60:64] == 0).all()
    assert (media[0, 64:128] == 2).all()
    assert (media[0, 128:148].view(np.float32) == floats.array).all()
    assert (media[0, 192:] == 3).all()


async def test_media_load_at_the_same_time(preparer):
    together = asyncio.Barrier(3)

    async def load(url, where, options):
        async with asyncio.timeout(10):
            await together.wait()
        return loaded(fill=int(url))

    content = [{"type": "image_url", "image_url": {"url": str(number)}} for number in (5, 6, 7)]
    work = preparer(load)
    prepared = await work.load(work.begin(body([{"role": "user", "content": content}])))
    assert [prepared.media[0, offset] for offset in (0, 64, 128)] == [5, 6, 7]


async def test_the_first_failure_gives_the_others_up(preparer):
    waiting = asyncio.Event()

    async def load(url, where, options):
        if url == "bad":
            await waiting.wait()
            raise MediaUnreadable("broken", where=where)
        waiting.set()
        await asyncio.Event().wait()

    content = [{"type": "image_url", "image_url": {"url": url}} for url in ("slow", "bad")]
    work = preparer(load)
    with pytest.raises(MediaUnreadable) as error:
        await work.load(work.begin(body([{"role": "user", "content": content}])))
    assert error.value.where == "messages[0].content[1].image_url.url"
    assert (work._loader.running, work._loader.cancelled) == (0, 1)


async def test_what_a_caller_asks_of_a_medium_reaches_the_loader(preparer):
    seen = []

    async def load(url, where, options):
        seen.append(options)
        return loaded()

    content = [
        {"type": "image_url", "image_url": {"url": "a", "detail": "low"}, "uuid": "u"},
        {"type": "image_embeds", "image_embeds": {"url": "b"}},
    ]
    work = preparer(load)
    await work.load(work.begin(body([{"role": "user", "content": content}])))
    assert (seen[0].detail, seen[0].uuid, seen[0].embeds) == ("low", "u", False)
    assert seen[1].embeds


async def never(url, where, options):
    raise AssertionError("nothing is loaded for a request that is refused")


def test_limits_of_a_request(preparer):
    work = preparer(never, max_items=2, max_request_mb=1)
    content = [{"type": "image_url", "image_url": {"url": "a"}}] * 3
    with pytest.raises(InvalidValue, match="3 media in one request, the limit is 2"):
        work.begin(body([{"role": "user", "content": content}]))
    with pytest.raises(InvalidRequest, match="the limit is 1048576"):
        work.begin(body([{"role": "user", "content": "x" * 2**20}]))


def embeds(offset, tokens, grid, dtype="float32", width=192):
    tensor = {"offset": offset, "shape": [tokens, width], "dtype": dtype}
    return {"type": "image_embeds", "image_embeds": {"tensor": tensor, "image_grid_thw": grid}}


WHERE = "messages[0].content[{}].image_embeds.tensor"


@pytest.fixture
async def loading(checkpoint, family):
    settings = PreprocessSettings(model=str(checkpoint), media_workers=1)
    preparer = Preparer(settings, family, MediaLoader(settings, family))
    yield preparer
    await preparer.close()


async def test_embeddings_come_in_a_tensor(loading):
    random = np.random.default_rng(0)
    first = random.standard_normal((4, 192)).astype(np.float32)
    second = random.standard_normal((6, 192)).astype(np.float16)
    tensors = np.frombuffer(b"-" * 13 + first.tobytes() + second.tobytes(), np.uint8)
    later = 13 + first.nbytes
    content = [embeds(later, 6, [1, 4, 6], "float16"), text("and"), embeds(13, 4, [1, 4, 4])]
    begun = loading.begin(body([{"role": "user", "content": content}]), tensors)
    prepared = await loading.load(begun)
    items = contract.decode(prepared.items, Items).items
    assert [(item.dtype, item.shape, item.grid_thw) for item in items] == [
        ("float16", (6, 192), (1, 4, 6)),
        ("float32", (4, 192), (1, 4, 4)),
    ]
    assert all(item.precomputed for item in items)
    for item, sent in zip(items, (second, first), strict=True):
        octets = prepared.media[0, item.offset : item.offset + item.nbytes]
        assert octets.tobytes() == sent.tobytes()
    assert items[0].hash != items[1].hash


@pytest.mark.parametrize(
    ("part", "size", "said"),
    [
        (embeds(0, 4, [1, 4, 4]), None, "bytes 0 to 3072 of the input TENSORS, which has 0"),
        (embeds(0, 4, [1, 4, 4]), 3071, "bytes 0 to 3072 of the input TENSORS, which has 3071"),
        (embeds(1, 4, [1, 4, 4]), 3072, "bytes 1 to 3073"),
        (embeds(2**40, 4, [1, 4, 4]), 3072, "which has 3072"),
    ],
)
def test_a_piece_that_the_tensor_does_not_have(preparer, part, size, said):
    tensors = None if size is None else np.zeros(size, np.uint8)
    with pytest.raises(InvalidValue, match=said) as error:
        preparer(never).begin(body([{"role": "user", "content": [text("x"), part]}]), tensors)
    assert error.value.where == WHERE.format(1)


def test_a_tensor_that_nothing_names(preparer):
    with pytest.raises(InvalidValue, match="5 bytes came") as error:
        preparer(never).begin(body([{"role": "user", "content": "x"}]), np.zeros(5, np.uint8))
    assert error.value.where == contract.REQUEST_TENSORS
    preparer(never).begin(body([{"role": "user", "content": "x"}]), np.zeros(0, np.uint8))


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        (embeds(0, 4, [1, 4, 4], width=191), 0, "192"),
        (embeds(0, 4, [1, 4, 6]), 0, "grid"),
        (embeds(0, 4, None), 0, "grid"),
        (embeds(0, 4, [1, 4, 4]), np.nan, "finite"),
        (embeds(0, 4, [1, 4, 4]), np.inf, "finite"),
    ],
)
async def test_embeddings_that_the_model_does_not_take(loading, part, value, said):
    tensors = np.full(4 * 192, value, np.float32).view(np.uint8)
    begun = loading.begin(body([{"role": "user", "content": [part]}]), tensors)
    with pytest.raises(InvalidValue, match=said) as error:
        await loading.load(begun)
    assert error.value.where == WHERE.format(0)


async def test_embeddings_in_a_tensor_have_limits(checkpoint, family):
    settings = PreprocessSettings(
        model=str(checkpoint), embeddings_max_file_size_mb=1, max_embedding_tokens=100
    )
    preparer = Preparer(settings, family, MediaLoader(settings, family))
    try:
        for tokens, said in ((1600, "1228800 bytes, over the limit of 1048576"), (144, "144")):
            part = embeds(0, tokens, [1, 24, 24])
            tensors = np.zeros(tokens * 192 * 4, np.uint8)
            begun = preparer.begin(body([{"role": "user", "content": [part]}]), tensors)
            with pytest.raises(MediaTooLarge, match=said):
                await preparer.load(begun)
    finally:
        await preparer.close()


def test_max_model_len_overrules_the_checkpoint(preparer):
    request = body([{"role": "user", "content": "hi"}])
    short, long = preparer(never, max_model_len=100), preparer(never)
    shorter = contract.decode(short.without_media(short.begin(request)).prompt, Prompt)
    longer = contract.decode(long.without_media(long.begin(request)).prompt, Prompt)
    assert shorter.sampling.max_tokens + shorter.length == 100
    assert longer.sampling.max_tokens > shorter.sampling.max_tokens


async def test_a_truncated_picture_is_the_callers_mistake(checkpoint, family):
    broken = part(picture(50, 50))
    broken["image_url"]["url"] = broken["image_url"]["url"][:-400]
    settings = PreprocessSettings(model=str(checkpoint), media_workers=1)
    preparer = Preparer(settings, family, MediaLoader(settings, family))
    try:
        with pytest.raises(MediaError) as error:
            await preparer.load(preparer.begin(body([{"role": "user", "content": [broken]}])))
    finally:
        await preparer.close()
    assert error.value.where == "messages[0].content[0].image_url.url"


def held(lease, *, fill=0):
    """A medium that the encoder holds."""
    return replace(loaded(fill=fill), lease=lease, leased_shape=(1, 1, 3))


class Again:
    """Loads `results` in turn; a later load of a medium is one more."""

    def __init__(self, *results):
        self.results = list(results)
        self.urls = []

    async def __call__(self, url, where, options):
        self.urls.append(url)
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


def ask(preparer):
    url = "data:image/png;base64,AAAA"
    shown = {"type": "image_url", "image_url": {"url": url}}
    return preparer.load(preparer.begin(body([{"role": "user", "content": [shown]}])))


async def test_a_lease_that_is_lost_is_asked_for_again(preparer):
    load = Again(held("first"), held("second"), held("third"))
    made = preparer(load)
    prepared = await ask(made)
    [item] = contract.decode(prepared.items, Items).items
    assert item.lease == "first"
    assert await made.again("first") == "second"
    assert await made.again("first") is None, "once"
    assert await made.again("second") == "third"
    assert load.urls == ["data:image/png;base64,AAAA"] * 3


@pytest.mark.parametrize(
    "later",
    [
        held("second", fill=1),  # the URL gives something else now
        loaded(),  # the encoder did not take it
        MediaUnreadable("gone"),
    ],
    ids=["another", "no lease", "error"],
)
async def test_what_is_not_the_same_any_more_has_no_other_lease(preparer, later):
    made = preparer(Again(held("first"), later))
    await ask(made)
    assert await made.again("first") is None
    assert await made.again("never sent") is None
