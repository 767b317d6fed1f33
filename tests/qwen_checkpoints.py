"""Small Qwen-VL checkpoints with random weights, with the hub's names; see `checkpoints`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoints import TEXT, _ids, _random, _write_json, _write_tokenizer, transformers

CONTEXT = TEXT["max_position_embeddings"]
WIDTH = TEXT["hidden_size"]
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen's checkpoints have it, less their system prompt."""
VISION = {"depth": 4, "num_heads": 2, "patch_size": 14}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16}
TOKENS = {"least": 4, "most": 100}
"""Tokens of a picture or of a step of a clip."""


def tiny_qwen2_vl(path: Path, **vision: Any) -> Path:
    """Qwen2-VL; ``vision`` goes over the fields of ``vision_config``."""
    # SGLang asks for the channels by the name that the hub's files have.
    channels = {"in_chans": 3}
    vision = {**VISION, **channels, "embed_dim": 64, "mlp_ratio": 2, "hidden_size": WIDTH, **vision}
    tokens = _prepare(path, CLIP, "Qwen2VLProcessor", "Qwen2VL")
    config = transformers.Qwen2VLConfig(
        vision_config=vision,
        text_config={**TEXT, **_ids(tokens), "rope_parameters": MROPE},
        **_media_ids(tokens),
    )
    return _write(path, transformers.Qwen2VLForConditionalGeneration(config), _before_5)


def tiny_qwen2_5_vl(path: Path, **vision: Any) -> Path:
    """Qwen2.5-VL; ``vision`` goes over the fields of ``vision_config``."""
    vision = {
        **VISION,
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1, 3],
        "window_size": 112,
        "tokens_per_second": 2,
        **vision,
    }
    tokens = _prepare(path, CLIP, "Qwen2_5_VLProcessor", "Qwen2VL")
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**TEXT, **_ids(tokens), "rope_parameters": MROPE},
        **_media_ids(tokens),
    )
    return _write(path, transformers.Qwen2_5_VLForConditionalGeneration(config), _before_5)


def tiny_qwen3_vl(path: Path, **vision: Any) -> Path:
    """Qwen3-VL with two deepstack layers; ``vision`` goes over those of ``vision_config``."""
    return _tiny_qwen3_vl(path, "Qwen3VL", vision, {})


def tiny_qwen3_vl_moe(path: Path, **vision: Any) -> Path:
    """Qwen3-VL with 4 experts, of which 2 are asked for each token."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    # transformers always norms, and its configuration has no name for it; vLLM asks.
    experts["norm_topk_prob"] = True
    return _tiny_qwen3_vl(path, "Qwen3VLMoe", vision, experts)


def _tiny_qwen3_vl(path: Path, name: str, vision: dict[str, Any], text: dict[str, Any]) -> Path:
    vision = {
        **VISION,
        "patch_size": 16,
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
        **vision,
    }
    tokens = _prepare(path, HALF, "Qwen3VLProcessor", "Qwen3VL")
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision,
        text_config={
            **TEXT,
            "head_dim": 32,
            **_ids(tokens),
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
            **text,
        },
        **_media_ids(tokens),
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return _write(path, model, lambda name: name)


def _prepare(path: Path, processor: dict[str, Any], processor_class: str, video: str) -> Any:
    """Tokenizer and processors; a clip of Qwen3-VL has the pixels of all its frames bounded."""
    tokens = _write_tokenizer(path, SPECIAL, TEMPLATE)
    area = (2 * processor["patch_size"]) ** 2
    steps = 8 if video == "Qwen3VL" else 1
    for file, kind, times in (
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}, 1),
        (
            "video_preprocessor_config.json",
            {"video_processor_type": f"{video}VideoProcessor", "cap_pixels_per_frame": False},
            steps,
        ),
    ):
        size = {"shortest_edge": TOKENS["least"] * area, "longest_edge": TOKENS["most"] * area}
        _write_json(
            path / file,
            **processor,
            **kind,
            processor_class=processor_class,
            size={name: value * times for name, value in size.items()},
            merge_size=2,
            temporal_patch_size=2,
        )
    return tokens


def _media_ids(tokens: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
    }


def _before_5(name: str) -> str:
    """A weight's name in the hub's files, from its name in transformers 5."""
    return name.removeprefix("model.").replace("language_model.", "model.", 1)


def _write(path: Path, model: torch.nn.Module, hub_name: Callable[[str], str]) -> Path:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in model.state_dict().items():
        made = _random(name.replace("ln_q", "norm"), weight.shape, generator)
        if "self_attn.q_proj" in name:  # attention so sharp that positions show in the answer
            made = 4 * made
        if ".experts." in name:  # one expert after another, each as large as a layer alone
            made = (made * made[0].numel() ** 0.5 / weight.shape[-1] ** 0.5).transpose(1, 2)
        weights[hub_name(name)] = made.contiguous()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    end = model.config.text_config.eos_token_id
    _write_json(path / "generation_config.json", eos_token_id=end)
    return path
