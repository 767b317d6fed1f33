"""Checkpoints with made-up language models, for tests of engines.

The trained model answers in a few words and then stops, as it should. Tests of an engine want
answers of any length that hang on every token and picture before them, which a *babbler* gives,
or an answer that is known beforehand, which a *reciter* gives.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
SPREAD = 0.15
"""Standard deviation of a matrix's entries; enough for no two logits to be nearly equal."""


def make_babbler(source: Path, target: Path) -> Path:
    """Copy ``source`` to ``target``, its language model random and with no token that ends it."""
    weights = _copy(source, target)
    chance = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if "visual" not in name and weight.ndim == 2:
            noise = torch.randn(weight.shape, generator=chance) * SPREAD
            weights[name] = noise.to(weight.dtype)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    special = [token["id"] for token in tokenizer["added_tokens"]]
    weights["lm_head.weight"][special] = 0
    # Rows that no token belongs to; engines differ in what they make of them.
    weights["lm_head.weight"][1 + max(special) :] = 0
    save_file({name: weight.contiguous() for name, weight in weights.items()}, target / WEIGHTS)
    return target


def make_reciter(source: Path, target: Path, cycle: Sequence[int]) -> Path:
    """Copy ``source`` to ``target``, its language model made to recite ``cycle`` over and over.

    No layer adds anything, so what comes next hangs on the last token alone: the output weights of
    each token of the cycle point to the embedding of the one before.

    Args:
        source: A checkpoint.
        target: A directory that is not there yet.
        cycle: Token ids, no two the same.
    """
    weights = _copy(source, target)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            weight.zero_()
        elif name == "model.norm.weight":
            weight.fill_(1)
    before = weights["model.embed_tokens.weight"]
    chance = torch.Generator().manual_seed(1)
    before.copy_(torch.randn(before.shape, generator=chance))
    for last, following in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        weights["lm_head.weight"][following] = before[last]
    save_file({name: weight.contiguous() for name, weight in weights.items()}, target / WEIGHTS)
    return target


def _copy(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """Copy the checkpoint with an output matrix of its own; its weights."""
    shutil.copytree(source, target)
    weights = load_file(target / WEIGHTS)
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return weights
