"""Tiny Qwen2-Audio: configuration, feature extractor, new weights, and its tower in training."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from .checkpoint import random_weights, write_json
from .tokenizer import build_tokenizer, tokenizer_config
from .tone_questions import every_sound_text
from .tones import RATE

HOP = 160
TOKEN = 4 * HOP
"""Samples that become one token: two convolutions and a mean of pairs make four frames one."""
MAX_SECONDS = 8
BANDS = 64
CONTEXT = 4096
VOCABULARY = 640
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
)
EXTRACTOR: dict[str, Any] = {
    "feature_size": BANDS,
    "sampling_rate": RATE,
    "hop_length": HOP,
    "chunk_length": MAX_SECONDS,
    "n_fft": 400,
    "padding_value": 0.0,
    "return_attention_mask": True,
}
CHAT_TEMPLATE: str = Qwen2AudioProcessor.default_chat_template.fget(None)


def build_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json as the hub's checkpoints of the family have it."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "torch_dtype": "bfloat16",
        "audio_token_index": ids["<|AUDIO|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": False,
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": BANDS,
            "encoder_layers": 3,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 384,
            "d_model": 128,
            "activation_function": "gelu",
            "max_source_positions": MAX_SECONDS * RATE // HOP // 2,
        },
        "text_config": {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
    }


def write_files(folder: Path) -> None:
    """Write everything but the weights."""
    tokenizer = build_tokenizer(every_sound_text(), SPECIAL_TOKENS, VOCABULARY)
    config = build_config(tokenizer)
    text = config["text_config"]
    name = {"processor_class": "Qwen2AudioProcessor"}
    files: dict[str, dict[str, Any]] = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": text["bos_token_id"],
            "pad_token_id": text["pad_token_id"],
            "eos_token_id": [text["eos_token_id"], text["bos_token_id"]],
            "do_sample": False,
        },
        "preprocessor_config.json": EXTRACTOR
        | name
        | {"feature_extractor_type": "WhisperFeatureExtractor"},
        "tokenizer_config.json": tokenizer_config(tokenizer, SPECIAL_TOKENS, context=CONTEXT)
        | name
        | {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    write_json(folder, files)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def new_model(folder: Path, seed: int) -> Qwen2AudioForConditionalGeneration:
    """A model with fresh random weights and Whisper's sinusoids for positions."""
    torch.manual_seed(seed)
    config = Qwen2AudioConfig.from_pretrained(folder)
    model = Qwen2AudioForConditionalGeneration(config).float()
    random_weights(model)
    positions = model.model.audio_tower.embed_positions.weight
    half = positions.shape[1] // 2
    frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    angles = torch.arange(positions.shape[0])[:, None] * frequencies
    positions.data.copy_(torch.cat([angles.sin(), angles.cos()], 1))
    return model


@lru_cache(2)
def mel_filters(device: torch.device) -> Tensor:
    """Shape (BANDS, 1 + n_fft / 2)."""
    return torch.from_numpy(WhisperFeatureExtractor(**EXTRACTOR).mel_filters).float().T.to(device)


def log_mel(samples: Tensor) -> Tensor:
    """Whisper's spectrogram, (sounds, BANDS, frames + 2), of int16 (sounds, samples).

    The two frames more see the silence with which the processor fills every sound up.
    """
    waves = F.pad(samples.float() / 32767, (0, 5 * HOP))
    window = torch.hann_window(EXTRACTOR["n_fft"], device=waves.device)
    spectrum = torch.stft(waves, EXTRACTOR["n_fft"], HOP, window=window, return_complex=True)
    power = spectrum[..., : samples.shape[1] // HOP + 2].abs() ** 2
    mel = torch.clamp(mel_filters(waves.device) @ power, min=1e-10).log10()
    return (torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


def encode(model: nn.Module, samples: Tensor) -> Tensor:
    """Embeddings (sounds, tokens, hidden) of int16 samples (sounds, tokens * TOKEN)."""
    tower = model.model.audio_tower
    with torch.autocast(samples.device.type, enabled=False):
        mel = log_mel(samples)
    n, places = samples.shape[0], samples.shape[1] // HOP // 2
    x = F.gelu(tower.conv2(F.gelu(tower.conv1(mel))))[..., :places].transpose(1, 2).float()
    x = x + tower.embed_positions.weight[:places]
    heads = tower.config.encoder_attention_heads
    for layer in tower.layers:
        y, attention = layer.self_attn_layer_norm(x), layer.self_attn
        q, k, v = (
            p(y).view(n, places, heads, -1).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
    x = tower.layer_norm(x.view(n, places // 2, 2, -1).mean(2))
    projected: Tensor = model.model.multi_modal_projector(x)
    return projected
