"""LLaVA-1.5 held against transformers: sizes, pixels, tower, and what goes to the engine."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoints import CLIP_PROCESSOR, IMAGE_SIZE, tiny_llava
from triptych import families
from triptych.contract import ImagePlan, Item, TicketItem
from triptych.engines.torchvision_ops import define_missing
from triptych.errors import ConfigurationError, InvalidValue, MediaError, UnsupportedMedium
from triptych.families.clip import ClipProcessor
from triptych.families.towers.clip import Normalise
from triptych.media.image import fit

CPU = torch.device("cpu")
TOKENS = 16
WIDTH = 128
TOLERANCE = {"atol": 2e-5, "rtol": 0}
"""float32, values of about 1 to 5: the order of the sums differs, nothing else."""

SIZES = [(56, 56), (57, 56), (56, 57), (55, 55), (1, 3), (300, 2), (100, 75), (480, 640), (333, 99)]


@pytest.fixture(scope="module")
def hf():
    define_missing()
    import transformers
    from transformers.image_transforms import get_resize_output_image_size

    return SimpleNamespace(
        resize=get_resize_output_image_size,
        ImageProcessor=transformers.CLIPImageProcessorPil,
        Model=transformers.LlavaForConditionalGeneration,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("llava") / "checkpoint")


@pytest.fixture(scope="module")
def family(directory):
    return families.load(directory)


@pytest.fixture(scope="module")
def tower(family):
    return family.load_tower(CPU, torch.float32)


@pytest.fixture
def altered(directory, tmp_path):
    """Makes a copy of the checkpoint with other fields in one of its JSON files."""

    def alter(file="config.json", **fields):
        copy = shutil.copytree(directory, tmp_path / "copy")
        values = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**values, **fields}))
        return copy

    return alter


def picture(seed=0, size=IMAGE_SIZE):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Item("image", f"#{seed}", "uint8", pixels.shape, 0, TOKENS), torch.from_numpy(pixels)


def run(tower, *media):
    items, pixels = zip(*media, strict=True)
    with torch.inference_mode():
        return tower.encode(items, list(pixels))


def ticket(shape=(TOKENS, WIDTH), modality="image", dtype="float32"):
    return TicketItem(modality, "#", dtype, shape, 0)


# --- sizes and pixels ----------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([56, 224, 336]))
@example(336, 336, 336)
@example(1, 200, 336)
@example(3, 1, 336)
def test_size_is_transformers_size(hf, height, width, edge):
    processor = ClipProcessor(size=edge, crop_size=edge)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(MediaError, match="the limit is 200"):
            processor.plan(ImagePlan, height, width, 1)
        return
    plan = processor.plan(ImagePlan, height, width, 1)
    blank = np.broadcast_to(np.uint8(0), (3, height, width))
    expected = hf.resize(blank, edge, default_to_square=False, input_data_format="channels_first")
    assert plan.resize == expected
    assert plan.shape == (edge, edge, 3)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (1, 201), (2010, 10)])
def test_picture_without_a_size_is_refused(family, height, width):
    with pytest.raises(MediaError, match=f"{width}×{height} pixels"):
        family.plan_image(height, width)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"size": 56, "crop_size": 56},
        {"size": {"shortest_edge": 64}},
        {"size": {"shortest_edge": 40}},
        {"size": {"height": 56, "width": 56}, "do_center_crop": False},
        {"do_resize": False},
        {"resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
        {"do_normalize": False},
        {"do_rescale": False},
    ],
    ids=str,
)
def test_pixels_are_transformers_pixels_bit_for_bit(hf, altered, fields):
    directory = altered("preprocessor_config.json", **fields)
    family = families.load(directory)
    normalise = Normalise(family.processor)
    reference = hf.ImageProcessor.from_pretrained(directory)
    for height, width in SIZES:
        noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        plan = family.plan_image(height, width)
        pixels = fit(image, plan)
        assert pixels.shape == plan.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        expected = reference(image, return_tensors="np")["pixel_values"]
        got = normalise(torch.tensor(pixels)[None]).numpy()
        np.testing.assert_array_equal(got, expected, err_msg=f"{height}×{width}")


def test_plan_of_the_hub_s_processor_is_336_pixels_and_576_tokens(altered):
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    directory = altered(vision_config={**vision, "hidden_size": 64, "num_attention_heads": 2})
    processor = {**CLIP_PROCESSOR, "size": {"shortest_edge": 336}}
    processor["crop_size"] = {"height": 336, "width": 336}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    plan = families.load(directory).plan_image(480, 640)
    assert plan == ImagePlan(resize=(336, 448), tokens=576, crop=(336, 336))


# --- the tower -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"vision_feature_layer": -1},
        {"vision_feature_layer": 0},
        {"vision_feature_layer": [1, -1]},
        {"vision_feature_select_strategy": "full"},
        {"multimodal_projector_bias": False, "projector_hidden_act": "relu"},
    ],
    ids=str,
)
def test_embeddings_are_transformers(hf, tmp_path, fields, caplog):
    directory = tiny_llava(tmp_path, **fields)
    family = families.load(directory)
    model, loading = hf.Model.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    media = [picture(seed) for seed in range(3)]
    tower = family.load_tower(CPU, torch.float32)
    pixels = tower.normalise(torch.stack([pixels for _, pixels in media]))
    with torch.inference_mode():
        expected = model.eval().get_image_features(pixels).pooler_output
    for ours, theirs in zip(run(tower, *media), expected, strict=True):
        assert theirs.shape == (family.config.tokens, WIDTH)
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert not caplog.records, "no weight is left over but those known to be"


def test_batched_is_alone(tower):
    media = [picture(seed) for seed in range(5)]
    for item, together in zip(media, run(tower, *media), strict=True):
        torch.testing.assert_close(together, run(tower, item)[0], **TOLERANCE)


def test_pictures_differ(tower):
    first, second = run(tower, picture(0), picture(1))
    assert (first - second).abs().mean() > 0.1


def test_weights_by_transformers_5_names(hf, directory, tower, tmp_path):
    model = hf.Model.from_pretrained(directory, dtype=torch.float32)
    copy = shutil.copytree(directory, tmp_path / "copy")
    save_file(dict(model.state_dict()), copy / "model.safetensors")
    theirs = families.load(copy).load_tower(CPU, torch.float32)
    assert torch.equal(run(theirs, picture())[0], run(tower, picture())[0])


def test_low_precision_stays_near(family, tower):
    half = family.load_tower(CPU, torch.bfloat16)
    (exact,), (rounded,) = run(tower, picture()), run(half, picture())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.15, rtol=0)


# --- what cannot be served -----------------------------------------------------------------------


def without(directory, start):
    weights = load_file(directory / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(start)}
    save_file(kept, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("start", "what"),
    [
        ("multi_modal_projector.", "no weights under multi_modal_projector"),
        ("multi_modal_projector.linear_2.bias", "no weight 'multi_modal_projector.linear_2.bias'"),
        ("vision_tower.", "no weights under vision_tower"),
        ("vision_tower.vision_model.encoder.layers.1.", "no weight .*layers.1"),
    ],
)
def test_missing_weights_are_named(altered, start, what):
    family = families.load(without(altered(), start))
    with pytest.raises(ConfigurationError, match=what):
        family.load_tower(CPU, torch.float32)


def test_layers_that_are_not_run_need_no_weights(altered, tower):
    directory = without(altered(), "vision_tower.vision_model.encoder.layers.2.")
    theirs = families.load(directory).load_tower(CPU, torch.float32)
    assert torch.equal(run(theirs, picture())[0], run(tower, picture())[0])


VISION = {"image_size": IMAGE_SIZE, "patch_size": 14}


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"vision_config": None}, "vision_config"),
        ({"vision_config": {**VISION, "model_type": "siglip_vision_model"}}, "siglip"),
        ({"vision_config": {**VISION, "hidden_size": 65}}, "65, which 12 heads cannot share"),
        ({"vision_config": {**VISION, "hidden_act": "mish"}}, "hidden_act"),
        ({"vision_config": {**VISION, "num_channels": 4}}, "num_channels"),
        ({"projector_hidden_act": "mish"}, "projector_hidden_act"),
        ({"vision_feature_layer": 4}, "is 4, but the tower has 3 layers"),
        ({"vision_feature_layer": [1, -5]}, "-5.*, but the tower has 3 layers"),
        ({"vision_feature_layer": []}, "but the tower has 3 layers"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        ({"text_config": {"model_type": "unheard"}}, "hidden_size"),
    ],
    ids=str,
)
def test_configuration_that_is_not_served(altered, fields, what):
    with pytest.raises(ConfigurationError, match=what):
        families.load(altered(**fields))


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"do_pad": True}, "do_pad=True"),
        ({"resample": 0}, "resample=0"),
        ({"crop_size": {"height": 28, "width": 28}}, r"\(28, 28\), but the vision tower takes"),
        ({"do_center_crop": False}, "any size, but the vision tower takes"),
        ({"size": {"longest_edge": 56}}, "neither a shortest_edge"),
        ({"crop_size": {"height": 56}}, "any size"),
    ],
    ids=str,
)
def test_processor_that_is_not_served(altered, fields, what):
    with pytest.raises(ConfigurationError, match=what):
        families.load(altered("preprocessor_config.json", **fields))


# --- items and embeddings ------------------------------------------------------------------------


def test_item_that_fits_is_taken(family):
    family.check_item(picture()[0])
    family.check_item(Item("image", "", "bfloat16", (TOKENS, WIDTH), 0, TOKENS, precomputed=True))


@pytest.mark.parametrize(
    ("item", "error"),
    [
        (Item("video", "", "uint8", (56, 56, 3), 0, TOKENS), UnsupportedMedium),
        (Item("image", "", "float32", (56, 56, 3), 0, TOKENS), InvalidValue),
        (Item("image", "", "uint8", (56, 55, 3), 0, TOKENS), InvalidValue),
        (Item("image", "", "uint8", (56, 56, 3), 0, TOKENS - 1), InvalidValue),
        (Item("image", "", "uint8", (56, 56, 3), 0, TOKENS, (1, 4, 4)), InvalidValue),
        (Item("image", "", "float32", (15, WIDTH), 0, 15, precomputed=True), InvalidValue),
        (Item("image", "", "float32", (16, 64), 0, 16, precomputed=True), InvalidValue),
    ],
)
def test_item_that_does_not_fit_is_refused(family, item, error):
    with pytest.raises(error):
        family.check_item(item)


def test_embeddings_go_to_the_engine_as_a_list(family):
    tensors = [torch.randn(TOKENS, WIDTH) for _ in range(2)]
    inputs = family.embedding_inputs([ticket(), ticket()], tensors)
    assert list(inputs) == ["image"]
    assert all(a is b for a, b in zip(inputs["image"], tensors, strict=True))
    assert family.embedding_inputs([], []) == {}


@pytest.mark.parametrize(
    ("item", "tensor", "error"),
    [
        (ticket(modality="audio"), torch.zeros(TOKENS, WIDTH), UnsupportedMedium),
        (ticket((15, WIDTH)), torch.zeros(15, WIDTH), InvalidValue),
        (ticket(), torch.zeros(TOKENS, WIDTH - 1), InvalidValue),
        (ticket(), torch.zeros(TOKENS, WIDTH).half(), InvalidValue),
        (ticket(), torch.full((TOKENS, WIDTH), torch.nan), InvalidValue),
    ],
)
def test_embeddings_that_would_end_the_engine_are_refused(family, item, tensor, error):
    with pytest.raises(error) as caught:
        family.embedding_inputs([ticket(), item], [torch.zeros(TOKENS, WIDTH), tensor])
    assert caught.value.where == "items[1]"


def test_only_pictures_are_taken(family):
    assert family.placeholder("image") == "<image>"
    with pytest.raises(UnsupportedMedium, match=r"LLaVA-1.5 takes no video"):
        family.placeholder("video")
    with pytest.raises(UnsupportedMedium, match=r"LLaVA-1.5 takes no audio"):
        family.plan_audio(1)
