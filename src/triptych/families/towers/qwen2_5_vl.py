"""Qwen2.5-VL's vision tower, after transformers' ``Qwen2_5_VisionTransformerPretrainedModel``.

Parameters have the hub's names and shapes. Norms, rotary embedding and softmax are computed in
float32 whatever the weights' dtype, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.functional import gelu, linear, silu

from triptych.contract import Item
from triptych.families.qwen_vl import ImageProcessor
from triptych.families.towers.patches import Patchify
from triptych.families.towers.segments import Segments, WindowLayout

if TYPE_CHECKING:
    from triptych.families.qwen2_5_vl import VisionConfig

NORM_EPSILON = 1e-6


class VisionTower(nn.Module):
    """Patch embedding, blocks with windowed or full attention, and the merger."""

    def __init__(self, config: VisionConfig, processor: ImageProcessor) -> None:
        super().__init__()
        self.merge = config.spatial_merge_size
        self.window = config.window_tokens
        self.full_attention = frozenset(config.fullatt_block_indexes)
        self.patchify = Patchify(processor)
        self.patch_embed = PatchEmbed(config)
        self.rotary = Rotary(
            config.hidden_size // config.num_heads, config.rope_parameters.rope_theta
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def encode(self, items: Sequence[Item], media: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Embeddings of several images and clips in one forward pass; see `Tower`."""
        grids = [item.grid_thw for item in items if item.grid_thw is not None]
        patches = torch.cat([self.patchify(pixels) for pixels in media])
        embeddings = self(patches, grids)
        return list(embeddings.split([item.tokens for item in items]))

    def forward(self, patches: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        """Run the tower.

        Args:
            patches: float32, shape (patches, 3 × temporal_patch_size × patch_size²), end to end.
            grids: ``grid_thw`` of each item.

        Returns:
            Shape (tokens, width), end to end, in the dtype of the weights.
        """
        layout = WindowLayout.of(grids, merge=self.merge, window=self.window, device=patches.device)
        hidden = self.patch_embed(patches)[layout.patch_order]
        rotation = self.rotary(layout.positions)
        for index, block in enumerate(self.blocks):
            segments = layout.frames if index in self.full_attention else layout.windows
            hidden = block(hidden, rotation, segments)
        return cast(torch.Tensor, self.merger(hidden)[layout.token_inverse])


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, which is a linear map of each patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, steps = config.patch_size, config.temporal_patch_size
        self.proj = nn.Conv3d(
            config.in_channels, config.hidden_size, (steps, size, size), bias=False
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(patches, values) → (patches, hidden)."""
        weight = self.proj.weight.flatten(1)
        return linear(patches.to(weight.dtype), weight)


class Rotary(nn.Module):
    """Two-dimensional rotary embedding: half of the angles turn with the row, half the column."""

    inverse_frequencies: torch.Tensor
    """float32, shape (head size / 4,)."""

    def __init__(self, head_size: int, theta: float) -> None:
        super().__init__()
        half = head_size // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half
        self.register_buffer("inverse_frequencies", 1.0 / theta**exponents, persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, float32, shape (patches, 1, 1, head size / 2)."""
        angles = positions[..., None].float() * self.inverse_frequencies
        angles = angles.flatten(1)[:, None, None]
        return angles.cos(), angles.sin()


def rotate(qk: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn queries and keys, shape (patches, 2, heads, head size), in float32."""
    cosines, sines = rotation
    first, second = qk.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    return turned.to(qk.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm, rounded to the input's dtype before the weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, size) → (…, size)."""
        exact = hidden.float()
        scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + NORM_EPSILON)
        return self.weight * (exact * scale).to(hidden.dtype)


class Attention(nn.Module):
    """Multi-head attention within segments."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        segments: Segments,
    ) -> torch.Tensor:
        """(patches, hidden) → (patches, hidden)."""
        qkv = self.qkv(hidden).unflatten(-1, (3, self.heads, -1))
        qkv[:, :2] = rotate(qkv[:, :2], rotation)
        return cast(torch.Tensor, self.proj(segments.attend(qkv)))


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


class Block(nn.Module):
    """Attention, then the feed-forward layer, each behind its norm and added to its input."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.norm2 = RMSNorm(config.hidden_size)
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        segments: Segments,
    ) -> torch.Tensor:
        """(patches, hidden) → (patches, hidden)."""
        hidden = hidden + self.attn(self.norm1(hidden), rotation, segments)
        return hidden + cast(torch.Tensor, self.mlp(self.norm2(hidden)))


class Merger(nn.Module):
    """Joins the patches of a token and projects them to the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.joined = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size)
        self.mlp = nn.ModuleList(
            [
                nn.Linear(self.joined, self.joined),
                nn.Identity(),  # keeps the hub's names, mlp.0 and mlp.2
                nn.Linear(self.joined, config.out_hidden_size),
            ]
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(patches, hidden) → (tokens, width)."""
        joined = self.ln_q(hidden).view(-1, self.joined)
        return cast(torch.Tensor, self.mlp[2](gelu(self.mlp[0](joined))))
