"""Qwen2-Audio held against transformers: features, lengths, tower, and what goes to the engine."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoints import AUDIO, EXTRACTOR, tiny_qwen2_audio
from triptych import families
from triptych.contract import Item, TicketItem
from triptych.engines.torchvision_ops import define_missing
from triptych.errors import (
    ConfigurationError,
    InvalidValue,
    MediaError,
    MediaTooLarge,
    UnsupportedMedium,
)
from triptych.families.qwen2_audio import FeatureExtractor
from triptych.families.towers.log_mel import LogMel, mel_filters

CPU = torch.device("cpu")
RATE = 16_000
WIDTH = 128
FEATURES = {"atol": 2e-6, "rtol": 0}
"""float32, values up to about 1.5: transformers multiplies more frames at a time."""
TOLERANCE = {"atol": 2e-5, "rtol": 0}
"""float32, values of about 1 to 5: the order of the sums differs, nothing else."""

LENGTHS = [
    321,
    480,
    481,
    640,
    641,
    1599,
    1600,
    1601,
    16_000,
    31_679,
    31_680,
    31_839,
    31_999,
    32_000,
]
"""Samples; 32 000 are all that the small tower hears."""


@pytest.fixture(scope="module")
def hf():
    define_missing()
    import transformers
    from transformers.audio_utils import mel_filter_bank

    return SimpleNamespace(
        mel_filter_bank=mel_filter_bank,
        FeatureExtractor=transformers.WhisperFeatureExtractor,
        Model=transformers.Qwen2AudioForConditionalGeneration,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_qwen2_audio(tmp_path_factory.mktemp("audio") / "checkpoint")


@pytest.fixture(scope="module")
def family(directory):
    return families.load(directory)


@pytest.fixture(scope="module")
def tower(family):
    return family.load_tower(CPU, torch.float32)


@pytest.fixture(scope="module")
def reference(hf, directory):
    """transformers' model and feature extractor; the loader knows every weight."""
    model, loading = hf.Model.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    extractor = hf.FeatureExtractor.from_pretrained(directory)

    @torch.inference_mode()
    def embeddings(sounds):
        inputs = extractor(
            sounds, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt"
        )
        frames = inputs["attention_mask"].sum(-1)
        places, tokens = model.model.audio_tower._get_feat_extract_output_lengths(frames)
        silent = torch.arange(AUDIO["max_source_positions"])[None] >= places[:, None]
        mask = torch.zeros(silent.shape).masked_fill(silent, -torch.inf)[:, None, None]
        mask = mask.expand(-1, 1, silent.shape[1], -1)
        hidden = model.model.audio_tower(inputs["input_features"], attention_mask=mask)
        projected = model.model.multi_modal_projector(hidden.last_hidden_state)
        return [row[:count] for row, count in zip(projected, tokens.tolist(), strict=True)]

    model.eval()
    return SimpleNamespace(embeddings=embeddings, extractor=extractor)


@pytest.fixture
def altered(directory, tmp_path):
    """Makes a copy of the checkpoint with other fields in one of its JSON files."""

    def alter(file="config.json", **fields):
        copy = shutil.copytree(directory, tmp_path / "copy")
        values = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**values, **fields}))
        return copy

    return alter


