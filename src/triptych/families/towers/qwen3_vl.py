"""Qwen3-VL's vision tower, after transformers' ``Qwen3VLVisionModel``."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.functional import gelu

from triptych.families.qwen_processors import ImageProcessor, VideoProcessor
from triptych.families.towers.activations import ACTIVATIONS
from triptych.families.towers.qwen_vl import Block, PatchEmbed, QwenTower, Rotary, layer_norm
from triptych.families.towers.segments import WindowLayout

if TYPE_CHECKING:
    from triptych.families.qwen3_vl import VisionConfig


class VisionTower(QwenTower):
    """Patch and position embedding, blocks whose attention spans the frame, and the mergers."""

    def __init__(self, config: VisionConfig, image: ImageProcessor, video: VideoProcessor) -> None:
        super().__init__(image, video)
        hidden = config.hidden_size
        self.merge = config.spatial_merge_size
        self.side = config.grid_side
        self.deepstack = config.deepstack_visual_indexes
        self.patch_embed = PatchEmbed(config, hidden, bias=True)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, hidden)
        self.rotary = Rotary(config, hidden)
        self.blocks = nn.ModuleList(
            Block(hidden, config.num_heads, MLP(config), layer_norm) for _ in range(config.depth)
        )
        self.merger = Merger(config, norm_joined=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, norm_joined=True) for _ in self.deepstack
        )

    def forward(self, patches: torch.Tensor, layout: WindowLayout) -> torch.Tensor:
        """Run the tower.

        Args:
            patches: float32, shape (patches, 3 × temporal_patch_size × patch_size²), end to end.
            layout: How they lie.

        Returns:
            Shape (tokens, width × (1 + deepstack)), end to end, in the dtype of the weights: what
            goes into the language model's first layer, then what goes behind each deepstack one.
        """
        hidden = self.patch_embed(patches)[layout.patch_order]
        hidden = hidden + self._positions(layout.positions, layout.sizes).to(hidden.dtype)
        rotation = self.rotary(layout.positions)
        features: list[torch.Tensor] = []
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, rotation, layout.windows)
            if index in self.deepstack:
                merger = self.deepstack_merger_list[len(features)]
                features.append(merger(hidden))
        joined = torch.cat([self.merger(hidden), *features], dim=1)
        return cast(torch.Tensor, joined[layout.token_inverse])

    def _positions(self, positions: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """The learned grid of positions, stretched over each frame corner to corner.

        Args:
            positions: int64, (patches, 2): row and column of each patch.
            sizes: int64, (patches, 2): rows and columns of its frame.

        Returns:
            Shape (patches, hidden): of the four learned positions around each patch, the mean,
            weighted bilinearly, as transformers' ``get_vision_interpolation_indices_and_weights``.
        """
        place = positions.float() * (self.side - 1) / (sizes - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=self.side - 1)
        part = place - low
        result = torch.zeros((), device=positions.device)
        for row, row_weight in ((low[:, 0], 1 - part[:, 0]), (high[:, 0], part[:, 0])):
            for column, weight in ((low[:, 1], 1 - part[:, 1]), (high[:, 1], part[:, 1])):
                learned = self.pos_embed(row * self.side + column)
                result = result + learned * (row_weight * weight)[:, None]
        return result


class MLP(nn.Module):
    """The feed-forward layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(patches, hidden) → (patches, hidden)."""
        return cast(torch.Tensor, self.linear_fc2(self.activation(self.linear_fc1(hidden))))


class Merger(nn.Module):
    """Joins the patches of a token and projects them to the language model's width."""

    def __init__(self, config: VisionConfig, *, norm_joined: bool) -> None:
        super().__init__()
        self.joined = config.hidden_size * config.spatial_merge_size**2
        self.norm_joined = norm_joined
        size = self.joined if norm_joined else config.hidden_size
        self.norm = layer_norm(size)
        self.linear_fc1 = nn.Linear(self.joined, self.joined)
        self.linear_fc2 = nn.Linear(self.joined, config.out_hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(patches, hidden) → (tokens, width)."""
        if self.norm_joined:
            joined = self.norm(hidden.view(-1, self.joined))
        else:
            joined = self.norm(hidden).view(-1, self.joined)
        return cast(torch.Tensor, self.linear_fc2(gelu(self.linear_fc1(joined))))
