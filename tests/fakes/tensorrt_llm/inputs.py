"""The loader of media and embeddings."""

from __future__ import annotations

import asyncio
from typing import Any

import torch


def default_multimodal_input_loader(
    *,
    tokenizer: Any,
    model_dir: str,
    model_type: str,
    modality: str,
    prompts: list[str],
    media: Any = None,
    image_data_format: str = "pt",
    num_frames: int = 8,
    mm_embeddings: list[list[torch.Tensor]] | None = None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    if (media is None) == (mm_embeddings is None):
        raise AssertionError("either media or mm_embeddings must be provided, not both")
    if mm_embeddings is None:
        raise NotImplementedError("the adapter never has it load media")
    if tokenizer is None:
        raise AssertionError("it would read the tokenizer's files at every call")
    if _on_an_event_loop():
        raise AssertionError("it reads files: it must not hold up an event loop")
    if modality != "image":
        raise ValueError(f"external embedding is not supported for {modality} modality yet")
    if len(prompts) != len(mm_embeddings):
        raise AssertionError(f"{len(prompts)} prompts, {len(mm_embeddings)} lists of embeddings")
    loaded = []
    for prompt, embeddings in zip(prompts, mm_embeddings, strict=True):
        content = [{"type": "image"}] * len(embeddings) + [{"type": "text", "text": prompt}]
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        loaded.append({"prompt": rendered, "multi_modal_embeddings": {"image": list(embeddings)}})
    return loaded


def _on_an_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