def sound(samples, seed=0):
    """A chord over noise, as loud at its end as anywhere."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / RATE
    waves = sum(np.sin(2 * np.pi * pitch * time) for pitch in rng.uniform(100, 6000, 3))
    return (0.2 * waves + 0.05 * rng.standard_normal(samples)).astype(np.float32)


def medium(family, samples, seed=0):
    plan = family.plan_audio(samples)
    item = Item("audio", f"{samples}#{seed}", "float32", (samples,), 0, plan.tokens)
    return item, torch.from_numpy(sound(samples, seed))


def run(tower, *media):
    items, samples = zip(*media, strict=True)
    with torch.inference_mode():
        return tower.encode(items, list(samples))


def ticket(tokens=10, modality="audio", dtype="float32"):
    return TicketItem(modality, "#", dtype, (tokens, WIDTH), 0)


# --- the spectrogram -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_fft", "bands", "rate"), [(400, 128, RATE), (400, 80, RATE), (512, 16, 24_000)]
)
def test_filters_are_transformers_filters(hf, n_fft, bands, rate):
    expected = hf.mel_filter_bank(
        1 + n_fft // 2, bands, 0.0, 8000.0, rate, norm="slaney", mel_scale="slaney"
    )
    np.testing.assert_array_equal(mel_filters(n_fft, bands, rate), expected)


@pytest.mark.parametrize("samples", LENGTHS)
def test_features_are_transformers_features(family, reference, samples):
    wave = sound(samples)
    expected = reference.extractor(wave, sampling_rate=RATE, return_tensors="pt")
    got = LogMel(family.extractor)(torch.from_numpy(wave))
    frames = min(-(-samples // 160) + 2, 200)
    assert got.shape == (16, frames)
    torch.testing.assert_close(got, expected["input_features"][0, :, :frames], **FEATURES)


def test_features_of_the_hub_s_extractor(hf):
    """128 bands, half a minute."""
    extractor = FeatureExtractor(feature_size=128)
    reference = hf.FeatureExtractor(feature_size=128)
    for samples in (20_000, 480_000):
        wave = sound(samples)
        expected = reference(wave, sampling_rate=RATE, return_tensors="pt")["input_features"][0]
        got = LogMel(extractor)(torch.from_numpy(wave))
        torch.testing.assert_close(got, expected[:, : got.shape[1]], **FEATURES)
        if samples == extractor.max_samples:
            assert torch.equal(got, expected), "nothing is left out, so nothing differs"


@pytest.mark.parametrize("wave", [np.zeros(4000, np.float32), np.eye(1, 4000, 3999, np.float32)[0]])
def test_features_of_silence_and_of_a_click_at_the_end(family, reference, wave):
    expected = reference.extractor(wave, sampling_rate=RATE, return_tensors="pt")
    got = LogMel(family.extractor)(torch.from_numpy(wave))
    torch.testing.assert_close(got, expected["input_features"][0, :, : got.shape[1]], **FEATURES)


# --- lengths -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The family of a checkpoint like the hub's, which has no weights."""
    path = tmp_path_factory.mktemp("full")
    config = {"audio_config": {}, "text_config": {"model_type": "qwen2"}}
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2_audio", **config}))
    processor = {**EXTRACTOR, "feature_size": 128, "chunk_length": 30}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return families.load(path)


@given(st.integers(321, 480_000))
@example(321)
@example(479_999)
@example(480_000)
def test_tokens_are_transformers_tokens(full, samples):
    """The expression is that of its processor; it counts frames in the mask of the samples."""
    frames = int(np.ones(samples, np.int8)[::160].sum())
    assert full.extractor.frames(samples) == frames
    assert full.plan_audio(samples).tokens == ((frames - 1) // 2 + 1 - 2) // 2 + 1 >= 1


def test_the_hub_s_model_makes_750_tokens_of_half_a_minute(full):
    assert full.plan_audio(480_000).tokens == 750
    assert full.embedding_width == 4096
    assert full.audio_rate == RATE


def test_sound_that_is_too_long_is_refused_and_not_cut(family):
    with pytest.raises(MediaTooLarge, match=r"lasts 2\.5 s; Qwen2-Audio hears 2 s at most"):
        family.plan_audio(40_000)


@pytest.mark.parametrize("samples", [0, 1, 320])
def test_sound_that_is_too_short_is_refused(family, samples):
    with pytest.raises(MediaError, match=f"{samples} samples .* needs 321 at least"):
        family.plan_audio(samples)


# --- the tower -----------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", LENGTHS)
def test_embeddings_are_transformers(family, tower, reference, samples):
    (ours,) = run(tower, medium(family, samples))
    (theirs,) = reference.embeddings([sound(samples)])
    assert ours.shape == theirs.shape == (family.plan_audio(samples).tokens, WIDTH)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_batched_is_alone_and_in_order(family, tower, reference):
    media = [
        medium(family, samples, seed) for seed, samples in enumerate([9000, 400, 32_000, 9000])
    ]
    together = run(tower, *media)
    theirs = reference.embeddings([samples.numpy() for _, samples in media])
    for item, ours, expected in zip(media, together, theirs, strict=True):
        torch.testing.assert_close(ours, run(tower, item)[0], **TOLERANCE)
        torch.testing.assert_close(ours, expected, **TOLERANCE)
    assert (together[0] - together[3]).abs().mean() > 0.1, "other sounds, other embeddings"


def test_every_weight_is_read(directory, family, caplog):
    family.load_tower(CPU, torch.float32)
    assert not caplog.records


def test_weights_by_transformers_5_names(hf, directory, family, tower, tmp_path):
    model = hf.Model.from_pretrained(directory, dtype=torch.float32)
    copy = shutil.copytree(directory, tmp_path / "copy")
    save_file(dict(model.state_dict()), copy / "model.safetensors")
    theirs = families.load(copy).load_tower(CPU, torch.float32)
    item = medium(family, 5000)
    assert torch.equal(run(theirs, item)[0], run(tower, item)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near(family, tower, dtype):
    half = family.load_tower(CPU, dtype)
    item = medium(family, 8000)
    (exact,), (rounded,) = run(tower, item), run(half, item)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.float(), exact, atol=0.15, rtol=0)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        ("multi_modal_projector.", "no weights under multi_modal_projector"),
        ("audio_tower.", "no weights under audio_tower"),
        ("audio_tower.conv2.bias", "no weight 'audio_tower.conv2.bias'"),
    ],
)
def test_missing_weights_are_named(altered, start, what):
    copy = altered()
    weights = load_file(copy / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(start)}
    save_file(kept, copy / "model.safetensors")
    with pytest.raises(ConfigurationError, match=what):
        families.load(copy).load_tower(CPU, torch.float32)


