"""LLaVA-NeXT-Video: frames as transformers prepares them, handed on to the engine unchanged."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import IMAGE_SIZE, VIDEO_VISION, tiny_llava_next_video
from triptych import families
from triptych.contract import Item, TicketItem, VideoPlan
from triptych.encode import Encoder
from triptych.engines.torchvision_ops import define_missing
from triptych.errors import ConfigurationError, InvalidValue, MediaError, UnsupportedMedium
from triptych.media.image import fit
from triptych.settings import EncoderSettings

CPU = torch.device("cpu")
FRAME_TOKENS = 16
ROW = 3 * 14 * 14
"""Bytes of pixels that are one token's."""


@pytest.fixture(scope="module")
def hf():
    define_missing()
    import transformers

    return SimpleNamespace(
        Processor=transformers.LlavaNextVideoVideoProcessor,
        Model=transformers.LlavaNextVideoForConditionalGeneration,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_llava_next_video(tmp_path_factory.mktemp("next") / "checkpoint")


@pytest.fixture(scope="module")
def family(directory):
    return families.load(directory)


@pytest.fixture
def altered(directory, tmp_path):
    """Makes a copy of the checkpoint with other fields in one of its JSON files."""

    def alter(file="config.json", **fields):
        copy = shutil.copytree(directory, tmp_path / "copy")
        values = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**values, **fields}))
        return copy

    return alter


