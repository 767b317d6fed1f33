"""The trained models' folders: complete, small, of one piece, and as good as they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from tiny.clips import CLIP_TYPES
from tiny.questions import IMAGE_TYPES, LLAVA_TYPES, PAIR_TYPES, VIDEO_TYPES
from tiny.tone_questions import SOUND_PAIR_TYPES, SOUND_TYPES
from triptych import families

MODELS = Path(__file__).parents[2] / "models"
TYPES = {
    "tiny-qwen2.5-vl": IMAGE_TYPES + PAIR_TYPES + VIDEO_TYPES,
    "tiny-llava-1.5": LLAVA_TYPES,
    "tiny-llava-next-video": CLIP_TYPES,
    "tiny-qwen2-audio": SOUND_TYPES + SOUND_PAIR_TYPES,
}
MAX_BYTES = 8 * 2**20
LEAST_ACCURACY = 0.95


@pytest.fixture(params=TYPES)
def folder(request: pytest.FixtureRequest) -> Path:
    return MODELS / str(request.param)


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_every_model_is_listed_here() -> None:
    assert {path.name for path in MODELS.iterdir() if path.is_dir()} == set(TYPES)


def test_it_is_small_and_no_file_is_missing(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(sizes.values()) <= MAX_BYTES
    assert sizes.keys() >= {
        "README.md",
        "accuracy.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_it_is_right_nineteen_times_in_twenty_and_beats_guessing(folder: Path) -> None:
    types = read(folder / "accuracy.json")["types"]
    assert set(types) <= set(TYPES[folder.name])
    for type_, splits in types.items():
        for split, measured in splits.items():
            assert measured["accuracy"] >= LEAST_ACCURACY, (type_, split)
            assert measured["accuracy"] > measured["majority_baseline"], (type_, split)


def test_its_card_says_what_was_measured(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for type_, splits in read(folder / "accuracy.json")["types"].items():
        (row,) = [line for line in card.splitlines() if line.startswith(f"| `{type_}` |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")][2:]
        told = [
            f"{measured[value]:.0%}".replace("%", " %")
            for measured in splits.values()
            for value in ("accuracy", "majority_baseline")
        ]
        assert [cell for cell in cells if cell != "–"] == told


def test_tokenizer_and_weights_fit_the_configuration(folder: Path) -> None:
    config = read(folder / "config.json")
    text = config.get("text_config", config)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.get_vocab_size() <= text["vocab_size"]
    assert text["eos_token_id"] == end
    assert end in read(folder / "generation_config.json")["eos_token_id"]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = weights.keys()
        (embeddings,) = [name for name in names if name.endswith("embed_tokens.weight")]
        shape = weights.get_slice(embeddings).get_shape()
    assert shape == [text["vocab_size"], text["hidden_size"]]


def test_its_family_serves_it(folder: Path) -> None:
    family = families.load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for modality in family.modalities:
        token = tokenizer.token_to_id(family.placeholder(modality))
        assert tokenizer.get_added_tokens_decoder()[token].special
