"""Checkpoints with the configurations of real models and towers drawn at random.

Only the towers have weights: the language model of an engine draws its own
(vLLM: ``"load_format": "dummy"``). Sources of the numbers: ``config.json`` of
Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-VL-8B-Instruct and llava-hf/llava-1.5-7b-hf.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

TINY = Path(__file__).parents[2] / "models"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Of a tiny model: a real one's is not here, and its ids do not change the work."""
QWEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
MROPE = {"rope_type": "default", "rope_theta": 1e6}
VISION_7B = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
TEXT_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "vocab_size": 152064,
    "rope_parameters": {**MROPE, "mrope_section": [16, 24, 24]},
}
VISION_8B = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 4096,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
TEXT_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "rope_parameters": {**MROPE, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
}
CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "vocab_size": 32064,
}


def write(name: str, folder: Path, *, small: bool = False) -> Path:
    """Write a checkpoint.

    Args:
        name: One of `MODELS`.
        folder: To be made.
        small: A tower of two layers, to see that things run.
    """
    folder.mkdir()
    MODELS[name](folder, small)
    return folder


def _qwen2_5(folder: Path, small: bool) -> None:
    vision = VISION_7B | ({"depth": 2, "fullatt_block_indexes": [1]} if small else {})
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=TEXT_7B, **_qwen_files(folder, 14)
    )
    module = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
    tower = module.Qwen2_5_VisionTransformerPretrainedModel
    _finish(folder, config, {"visual.": lambda: tower(config.vision_config)})


def _qwen3(folder: Path, small: bool) -> None:
    vision = VISION_8B | ({"depth": 2, "deepstack_visual_indexes": [0]} if small else {})
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    config = transformers.Qwen3VLConfig(
        vision_config=vision, text_config=TEXT_8B, **_qwen_files(folder, 16, **half)
    )
    tower = transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel
    _finish(folder, config, {"model.visual.": lambda: tower(config.vision_config)})


def _llava(folder: Path, small: bool) -> None:
    vision = CLIP_LARGE | ({"num_hidden_layers": 2} if small else {})
    tiny = TINY / "tiny-llava-1.5"
    _copy(tiny, folder)
    size = {"height": 336, "width": 336}
    processor = json.loads((tiny / "preprocessor_config.json").read_text())
    processor |= {"crop_size": size, "size": {"shortest_edge": 336}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    ids = json.loads((tiny / "config.json").read_text())
    tokens = ids.get("image_token_id", ids.get("image_token_index"))
    config = transformers.LlavaConfig(
        vision_config={**vision, "model_type": "clip_vision_model"},
        text_config=LLAMA_7B,
        image_token_index=tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    projector = transformers.models.llava.modeling_llava.LlavaMultiModalProjector
    clip = transformers.CLIPVisionModel
    parts: dict[str, Callable[[], torch.nn.Module]] = {
        "vision_tower.": lambda: clip(config.vision_config),
        "multi_modal_projector.": lambda: projector(config),
    }
    _finish(folder, config, parts)


MODELS: dict[str, Callable[[Path, bool], None]] = {
    "Qwen2.5-VL-7B": _qwen2_5,
    "Qwen3-VL-8B": _qwen3,
    "LLaVA-1.5-7B": _llava,
}


def _qwen_files(folder: Path, patch: int, **processor: Any) -> dict[str, int]:
    """Tokenizer and processors; the ids that go into the configuration."""
    tiny = TINY / "tiny-qwen2.5-vl"
    _copy(tiny, folder)
    area = (2 * patch) ** 2
    size = {"shortest_edge": 4 * area, "longest_edge": 16384 * area}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        config = json.loads((tiny / name).read_text()) | processor
        config |= {"patch_size": patch, "size": size}
        for pixels in ("min_pixels", "max_pixels"):
            config.pop(pixels, None)
        (folder / name).write_text(json.dumps(config))
    ids = json.loads((tiny / "config.json").read_text())
    return {name: ids[name] for name in QWEN_IDS}


def _copy(tiny: Path, folder: Path) -> None:
    for name in (*TOKENIZER, "generation_config.json"):
        shutil.copy2(tiny / name, folder / name)


def _finish(folder: Path, config: Any, parts: dict[str, Callable[[], torch.nn.Module]]) -> None:
    """Write the configuration and the weights of the parts, by the prefixes of their names."""
    # As the hub's configurations name it; engines serve nothing that has no name.
    family = type(config).__name__.removesuffix("Config")
    config.architectures = [f"{family}ForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for prefix, make in parts.items():
        with torch.device("meta"):
            shapes = {name: weight.shape for name, weight in make().state_dict().items()}
        for name, shape in shapes.items():
            drawn = torch.randn(shape, generator=generator) * 0.02
            weights[prefix + name] = (drawn + ("norm" in name)).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors")
