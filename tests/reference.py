"""Hugging Face's own model and processor: what greedy tokens must be equal to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from triptych.engines import torchvision_ops

torchvision_ops.define_missing()  # transformers imports torchvision with its processors

from transformers import (  # noqa: E402
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
)

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A conversation as Hugging Face's processor makes it."""

    inputs: dict[str, torch.Tensor]
    """``input_ids`` (1, tokens) with every placeholder spread out; for pictures also
    ``pixel_values`` (patches, features) and ``image_grid_thw`` (pictures, 3)."""
    compact_ids: list[int]
    """The ids with one placeholder a picture."""

    @property
    def input_ids(self) -> list[int]:
        return self.inputs["input_ids"][0].tolist()

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        grids = self.inputs.get("image_grid_thw")
        return [] if grids is None else [tuple(grid) for grid in grids.tolist()]


class HuggingFaceReference:
    """A Qwen2-VL or Qwen2.5-VL in transformers, float32 on the CPU, images by the PIL backend."""

    def __init__(self, model_dir: str | Path) -> None:
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.processor = Qwen2_5_VLProcessor(
            Qwen2VLImageProcessorPil.from_pretrained(model_dir),
            self.tokenizer,
            Qwen2VLVideoProcessor.from_pretrained(model_dir),
        )
        self.model = AutoModelForImageTextToText.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def prepare(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> Prepared:
        """Render a conversation.

        Args:
            messages: OpenAI's; a part of another type than ``text`` stands for the next picture.
            images: In the order of the parts.
        """
        turns = [{**message, "content": _parts(message["content"])} for message in messages]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        pictures = [image.convert("RGB") for image in images] or None
        inputs = self.processor(text=[text], images=pictures, return_tensors="pt")
        compact = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prepared(dict(inputs), compact)

    @torch.inference_mode()
    def embeddings(self, prepared: Prepared) -> list[torch.Tensor]:
        """What the vision tower and its merger make of each picture, (tokens, width)."""
        if not prepared.grids:
            return []
        features = self.model.get_image_features(
            prepared.inputs["pixel_values"], prepared.inputs["image_grid_thw"]
        )
        return list(features.pooler_output)

    @torch.inference_mode()
    def generate(
        self, messages: Sequence[Message], images: Sequence[Image.Image], max_new_tokens: int
    ) -> tuple[list[int], str]:
        """Greedy decoding.

        Returns:
            The drawn ids, the token that ended the answer included; the text without it.
        """
        prepared = self.prepare(messages, images)
        output = self.model.generate(
            **prepared.inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens
        )
        ids = output[0, len(prepared.input_ids) :].tolist()
        return ids, self.tokenizer.decode(ids, skip_special_tokens=True)


def _parts(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [part if part["type"] == "text" else {"type": "image"} for part in content]
