"""What a model family must know, in one class: sizes, counts, the tower, the engine's wishes.

A family object is light: it reads the checkpoint's JSON files and nothing else, imports no torch
until `Family.load_tower`, and can be pickled, because the media workers plan with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from triptych.contract import (
    AudioPlan,
    DType,
    GridTHW,
    ImagePlan,
    Item,
    Modality,
    PromptItem,
    TicketItem,
    VideoPlan,
)
from triptych.errors import InvalidValue, UnsupportedMedium

if TYPE_CHECKING:
    import torch

    from triptych.families.checkpoint import Checkpoint

FLOATS: tuple[DType, ...] = ("float32", "bfloat16", "float16")
"""What embeddings may be."""


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


@runtime_checkable
class StaticTower(Tower, Protocol):
    """A tower whose work depends on the items alone, so that a GPU can replay a pass."""

    def layout(self, items: Sequence[Item]) -> Any:
        """What `run` needs on the device besides the media, which a replay goes on reading."""
        ...

    def run(self, layout: Any, media: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`encode` from there on: nothing is copied from the host, and nothing is looked at."""
        ...


class Family(ABC):
    """One model family, bound to one checkpoint."""

    name: ClassVar[str]
    """As people write it: ``Qwen2.5-VL``."""
    model_types: ClassVar[tuple[str, ...]]
    """The ``model_type`` of config.json that choose this family."""
    modalities: ClassVar[frozenset[Modality]]
    unserved: ClassVar[Mapping[Modality, str]] = {}
    """Media that the model was made for and are refused all the same, each with the reason."""
    engine_encodes: ClassVar[frozenset[Modality]] = frozenset()
    """Of ``modalities``, those that the engine must be given as pixels, since it takes no
    embeddings of them: the tower hands the pixels on, and the engine keeps its own."""

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

    def plan_video(self, frames: int, height: int, width: int, fps: float) -> VideoPlan:
        """The size for ``frames`` pictures chosen from a clip.

        Args:
            frames: How many were chosen.
            height: Of the clip, upright, pixels.
            width: Of the clip, upright, pixels.
            fps: Chosen frames a second.

        Raises:
            UnsupportedMedium: The family has no video.
            MediaError: The family cannot take a clip of that shape.
        """
        raise UnsupportedMedium(f"{self.name} takes no video")

    @property
    def audio_rate(self) -> int:
        """Samples a second, mono, that the audio tower hears."""
        raise UnsupportedMedium(f"{self.name} takes no audio")

    def plan_audio(self, samples: int) -> AudioPlan:
        """What ``samples`` at `audio_rate` become.

        Raises:
            UnsupportedMedium: The family has no audio.
        """
        raise UnsupportedMedium(f"{self.name} takes no audio")

    def plan_embeddings(
        self, modality: Modality, shape: tuple[int, int], grid_thw: GridTHW | None
    ) -> None:
        """Check embeddings that a caller made; families with grids check those too.

        Args:
            modality: What they are embeddings of.
            shape: (tokens, width).
            grid_thw: As the caller gave it.

        Raises:
            UnsupportedMedium: The family does not have that modality.
            InvalidValue: The width or the grid is not the model's.
        """
        if modality not in self.modalities:
            raise UnsupportedMedium(f"{self.name} takes no {modality}")
        if shape[1] != self.embedding_width:
            raise InvalidValue(
                f"embeddings of {self.name} are {self.embedding_width} wide, got {shape = }"
            )

    def check_item(self, item: Item) -> None:
        """Whether the family's tower can take an item, before it is put in a batch with others.

        This much holds for every family; each adds what it knows of its media.

        Raises:
            UnsupportedMedium: The family does not have that modality.
            InvalidValue: Dtype, shape, tokens or grid do not belong together.
        """
        if item.modality not in self.modalities:
            raise UnsupportedMedium(f"{self.name} takes no {item.modality}")
        if not item.precomputed:
            return
        if item.dtype not in FLOATS or len(item.shape) != 2 or item.shape[0] != item.tokens:
            raise InvalidValue(
                f"{item.tokens} precomputed embeddings must be a matrix of {', '.join(FLOATS)}, "
                f"got {item.dtype} of shape {item.shape}"
            )
        self.plan_embeddings(item.modality, (item.shape[0], item.shape[1]), item.grid_thw)

    def parts(self, item: Item, max_tokens: int) -> list[Item]:
        """An item in parts that the tower may be given one after another.

        Along the first axis of its array, each of ``max_tokens`` embeddings at most where that
        can be; end to end their embeddings are the item's. The item itself where it has no parts.
        """
        return [item]

    def prompt_times(
        self, grid_thw: GridTHW | None, frames: Sequence[float], second_per_grid: float | None
    ) -> tuple[float, ...]:
        """Seconds that the prompt tells of a clip, one a step; empty where it tells none.

        Args:
            grid_thw: Of the clip.
            frames: Seconds from the clip's start to each of its frames; empty for embeddings.
            second_per_grid: Seconds from one step to the next, if known.

        Raises:
            InvalidValue: They are needed, and neither of the two is known.
        """
        return ()

    def prompt_text(self, grid_thw: GridTHW | None, times: Sequence[float]) -> str:
        """What stands in a clip's place in the prompt, placeholders and all.

        Empty: the placeholder, as often as the clip has embeddings.
        """
        return ""

    def prompt_inputs(
        self, places: Sequence[PromptItem], items: Sequence[TicketItem]
    ) -> Mapping[Modality, Mapping[str, Any]]:
        """What Hugging Face's model must know of the prompt's media beside `embedding_inputs`.

        Raises:
            InvalidValue: ``places`` and ``items`` do not go together.
        """
        return {}

    @abstractmethod
    def load_tower(self, device: torch.device, dtype: torch.dtype) -> Tower:
        """Read the tower's weights from the checkpoint's safetensors, and nothing else.

        Raises:
            ConfigurationError: Weights are missing or of the wrong shape.
        """

    @abstractmethod
    def embedding_inputs(
        self, items: Sequence[TicketItem], embeddings: Sequence[torch.Tensor]
    ) -> Mapping[Modality, Mapping[str, Any] | Sequence[torch.Tensor]]:
        """The embeddings of one request as Hugging Face's model names them, by modality.

        Qwen-VL: ``{"image": {"image_embeds": (tokens, width), "image_grid_thw": (items, 3)}}``.
        Families without grids: ``{"image": [(tokens, width), …]}``, one tensor an item.
        What `engine_encodes` names: ``{"video": [(frames, height, width, 3), …]}``, uint8.

        Raises:
            InvalidValue: A shape, dtype or grid that the engine must never see.
        """

    def check_embeddings(
        self, items: Sequence[TicketItem], embeddings: Sequence[torch.Tensor]
    ) -> None:
        """Whether embeddings are what their ticket and the language model say.

        Raises:
            UnsupportedMedium: The family does not have an item's modality.
            InvalidValue: Their number, a dtype or shape is another, or a value is not finite.
        """
        import torch

        if len(items) != len(embeddings):
            raise InvalidValue(f"{len(items)} items, but {len(embeddings)} embeddings")
        for index, (item, tensor) in enumerate(zip(items, embeddings, strict=True)):
            where = f"items[{index}]"
            if item.modality not in self.modalities:
                raise UnsupportedMedium(f"{self.name} takes no {item.modality}", where=where)
            shape = (item.shape[0], self.embedding_width)
            if tuple(tensor.shape) != shape or item.shape != shape:
                raise InvalidValue(
                    f"embeddings must be of shape {shape}, got {tuple(tensor.shape)}, "
                    f"and {item.shape} in the ticket",
                    where=where,
                )
            if item.dtype not in FLOATS or tensor.dtype != getattr(torch, item.dtype):
                raise InvalidValue(
                    f"embeddings must be of a dtype of {', '.join(FLOATS)}, got {tensor.dtype}, "
                    f"and {item.dtype} in the ticket",
                    where=where,
                )
            if tensor.is_meta:
                continue  # whoever fetches the values looks at them
            # One pass over the memory; a NaN comes through both extremes.
            if not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):
                raise InvalidValue("embeddings hold values that are not finite", where=where)
