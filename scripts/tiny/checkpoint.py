"""Weights: new ones, and files of them under the hub's names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

HubName = Callable[[str], str]
"""From a parameter's name in transformers 5 to its name in the hub's checkpoints."""


def random_weights(model: nn.Module) -> None:
    """Linear maps that keep the size of what passes through, and embeddings of words."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.5)


def save_weights(model: nn.Module, path: Path, dtype: torch.dtype, hub_name: HubName) -> None:
    """Write the weights under the hub's names, in place of the file in one step."""
    state = {
        hub_name(name): t.detach().to("cpu", dtype).contiguous()
        for name, t in model.state_dict().items()
    }
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    os.replace(temporary, path)


def load_weights(model: nn.Module, path: Path, hub_name: HubName) -> None:
    """Read weights that `save_weights` wrote."""
    state = load_file(path)
    model.load_state_dict({name: state[hub_name(name)] for name in model.state_dict()})


def write_json(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write each of the files, by name, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def llava_hub_name(name: str) -> str:
    """For the families whose language model lies under ``language_model.`` on the hub."""
    if name.startswith("lm_head."):
        return "language_model." + name
    name = name.removeprefix("model.")
    for ours, hub in {
        "language_model.": "language_model.model.",
        "vision_tower.": "vision_tower.vision_model.",
    }.items():
        if name.startswith(ours):
            return hub + name.removeprefix(ours)
    return name
