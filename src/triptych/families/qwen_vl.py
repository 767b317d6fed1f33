"""What the Qwen-VL families have in common: dynamic resolution, grids, placeholders.

Pictures and clips are scaled as `triptych.families.qwen_processors` says; each square of
``merge_size²`` patches becomes one token. ``grid_thw`` counts patches in time, height and width
before they are merged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from triptych.contract import GridTHW, ImagePlan, Item, Modality, TicketItem, VideoPlan
from triptych.errors import ConfigurationError, InvalidValue, UnsupportedMedium
from triptych.families.base import Family, Tower
from triptych.families.checkpoint import Checkpoint
from triptych.families.qwen_processors import (
    ImageProcessor,
    VideoProcessor,
    read_config,
    read_processor,
)

if TYPE_CHECKING:
    import torch

__all__ = ["QwenVL", "read_config"]

PREFIXES = ("visual.", "model.visual.")
"""What the tower's weights start with, on the hub and as transformers 5 saves them."""

_PLACEHOLDERS: dict[Modality, str] = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


class QwenVL(Family):
    """Qwen2-VL and its successors, less the tower."""

    modalities = frozenset[Modality]({"image"})

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        raw = {
            # transformers takes a flag that is null for false, other nulls not at all.
            name: False if value is None and name.startswith("do_") else value
            for name, value in checkpoint.image_processor.items()
        }
        self.processor = read_config(ImageProcessor, raw, f"{checkpoint.path}: the image processor")
        if not self.processor.do_resize or self.processor.resample not in _RESAMPLE:
            raise ConfigurationError(
                f"{checkpoint.path}: the image processor has do_resize={self.processor.do_resize} "
                f"and resample={self.processor.resample}; served are true and {list(_RESAMPLE)}"
            )

    @property
    def embedding_width(self) -> int:
        """The language model's hidden size."""
        return _positive(self.checkpoint, "hidden_size")

    @property
    def context_length(self) -> int:
        """Config.json's ``max_position_embeddings``."""
        return _positive(self.checkpoint, "max_position_embeddings")

    def placeholder(self, modality: Modality) -> str:
        """``<|image_pad|>`` or ``<|video_pad|>``."""
        if modality not in _PLACEHOLDERS:
            raise UnsupportedMedium(f"{self.name} takes no {modality}")
        return _PLACEHOLDERS[modality]

    def plan_image(self, height: int, width: int) -> ImagePlan:
        """The size that Hugging Face's processor would scale the picture to."""
        processor = self.processor
        resize = smart_resize(
            height,
            width,
            factor=processor.factor,
            min_pixels=processor.min_pixels or processor.size.shortest_edge,
            max_pixels=processor.max_pixels or processor.size.longest_edge,
        )
        grid = (1, resize[0] // processor.patch_size, resize[1] // processor.patch_size)
        return ImagePlan(
            resize=resize,
            tokens=self._tokens(grid),
            resample=_RESAMPLE[processor.resample],
            grid_thw=grid,
        )

    def plan_embeddings(
        self, modality: Modality, shape: tuple[int, int], grid_thw: GridTHW | None
    ) -> None:
        """Check embeddings that a caller made, and that their grid makes so many tokens."""
        super().plan_embeddings(modality, shape, grid_thw)
        self._check_grid(modality, grid_thw, shape[0])

    def check_item(self, item: Item) -> None:
        """Hold an item's shape, grid and token count against one another."""
        super().check_item(item)
        if item.precomputed:
            return
        steps, rows, columns = self._check_grid(item.modality, item.grid_thw, item.tokens)
        shape: tuple[int, ...] = (
            rows * self.processor.patch_size,
            columns * self.processor.patch_size,
            3,
        )
        if item.modality == "video":
            frames = item.shape[0]
            if steps != -(-frames // self.processor.temporal_patch_size):
                raise InvalidValue(
                    f"a grid of {item.grid_thw} does not go with {frames} frames, "
                    f"{self.processor.temporal_patch_size} to a step"
                )
            shape = (frames, *shape)
        if item.dtype != "uint8" or item.shape != shape:
            raise InvalidValue(
                f"a grid of {item.grid_thw} needs uint8 of shape {shape}, "
                f"got {item.dtype} of shape {item.shape}"
            )

    def embedding_inputs(
        self, items: Sequence[TicketItem], embeddings: Sequence[torch.Tensor]
    ) -> Mapping[Modality, Mapping[str, Any]]:
        """``{"image": {"image_embeds": (tokens, width), "image_grid_thw": (items, 3)}}``.

        Videos go under ``video`` by the same names, with ``second_per_grid_ts`` where each has
        one.
        """
        import torch

        for index, item in enumerate(items):
            try:
                self._check_grid(item.modality, item.grid_thw, item.shape[0])
            except InvalidValue as error:
                raise error.at(f"items[{index}]") from None
        self.check_embeddings(items, embeddings)
        inputs: dict[Modality, Mapping[str, Any]] = {}
        for modality in dict.fromkeys(item.modality for item in items):
            chosen = [index for index, item in enumerate(items) if item.modality == modality]
            parts = [embeddings[index] for index in chosen]
            inputs[modality] = {
                f"{modality}_embeds": parts[0] if len(parts) == 1 else torch.cat(parts),
                f"{modality}_grid_thw": torch.tensor([items[i].grid_thw for i in chosen]),
            }
            seconds = [items[index].second_per_grid for index in chosen]
            if modality == "video" and None not in seconds:
                inputs[modality] = {**inputs[modality], "second_per_grid_ts": torch.tensor(seconds)}
        return inputs

    def _tokens(self, grid: GridTHW) -> int:
        return grid[0] * grid[1] * grid[2] // self.processor.merge_size**2

    def _check_grid(self, modality: Modality, grid: GridTHW | None, tokens: int) -> GridTHW:
        """The grid; `InvalidValue` if there is none, or one that does not make ``tokens``."""
        merge = self.processor.merge_size
        if grid is None:
            raise InvalidValue(
                f"{self.name} needs {modality}_grid_thw with every {modality}: patches in time, "
                "height and width"
            )
        if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise InvalidValue(
                f"a grid must be positive, its height and width multiples of {merge}, got {grid}"
            )
        if modality == "image" and grid[0] != 1:
            raise InvalidValue(f"an image's grid has one step in time, got {grid}")
        if self._tokens(grid) != tokens:
            raise InvalidValue(
                f"a grid of {grid} makes {self._tokens(grid)} tokens, got {tokens} embeddings"
            )
        return grid


def _positive(checkpoint: Checkpoint, field: str) -> int:
    value = checkpoint.text_config.get(field)
    if not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{checkpoint.path / 'config.json'}: {field} is {value!r}")
    return value
