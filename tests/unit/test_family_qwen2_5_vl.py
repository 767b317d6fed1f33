"""Qwen2.5-VL held against transformers: sizes, pixels, tower, and what goes to the engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from triptych import families
from triptych.contract import Item, TicketItem
from triptych.errors import ConfigurationError, InvalidValue, MediaError, UnsupportedMedium
from triptych.families.qwen_processors import ImageProcessor, VideoProcessor, smart_resize
from triptych.families.towers.patches import Patchify
from unit.qwen import (
    TEXT,
    VISION,
    WIDTH,
    clip,
    write_checkpoint,
    write_json,
)

CPU = torch.device("cpu")
TOLERANCE = {"atol": 1e-5, "rtol": 0}
"""float32, values of about 1: the order of the sums differs, nothing else."""

SIZES = [(8, 8), (28, 28), (1, 200), (200, 1), (30, 4000), (4000, 30), (480, 640), (1080, 1920)]
SIZES += [(55, 57), (13, 14), (42, 70), (1000, 1000), (3024, 4032), (56, 11200), (27, 29)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint")


@pytest.fixture(scope="module")
def family(directory):
    return families.load(directory)


# --- sizes ---------------------------------------------------------------------------------------


@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([1280, 16384]))
@example(8, 8, 1280)
@example(4000, 30, 1280)
@example(200, 1, 1280)
@example(201, 1, 1280)
def test_size_is_transformers_size(hf, height, width, max_tokens):
    limits = {"factor": 28, "min_pixels": 4 * 28 * 28, "max_pixels": max_tokens * 28 * 28}
    try:
        expected = hf.smart_resize(height, width, **limits)
    except ValueError:
        with pytest.raises(MediaError):
            smart_resize(height, width, **limits)
    else:
        assert smart_resize(height, width, **limits) == expected


@pytest.mark.parametrize(("height", "width", "ratio"), [(1, 201, "201.0"), (4020, 20, "201.0")])
def test_long_thin_picture_is_refused_with_its_numbers(family, height, width, ratio):
    with pytest.raises(MediaError, match=rf"{width}×{height} pixels .* {ratio}, the limit is 200"):
        family.plan_image(height, width)


def test_empty_picture_is_refused(family):
    with pytest.raises(MediaError, match="0×5 pixels is empty"):
        family.plan_image(5, 0)


@pytest.mark.parametrize(
    "processor",
    [
        {},
        {"min_pixels": 100 * 28 * 28, "max_pixels": 200 * 28 * 28},
        {"size": {"shortest_edge": 10 * 28 * 28, "longest_edge": 20 * 28 * 28}},
        {"size": {"shortest_edge": 28, "longest_edge": 10**6}, "max_pixels": 50 * 28 * 28},
        {"resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 0.0078125, "do_normalize": None},
        {"patch_size": 16, "merge_size": 4, "temporal_patch_size": 3},
    ],
    ids=str,
)
def test_pixels_are_transformers_pixels_bit_for_bit(hf, tmp_path, processor):
    """From the same preprocessor_config.json: plan, resize, normalise and patchify."""
    vision = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    merge = {"spatial_merge_size": "merge_size"}
    vision = {key: processor.get(merge.get(key, key), value) for key, value in vision.items()}
    write_checkpoint(tmp_path, **vision, window_size=512)
    write_json(tmp_path / "preprocessor_config.json", **processor)
    family, theirs = families.load(tmp_path), hf.ImageProcessor.from_pretrained(tmp_path)
    patchify = Patchify(family.processor, family.video_processor)
    for seed, (height, width) in enumerate([(8, 8), (100, 333), (1500, 1000), (600, 4)]):
        array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        plan = family.plan_image(height, width)
        resample = Image.Resampling[plan.resample.upper()]
        resized = Image.fromarray(array).resize(plan.resize[::-1], resample)
        ours = patchify(torch.from_numpy(np.array(resized)))
        expected = theirs(Image.fromarray(array), return_tensors="pt")
        assert torch.equal(ours, expected["pixel_values"])
        assert plan.grid_thw == tuple(expected["image_grid_thw"][0].tolist())
        assert plan.tokens == ours.shape[0] // family.processor.merge_size**2


def test_what_transformers_saves_reads_as_what_it_was(hf, directory, tmp_path):
    """transformers 5 writes other names than the hub's files have."""
    theirs = hf.ImageProcessor.from_pretrained(directory)
    write_checkpoint(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    theirs.save_pretrained(tmp_path)
    saved, original = families.load(tmp_path), families.load(directory)
    assert [saved.plan_image(*size) for size in SIZES] == [
        original.plan_image(*size) for size in SIZES
    ]


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_clip_patches_are_in_transformers_order(hf, frames):
    """Without scaling, since transformers normalises videos by torchvision, in another rounding."""
    family = SimpleNamespace()
    _, pixels = clip(family, frames, 56, 84)
    plain = {"do_rescale": False, "do_normalize": False}
    ours = Patchify(ImageProcessor(**plain), VideoProcessor(**plain))(torch.from_numpy(pixels))
    video = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    theirs = hf.VideoProcessor(**plain, do_resize=False, do_sample_frames=False)
    expected = theirs([video], return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(ours, expected.float())


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vision", "processor", "what"),
    [
        ({"patch_size": 16}, {}, "patch_size is 14, but the vision tower has 16"),
        ({}, {"merge_size": 4}, "merge_size is 4"),
        ({}, {"temporal_patch_size": 1}, "temporal_patch_size is 1"),
        ({"out_hidden_size": 99}, {}, "hidden_size is 48, but the vision tower has 99"),
        ({"hidden_act": "gelu"}, {}, "hidden_act='gelu'"),
        ({"window_size": 14}, {}, "window of 14 pixels"),
        ({"depth": "four"}, {}, "vision_config: Expected `int`"),
        ({}, {"image_mean": [0.5]}, "the image processor: Expected `array` of length 3"),
        ({}, {"do_resize": False}, "do_resize=False"),
        ({}, {"resample": 0}, "resample=0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_faulty_configuration_is_refused(tmp_path, vision, processor, what):
    config = {"model_type": "qwen2_5_vl", "vision_config": {**VISION, **vision}, **TEXT}
    write_json(tmp_path / "config.json", **config)
    write_json(tmp_path / "preprocessor_config.json", **processor)
    with pytest.raises(ConfigurationError, match=what):
        families.load(tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_text_settings_are_found_flat_and_nested(tmp_path, nested):
    text = {"text_config": TEXT} if nested else TEXT
    write_json(tmp_path / "config.json", model_type="qwen2_5_vl", vision_config=VISION, **text)
    family = families.load(tmp_path)
    assert (family.embedding_width, family.context_length) == (WIDTH, 4096)


def test_placeholders(family):
    assert family.placeholder("image") == "<|image_pad|>"
    assert family.placeholder("video") == "<|video_pad|>"
    with pytest.raises(UnsupportedMedium, match="takes no audio"):
        family.placeholder("audio")


# --- what the engine sees ------------------------------------------------------------------------


def entry(tokens=4, width=WIDTH, dtype="float32", grid=(1, 4, 4), **changes):
    return TicketItem("image", "h", dtype, (tokens, width), 0, grid_thw=grid, **changes)


def test_embedding_inputs(family):
    items = [entry(), entry(6, grid=(1, 6, 4))]
    embeddings = [torch.rand(4, WIDTH), torch.rand(6, WIDTH)]
    inputs = family.embedding_inputs(items, embeddings)
    assert inputs.keys() == {"image"}
    assert torch.equal(inputs["image"]["image_embeds"], torch.cat(embeddings))
    assert inputs["image"]["image_grid_thw"].tolist() == [[1, 4, 4], [1, 6, 4]]


def test_no_media_no_inputs(family):
    assert family.embedding_inputs([], []) == {}


def test_one_item_is_not_copied(family):
    embeddings = torch.rand(4, WIDTH)
    inputs = family.embedding_inputs([entry()], [embeddings])
    assert inputs["image"]["image_embeds"].data_ptr() == embeddings.data_ptr()


@pytest.mark.parametrize(
    ("item", "embeddings", "what"),
    [
        (entry(grid=None), torch.rand(4, WIDTH), "needs image_grid_thw"),
        (entry(grid=(1, 4, 6)), torch.rand(4, WIDTH), "makes 6 tokens, got 4"),
        (entry(grid=(1, 16, 1)), torch.rand(4, WIDTH), "multiples of 2"),
        (entry(grid=(4, 2, 2)), torch.rand(4, WIDTH), "one step in time"),
        (entry(grid=(1, -4, -4)), torch.rand(4, WIDTH), "must be positive"),
        (entry(width=32), torch.rand(4, 32), r"must be of shape \(4, 48\), got \(4, 32\)"),
        (entry(), torch.rand(5, WIDTH), r"got \(5, 48\)"),
        (entry(), torch.rand(4 * WIDTH), r"got \(192,\)"),
        (entry(), torch.rand(4, WIDTH).half(), "got torch.float16, and float32 in the ticket"),
        (entry(dtype="uint8"), torch.zeros(4, WIDTH, dtype=torch.uint8), "dtype"),
        (entry(), torch.full((4, WIDTH), float("nan")), "not finite"),
        (entry(), torch.eye(4, WIDTH) * float("-inf"), "not finite"),
    ],
)
def test_what_would_hurt_the_engine_is_refused(family, item, embeddings, what):
    good = torch.rand(4, WIDTH)
    with pytest.raises(InvalidValue, match=what) as caught:
        family.embedding_inputs([entry(), item], [good, embeddings])
    assert caught.value.where == "items[1]"


def test_number_of_embeddings_is_checked(family):
    with pytest.raises(InvalidValue, match="1 items, but 0 embeddings"):
        family.embedding_inputs([entry()], [])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"grid_thw": None}, "needs image_grid_thw"),
        ({"shape": (56, 84, 3)}, r"needs uint8 of shape \(56, 56, 3\)"),
        ({"dtype": "float32"}, "got float32"),
        ({"tokens": 5}, "makes 4 tokens, got 5"),
        ({"precomputed": True}, "must be a matrix"),
        ({"precomputed": True, "dtype": "float16", "shape": (4, 3)}, "48 wide"),
        ({"precomputed": True, "dtype": "float16", "shape": (5, WIDTH)}, "must be a matrix"),
    ],
    ids=str,
)
def test_item_that_does_not_fit_is_refused(family, changes, what):
    good = {"modality": "image", "hash": "h", "dtype": "uint8", "shape": (56, 56, 3)}
    good |= {"offset": 0, "tokens": 4, "grid_thw": (1, 4, 4)}
    family.check_item(Item(**good))
    with pytest.raises(InvalidValue, match=what):
        family.check_item(Item(**{**good, **changes}))


def test_modality_that_is_not_served_is_refused(family):
    with pytest.raises(UnsupportedMedium, match="takes no audio"):
        family.check_item(Item("audio", "h", "float32", (80, 3000), 0, 4))
