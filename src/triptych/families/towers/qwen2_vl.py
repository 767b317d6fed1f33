"""Qwen2-VL's vision tower, after transformers' ``Qwen2VisionTransformerPretrainedModel``."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from triptych.families.qwen_processors import ImageProcessor, VideoProcessor
from triptych.families.towers.activations import ACTIVATIONS
from triptych.families.towers.qwen_vl import (
    Block,
    Merger,
    PatchEmbed,
    QwenTower,
    Rotary,
    layer_norm,
)
from triptych.families.towers.segments import WindowLayout

if TYPE_CHECKING:
    from triptych.families.qwen2_vl import VisionConfig


class VisionTower(QwenTower):
    """Patch embedding, blocks whose attention spans the frame, and the merger."""

    def __init__(self, config: VisionConfig, image: ImageProcessor, video: VideoProcessor) -> None:
        super().__init__(image, video)
        self.merge = config.spatial_merge_size
        self.patch_embed = PatchEmbed(config, config.embed_dim, bias=False)
        self.rotary = Rotary(config, config.embed_dim)
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.num_heads, MLP(config), layer_norm)
            for _ in range(config.depth)
        )
        self.merger = Merger(config, config.embed_dim, layer_norm)

    def forward(self, patches: torch.Tensor, layout: WindowLayout) -> torch.Tensor:
        """Run the tower.

        Args:
            patches: float32, shape (patches, 3 × temporal_patch_size × patch_size²), end to end.
            layout: How they lie.

        Returns:
            Shape (tokens, width), end to end, in the dtype of the weights.
        """
        hidden = self.patch_embed(patches)[layout.patch_order]
        rotation = self.rotary(layout.positions)
        for block in self.blocks:
            hidden = block(hidden, rotation, layout.windows)
        return cast(torch.Tensor, self.merger(hidden)[layout.token_inverse])


class MLP(nn.Module):
    """The feed-forward layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        inner = int(config.embed_dim * config.mlp_ratio)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.embed_dim, inner)
        self.fc2 = nn.Linear(inner, config.embed_dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(patches, hidden) → (patches, hidden)."""
        return cast(torch.Tensor, self.fc2(self.activation(self.fc1(hidden))))
