from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from media_files import data_uri, embeddings, jpeg, settings
from media_planner import WIDTH, FilePlanner
from triptych.errors import (
    InvalidValue,
    MediaForbidden,
    MediaTooLarge,
    MediaType,
    MediaUnreadable,
    TriptychError,
)
from triptych.media import MediaLoader, MediaOptions
from triptych.media import embeddings as room

PLANNER = FilePlanner()
GRID = np.array([[1, 4, 12]])


def load(data, **limits):
    return room.load(data, "image", PLANNER, max_tokens=limits.get("max_tokens", 1000))


def raw(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def brain(rows: int, width: int = WIDTH, fill: int = 0x3F80) -> bytes:
    """bfloat16, which numpy cannot write."""
    body = np.full(rows * width, fill, "<u2").tobytes()
    entry = {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, len(body)]}
    return raw({"mm_embeddings": entry}, body)


def test_a_matrix_and_its_grid():
    got = load(embeddings(image_grid_thw=GRID))
    assert got.array.shape == (12, WIDTH)
    assert got.array.dtype == np.float32
    assert got.grid_thw == (1, 4, 12)


@pytest.mark.parametrize("name", ["ec_cache", "mm_embeddings", "anything"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_names_and_dtypes(name, dtype):
    data = safetensors.numpy.save({name: np.ones((1, 3, WIDTH), dtype)})
    got = load(data)
    assert (got.dtype, got.array.shape) == (dtype, (3, WIDTH))


def test_bfloat16_is_held_as_its_bits():
    got = load(brain(3))
    assert (got.dtype, got.array.dtype, got.array[0, 0]) == ("bfloat16", np.uint16, 0x3F80)


def test_seconds_per_grid():
    data = embeddings(video_grid_thw=GRID, second_per_grid_ts=np.array([0.5], np.float32))
    assert load(data).second_per_grid == 0.5


def save(**tensors):
    return safetensors.numpy.save(tensors)


ONES = np.ones((3, WIDTH), np.float32)
REFUSED = {
    "width": (save(x=np.ones((3, WIDTH + 1), np.float32)), InvalidValue),
    "one axis": (save(x=np.ones(WIDTH, np.float32)), InvalidValue),
    "two items": (save(x=np.ones((2, 3, WIDTH), np.float32)), InvalidValue),
    "no rows": (save(x=np.ones((0, WIDTH), np.float32)), InvalidValue),
    "doubles": (save(x=np.ones((3, WIDTH))), InvalidValue),
    "whole numbers": (save(x=np.ones((3, WIDTH), np.int64)), InvalidValue),
    "not a number": (save(x=np.full((3, WIDTH), np.nan, np.float32)), InvalidValue),
    "infinite": (save(x=np.full((3, WIDTH), np.inf, np.float16)), InvalidValue),
    "infinite bfloat16": (brain(3, fill=0xFF80), InvalidValue),
    "two tensors": (save(x=ONES, y=ONES), InvalidValue),
    "only a grid": (save(image_grid_thw=GRID), InvalidValue),
    "two grids": (save(x=ONES, image_grid_thw=GRID, video_grid_thw=GRID), InvalidValue),
    "grid of floats": (save(x=ONES, image_grid_thw=GRID.astype(np.float32)), InvalidValue),
    "grid of two": (save(x=ONES, image_grid_thw=np.ones((2, 3), np.int64)), InvalidValue),
    "grid of zero": (save(x=ONES, image_grid_thw=GRID * 0), InvalidValue),
    "grid of below": (save(x=ONES, image_grid_thw=-GRID), InvalidValue),
    "huge grid": (save(x=ONES, image_grid_thw=GRID * 10**12), InvalidValue),
    "negative seconds": (save(x=ONES, second_per_grid=np.array([-1.0])), InvalidValue),
    "many tensors": (save(**{f"x{n}": ONES for n in range(20)}), MediaTooLarge),
    "many rows": (embeddings(1001), MediaTooLarge),
    "long header": ((1 << 31).to_bytes(8, "little") + b"{" + bytes(100), MediaTooLarge),
    "header past the end": ((1 << 19).to_bytes(8, "little") + b"{" + bytes(100), MediaUnreadable),
    "no json": (raw(b"{not json"), MediaUnreadable),
    "nothing": (b"", MediaUnreadable),
    "overlap": (
        raw(
            {
                "x": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
                "y": {"dtype": "F32", "shape": [1, 2], "data_offsets": [4, 12]},
            },
            bytes(12),
        ),
        MediaUnreadable,
    ),
    "beyond": (
        raw({"x": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 324]}}, bytes(8)),
        MediaUnreadable,
    ),
    "overflow": (
        raw({"x": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 8]}}, bytes(8)),
        MediaUnreadable,
    ),
}


@pytest.mark.parametrize(("data", "error"), REFUSED.values(), ids=REFUSED)
def test_refused(data, error):
    with pytest.raises(error):
        load(data)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_no_bytes_break_the_parser(noise, place):
    data = embeddings(2, image_grid_thw=GRID)
    for broken in (noise, raw(noise), data[:place] + noise + data[place + len(noise) :]):
        try:
            got = load(broken)
        except TriptychError as error:
            assert error.http_status < 500  # noqa: PT017 - success is as good
        else:
            assert got.array.ndim == 2


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def saved(value, **options):
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.fixture
async def pickles():
    loader = MediaLoader(settings(allow_pickle_embeddings=True), PLANNER)

    async def load(data):
        return await loader.load(
            "image", data_uri(data), where="x", options=MediaOptions(embeds=True)
        )

    yield load
    await loader.close()


async def test_pickles_where_they_are_allowed(pickles):
    import torch

    matrix = torch.arange(3.0 * WIDTH).reshape(3, WIDTH)
    got = await pickles(saved({"mm_embeddings": matrix[None], "image_grid_thw": [[1, 2, 6]]}))
    assert np.array_equal(got.array, matrix.numpy())
    assert (got.grid_thw, got.precomputed, got.tokens) == ((1, 2, 6), True, 3)
    old = await pickles(saved(matrix.bfloat16(), _use_new_zipfile_serialization=False))
    assert (old.dtype, old.array.shape) == ("bfloat16", (3, WIDTH))


async def test_pickles_that_are_programs(pickles):
    for data in (pickle.dumps(Evil(), protocol=2), saved({"x": Evil()})):
        with pytest.raises(MediaUnreadable):
            await pickles(data)


async def test_broken_pickles(pickles):
    import torch

    whole = saved(torch.ones(3, WIDTH))
    for data in (whole[:-60], whole[:100], b"PK\x03\x04" + bytes(100)):
        with pytest.raises(MediaUnreadable):
            await pickles(data)


async def test_the_loader_takes_safetensors_by_every_route():
    loader = MediaLoader(settings(), PLANNER)
    data = embeddings(image_grid_thw=GRID)
    by_content = await loader.load("image", data_uri(data), where="x")
    asked = MediaOptions(embeds=True)
    announced = await loader.load("image", data_uri(data), where="x", options=asked)
    assert by_content.precomputed
    assert announced.hash == by_content.hash
    item = announced.item(64)
    assert (item.dtype, item.shape, item.offset, item.tokens) == ("float32", (12, WIDTH), 64, 12)
    with pytest.raises(MediaForbidden, match="allow_pickle_embeddings"):
        await loader.load("image", data_uri(b"\x80\x02." + bytes(20)), where="x", options=asked)
    with pytest.raises(MediaType, match="safetensors, got JPEG"):
        await loader.load("image", data_uri(jpeg()), where="x", options=asked)
    await loader.close()
