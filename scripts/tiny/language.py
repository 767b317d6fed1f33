"""The language model's forward pass in training, of Qwen2 and Llama, media in their places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Batch

Rotation = tuple[Tensor, Tensor]


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """Root-mean-square norm with the module's weight."""
    return F.rms_norm(x.float(), (x.shape[-1],), module.weight, 1e-6)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding of x, shape (batch, heads, length, head width)."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def hidden_states(text: nn.Module, batch: Batch, encoded: Sequence[Tensor]) -> Tensor:
    """The last hidden states, shape (chats, length, hidden).

    Args:
        text: transformers' Qwen2Model, Qwen2_5_VLTextModel or LlamaModel.
        batch: What is said.
        encoded: Each group's embeddings, shape (media, tokens, hidden).
    """
    config = text.config
    x = text.embed_tokens(batch.ids).float()
    flat = x.reshape(-1, x.shape[-1])
    for group, embeddings in zip(batch.groups, encoded, strict=True):
        flat = flat.index_copy(0, group.slots.flatten(), embeddings.flatten(0, 1).float())
    x = flat.view_as(x)
    width = config.hidden_size // config.num_attention_heads
    rotation = _rotation(batch.positions, width, config.rope_parameters.get("mrope_section"))
    size = (*batch.ids.shape, -1, width)
    for layer in text.layers:
        y = norm(layer.input_layernorm, x)
        attention = layer.self_attn
        q, k, v = (
            p(y).view(size).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        repeats = q.shape[1] // k.shape[1]
        k, v = rotate(k, rotation).repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        # Padding is on the right and no label is there, so the causal mask is all that is needed.
        mixed = F.scaled_dot_product_attention(rotate(q, rotation), k, v, is_causal=True)
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(norm(layer.post_attention_layernorm, x))
    return norm(text.norm, x)


def _rotation(positions: Tensor, width: int, sections: Sequence[int] | None) -> Rotation:
    """Of every token's position in one dimension, or in three that share the frequencies."""
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, width, 2, device=positions.device) / width))
    angles = positions[..., None].float() * frequencies
    if sections:
        angles = torch.cat([part[i] for i, part in enumerate(angles.split(sections, -1))], -1)
    else:
        angles = angles[0]
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()
