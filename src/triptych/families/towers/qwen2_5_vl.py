"""Qwen2.5-VL's vision tower, after transformers' ``Qwen2_5_VisionTransformerPretrainedModel``.

Parameters have the hub's names and shapes. Norms, rotary embedding and softmax are computed in
float32 whatever the weights' dtype, as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.functional import pad, rms_norm, silu

from triptych.families.qwen_processors import ImageProcessor, VideoProcessor
from triptych.families.towers.qwen_vl import (
    NORM_EPSILON,
    Block,
    Merger,
    PatchEmbed,
    QwenTower,
    Rotary,
)
from triptych.families.towers.segments import WindowLayout

if TYPE_CHECKING:
    from triptych.families.qwen2_5_vl import VisionConfig


class VisionTower(QwenTower):
    """Patch embedding, blocks with windowed or full attention, and the merger."""

    def __init__(self, config: VisionConfig, image: ImageProcessor, video: VideoProcessor) -> None:
        super().__init__(image, video)
        self.merge = config.spatial_merge_size
        self.window = config.window_tokens
        self.full_attention = frozenset(config.fullatt_block_indexes)
        self.patch_embed = PatchEmbed(config, config.hidden_size, bias=False)
        self.rotary = Rotary(config, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config.hidden_size, config.num_heads, MLP(config), RMSNorm)
            for _ in range(config.depth)
        )
        self.merger = Merger(config, config.hidden_size, RMSNorm)

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
        for index, block in enumerate(self.blocks):
            segments = layout.frames if index in self.full_attention else layout.windows
            hidden = block(hidden, rotation, segments)
        return cast(torch.Tensor, self.merger(hidden)[layout.token_inverse])

    def align(self) -> None:
        """See `QwenTower`."""
        for block in self.blocks:
            cast(MLP, block.mlp).align()


class RMSNorm(nn.Module):
    """Root-mean-square norm, rounded to the input's dtype before the weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, size) → (…, size)."""
        if hidden.is_cuda:  # one kernel; it rounds once, after the weight
            return rms_norm(hidden, self.weight.shape, self.weight, NORM_EPSILON)
        exact = hidden.float()
        scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + NORM_EPSILON)
        return self.weight * (exact * scale).to(hidden.dtype)


class MLP(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(patches, hidden) → (patches, hidden)."""
        gated = silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        return cast(torch.Tensor, self.down_proj(gated))

    def align(self, multiple: int = 64) -> None:
        """Widen the inner layer with zeros.

        A GPU has its fast kernels for rows that are multiples of 16 bytes, which those of the
        hub's 7B model, 3420 columns of bfloat16, are not: measured on an H200, they take a
        picture of 1080p from 94 to 66 ms.
        """
        more = -self.gate_proj.out_features % multiple
        for layer, sides in (
            (self.gate_proj, (0, 0, 0, more)),
            (self.up_proj, (0, 0, 0, more)),
            (self.down_proj, (0, more)),
        ):
            layer.weight = nn.Parameter(pad(layer.weight, sides), requires_grad=False)
            if layer is not self.down_proj:
                layer.bias = nn.Parameter(pad(layer.bias, (0, more)), requires_grad=False)
            layer.out_features, layer.in_features = layer.weight.shape
