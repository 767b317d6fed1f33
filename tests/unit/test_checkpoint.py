from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from triptych.errors import ConfigurationError
from triptych.families import Checkpoint, load
from unit.qwen import VISION, write_checkpoint, write_json


@pytest.fixture
def directory(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


def shard(directory, **files):
    """Turn the single file into shards, each with the weights that a predicate chooses."""
    single = directory / "model.safetensors"
    weights = dict(Checkpoint(directory).tensors(Checkpoint(directory).names()))
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    weight_map = {}
    for file, chosen in files.items():
        part = {name: tensor for name, tensor in weights.items() if chosen(name)}
        save_file(part, directory / f"{file}.safetensors")
        weight_map |= dict.fromkeys(part, f"{file}.safetensors")
    single.unlink()
    write_json(directory / "model.safetensors.index.json", weight_map=weight_map)
    return weights


def test_reads_only_the_tensors_that_are_asked_for(directory):
    checkpoint = Checkpoint(directory)
    names = checkpoint.names("visual.merger.")
    assert names == [
        "visual.merger.ln_q.weight",
        "visual.merger.mlp.0.bias",
        "visual.merger.mlp.0.weight",
        "visual.merger.mlp.2.bias",
        "visual.merger.mlp.2.weight",
    ]
    read = dict(checkpoint.tensors(names[:1]))
    assert list(read) == names[:1]
    assert read[names[0]].shape == (VISION["hidden_size"],)


def test_shards_hold_the_same_weights_as_one_file(directory):
    expected = shard(
        directory, a=lambda name: "blocks.0" in name, b=lambda name: "blocks.0" not in name
    )
    checkpoint = Checkpoint(directory)
    read = dict(checkpoint.tensors(checkpoint.names()))
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_a_shard_that_is_not_asked_for_is_not_opened(directory):
    shard(directory, a=lambda name: "merger" in name, b=lambda name: "merger" not in name)
    (directory / "b.safetensors").write_bytes(b"not safetensors")
    checkpoint = Checkpoint(directory)
    assert len(dict(checkpoint.tensors(checkpoint.names("visual.merger.")))) == 5


def test_missing_directory(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere is not a directory"):
        Checkpoint(tmp_path / "nowhere")


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"file is not a directory"):
        Checkpoint(tmp_path / "file")


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(ConfigurationError, match=r"holds no config\.json") as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ['{"model_type": ', "[]", "", "\xff"])
def test_broken_config(directory, text):
    (directory / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"config\.json cannot be read"):
        Checkpoint(directory)


def test_broken_processor_config(directory):
    (directory / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"preprocessor_config\.json cannot be read"):
        load(directory)


def test_no_weights(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"neither model\.safetensors nor"):
        Checkpoint(directory).names()


def test_missing_shard(directory):
    shard(directory, a=lambda name: True)
    (directory / "a.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"a\.safetensors does not exist"):
        Checkpoint(directory).names()


def test_index_without_weight_map(directory):
    write_json(directory / "model.safetensors.index.json", metadata={})
    with pytest.raises(ConfigurationError, match=r"index\.json has no weight_map"):
        Checkpoint(directory).names()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(directory, keep):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigurationError, match=r"model\.safetensors cannot be read"):
        Checkpoint(directory).names()


def test_missing_weight(directory):
    with pytest.raises(ConfigurationError, match=r"has no weight 'visual\.nothing'"):
        dict(Checkpoint(directory).tensors(["visual.nothing"]))


def test_nested_processor_config_comes_first(directory):
    write_json(
        directory / "processor_config.json",
        image_processor={"patch_size": 7},
        video_processor={"patch_size": 8},
    )
    checkpoint = Checkpoint(directory)
    assert checkpoint.image_processor == {"patch_size": 7}
    assert checkpoint.video_processor == {"patch_size": 8}


def test_processor_config_without_nesting_is_passed_over(directory):
    write_json(directory / "processor_config.json", processor_class="Qwen2_5_VLProcessor")
    checkpoint = Checkpoint(directory)
    assert checkpoint.image_processor["min_pixels"] == 56 * 56
    assert checkpoint.video_processor == checkpoint.image_processor
    write_json(directory / "video_preprocessor_config.json", fps=2)
    assert Checkpoint(directory).video_processor == {"fps": 2}


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 3}, {"eos_token_id": [1, 2]}, (1, 2)),
        ({"eos_token_id": 3}, {}, (3,)),
        ({"text_config": {"eos_token_id": 0}}, None, (0,)),
        ({}, None, ()),
    ],
)
def test_end_of_answer_tokens(tmp_path, config, generation, expected):
    write_json(tmp_path / "config.json", **config)
    if generation is not None:
        write_json(tmp_path / "generation_config.json", **generation)
    assert Checkpoint(tmp_path).eos_token_ids == expected


def test_added_tokens(directory):
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json cannot be read"):
        assert Checkpoint(directory).added_tokens
    token = {"id": 7, "content": "<|image_pad|>", "special": True}
    write_json(directory / "tokenizer.json", added_tokens=[token], model={"vocab": {"a": 0}})
    assert Checkpoint(directory).added_tokens == {"<|image_pad|>": 7}


def test_pickles_with_its_family(directory):
    family = load(directory)
    copy = pickle.loads(pickle.dumps(family))
    assert copy.plan_image(100, 200) == family.plan_image(100, 200)
    assert copy.checkpoint.config == family.checkpoint.config


def test_unknown_family_names_what_is_served(tmp_path):
    write_json(tmp_path / "config.json", model_type="llama")
    with pytest.raises(ConfigurationError, match=r"'llama'.*Qwen2\.5-VL \(qwen2_5_vl\)"):
        load(tmp_path)


def test_planning_needs_no_torch(directory):
    """The media workers plan; importing torch would cost each of them seconds and memory."""
    program = (
        "import sys; from triptych import families\n"
        f"plan = families.load({str(directory)!r}).plan_image(100, 100)\n"
        "assert plan.tokens == 16, plan\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
