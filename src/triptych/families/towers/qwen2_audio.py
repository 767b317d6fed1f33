"""Qwen2-Audio's tower, after transformers' ``Qwen2AudioEncoder``.

Parameters have the hub's names and shapes. transformers fills every sound up to half a minute and
masks the silence; here sounds lie end to end at their own lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn
from torch.nn.functional import gelu, linear, pad

from triptych.contract import Item
from triptych.families.towers.activations import ACTIVATIONS
from triptych.families.towers.log_mel import LogMel
from triptych.families.towers.segments import Segments

if TYPE_CHECKING:
    from triptych.families.qwen2_audio import AudioConfig, FeatureExtractor


class AudioTower(nn.Module):
    """Samples to embeddings."""

    def __init__(
        self, encoder: AudioEncoder, projector: Projector, extractor: FeatureExtractor
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.log_mel = LogMel(extractor)
        self.encoder = encoder
        self.projector = projector

    def encode(self, items: Sequence[Item], media: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Embeddings of several sounds in one forward pass; see `Tower`."""
        frames = [self.extractor.frames(samples.numel()) for samples in media]
        # Sounds of one length next to one another: each length is one call of attention.
        order = sorted(range(len(media)), key=frames.__getitem__)
        embeddings = self.projector(
            self.encoder([self.log_mel(media[i]) for i in order], [frames[i] for i in order])
        )
        parts = embeddings.split([items[i].tokens for i in order])
        return [parts[place] for place in np.argsort(order)]


class AudioEncoder(nn.Module):
    """Two convolutions, the blocks, and a mean of pairs."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        width = config.d_model
        self.conv1 = nn.Conv1d(config.num_mel_bins, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, mels: Sequence[torch.Tensor], frames: Sequence[int]) -> torch.Tensor:
        """Encode several sounds.

        Args:
            mels: Of each sound, float32, (bands, ``frames`` + 2) or up to the longest sound.
            frames: How many frames of each hold something; they must not fall.

        Returns:
            Shape (tokens, d_model), sound after sound.
        """
        lengths = [(count - 1) // 2 + 1 for count in frames]
        hidden = torch.cat(
            [self._convolved(mel, length) for mel, length in zip(mels, lengths, strict=True)]
        )
        counts, runs = np.unique(lengths, return_counts=True)
        segments = Segments(tuple(zip(runs.tolist(), counts.tolist(), strict=True)))
        for block in self.layers:
            hidden = block(hidden, segments)
        pairs = [
            part[: length // 2 * 2]
            for part, length in zip(hidden.split(lengths), lengths, strict=True)
        ]
        return cast(torch.Tensor, self.layer_norm(torch.cat(pairs).unflatten(0, (-1, 2)).mean(1)))

    def _convolved(self, mel: torch.Tensor, length: int) -> torch.Tensor:
        """(bands, frames) → (length, d_model), with positions."""
        hidden = gelu(convolve(mel.T.to(self.conv1.weight.dtype), self.conv1))
        hidden = gelu(convolve(hidden, self.conv2))[:length]
        return cast(torch.Tensor, hidden + self.embed_positions.weight[:length])


def convolve(steps: torch.Tensor, layer: nn.Conv1d) -> torch.Tensor:
    """A convolution in time as a linear map of each window.

    On a GPU this is exact in float32, where a convolution would be TensorFloat-32.

    Args:
        steps: Shape (steps, channels).
        layer: With a kernel of 3 and a padding of 1.

    Returns:
        Shape (steps / stride rounded up, channels of the layer).
    """
    windows = pad(steps, (0, 0, 1, 1)).unfold(0, 3, layer.stride[0])
    return linear(windows.flatten(1), layer.weight.flatten(1), layer.bias)


class Block(nn.Module):
    """Attention, then the feed-forward layer, each behind its norm and added to its input."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config.d_model, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = ACTIVATIONS[config.activation_function]
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, hidden: torch.Tensor, segments: Segments) -> torch.Tensor:
        """(places, d_model) → the same."""
        hidden = hidden + self.self_attn(self.self_attn_layer_norm(hidden), segments)
        fed = self.fc2(self.activation(self.fc1(self.final_layer_norm(hidden))))
        hidden = hidden + fed
        if hidden.dtype == torch.float16:  # its range is too small for some sounds
            limit = torch.finfo(torch.float16).max - 1000
            hidden = hidden.clamp(-limit, limit)
        return cast(torch.Tensor, hidden)


class Attention(nn.Module):
    """Multi-head attention within each sound."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, segments: Segments) -> torch.Tensor:
        """(places, width) → the same."""
        projected = [project(hidden) for project in (self.q_proj, self.k_proj, self.v_proj)]
        qkv = torch.stack(projected, dim=1).unflatten(-1, (self.heads, -1))
        return cast(torch.Tensor, self.out_proj(segments.attend(qkv)))


class Projector(nn.Module):
    """One linear map to the language model's width."""

    def __init__(self, audio_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(audio_width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(tokens, d_model) → (tokens, width)."""
        return cast(torch.Tensor, self.linear(hidden))
