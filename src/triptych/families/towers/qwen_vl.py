"""What the vision towers of the Qwen-VL families have in common.

Parameters have the hub's names and shapes. Rotary embedding and softmax are computed in float32
whatever the weights' dtype, as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.functional import gelu, linear

from triptych.contract import Item
from triptych.families.qwen_processors import ImageProcessor, VideoProcessor
from triptych.families.towers.patches import Patchify
from triptych.families.towers.segments import WHOLE_FRAME, Segments, WindowLayout

if TYPE_CHECKING:
    from triptych.families.qwen_vl import QwenVisionConfig

NORM_EPSILON = 1e-6


def layer_norm(size: int) -> nn.Module:
    """The norm of Qwen2-VL and Qwen3-VL."""
    return nn.LayerNorm(size, eps=NORM_EPSILON)


@dataclass(frozen=True)
class Layout:
    """How the patches of a batch lie."""

    windows: WindowLayout
    tokens: tuple[int, ...]
    """Of each item."""


class QwenTower(nn.Module):
    """A tower that takes the patches of several items end to end."""

    merge: int
    """Patches along the side of a token."""
    window: int = WHOLE_FRAME
    """Tokens along the side of a window."""

    def __init__(self, image: ImageProcessor, video: VideoProcessor) -> None:
        super().__init__()
        self.patchify = Patchify(image, video)

    def encode(self, items: Sequence[Item], media: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Embeddings of several images and clips in one forward pass; see `Tower`."""
        return self.run(self.layout(items), media)

    def layout(self, items: Sequence[Item]) -> Layout:
        """See `StaticTower`."""
        grids = [item.grid_thw for item in items if item.grid_thw is not None]
        device = self.patchify.image_table.device
        windows = WindowLayout.of(grids, merge=self.merge, window=self.window, device=device)
        return Layout(windows, tuple(item.tokens for item in items))

    def run(self, layout: Layout, media: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `StaticTower`."""
        patches = torch.cat([self.patchify(pixels) for pixels in media])
        return list(self(patches, layout.windows).split(layout.tokens))

    def align(self) -> None:
        """Bring the weights into the form that a GPU multiplies fastest; the outcome stays."""


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, which is a linear map of each patch."""

    def __init__(self, config: QwenVisionConfig, hidden_size: int, *, bias: bool) -> None:
        super().__init__()
        size, steps = config.patch_size, config.temporal_patch_size
        self.proj = nn.Conv3d(config.in_channels, hidden_size, (steps, size, size), bias=bias)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(patches, values) → (patches, hidden)."""
        weight = self.proj.weight.flatten(1)
        return linear(patches.to(weight.dtype), weight, self.proj.bias)


class Rotary(nn.Module):
    """Two-dimensional rotary embedding: half of the angles turn with the row, half the column."""

    inverse_frequencies: torch.Tensor
    """float32, shape (head size / 4,)."""

    def __init__(self, config: QwenVisionConfig, hidden_size: int) -> None:
        super().__init__()
        half = hidden_size // config.num_heads // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half
        theta = config.rope_parameters.rope_theta
        self.register_buffer("inverse_frequencies", 1.0 / theta**exponents, persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, float32, shape (patches, 1, 1, head size / 2)."""
        angles = positions[..., None].float() * self.inverse_frequencies
        angles = angles.flatten(1)[:, None, None]
        return angles.cos(), angles.sin()


def rotate(qk: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Turn queries and keys, shape (patches, 2, heads, head size), in place, in float32."""
    cosines, sines = rotation
    first, second = qk.chunk(2, dim=-1)
    # A product with float32 is float32: nothing has to be converted before.
    turned = first * cosines - second * sines
    second.copy_(second * cosines + first * sines)
    first.copy_(turned)


class Attention(nn.Module):
    """Multi-head attention within segments."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        segments: Segments,
    ) -> torch.Tensor:
        """(patches, hidden) → (patches, hidden)."""
        qkv = self.qkv(hidden).unflatten(-1, (3, self.heads, -1))
        rotate(qkv[:, :2], rotation)
        return cast(torch.Tensor, self.proj(segments.attend(qkv)))


class Block(nn.Module):
    """Attention, then the feed-forward layer, each behind its norm and added to its input."""

    def __init__(
        self, hidden_size: int, heads: int, mlp: nn.Module, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.norm1 = norm(hidden_size)
        self.norm2 = norm(hidden_size)
        self.attn = Attention(hidden_size, heads)
        self.mlp = mlp

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

    def __init__(
        self, config: QwenVisionConfig, hidden_size: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.joined = hidden_size * config.spatial_merge_size**2
        self.ln_q = norm(hidden_size)
        self.mlp = nn.ModuleList(
            [
                nn.Linear(self.joined, self.joined),
                nn.Identity(),  # keeps the hub's names, mlp.0 and mlp.2
                nn.Linear(self.joined, config.width),
            ]
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(patches, hidden) → (tokens, width)."""
        joined = self.ln_q(hidden).view(-1, self.joined)
        return cast(torch.Tensor, self.mlp[2](gelu(self.mlp[0](joined))))
