"""Models for SGLang that are a language model alone, with embeddings from outside.

SGLang 0.5.17's own model of Hugging Face's LLaVA does not load: it looks for a CLIP tower among
SGLang's models, which have none, and refuses ``vision_feature_select_strategy`` of LLaVA-1.5. Here
neither is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.managers.mm_utils import (
    MultiModalityDataPaddingPatternMultimodalTokens,
    general_mm_embed_routine,
)
from sglang.srt.utils import add_prefix
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_LANGUAGE = "language_model."
"""What the language model's weights start with on the hub."""


class EmbeddedModel(torch.nn.Module):  # type: ignore[misc]  # following torch's imports is slow
    """A model whose media come as embeddings."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        self.language_model = _language_model(config.text_config)(
            config.text_config,
            quant_config=quant_config,
            prefix=add_prefix("language_model", prefix),
        )

    def pad_input_ids(self, input_ids: list[int], mm_inputs: Any) -> list[int]:
        """The ids with each medium's places marked by its hash."""
        pattern = MultiModalityDataPaddingPatternMultimodalTokens()
        return pattern.pad_input_tokens(input_ids, mm_inputs)  # type: ignore[no-any-return]

    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        """There is no tower; SGLang asks whether there is a way, and never goes it."""
        raise NotImplementedError("all media come as embeddings")

    get_audio_feature = get_image_feature

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any, **others: Any
    ) -> Any:
        """Run the language model, with the embeddings in their places."""
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            multimodal_model=self,
            positions=positions,
            **others,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the language model's; those of tower and projector are passed over."""
        self.language_model.load_weights(
            (name.removeprefix(_LANGUAGE), weight)
            for name, weight in weights
            if name.startswith(_LANGUAGE)
        )


def _language_model(config: Any) -> Any:
    """SGLang's class for a text configuration."""
    from sglang.srt.models.registry import ModelRegistry

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    return ModelRegistry.resolve_model_cls([name])[0]


class LlavaForConditionalGeneration(EmbeddedModel):
    """Takes the place of SGLang's model of that name."""


class Qwen2AudioForConditionalGeneration(EmbeddedModel):
    """Takes the place of SGLang's model of that name."""


EntryClass = [LlavaForConditionalGeneration, Qwen2AudioForConditionalGeneration]
