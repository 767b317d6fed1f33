"""The forward pass for batches of equal pictures: the same weights, no ragged bookkeeping.

`transformers` runs the vision tower window by window and picture by picture. In training all
pictures of a group have one size, so a window is a mask that the whole group shares. The result
is the same to rounding, which the evaluation bears out: it runs through `transformers`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from .batch import Batch
from .model import IMAGE_MEAN, IMAGE_STD, PATCH

Rotation = tuple[Tensor, Tensor]


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """Root-mean-square norm with the module's weight."""
    return F.rms_norm(x.float(), (x.shape[-1],), module.weight, 1e-6)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding of x, shape (batch, heads, length, head width)."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


@lru_cache(512)
def layout(rows: int, columns: int, window: int, device: torch.device) -> tuple[Rotation, Tensor]:
    """Rotation of every patch, and which patches share a window, for a grid of merged tokens.

    Patches come merged token by merged token, each token's four in reading order.
    """
    y, x = torch.meshgrid(torch.arange(rows * 2), torch.arange(columns * 2), indexing="ij")
    y, x = (t.reshape(rows, 2, columns, 2).transpose(1, 2).flatten() for t in (y, x))
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, 16, 2) / 16))
    angles = torch.cat([y[:, None] * frequencies, x[:, None] * frequencies], 1).repeat(1, 2)
    patches = window // PATCH
    owner = (y // patches) * 1000 + x // patches
    return (angles.cos().to(device), angles.sin().to(device)), (owner[:, None] == owner[None]).to(
        device
    )


def encode(
    model: Qwen2_5_VLForConditionalGeneration, pixels: Tensor, noise: bool = False
) -> Tensor:
    """Embeddings (n, tokens, hidden) of uint8 pictures (n, 1 or 2 frames, height, width, 3)."""
    visual = model.model.visual
    config = visual.config
    n, frames, height, width, _ = pixels.shape
    rows, columns = height // (2 * PATCH), width // (2 * PATCH)
    values = pixels.float() / 255
    if noise:
        shape = (n, 1, 1, 1, 1)
        amount = torch.rand(shape, device=values.device) * (
            torch.rand(shape, device=values.device) < 0.5
        )
        values = values + torch.randn_like(values) * amount * 0.03
    mean, std = (torch.tensor(t, device=values.device) for t in (IMAGE_MEAN, IMAGE_STD))
    values = (values - mean) / std
    values = values.view(n, frames, rows, 2, PATCH, columns, 2, PATCH, 3)
    patches = values.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(n, rows * columns * 4, -1)
    kernel = visual.patch_embed.proj.weight
    if frames == 1:  # a still picture is its own second frame
        kernel = kernel.sum(2, keepdim=True)
    x = F.linear(patches, kernel.flatten(1)).float()
    rotation, windows = layout(rows, columns, config.window_size, values.device)
    for index, block in enumerate(visual.blocks):
        q, k, v = (
            block.attn.qkv(norm(block.norm1, x))
            .view(n, x.shape[1], 3, config.num_heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        mask = None if index in config.fullatt_block_indexes else windows
        mixed = F.scaled_dot_product_attention(
            rotate(q, rotation), rotate(k, rotation), v, attn_mask=mask
        )
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(norm(block.norm2, x))
    merged: Tensor = visual.merger.mlp(norm(visual.merger.ln_q, x).view(n, rows * columns, -1))
    return merged


def hidden_states(
    model: Qwen2_5_VLForConditionalGeneration, batch: Batch, noise: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The last hidden states (chats, length, hidden), and each group's embeddings."""
    text = model.model.language_model
    config = text.config
    x = text.embed_tokens(batch.ids).float()
    encoded = [encode(model, group.pixels, noise) for group in batch.groups]
    flat = x.reshape(-1, x.shape[-1])
    for group, embeddings in zip(batch.groups, encoded, strict=True):
        flat = flat.index_copy(0, group.slots.flatten(), embeddings.flatten(0, 1).float())
    x = flat.view_as(x)
    width = config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, width, 2, device=x.device) / width))
    angles = batch.positions[..., None].float() * frequencies
    sections = config.rope_parameters["mrope_section"]
    angles = torch.cat([part[i] for i, part in enumerate(angles.split(sections, -1))], -1)
    angles = torch.cat([angles, angles], -1)[:, None]
    rotation = (angles.cos(), angles.sin())
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
    return norm(text.norm, x), encoded
