"""Qwen2.5-VL's vision tower held against transformers', and how its weights are read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from triptych import families
from triptych.errors import ConfigurationError
from unit.qwen import TEXT, VISION, WIDTH, clip, picture, random_weights, write_checkpoint

CPU = torch.device("cpu")
TOLERANCE = {"atol": 1e-5, "rtol": 0}
"""float32, values of about 1: the order of the sums differs, nothing else."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint")


@pytest.fixture(scope="module")
def family(directory):
    return families.load(directory)


@pytest.fixture(scope="module")
def tower(family):
    return family.load_tower(CPU, torch.float32)


@pytest.fixture(scope="module")
def hf_tower(hf):
    """transformers' vision tower with the same weights."""
    text = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0, "intermediate_size": 8}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, **TEXT}
    visual = hf.Model(hf.Config(vision_config=VISION, text_config=text)).eval().model.visual
    visual.load_state_dict(random_weights(prefix=""))
    return visual


def run(tower, *media):
    items, arrays = zip(*media, strict=True)
    with torch.inference_mode():
        return tower.encode(items, [torch.from_numpy(array) for array in arrays])


def run_hf(hf_tower, tower, *media):
    """transformers' tower on our patches, which other tests hold against transformers'."""
    patches = torch.cat([tower.patchify(torch.from_numpy(array)) for _, array in media])
    grids = torch.tensor([item.grid_thw for item, _ in media])
    with torch.inference_mode():
        merged = hf_tower(patches, grids).pooler_output
    return merged.split([item.tokens for item, _ in media])


# --- the tower -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (112, 112), (448, 448), (140, 364), (28, 5600)])
def test_tower_is_transformers_tower(tower, hf_tower, family, size):
    """Whole windows, windows cut at an edge, and one line of tokens."""
    medium = picture(family, *size)
    [ours], [theirs] = run(tower, medium), run_hf(hf_tower, tower, medium)
    assert ours.shape == (medium[0].tokens, WIDTH)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_mixed_batch_is_transformers_batch(tower, hf_tower, family):
    media = [picture(family, *size) for size in [(300, 200), (56, 56), (448, 420), (300, 200)]]
    media += [clip(family, 5, 56, 140), clip(family, 1, 140, 56)]
    for ours, theirs in zip(run(tower, *media), run_hf(hf_tower, tower, *media), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


@settings(max_examples=20)
@given(st.permutations(range(6)))
def test_batched_is_as_alone(tower, family, order):
    sizes = [(300, 200), (56, 56), (448, 420), (10, 1000), (112, 112), (200, 300)]
    media = [picture(family, *sizes[index], seed=index) for index in order]
    for medium, batched in zip(media, run(tower, *media), strict=True):
        [alone] = run(tower, medium)
        torch.testing.assert_close(batched, alone, **TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [
        {"window_size": 56},
        {"window_size": 448},
        {"fullatt_block_indexes": [1]},
        {"rope_parameters": {"rope_theta": 100.0}},
    ],
    ids=str,
)
def test_tolerance_is_small_enough_to_see_a_change(tower, family, tmp_path, change):
    other = families.load(write_checkpoint(tmp_path, **change)).load_tower(CPU, torch.float32)
    medium = picture(family, 448, 364)
    [one], [two] = run(tower, medium), run(other, medium)
    assert (one - two).abs().max() > 100 * TOLERANCE["atol"]


def test_trained_checkpoint_equals_transformers(hf, checkpoint):
    """The model that comes with the repository, its own processor included."""
    family = families.load(checkpoint)
    tower = family.load_tower(CPU, torch.float32)
    theirs = hf.Model.from_pretrained(checkpoint, dtype=torch.float32).eval().model.visual
    media = [picture(family, *size) for size in [(100, 100), (64, 200), (8, 8)]]
    for ours, expected in zip(run(tower, *media), run_hf(theirs, tower, *media), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours, expected, atol=1e-5 * scale, rtol=0)


def test_bfloat16(tower, family):
    """As on a GPU; the bound is bfloat16's 8 bits over the depth of the tower."""
    half = family.load_tower(CPU, torch.bfloat16)
    medium = picture(family, 300, 200)
    [exact], [rounded] = run(tower, medium), run(half, medium)
    assert rounded.dtype == torch.bfloat16
    assert (exact - rounded.float()).norm() < 0.03 * exact.norm()


# --- weights -------------------------------------------------------------------------------------


def test_names_of_transformers_5_are_read_too(tower, family, tmp_path):
    other = families.load(write_checkpoint(tmp_path, "model.visual."))
    medium = picture(family, 100, 100)
    [one], [two] = run(tower, medium), run(other.load_tower(CPU, torch.float32), medium)
    assert torch.equal(one, two)


def test_other_dtypes_and_a_rewritten_file_do_not_matter(tmp_path):
    """bfloat16 on disk, float32 in use, and no view of the file is kept."""
    family = families.load(write_checkpoint(tmp_path))
    weights = {name: weight.bfloat16() for name, weight in random_weights().items()}
    save_file(weights, tmp_path / "model.safetensors")
    tower = family.load_tower(CPU, torch.float32)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1000, 2)
        file.write(bytes(1000))
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, weights["visual." + name].float()), name


def test_weights_that_are_not_used_are_told_of(tmp_path, caplog):
    family = families.load(write_checkpoint(tmp_path))
    weights = random_weights() | {"visual.blocks.9.norm1.weight": torch.ones(1)}
    save_file(weights, tmp_path / "model.safetensors")
    family.load_tower(CPU, torch.float32)
    assert "blocks.9.norm1.weight" in caplog.text


@pytest.mark.parametrize("name", ["merger.mlp.2.bias", "patch_embed.proj.weight"])
@pytest.mark.parametrize("fault", ["missing", "shape", "dtype"])
def test_faulty_weight_is_named(tmp_path, name, fault):
    family = families.load(write_checkpoint(tmp_path))
    weights = random_weights()
    weight = weights.pop(f"visual.{name}")
    if fault == "shape":
        weights[f"visual.{name}"] = weight[1:].clone()
    elif fault == "dtype":
        weights[f"visual.{name}"] = weight.to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match=f"visual.{name}"):
        family.load_tower(CPU, torch.float32)


def test_checkpoint_without_a_tower(tmp_path):
    family = families.load(write_checkpoint(tmp_path))
    save_file({"lm_head.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"no weights under visual\. or model\.visual\."):
        family.load_tower(CPU, torch.float32)
