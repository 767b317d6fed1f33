"""CLIP's vision tower up to the layers that are wanted, after transformers' ``CLIPVisionModel``.

Parameters have the hub's names and shapes, those under ``vision_model.``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from triptych.families.clip import ClipVisionConfig
from triptych.families.towers.activations import ACTIVATIONS
from triptych.families.towers.patches import Normalisation, normalisation_table


class Normalise(nn.Module):
    """From uint8 pixels to what the tower takes, bit for bit as transformers' PIL backend does."""

    table: torch.Tensor
    """float32, shape (3, 256)."""

    def __init__(self, processor: Normalisation) -> None:
        super().__init__()
        self.register_buffer("table", normalisation_table(processor), persistent=False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Uint8 (pictures, height, width, 3) → float32 (pictures, 3, height, width)."""
        channels = [
            table.index_select(0, values.flatten().int()).view(values.shape)
            for table, values in zip(self.table, pictures.unbind(-1), strict=True)
        ]
        return torch.stack(channels, dim=1)


class ClipVisionTower(nn.Module):
    """Patch embedding and the blocks up to the last layer that is wanted.

    Args:
        config: The checkpoint's ``vision_config``.
        layers: Which hidden states to give: 0 is what the first block takes, ``n`` what the n-th
            block makes.
    """

    def __init__(self, config: ClipVisionConfig, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config, max(layers))

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The wanted hidden states, class embedding first.

        Args:
            pixels: float32, shape (pictures, 3, image_size, image_size).

        Returns:
            One tensor (pictures, 1 + patches, hidden) a layer, in the order of ``layers``.
        """
        states = [self.pre_layrnorm(self.embeddings(pixels))]
        for block in self.encoder.layers:
            states.append(block(states[-1]))
        return [states[layer] for layer in self.layers]


class Embeddings(nn.Module):
    """Patches, the class embedding before them, and their positions."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.grid = config.grid
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, size, stride=size, bias=False)
        self.position_embedding = nn.Embedding(config.grid**2 + 1, config.hidden_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(pictures, 3, height, width) → (pictures, 1 + patches, hidden)."""
        weight = self.patch_embedding.weight
        side, size = self.grid, weight.shape[-1]
        cut = pixels[:, :, : side * size, : side * size].to(weight.dtype)
        # A convolution whose stride is its kernel is a linear map of each patch. On a GPU this is
        # exact in float32, where a convolution would be TensorFloat-32.
        blocks = cut.unflatten(3, (side, size)).unflatten(2, (side, size))
        patches = linear(
            blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), weight.flatten(1)
        )
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        hidden = torch.cat([first, patches], dim=1)
        return cast(torch.Tensor, hidden + self.position_embedding.weight)


class Encoder(nn.Module):
    """The blocks, under the hub's name."""

    def __init__(self, config: ClipVisionConfig, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(depth))


class Block(nn.Module):
    """Attention, then the feed-forward layer, each behind its norm and added to its input."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(pictures, places, hidden) → the same."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return cast(torch.Tensor, hidden + self.mlp(self.layer_norm2(hidden)))


class Attention(nn.Module):
    """Multi-head attention within each picture."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(pictures, places, hidden) → the same."""
        query, key, value = (
            project(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = scaled_dot_product_attention(query, key, value)
        return cast(torch.Tensor, self.out_proj(attended.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """The feed-forward layer."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(pictures, places, hidden) → the same."""
        return cast(torch.Tensor, self.fc2(self.activation(self.fc1(hidden))))
