"""The model families that Triptych serves, one file each.

To add one: write its file and its line in `FAMILIES`.
"""

from __future__ import annotations

from pathlib import Path

from triptych.errors import ConfigurationError
from triptych.families.base import Family, Tower
from triptych.families.checkpoint import Checkpoint
from triptych.families.llava import Llava
from triptych.families.llava_next_video import LlavaNextVideo
from triptych.families.qwen2_5_vl import Qwen2_5_VL
from triptych.families.qwen2_audio import Qwen2Audio
from triptych.families.qwen2_vl import Qwen2_VL
from triptych.families.qwen3_vl import Qwen3_VL

FAMILIES: tuple[type[Family], ...] = (
    Llava,
    LlavaNextVideo,
    Qwen2_VL,
    Qwen2_5_VL,
    Qwen3_VL,
    Qwen2Audio,
)

__all__ = ["FAMILIES", "Checkpoint", "Family", "Tower", "load"]


def load(model_dir: str | Path) -> Family:
    """The family of a checkpoint, by config.json's ``model_type``, bound to the checkpoint.

    Raises:
        ConfigurationError: No checkpoint is there, it is broken, or no family serves it.
    """
    checkpoint = Checkpoint(model_dir)
    for family in FAMILIES:
        if checkpoint.model_type in family.model_types:
            return family(checkpoint)
    served = ", ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)
    raise ConfigurationError(
        f"{checkpoint.path / 'config.json'} has model_type {checkpoint.model_type!r}, "
        f"which no family serves; served are {served}"
    )
