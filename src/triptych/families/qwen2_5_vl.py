"""Qwen2.5-VL: images and videos at their own resolution, a tower with windowed attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from triptych.errors import ConfigurationError
from triptych.families.base import Tower
from triptych.families.checkpoint import Checkpoint
from triptych.families.qwen_vl import QwenVL, read_config

if TYPE_CHECKING:
    import torch


class RopeParameters(msgspec.Struct, frozen=True):
    """``vision_config.rope_parameters``, which the hub's files do not have."""

    rope_theta: float = 10_000.0


class VisionConfig(msgspec.Struct, frozen=True):
    """``vision_config``; the defaults are those of transformers' Qwen2_5_VLVisionConfig."""

    depth: int = 32
    hidden_size: int = 3584
    hidden_act: str = "silu"
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    """Pixels."""
    spatial_merge_size: int = 2
    """Patches."""
    temporal_patch_size: int = 2
    """Frames."""
    window_size: int = 112
    """Pixels along the side of an attention window."""
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    """Blocks whose attention spans the whole frame."""
    tokens_per_second: float = 4
    rope_parameters: RopeParameters = RopeParameters()

    @property
    def window_tokens(self) -> int:
        """Tokens along the side of an attention window."""
        return self.window_size // self.spatial_merge_size // self.patch_size


class Qwen2_5_VL(QwenVL):
    """Qwen2.5-VL."""

    name = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.vision = read_config(
            VisionConfig,
            checkpoint.config.get("vision_config") or {},
            f"{checkpoint.path / 'config.json'}: vision_config",
        )
        self._check_agreement()

    def load_tower(self, device: torch.device, dtype: torch.dtype) -> Tower:
        """Read the weights under ``visual.`` or, as transformers 5 has it, ``model.visual.``."""
        from triptych.families.towers.qwen2_5_vl import VisionTower
        from triptych.families.towers.weights import load_weights

        return load_weights(
            lambda: VisionTower(self.vision, self.processor),
            self.checkpoint,
            prefixes=("visual.", "model.visual."),
            device=device,
            dtype=dtype,
        )

    def _check_agreement(self) -> None:
        """The image processor, the tower and the language model must be made for one another."""
        pairs = {
            "patch_size": (self.processor.patch_size, self.vision.patch_size),
            "merge_size": (self.processor.merge_size, self.vision.spatial_merge_size),
            "temporal_patch_size": (
                self.processor.temporal_patch_size,
                self.vision.temporal_patch_size,
            ),
            "hidden_size": (self.embedding_width, self.vision.out_hidden_size),
        }
        for field, (ours, tower) in pairs.items():
            if ours != tower:
                raise ConfigurationError(
                    f"{self.checkpoint.path}: {field} is {ours}, but the vision tower has {tower}"
                )
        if self.vision.hidden_act != "silu" or self.vision.in_channels != 3:
            raise ConfigurationError(
                f"{self.checkpoint.path}: the vision tower has hidden_act="
                f"{self.vision.hidden_act!r} and {self.vision.in_channels} channels; "
                "served are 'silu' and 3"
            )
        if self.vision.window_tokens < 1:
            raise ConfigurationError(
                f"{self.checkpoint.path}: an attention window of {self.vision.window_size} pixels "
                "is smaller than a token"
            )
