"""The checkpoint of the benches: tiny weights, the hub's picture sizes, and no end of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TINY = Path(__file__).parents[2] / "models" / "tiny-qwen2.5-vl"
PIXELS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
"""Of the hub's Qwen2.5-VL processor, as deployed: a picture of 1024² is 1296 embeddings."""
NEVER = "<|object_ref_start|>"
"""A token that the model never draws."""


def with_hub_sizes(folder: Path) -> Path:
    """The tiny Qwen2.5-VL with the picture sizes of the hub's.

    Args:
        folder: To be made; the weights in it are links.
    """
    folder.mkdir()
    for file in TINY.iterdir():
        (folder / file.name).symlink_to(file)
    edges = {"shortest_edge": PIXELS["min_pixels"], "longest_edge": PIXELS["max_pixels"]}
    _change(folder / "preprocessor_config.json", **PIXELS, size=edges)
    return folder


def endless(folder: Path, context: int) -> Path:
    """`with_hub_sizes`, whose answers always have as many tokens as were asked for.

    Every server gets this checkpoint, so none needs an option that the others may not have.

    Args:
        folder: To be made.
        context: Tokens of prompt and answer together.
    """
    with_hub_sizes(folder)
    never_end(folder, context)
    return folder


def never_end(folder: Path, context: int) -> None:
    """Change a checkpoint as `endless` has it."""
    ids = {
        token["content"]: token["id"]
        for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    _change(
        folder / "config.json",
        eos_token_id=ids[NEVER],
        max_position_embeddings=context,
        max_window_layers=0,
    )
    _change(folder / "generation_config.json", eos_token_id=ids[NEVER])
    _change(folder / "tokenizer_config.json", eos_token=NEVER, model_max_length=context)


def _change(file: Path, **fields: Any) -> None:
    config = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps({**config, **fields}))
