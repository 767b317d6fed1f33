"""What the Qwen-VL families have in common: dynamic resolution, grids, placeholders.

A picture is scaled so that both sides are multiples of ``patch_size × merge_size`` and its area
lies between ``min_pixels`` and ``max_pixels``; each square of ``merge_size²`` patches becomes one
token. ``grid_thw`` counts patches in time, height and width before they are merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from triptych.contract import GridTHW, ImagePlan, Item, Modality, TicketItem
from triptych.errors import ConfigurationError, InvalidValue, MediaError, UnsupportedMedium
from triptych.families.base import Family
from triptych.families.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

MAX_ASPECT_RATIO = 200
"""Longer side over shorter; Hugging Face's processor refuses more."""

Resample = Literal["bicubic", "bilinear", "lanczos"]
_RESAMPLE: dict[int, Resample] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, which preprocessor_config.json holds."""

_PLACEHOLDERS: dict[Modality, str] = {"image": "<|image_pad|>", "video": "<|video_pad|>"}

ConfigType = TypeVar("ConfigType", bound=msgspec.Struct)


class PixelSize(msgspec.Struct, frozen=True):
    """``size`` as Qwen-VL means it: areas in pixels, whatever the names say."""

    shortest_edge: int = 56 * 56
    longest_edge: int = 28 * 28 * 1280


class ImageProcessor(msgspec.Struct, frozen=True):
    """preprocessor_config.json; the defaults are those of transformers' Qwen2VLImageProcessor."""

    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resample: int = 3
    size: PixelSize = PixelSize()
    min_pixels: int | None = None
    """Overrules ``size.shortest_edge``."""
    max_pixels: int | None = None
    """Overrules ``size.longest_edge``."""
    patch_size: int = 14
    """Pixels along a side."""
    temporal_patch_size: int = 2
    """Frames; a picture is repeated to fill them."""
    merge_size: int = 2
    """Patches along the side of a token."""

    @property
    def factor(self) -> int:
        """Pixels along the side of a token."""
        return self.patch_size * self.merge_size


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


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size to scale a picture to, exactly as transformers' ``smart_resize`` has it.

    Args:
        height: Pixels.
        width: Pixels.
        factor: Both sides of the answer are multiples of it.
        min_pixels: Least area of the answer.
        max_pixels: Greatest area of the answer, unless one side is down to ``factor``.

    Returns:
        (height, width), pixels.

    Raises:
        MediaError: A side is empty, or one is more than `MAX_ASPECT_RATIO` times the other.
    """
    if min(height, width) < 1:
        raise MediaError(f"a picture of {width}×{height} pixels is empty")
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise MediaError(
            f"a picture of {width}×{height} pixels has an aspect ratio of {ratio:.1f}, "
            f"the limit is {MAX_ASPECT_RATIO}"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def read_config(kind: type[ConfigType], raw: Mapping[str, Any], what: str) -> ConfigType:
    """``raw`` as ``kind``; nulls are defaults, fields that ``kind`` has not are passed over.

    Raises:
        ConfigurationError: A field is missing or of the wrong type; ``what`` names the file.
    """
    try:
        return msgspec.convert({key: v for key, v in raw.items() if v is not None}, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{what}: {error}") from None


def _positive(checkpoint: Checkpoint, field: str) -> int:
    value = checkpoint.text_config.get(field)
    if not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{checkpoint.path / 'config.json'}: {field} is {value!r}")
    return value
