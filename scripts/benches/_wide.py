"""A language model of one thin layer and wide embeddings: 100 MiB of them are few tokens."""

from __future__ import annotations

import json
from pathlib import Path

from benches._checkpoint import TINY

HIDDEN = 4096
WIDTH = 2 * HIDDEN
"""Of an embedding: the tower's last layer and one of those before it (deepstack)."""
TOKENS = 4096
"""That the model takes at a time."""


def write(folder: Path) -> Path:
    """A Qwen3-VL of random weights.

    Args:
        folder: To be made.
    """
    from triptych.engines import torchvision_ops

    torchvision_ops.define_missing()
    import transformers

    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).symlink_to(TINY / file)
    ids = {
        token["content"]: token["id"]
        for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    config = transformers.Qwen3VLConfig(
        vision_config={
            "depth": 1,
            "num_heads": 2,
            "patch_size": 16,
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0],
        },
        text_config={
            "vocab_size": 768,
            "hidden_size": HIDDEN,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 2 * TOKENS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
            "eos_token_id": ids["<|im_end|>"],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16, "merge_size": 2}
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * TOKENS}
    for file, kind in (
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}),
        ("video_preprocessor_config.json", {"video_processor_type": "Qwen3VLVideoProcessor"}),
    ):
        given = {**half, **kind, "size": size, "processor_class": "Qwen3VLProcessor"}
        (folder / file).write_text(json.dumps({**given, "temporal_patch_size": 2}))
    return folder
