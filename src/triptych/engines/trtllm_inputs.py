"""What TensorRT-LLM is given of a request: text, and the embeddings in one of two ways.

Families without a grid (LLaVA) hand embeddings over by the library's own input loader, those with
one (Qwen-VL) by handles of shared memory, beside the positions that M-RoPE makes of the grid. In
both a medium's placeholder stands once in a prompt that is *text*: TensorRT-LLM drops embeddings
that come with token ids. A prompt of words alone goes in as ids.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from triptych.contract import Prompt
from triptych.engines.base import EmbeddingInputs, Media
from triptych.errors import InvalidRequest, UnsupportedMedium
from triptych.families import mrope

if TYPE_CHECKING:
    import torch

    from triptych.families.base import Family

_MROPE = ("mrope_position_ids_handle", "mrope_position_deltas_handle")


class Inputs(msgspec.Struct, frozen=True):
    """Arguments of ``LLM.generate_async``."""

    inputs: Any
    disaggregated_params: Any = None
    alive: Sequence[Any] = ()
    """Tensors whose memory the handles name; kept until the engine has read them."""


class InputMaker:
    """Makes the inputs of one model.

    Args:
        family: The model's.
        tokenizer: As of `load_tokenizer`; made once, since it takes its time.
        dtype: Of the language model, which embeddings are cast to; None: they stay as they are.
    """

    def __init__(self, family: Family, tokenizer: Any, dtype: torch.dtype | None) -> None:
        self._family = family
        self._tokenizer = tokenizer
        self._dtype = dtype

    async def make(self, prompt: Prompt, media: Media, embeddings: EmbeddingInputs) -> Inputs:
        """The inputs of one request.

        Args:
            prompt: As preprocess made it.
            media: Its media, checked.
            embeddings: The same as `Engine.admit` returns them.

        Raises:
            InvalidRequest: The prompt cannot be said in text.
            UnsupportedMedium: The installed version does not take the family's embeddings.
        """
        if not embeddings:
            return Inputs(prompt.token_ids)
        text = self._text(prompt.token_ids)
        tensors = [self._cast(tensor) for _, tensor in media]
        if isinstance(embeddings["image"], Mapping):
            return self._by_handles(text, prompt, media, tensors)
        # It reads files of the checkpoint at each call.
        return Inputs(await asyncio.to_thread(self._by_loader, text, tensors))

    def _by_loader(self, text: str, tensors: list[torch.Tensor]) -> dict[str, Any]:
        """What the library's loader makes of the embeddings, with our prompt.

        The loader knows in which form the installed version takes embeddings, but of a
        conversation it can render one turn of the user alone.
        """
        from tensorrt_llm.inputs import default_multimodal_input_loader

        [loaded] = default_multimodal_input_loader(
            tokenizer=self._tokenizer,
            model_dir=str(self._family.checkpoint.path),
            model_type=self._family.checkpoint.model_type,
            modality="image",
            prompts=[text],
            mm_embeddings=[tensors],
        )
        return {**loaded, "prompt": text}

    def _by_handles(
        self, text: str, prompt: Prompt, media: Media, tensors: list[torch.Tensor]
    ) -> Inputs:
        from tensorrt_llm import DisaggregatedParams

        known = {field.name for field in dataclasses.fields(DisaggregatedParams)}
        if not known.issuperset(_MROPE):
            raise UnsupportedMedium(
                f"the installed TensorRT-LLM takes no embeddings of {self._family.name}: it has "
                "no M-RoPE positions beside them",
                where="items[0]",
            )
        shared = [*tensors, *mrope.positions(prompt, [item for item, _ in media])]
        *handles, positions, deltas = map(_handle, shared)
        disaggregated = DisaggregatedParams(
            request_type="context_and_generation",
            multimodal_embedding_handles=handles,
            **dict(zip(_MROPE, (positions, deltas), strict=True)),
        )
        return Inputs({"prompt": text}, disaggregated, shared)

    def _text(self, ids: list[int]) -> str:
        """The text that TensorRT-LLM will read as ``ids``."""
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if self._tokenizer(text).input_ids != ids:
            raise InvalidRequest(
                "TensorRT-LLM takes a prompt with media as text alone, and would read other "
                "tokens in this one"
            )
        return text

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        # A copy in memory of its own: a handle shares the whole of the storage.
        return tensor.to(self._dtype or tensor.dtype, copy=True)


def _handle(tensor: torch.Tensor) -> dict[str, Any]:
    """Names a tensor's memory to the engine's process; good for one reading."""
    from tensorrt_llm._torch.shared_tensor import SharedTensorContainer

    handle: dict[str, Any] = SharedTensorContainer.from_tensor(tensor).dump_to_dict()
    return handle


def load_tokenizer(checkpoint: Path) -> Any:
    """Hugging Face's tokenizer of a checkpoint, which adds no token of its own to a text.

    Chat templates write every special token themselves, and TensorRT-LLM calls the tokenizer
    without asking it to leave them out.
    """
    from tokenizers.processors import Sequence as Nothing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.backend_tokenizer.post_processor = Nothing([])
    return tokenizer
