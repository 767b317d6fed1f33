"""Qwen2-VL: images and videos at their own resolution, a tower with full attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triptych.families.fields import Activation
from triptych.families.qwen_vl import QwenVisionConfig, QwenVL

if TYPE_CHECKING:
    from triptych.families.towers.qwen_vl import QwenTower


class VisionConfig(QwenVisionConfig, frozen=True):
    """``vision_config``; the defaults are those of transformers' Qwen2VLVisionConfig."""

    depth: int = 32
    num_heads: int = 16
    hidden_act: Activation = "quick_gelu"
    embed_dim: int = 1280
    """Width within the tower."""
    hidden_size: int = 3584
    """Of the language model."""
    mlp_ratio: float = 4
    """Width of the feed-forward layers over ``embed_dim``."""

    @property
    def width(self) -> int:
        """``hidden_size``."""
        return self.hidden_size


class Qwen2_VL(QwenVL):
    """Qwen2-VL."""

    name = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    vision_type = VisionConfig
    vision: VisionConfig

    def _build_tower(self) -> QwenTower:
        from triptych.families.towers.qwen2_vl import VisionTower

        return VisionTower(self.vision, self.processor, self.video_processor)
