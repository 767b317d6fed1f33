"""What of the engine SGLang can be tested without starting it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from msgspec.structs import replace

from checkpoints import tiny_llava_next_video
from generations import generation, picture
from triptych import families
from triptych.contract import TicketItem
from triptych.engines import sglang_wire as wire
from triptych.engines.base import Engine
from triptych.engines.sglang import SglangEngine, _hash
from triptych.engines.sglang_arguments import (
    LONGER_CONTEXT,
    MARGIN,
    _on_cpu,
    check_arguments,
    find_context,
)
from triptych.engines.sglang_generation import Generation
from triptych.engines.sglang_wire import Abort, Channel, Embeddings, Generate, Output, TensorSpec
from triptych.engines.trtllm import TrtllmEngine
from triptych.errors import ConfigurationError
from triptych.families import Family
from triptych.settings import DecodeSettings

CLIP = TicketItem("video", "ab", "float32", (4, 8), 0, grid_thw=(1, 4, 4), second_per_grid=0.5)


@pytest.fixture
def family(checkpoint: Path) -> Family:
    return families.load(checkpoint)


@pytest_asyncio.fixture
async def channels() -> AsyncIterator[tuple[Channel, Channel]]:
    ends = [Channel(end) for end in socket.socketpair()]
    yield ends[0], ends[1]
    for end in ends:
        await end.close()


async def test_messages_and_tensors_cross_in_their_order(channels: tuple[Channel, Channel]) -> None:
    here, there = channels
    pixels = [torch.rand(300, 1000), torch.rand(7, 1000).to(torch.bfloat16)]
    media = tuple(
        Embeddings("IMAGE", TensorSpec(name, tuple(part.shape)), number, {"grid": [[1, 2, 3]]})
        for number, (name, part) in enumerate(zip(("float32", "bfloat16"), pixels, strict=True))
    )
    asked = Generate("a", [1, 2], {"top_p": 0.5}, None, media)
    here.post(asked, pixels)
    here.post(Abort("a"))

    message, octets = await there.receive()
    assert message == asked
    offset = 0
    for part, each in zip(pixels, media, strict=True):
        found, offset = wire.tensor(each.spec, octets, offset)
        assert torch.equal(found, part)
    assert offset == len(octets)
    message, octets = await there.receive()
    assert (message, len(octets)) == (Abort("a"), 0)


@pytest.mark.parametrize("closed", [0, 1], ids=["this end", "the other end"])
async def test_a_closed_end_ends_what_waits(channels: tuple[Channel, Channel], closed: int) -> None:
    waiting = asyncio.create_task(channels[0].receive())
    await asyncio.sleep(0.05)
    await channels[closed].close()
    with pytest.raises(EOFError):
        await asyncio.wait_for(waiting, 5)
    channels[0].post(Abort("into the void"))
    await channels[0].close()


@pytest.mark.parametrize(
    "fields", [{"hash": "cd"}, {"grid_thw": (1, 2, 8)}, {"second_per_grid": 0.7}]
)
def test_what_moves_positions_is_in_the_hash(fields: dict[str, Any]) -> None:
    assert _hash([CLIP]) == _hash([replace(CLIP)])
    assert _hash([CLIP]) != _hash([replace(CLIP, **fields)])
    assert _hash([CLIP, replace(CLIP, **fields)]) != _hash([replace(CLIP, **fields), CLIP])


def test_a_picture_beside_a_clip_brings_its_timing(family: Family) -> None:
    """SGLang looks for it in the first of a request's media alone."""
    engine = SglangEngine(DecodeSettings(model="-"), family)
    prompt, [(shown, tensor)] = generation(
        family,
        [family.checkpoint.added_tokens["<|image_pad|>"]],
        *zip(picture(family, 1, 4, 4), strict=True),
    )
    clip = replace(shown, modality="video", second_per_grid=0.25)
    items = [shown, clip]
    inputs = family.embedding_inputs(items, [tensor, tensor])
    asked, tensors = engine._request(Generation("x", prompt, None), items, inputs)  # type: ignore[arg-type]
    assert [media.modality for media in asked.media] == ["IMAGE", "VIDEO"]
    assert all(media.fields["second_per_grid_ts"] == [0.25] for media in asked.media)
    assert all(torch.equal(each, tensor) for each in tensors)


@pytest.mark.parametrize("engine", [SglangEngine, TrtllmEngine])
def test_a_family_none_of_whose_media_it_takes_is_an_error_at_load(
    engine: type[Engine], tmp_path: Path
) -> None:
    clips = families.load(tiny_llava_next_video(tmp_path / "model"))
    with pytest.raises(ConfigurationError, match=r"takes .*embeddings of"):
        engine(DecodeSettings(model="-"), clips)


async def test_text_that_begins_a_stop_string_waits(family: Family) -> None:
    prompt, _ = generation(family, [1], stop=("ab",))
    said = Generation("x", prompt, None)  # type: ignore[arg-type]
    for text in ("1a", "a", "b!", "never seen"):
        said.put(Output("x", text, [1], 0))
    deltas = [delta async for delta in said.deltas()]
    assert [delta.text for delta in deltas] == ["1", "a", ""]
    assert [delta.finish_reason for delta in deltas] == [None, None, "stop"]
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == 3
    assert not said.finished, "SGLang has to be told"


def test_arguments_that_the_engine_rests_on_are_refused() -> None:
    check_arguments({"tp_size": 2, "nnodes": 1}, {"tp_size", "nnodes"})
    with pytest.raises(ConfigurationError, match="nnodes must be 1, got 2"):
        check_arguments({"nnodes": 2}, {"nnodes"})
    with pytest.raises(ConfigurationError, match=r"'tp_sise'; did you mean 'tp_size'\?"):
        check_arguments({"tp_sise": 2}, {"tp_size"})


def test_a_cpu_keeps_a_gib_of_keys_and_values_or_one_request(family: Family) -> None:
    """And never a part of what memory happens to be free."""

    def kept(length: int, **settings: Any) -> int:
        return _on_cpu(DecodeSettings(model="-", **settings), family, length)["max_total_tokens"]

    config = family.checkpoint.text_config
    width = config["hidden_size"] // config["num_attention_heads"]
    heads = config["num_key_value_heads"]
    token = 2 * config["num_hidden_layers"] * heads * width * 4
    assert kept(100, max_num_seqs=2) == 2 * (100 + MARGIN)
    assert kept(100, max_num_seqs=1 << 30) == (1 << 30) // token
    assert kept(100, max_num_seqs=1 << 30, engine_dtype="bfloat16") == (1 << 30) // (token // 2)
    assert kept(1 << 30) == (1 << 30) + MARGIN


def test_the_context_is_the_checkpoints_at_most(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LONGER_CONTEXT, raising=False)
    own = family.context_length
    settings = DecodeSettings(model="-", max_model_len=64)
    assert find_context(DecodeSettings(model="-"), family, {}) == own
    assert find_context(settings, family, {}) == 64
    assert find_context(settings, family, {"context_length": 99}) == 99
    with pytest.raises(ConfigurationError, match=f"{own + 1} tokens is longer"):
        find_context(settings, family, {"context_length": own + 1})
    monkeypatch.setenv(LONGER_CONTEXT, "1")
    assert find_context(settings, family, {"context_length": own + 1}) == own + 1