# --- what cannot be served -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "fields", "what"),
    [
        ("config.json", {"audio_config": {**AUDIO, "d_model": 65}}, "65, which 2 heads"),
        (
            "config.json",
            {"audio_config": {**AUDIO, "num_mel_bins": 80}},
            "feature_size .* takes 80",
        ),
        ("config.json", {"audio_config": {**AUDIO, "max_source_positions": 99}}, "is 200, .* 198"),
        ("config.json", {"audio_config": {**AUDIO, "activation_function": "mish"}}, "mish"),
        ("preprocessor_config.json", {"dither": 0.1}, "dither"),
        ("preprocessor_config.json", {"padding_value": 1.0}, "padding_value"),
        ("preprocessor_config.json", {"chunk_length": 30}, "the number of frames"),
        ("preprocessor_config.json", {"hop_length": 0}, "hop_length"),
    ],
)
def test_configuration_that_is_not_served(altered, file, fields, what):
    with pytest.raises(ConfigurationError, match=what):
        families.load(altered(file, **fields))


@pytest.mark.parametrize(
    ("item", "error"),
    [
        (Item("image", "", "float32", (9000,), 0, 14), UnsupportedMedium),
        (Item("audio", "", "uint8", (9000,), 0, 14), InvalidValue),
        (Item("audio", "", "float32", (9000, 1), 0, 14), InvalidValue),
        (Item("audio", "", "float32", (9000,), 0, 15), InvalidValue),
        (Item("audio", "", "float32", (9000,), 0, 14, (1, 2, 2)), InvalidValue),
        (Item("audio", "", "float32", (100,), 0, 0), MediaError),
        (Item("audio", "", "float32", (33_000,), 0, 51), MediaTooLarge),
        (Item("audio", "", "float32", (51, WIDTH), 0, 51, precomputed=True), InvalidValue),
        (Item("audio", "", "float32", (5, 64), 0, 5, precomputed=True), InvalidValue),
    ],
)
def test_item_that_does_not_fit_is_refused(family, item, error):
    with pytest.raises(error):
        family.check_item(item)


def test_item_that_fits_is_taken(family):
    family.check_item(medium(family, 9000)[0])
    family.check_item(Item("audio", "", "float16", (50, WIDTH), 0, 50, precomputed=True))


def test_embeddings_go_to_the_engine_as_a_list(family):
    tensors = [torch.randn(10, WIDTH), torch.randn(3, WIDTH)]
    inputs = family.embedding_inputs([ticket(10), ticket(3)], tensors)
    assert list(inputs) == ["audio"]
    assert all(a is b for a, b in zip(inputs["audio"], tensors, strict=True))
    assert family.embedding_inputs([], []) == {}


@pytest.mark.parametrize(
    ("item", "tensor", "error"),
    [
        (ticket(modality="image"), torch.zeros(10, WIDTH), UnsupportedMedium),
        (ticket(), torch.zeros(9, WIDTH), InvalidValue),
        (ticket(), torch.zeros(10, WIDTH + 1), InvalidValue),
        (ticket(), torch.zeros(10, WIDTH).half(), InvalidValue),
        (ticket(), torch.full((10, WIDTH), torch.inf), InvalidValue),
    ],
)
def test_embeddings_that_would_end_the_engine_are_refused(family, item, tensor, error):
    with pytest.raises(error) as caught:
        family.embedding_inputs([ticket(), item], [torch.zeros(10, WIDTH), tensor])
    assert caught.value.where == "items[1]"


def test_only_sounds_are_taken(family):
    assert family.placeholder("audio") == "<|AUDIO|>"
    with pytest.raises(UnsupportedMedium, match="Qwen2-Audio takes no image"):
        family.plan_image(10, 10)
    with pytest.raises(UnsupportedMedium, match="Qwen2-Audio takes no video"):
        family.placeholder("video")
