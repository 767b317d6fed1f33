"""Tiny LLaVA-1.5 and LLaVA-NeXT-Video: configuration, processors, new weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
)

from . import chats, examples, model
from .checkpoint import random_weights, write_json
from .model import IMAGE_MEAN, IMAGE_STD, VOCABULARY
from .tokenizer import build_tokenizer, tokenizer_config

SIDE = 144
"""Pixels along each side of what the tower takes; pictures are scaled to it, not cropped."""
PATCH = 12
GRID = SIDE // PATCH
POOL = 2
"""Patches along the side of what becomes one token of a video's frame."""
CONTEXT = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<image>\\n' -}}
{%- elif part.type == 'video' or 'video' in part or 'video_url' in part -%}
{{- '<video>\\n' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_config(tokenizer: Tokenizer, *, video: bool) -> dict[str, Any]:
    """config.json as the hub's checkpoints of the two families have it."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    config: dict[str, Any] = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": "bfloat16",
        "image_token_index": ids["<image>"],
        "image_seq_length": GRID**2,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "pad_token_id": ids["<|endoftext|>"],
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCABULARY,
            "hidden_size": 192,
            "intermediate_size": 448,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "hidden_act": "silu",
            "attention_bias": True,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "hidden_act": "quick_gelu",
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": 128,
            "layer_norm_eps": 1e-5,
        },
    }
    if video:
        config |= {
            "architectures": ["LlavaNextVideoForConditionalGeneration"],
            "model_type": "llava_next_video",
            "video_token_index": ids["<video>"],
            "video_seq_length": (GRID // POOL) ** 2,
            "spatial_pool_mode": "average",
            "spatial_pool_stride": POOL,
            "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]],
        }
    return config


def write_files(folder: Path, *, video: bool) -> None:
    """Write everything but the weights."""
    # The vocabulary of the tiny Qwen2.5-VL, but for the special tokens: its language model can be
    # what the training begins with.
    vocabulary = VOCABULARY - len(model.SPECIAL_TOKENS) + len(SPECIAL_TOKENS)
    tokenizer = build_tokenizer(
        examples.every_text() + chats.every_text(), SPECIAL_TOKENS, vocabulary
    )
    config = build_config(tokenizer, video=video)
    processor = "LlavaNextVideoProcessor" if video else "LlavaProcessor"
    square = {"height": SIDE, "width": SIDE}
    image: dict[str, Any] = {
        "processor_class": processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }
    text = config["text_config"]
    files: dict[str, dict[str, Any]] = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": text["bos_token_id"],
            "pad_token_id": text["pad_token_id"],
            "eos_token_id": [text["eos_token_id"], text["bos_token_id"]],
            "do_sample": False,
        },
        "preprocessor_config.json": image | {"image_processor_type": "CLIPImageProcessor"},
        "processor_config.json": {
            "processor_class": processor,
            "image_token": "<image>",
            "patch_size": PATCH,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": tokenizer_config(tokenizer, SPECIAL_TOKENS, context=CONTEXT)
        | {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": processor},
    }
    if video:
        files["preprocessor_config.json"] |= {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": config["image_grid_pinpoints"],
        }
        files["processor_config.json"]["video_token"] = "<video>"
        files["video_preprocessor_config.json"] = image | {
            "video_processor_type": "LlavaNextVideoVideoProcessor"
        }
    write_json(folder, files)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def new_model(folder: Path, seed: int, *, video: bool) -> nn.Module:
    """A model with fresh random weights, configured by the folder's config.json."""
    torch.manual_seed(seed)
    if video:
        config = LlavaNextVideoConfig.from_pretrained(folder)
        model = LlavaNextVideoForConditionalGeneration(config).float()
    else:
        model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder)).float()
    random_weights(model)
    embeddings = model.model.vision_tower.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=0.03)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.3)
    nn.init.normal_(embeddings.class_embedding, std=0.3)
    return model


def begin_with(model: nn.Module, folder: Path) -> None:
    """Take over the language model of a tiny Qwen2.5-VL; what it lacks, biases, is nought."""
    ours = {name: weight for name, weight in model.named_parameters() if "vision" not in name}
    with torch.no_grad():
        for name, weight in load_file(folder / "model.safetensors").items():
            if not name.startswith("visual."):
                ours[name.replace("model.", "model.language_model.", 1)].copy_(weight.float())


def encode(model: nn.Module, pixels: Tensor, noise: bool, *, video: bool) -> Tensor:
    """Embeddings (n, tokens, hidden) of uint8 pictures or frames (n, SIDE, SIDE, 3)."""
    tower = model.model.vision_tower
    heads = tower.config.num_attention_heads
    n = pixels.shape[0]
    values = pixels.float() / 255
    if noise:
        shape = (n, 1, 1, 1)
        amount = torch.rand(shape, device=values.device)
        amount = amount * (torch.rand(shape, device=values.device) < 0.5)
        values = values + torch.randn_like(values) * amount * 0.03
    mean, std = (torch.tensor(t, device=values.device) for t in (IMAGE_MEAN, IMAGE_STD))
    patches = ((values - mean) / std).view(n, GRID, PATCH, GRID, PATCH, 3)
    patches = patches.permute(0, 1, 3, 5, 2, 4).reshape(n, GRID**2, -1)
    embeddings = tower.embeddings
    x = F.linear(patches, embeddings.patch_embedding.weight.flatten(1)).float()
    x = torch.cat([embeddings.class_embedding.expand(n, 1, -1), x], 1)
    x = tower.pre_layrnorm(x + embeddings.position_embedding.weight)
    for layer in tower.encoder.layers[:-1]:  # vision_feature_layer is -2
        y, attention = layer.layer_norm1(x), layer.self_attn
        q, k, v = (
            p(y).view(n, x.shape[1], heads, -1).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
    x = x[:, 1:]
    if video:
        rows = GRID // POOL
        x = x.view(n, rows, POOL, rows, POOL, -1).mean((2, 4)).flatten(1, 2)
    projected: Tensor = model.model.multi_modal_projector(x)
    return projected
