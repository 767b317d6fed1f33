"""Small Qwen2.5-VL checkpoints with random weights, and media for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file

from triptych.contract import Item, aligned
from triptych.families.qwen2_5_vl import VisionConfig
from triptych.families.qwen_processors import ImageProcessor, VideoProcessor
from triptych.families.towers.qwen2_5_vl import VisionTower

WIDTH = 48
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_heads": 4,
    "out_hidden_size": WIDTH,
    "fullatt_block_indexes": [1, 3],
    "window_size": 112,
}
TEXT = {"hidden_size": WIDTH, "max_position_embeddings": 4096}


def random_weights(prefix: str = "visual.", **vision: Any) -> dict[str, torch.Tensor]:
    """Weights of which every part of the tower shows in the result."""
    config = msgspec.convert({**VISION, **vision}, VisionConfig)
    with torch.device("meta"):
        shapes = VisionTower(config, ImageProcessor(), VideoProcessor()).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        prefix + name: torch.randn(weight.shape, generator=generator)
        / max(1, weight[0].numel()) ** 0.5
        for name, weight in shapes.items()
    }


def write_json(path: Path, **values: Any) -> None:
    """One JSON file of a checkpoint."""
    path.write_text(json.dumps(values))


def write_checkpoint(path: Path, prefix: str = "visual.", **vision: Any) -> Path:
    """A checkpoint with a tower of random weights and no language model."""
    path.mkdir(parents=True, exist_ok=True)
    write_json(
        path / "config.json",
        model_type="qwen2_5_vl",
        vision_config={**VISION, **vision},
        **TEXT,
    )
    write_json(path / "preprocessor_config.json", min_pixels=56 * 56, max_pixels=448 * 448)
    save_file(random_weights(prefix, **vision), path / "model.safetensors")
    return path


def picture(family, height: int, width: int, seed: int = 0) -> tuple[Item, np.ndarray]:
    """A picture of noise at the size that the family plans for ``height`` × ``width``."""
    plan = family.plan_image(height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, plan.shape, dtype=np.uint8)
    digest = f"{height}x{width}#{seed}"
    return Item("image", digest, "uint8", plan.shape, 0, plan.tokens, plan.grid_thw), pixels


def clip(family, frames: int, height: int, width: int) -> tuple[Item, np.ndarray]:
    """A clip of noise; both sides must be multiples of 28."""
    pixels = np.random.default_rng(1).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    grid = (-(-frames // 2), height // 14, width // 14)
    return Item("video", "clip", "uint8", pixels.shape, 0, int(np.prod(grid)) // 4, grid), pixels


def request(*media: tuple[Item, np.ndarray]) -> tuple[list[Item], torch.Tensor]:
    """ITEMS and MEDIA of one request, as preprocess lays them out."""
    items, parts, offset = [], [], 0
    for item, array in media:
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        items.append(msgspec.structs.replace(item, offset=offset))
        parts.append(np.pad(data, (0, aligned(data.size) - data.size)))
        offset += aligned(data.size)
    return items, torch.from_numpy(np.concatenate(parts or [np.empty(0, np.uint8)]))
