"""Small checkpoints with random weights: configuration, processors, tokenizer and hub's names.

Every part of a model shows in what it answers: the weights keep the size of what passes through
them, so that another picture, clip or sound gives other greedy tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer

from tiny.checkpoint import llava_hub_name
from triptych.engines import torchvision_ops

torchvision_ops.define_missing()

import transformers  # noqa: E402 - it imports torchvision, which the line above makes possible

TOKENIZER = Path(__file__).parents[1] / "models" / "tiny-qwen2.5-vl" / "tokenizer.json"
IMAGE_SIZE = 56
"""Pixels along a side of what the CLIP towers take."""
CONTEXT = 1024
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 14,
    "projection_dim": 64,
}
VIDEO_VISION = {**VISION, "patch_size": 7}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
AUDIO = {
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "d_model": 64,
    "max_source_positions": 100,
}
EXTRACTOR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 16,
    "sampling_rate": 16_000,
    "hop_length": 160,
    "chunk_length": 2,
    "n_fft": 400,
    "padding_value": 0.0,
    "return_attention_mask": True,
}
CLIP_PROCESSOR = {
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "size": {"shortest_edge": IMAGE_SIZE},
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
VICUNA_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for part in message['content'] if part['type'] != 'text' %}"
    "{{ '<' + part['type'] + '>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As llava-hf's checkpoints have it: media before text."""


def tiny_llava(path: Path, **fields: Any) -> Path:
    """LLaVA-1.5: 16 tokens a picture; ``fields`` go over those of config.json."""
    tokens = _write_tokenizer(path, ["<image>"], VICUNA_TEMPLATE)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT, **_ids(tokens)),
        image_token_index=tokens["<image>"],
        **fields,
    )
    _write_json(
        path / "preprocessor_config.json",
        **CLIP_PROCESSOR,
        image_processor_type="CLIPImageProcessor",
        processor_class="LlavaProcessor",
    )
    _write_json(
        path / "processor_config.json",
        processor_class="LlavaProcessor",
        image_token="<image>",
        patch_size=VISION["patch_size"],
        num_additional_image_tokens=1,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    return _write_model(path, transformers.LlavaForConditionalGeneration(config))


def tiny_llava_next_video(path: Path, **fields: Any) -> Path:
    """LLaVA-NeXT-Video: 16 tokens a frame; ``fields`` go over those of config.json."""
    tokens = _write_tokenizer(path, ["<image>", "<video>"], VICUNA_TEMPLATE)
    config = transformers.LlavaNextVideoConfig(
        vision_config=transformers.CLIPVisionConfig(**VIDEO_VISION),
        text_config=transformers.LlamaConfig(**TEXT, **_ids(tokens)),
        image_token_index=tokens["<image>"],
        video_token_index=tokens["<video>"],
        image_grid_pinpoints=[[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE]],
        **fields,
    )
    _write_json(
        path / "preprocessor_config.json",
        **CLIP_PROCESSOR,
        image_processor_type="LlavaNextImageProcessor",
        processor_class="LlavaNextVideoProcessor",
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    _write_json(
        path / "video_preprocessor_config.json",
        **CLIP_PROCESSOR,
        video_processor_type="LlavaNextVideoVideoProcessor",
        processor_class="LlavaNextVideoProcessor",
    )
    _write_json(
        path / "processor_config.json",
        processor_class="LlavaNextVideoProcessor",
        image_token="<image>",
        video_token="<video>",
        patch_size=VIDEO_VISION["patch_size"],
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    return _write_model(path, transformers.LlavaNextVideoForConditionalGeneration(config))


def tiny_qwen2_audio(path: Path, *, seconds: int = 2, **fields: Any) -> Path:
    """Qwen2-Audio: 25 tokens a second; ``fields`` go over those of config.json."""
    special = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokens = _write_tokenizer(
        path, special, transformers.Qwen2AudioProcessor.default_chat_template.fget(None)
    )
    config = transformers.Qwen2AudioConfig(
        audio_config=transformers.Qwen2AudioEncoderConfig(
            **{**AUDIO, "max_source_positions": 50 * seconds}
        ),
        text_config=transformers.Qwen2Config(**TEXT, **_ids(tokens)),
        audio_token_index=tokens["<|AUDIO|>"],
        **fields,
    )
    _write_json(
        path / "preprocessor_config.json",
        **{**EXTRACTOR, "chunk_length": seconds},
        processor_class="Qwen2AudioProcessor",
    )
    return _write_model(path, transformers.Qwen2AudioForConditionalGeneration(config))


def _write_tokenizer(path: Path, special: Sequence[str], template: str) -> dict[str, int]:
    """The trained model's vocabulary with other special tokens, and a chat template.

    Returns:
        Ids by special token; ``""`` has the size of the vocabulary.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special),
    )
    (path / "chat_template.jinja").write_text(template)
    known = [*special, "<|im_end|>", "<|endoftext|>"]
    ids = {text: tokenizer.token_to_id(text) for text in known}
    return {**ids, "": tokenizer.get_vocab_size()}


def _ids(tokens: dict[str, int]) -> dict[str, int]:
    end = tokens["<|im_end|>"]
    pad = tokens["<|endoftext|>"]
    return {"vocab_size": tokens[""], "eos_token_id": end, "pad_token_id": pad, "bos_token_id": pad}


def _write_model(path: Path, model: torch.nn.Module) -> Path:
    generator = torch.Generator().manual_seed(0)
    weights = {
        llava_hub_name(name): _random(name, weight.shape, generator)
        for name, weight in model.state_dict().items()
    }
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    _write_json(path / "generation_config.json", eos_token_id=model.config.text_config.eos_token_id)
    return path


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:  # norms lie about one, biases about nothing
        return 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    if "embed" in name and "patch" not in name:
        return noise
    return noise / noise[0].numel() ** 0.5


def _write_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values, indent=1))
