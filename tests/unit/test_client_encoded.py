"""Embeddings as a file: what the client writes, the safetensors library and the server read."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from media_planner import WIDTH, FilePlanner
from triptych.media import embeddings
from triptych_client import (
    Encoded,
    InternalError,
    InvalidRequest,
    LeaseLost,
    MediaUnreadable,
    UnsupportedMedium,
    audio,
    image,
    video,
)
from triptych_client.encoded import encode
from triptych_client.media import modality_of
from triptych_client.requests import Call

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
GRIDS = st.none() | st.tuples(*[st.integers(1, 99)] * 3)


def encoded(modality: str = "image", **fields) -> Encoded:
    given = {"data": b"\0" * 3 * WIDTH * 4, "dtype": "float32", "shape": (3, WIDTH)}
    return Encoded(**{"modality": modality, **given, **fields})


@given(
    st.sampled_from(["image", "video", "audio"]),
    st.sampled_from(sorted(SIZES)),
    st.integers(1, 9),
    GRIDS,
    st.none() | st.floats(0.01, 100),
)
def test_the_server_reads_what_was_written(modality, dtype, tokens, grid, seconds) -> None:
    data = np.random.default_rng(tokens).integers(0, 60, tokens * WIDTH * SIZES[dtype], np.uint8)
    made = encoded(
        modality,
        data=data.tobytes(),
        dtype=dtype,
        shape=(tokens, WIDTH),
        grid_thw=grid if modality != "audio" else None,
        second_per_grid=seconds,
    )
    read = embeddings.load(made.safetensors(), modality, FilePlanner(), max_tokens=9)
    assert read.array.tobytes() == made.data
    assert (read.dtype, read.array.shape) == (dtype, made.shape)
    assert (read.grid_thw, read.second_per_grid) == (made.grid_thw, made.second_per_grid)


def test_the_library_reads_it_too() -> None:
    values = np.arange(12, dtype="<f4").reshape(3, 4)
    made = encoded(data=values.tobytes(), shape=(3, 4), grid_thw=(1, 2, 6), second_per_grid=0.5)
    tensors = safetensors.numpy.load(made.safetensors())
    np.testing.assert_array_equal(tensors["ec_cache"], values)
    np.testing.assert_array_equal(tensors["image_grid_thw"], [[1, 2, 6]])
    np.testing.assert_array_equal(tensors["second_per_grid_ts"], [0.5])


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_a_file_tells_what_it_is_of(modality: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    encoded(modality).save(path)
    assert modality_of(path) == modality
    make = {"image": image, "video": video, "audio": audio}[modality]
    [part] = [value for name, value in make(path).items() if name != "type"]
    assert part["url"].startswith("data:application/octet-stream;base64,")


def test_a_file_that_tells_nothing_is_a_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.numpy.save({"anything": np.ones((1, 4), "f4")}))
    assert modality_of(path) == "image"
    grid = {"video_grid_thw": np.ones((1, 3), "i8"), "ec_cache": np.ones((1, 4), "f4")}
    path.write_bytes(safetensors.numpy.save(grid))
    assert modality_of(path) == "video"


@pytest.mark.parametrize("header", [b"{broken", b'{"__metadata__": 3}', b'{"__metadata__": [1]}'])
def test_a_broken_file_is_named(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(MediaUnreadable, match="safetensors"):
        modality_of(path)


# What is asked of a server.


class Stages:
    """A transport whose models answer from a script; an exception is raised."""

    def __init__(self, *script: object) -> None:
        self._script = list(script)
        self.asked: list[str] = []

    async def outputs(self, ensemble: str) -> dict[str, str]:
        return {"ITEMS": "preprocess", "TICKET": "encoder"} if ensemble == "chat" else {}

    async def infer(self, model: str, inputs: object, timeout_s: float) -> dict[str, bytes]:
        self.asked.append(model)
        step = self._script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step


READ = {"MEDIA": b"abc", "ITEMS": b"{}"}


def made(dtype: str = "float32") -> dict[str, bytes]:
    item = {"modality": "video", "dtype": dtype, "shape": [1, 2], "offset": 64}
    return {"TICKET": json.dumps({"items": [item]}).encode(), "EMBEDDINGS": bytes(range(80))}


def ask(stages: Stages, model: str = "chat") -> Encoded:
    return asyncio.run(encode(stages, Call(model, "id", b"{}", 1.0)))


def test_the_two_stages_are_asked() -> None:
    stages = Stages(READ, made())
    found = ask(stages)
    assert stages.asked == ["preprocess", "encoder"]
    assert found.data == bytes(range(64, 72))


def test_a_lease_that_is_lost_between_them_is_asked_for_again() -> None:
    stages = Stages(READ, LeaseLost("gone"), READ, made())
    assert ask(stages).shape == (1, 2)
    with pytest.raises(LeaseLost):
        ask(Stages(READ, LeaseLost("gone"), READ, LeaseLost("gone")))


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedMedium, match="the engine encodes such a video itself"):
        ask(Stages(READ, made("uint8")))
    with pytest.raises(InvalidRequest, match="'decode' is no ensemble with an encoder"):
        ask(Stages(), "decode")
    with pytest.raises(InternalError, match="TICKET"):
        ask(Stages(READ, {"TICKET": b"{}"}))
