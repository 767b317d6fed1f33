"""What holds for every family: how it is found, that it is light, the hub's short files."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest

import checkpoints
from triptych import families
from triptych.engines.torchvision_ops import define_missing
from triptych.errors import ConfigurationError
from triptych.families.text import DEFAULTS, text_config

TINY = {
    "LLaVA-1.5": checkpoints.tiny_llava,
    "LLaVA-NeXT-Video": checkpoints.tiny_llava_next_video,
    "Qwen2-Audio": checkpoints.tiny_qwen2_audio,
}


@pytest.fixture(scope="module", params=sorted(TINY))
def named(request, tmp_path_factory):
    """A family's name, and a checkpoint of it."""
    path = tmp_path_factory.mktemp("family") / "checkpoint"
    return request.param, TINY[request.param](path)


def test_family_is_found_by_its_model_type(named):
    name, directory = named
    assert families.load(directory).name == name


def test_family_is_light_and_can_be_pickled(named):
    _, directory = named
    script = (
        "import pickle, sys; from triptych import families; "
        f"sys.stdout.buffer.write(pickle.dumps(families.load({str(directory)!r}))); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    family = pickle.loads(done.stdout)
    assert family.checkpoint.path == directory
    assert family.context_length == checkpoints.CONTEXT


def test_placeholder_is_the_token_that_the_configuration_names(named):
    _, directory = named
    family = families.load(directory)
    (modality,) = family.modalities
    fields = json.loads((directory / "config.json").read_text())
    token = family.checkpoint.added_tokens[family.placeholder(modality)]
    assert token == fields[f"{modality}_token_index"]


def test_unknown_model_type_names_what_is_served(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard"}')
    with pytest.raises(ConfigurationError, match=r"'unheard'.*LLaVA-1\.5 \(llava\).*Qwen2-Audio"):
        families.load(tmp_path)


@pytest.mark.parametrize("model_type", sorted(DEFAULTS))
def test_fields_that_the_hub_leaves_out_are_transformers_defaults(model_type, tmp_path):
    define_missing()
    from transformers import AutoConfig

    expected = AutoConfig.for_model(model_type)
    for nested in ({"model_type": model_type}, {}):
        (tmp_path / "config.json").write_text(json.dumps({"text_config": nested}))
        text = text_config(families.Checkpoint(tmp_path), model_type)
        assert text.hidden_size == expected.hidden_size
        assert text.max_position_embeddings == expected.max_position_embeddings