def clip(frames, seed=0):
    shape = (frames, IMAGE_SIZE, IMAGE_SIZE, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Item("video", f"#{seed}", "uint8", shape, 0, frames * FRAME_TOKENS), pixels


def ticket(shape=(32, ROW), modality="video", dtype="uint8"):
    return TicketItem(modality, "#", dtype, shape, 0)


# --- sizes and pixels ----------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(56, 56), (100, 75), (240, 321), (57, 400)])
def test_frames_are_transformers_frames(hf, family, directory, height, width):
    """transformers scales with torchvision, we with Pillow: one step of 256 apart at most."""
    processor = hf.Processor.from_pretrained(directory)
    plain = {"return_tensors": "pt", "do_rescale": False, "do_normalize": False}
    noise = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    plan = family.plan_video(3, height, width, 1.0)
    frames = np.stack([fit(Image.fromarray(frame), plan) for frame in noise])
    expected = processor(noise, **plain)["pixel_values_videos"][0].permute(0, 2, 3, 1)
    assert frames.shape == expected.shape == (3, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert np.abs(frames.astype(int) - expected.numpy().astype(int)).max() <= 1
    again = processor(frames, **plain)["pixel_values_videos"][0].permute(0, 2, 3, 1)
    np.testing.assert_array_equal(again.numpy(), frames, "the engine's processor leaves them alone")


def test_tokens_are_those_that_transformers_model_makes(hf, family, directory):
    model = hf.Model.from_pretrained(directory, dtype=torch.float32).eval()
    pixels = torch.zeros(1, 5, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.inference_mode():
        (features,) = model.model.get_video_features(pixels).pooler_output
    assert features.shape[:2] == (5, FRAME_TOKENS)
    assert family.plan_video(5, 100, 100, 1.0).tokens == 5 * FRAME_TOKENS


def test_plan_names_both_sizes(family):
    assert family.plan_video(8, 90, 120, 2.0) == VideoPlan(
        resize=(56, 74), tokens=128, crop=(56, 56)
    )
    with pytest.raises(MediaError, match="the limit is 200"):
        family.plan_video(8, 1, 900, 2.0)


# --- the way to the engine -----------------------------------------------------------------------


def test_frames_come_through_the_encoder_as_they_went_in(family):
    assert family.engine_encodes == {"video"}
    encoder = Encoder(family, EncoderSettings(model=str(family.checkpoint.path)), CPU)
    media = [clip(3), clip(8, seed=1)]
    requests = [([item], torch.from_numpy(pixels.reshape(-1))) for item, pixels in media]
    for (_, pixels), encoded in zip(media, encoder.encode(requests), strict=True):
        (entry,) = encoded.ticket.items
        assert entry.dtype == "uint8"
        assert entry.shape == (len(pixels) * FRAME_TOKENS, ROW)
        rows = encoded.embeddings[: entry.nbytes].view(entry.shape)
        inputs = family.embedding_inputs([entry], [rows])
        assert list(inputs) == ["video"]
        np.testing.assert_array_equal(inputs["video"][0].numpy(), pixels)


@pytest.mark.parametrize(
    ("item", "tensor", "error"),
    [
        (ticket(modality="image"), torch.zeros(32, ROW).byte(), UnsupportedMedium),
        (ticket((31, ROW)), torch.zeros(31, ROW).byte(), InvalidValue),
        (ticket((0, ROW)), torch.zeros(0, ROW).byte(), InvalidValue),
        (ticket((32, 128)), torch.zeros(32, 128).byte(), InvalidValue),
        (ticket(), torch.zeros(16, ROW).byte(), InvalidValue),
        (ticket(), torch.zeros(32, ROW), InvalidValue),
        (ticket(dtype="float32"), torch.zeros(32, ROW).byte(), InvalidValue),
    ],
)
def test_frames_that_the_engine_must_not_see_are_refused(family, item, tensor, error):
    with pytest.raises(error) as caught:
        family.embedding_inputs([item], [tensor])
    assert caught.value.where == "items[0]"


def test_one_clip_a_request(family):
    rows = torch.zeros(32, ROW).byte()
    with pytest.raises(InvalidValue, match="takes 1 video a request, got 2"):
        family.embedding_inputs([ticket(), ticket()], [rows, rows])
    with pytest.raises(InvalidValue, match="1 items and 0 tensors"):
        family.embedding_inputs([ticket()], [])
    assert family.embedding_inputs([], []) == {}


# --- what cannot be served -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "error"),
    [
        (Item("image", "", "uint8", (56, 56, 3), 0, 16), UnsupportedMedium),
        (Item("video", "", "float32", (2, 56, 56, 3), 0, 32), InvalidValue),
        (Item("video", "", "uint8", (2, 56, 57, 3), 0, 32), InvalidValue),
        (Item("video", "", "uint8", (2, 56, 56, 3), 0, 33), InvalidValue),
        (Item("video", "", "uint8", (0, 56, 56, 3), 0, 0), InvalidValue),
        (Item("video", "", "uint8", (2, 56, 56, 3), 0, 32, (2, 2, 2)), InvalidValue),
        (Item("video", "", "uint8", (), 0, 0), InvalidValue),
        (Item("video", "", "float32", (8, 128), 0, 8, precomputed=True), UnsupportedMedium),
    ],
)
def test_item_that_does_not_fit_is_refused(family, item, error):
    with pytest.raises(error):
        family.check_item(item)


def test_item_that_fits_is_taken(family):
    family.check_item(clip(2)[0])


@pytest.mark.parametrize(
    ("file", "fields", "what"),
    [
        ("config.json", {"spatial_pool_mode": "conv"}, "spatial_pool_mode"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "select_strategy"),
        ("config.json", {"spatial_pool_stride": 3}, "56 pixels a side .* tokens of 21"),
        ("config.json", {"vision_config": {**VIDEO_VISION, "patch_size": 16}}, "tokens of 32"),
        ("config.json", {"vision_config": {**VIDEO_VISION, "patch_size": 14}}, "vLLM cannot pool"),
        ("video_preprocessor_config.json", {"do_center_crop": False}, "any size"),
        ("video_preprocessor_config.json", {"crop_size": 28}, r"\(28, 28\)"),
    ],
)
def test_configuration_that_is_not_served(altered, file, fields, what):
    with pytest.raises(ConfigurationError, match=what):
        families.load(altered(file, **fields))


def test_only_clips_are_taken(family):
    assert family.placeholder("video") == "<video>"
    with pytest.raises(UnsupportedMedium, match="LLaVA-NeXT-Video takes no image, but video"):
        family.plan_image(10, 10)
    with pytest.raises(UnsupportedMedium, match="takes no image"):
        family.placeholder("image")
    with pytest.raises(UnsupportedMedium, match="takes no audio"):
        family.plan_audio(10)
