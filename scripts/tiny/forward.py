"""Qwen2.5-VL's tower for batches of equal pictures: the same weights, no ragged bookkeeping.

`transformers` runs the vision tower window by window and picture by picture. In training all
pictures of a group have one size, so a window is a mask that the whole group shares. The result
is the same to rounding, which the evaluation bears out: it runs through `transformers`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from .language import Rotation, norm, rotate
from .model import IMAGE_MEAN, IMAGE_STD, PATCH


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
