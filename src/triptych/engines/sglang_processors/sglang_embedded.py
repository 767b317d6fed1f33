"""Embeddings put in their places; SGLang's own processors of these models take the media."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput
from sglang.srt.multimodal.processors.base_processor import (
    BaseMultimodalProcessor,
    MultimodalSpecialTokens,
)

from triptych.engines.sglang_models.sglang_embedded import (
    LlavaForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
)


class EmbeddedProcessor(BaseMultimodalProcessor):  # type: ignore[misc]  # it has no types
    """For prompts whose placeholders are spread out."""

    models = (LlavaForConditionalGeneration, Qwen2AudioForConditionalGeneration)

    def __init__(self, hf_config: Any, server_args: Any, processor: Any, *others: Any) -> None:
        super().__init__(hf_config, server_args, processor, *others)
        self.mm_tokens = MultimodalSpecialTokens(
            image_token_id=getattr(hf_config, "image_token_index", None),
            audio_token_id=getattr(hf_config, "audio_token_index", None),
        ).build(processor)

    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: Any, *_: Any, **__: Any
    ) -> MultimodalProcessorOutput:
        """The items of a request, each with its places."""
        loaded = await self.load_mm_data(
            prompt=input_text,
            image_data=image_data,
            audio_data=audio_data,
            multimodal_tokens=self.mm_tokens,
        )
        items, input_ids, _ = self.process_and_combine_mm_data(loaded, self.mm_tokens)
        return MultimodalProcessorOutput(
            input_ids=input_ids.tolist(),
            mm_items=items,
            im_token_id=self.mm_tokens.image_token_id,
            audio_token_id=self.mm_tokens.audio_token_id,
        )
