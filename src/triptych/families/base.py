"""What a model family must know, in one class: sizes, counts, the tower, the engine's wishes.

A family object is light: it reads the checkpoint's JSON files and nothing else, imports no torch
until `Family.load_tower`, and can be pickled, because the media workers plan with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from triptych.contract import ImagePlan, Item, Modality, TicketItem

if TYPE_CHECKING:
    import torch

    from triptych.families.checkpoint import Checkpoint


class Tower(Protocol):
    """A vision or audio tower with its projector, on its device, in its dtype."""

    def encode(self, items: Sequence[Item], media: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Embeddings of several items in one forward pass.

        Args:
            items: What each tensor is.
            media: Each item's array as `Item.shape` and `Item.dtype` say, on the tower's device.

        Returns:
            One tensor (tokens, width) an item, in order.
        """
        ...


class Family(ABC):
    """One model family, bound to one checkpoint."""

    name: ClassVar[str]
    """As people write it: ``Qwen2.5-VL``."""
    model_types: ClassVar[tuple[str, ...]]
    """The ``model_type`` of config.json that choose this family."""
    modalities: ClassVar[frozenset[Modality]]

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @property
    @abstractmethod
    def embedding_width(self) -> int:
        """Columns of an embedding, which is what the engine checks."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Tokens the checkpoint was made for, prompt and answer together."""

    @abstractmethod
    def placeholder(self, modality: Modality) -> str:
        """The special token that stands once in the rendered prompt for each item."""

    @abstractmethod
    def plan_image(self, height: int, width: int) -> ImagePlan:
        """The size for a picture of ``height`` × ``width`` pixels.

        Raises:
            MediaError: The family cannot take a picture of that shape.
        """

    @abstractmethod
    def load_tower(self, device: torch.device, dtype: torch.dtype) -> Tower:
        """Read the tower's weights from the checkpoint's safetensors, and nothing else.

        Raises:
            ConfigurationError: Weights are missing or of the wrong shape.
        """

    @abstractmethod
    def embedding_inputs(
        self, items: Sequence[TicketItem], embeddings: Sequence[torch.Tensor]
    ) -> Mapping[Modality, Mapping[str, Any]]:
        """The embeddings of one request as Hugging Face's model names them, by modality.

        Qwen-VL: ``{"image": {"image_embeds": (tokens, width), "image_grid_thw": (items, 3)}}``.

        Raises:
            InvalidValue: A shape, dtype or grid that the engine must never see.
        """
