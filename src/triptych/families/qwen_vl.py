"""What the Qwen-VL families have in common: dynamic resolution, grids, placeholders.

Pictures and clips are scaled as `triptych.families.qwen_processors` says; each square of
``merge_size²`` patches becomes one token. ``grid_thw`` counts patches in time, height and width
before they are merged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from triptych.contract import GridTHW, ImagePlan, Item, Modality, TicketItem, VideoPlan
from triptych.errors import ConfigurationError, InvalidValue, UnsupportedMedium
from triptych.families.base import Family, Tower
from triptych.families.checkpoint import Checkpoint
from triptych.families.fields import Activation, read_config
from triptych.families.qwen_processors import (
    ImageProcessor,
    VideoProcessor,
    read_processor,
)

if TYPE_CHECKING:
    import torch

    from triptych.families.towers.qwen_vl import QwenTower

PREFIXES = ("visual.", "model.visual.")
"""What the tower's weights start with, on the hub and as transformers 5 saves them."""

_PLACEHOLDERS: dict[Modality, str] = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


class RopeParameters(msgspec.Struct, frozen=True):
    """``vision_config.rope_parameters``, which the hub's files do not have."""

    rope_theta: float = 10_000.0


class QwenVisionConfig(msgspec.Struct, frozen=True):
    """What the ``vision_config`` of all families have."""

    depth: int
    num_heads: int
    hidden_act: Activation
    in_channels: int = 3
    patch_size: int = 14
    """Pixels."""
    spatial_merge_size: int = 2
    """Patches."""
    temporal_patch_size: int = 2
    """Frames."""
    rope_parameters: RopeParameters = RopeParameters()

    @property
    def width(self) -> int:
        """Columns of what the tower gives of one token to one layer of the language model."""
        raise NotImplementedError


class QwenVL(Family):
    """Qwen2-VL and its successors, less the tower."""

    modalities = frozenset[Modality]({"image", "video"})
    vision_type: ClassVar[type[QwenVisionConfig]]
    video_processor_type: ClassVar[type[VideoProcessor]] = VideoProcessor

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.processor = read_processor(
            ImageProcessor, checkpoint.image_processor, f"{checkpoint.path}: the image processor"
        )
        self.video_processor = read_processor(
            self.video_processor_type,
            checkpoint.video_processor,
            f"{checkpoint.path}: the video processor",
        )
        self.vision = read_config(
            self.vision_type,
            checkpoint.config.get("vision_config") or {},
            f"{checkpoint.path / 'config.json'}: vision_config",
        )
        self._check_agreement()

    @property
    def hidden_size(self) -> int:
        """The language model's hidden size."""
        return _positive(self.checkpoint, "hidden_size")

    @property
    def embedding_width(self) -> int:
        """The language model's hidden size."""
        return self.hidden_size

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
        resize = self.processor.fit(height, width)
        grid = self._grid(1, resize)
        return ImagePlan(
            resize=resize,
            tokens=self._tokens(grid),
            resample=self.processor.filter,
            grid_thw=grid,
        )

    def plan_video(self, frames: int, height: int, width: int, fps: float) -> VideoPlan:
        """The size that Hugging Face's processor would scale the frames to.

        ``second_per_grid`` is its ``second_per_grid_ts``: the frames of a step over ``fps``.
        """
        if "video" not in self.modalities:
            return super().plan_video(frames, height, width, fps)
        processor = self.video_processor
        resize = processor.fit(frames, height, width)
        grid = self._grid(-(-frames // processor.temporal_patch_size), resize)
        return VideoPlan(
            resize=resize,
            tokens=self._tokens(grid),
            resample=processor.filter,
            grid_thw=grid,
            second_per_grid=processor.temporal_patch_size / fps,
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

    def parts(self, item: Item, max_tokens: int) -> list[Item]:
        """Steps of a clip, which do not attend to one another in any of the towers."""
        if item.modality != "video" or item.grid_thw is None or item.tokens <= max_tokens:
            return [item]
        steps, rows, columns = item.grid_thw
        frames, each = self.video_processor.temporal_patch_size, item.tokens // steps
        long = max(1, max_tokens // each)
        found = []
        for first in range(0, steps, long):
            count = min(long, steps - first)
            shape = (min(count * frames, item.shape[0] - first * frames), *item.shape[1:])
            grid = (count, rows, columns)
            found.append(
                msgspec.structs.replace(item, shape=shape, tokens=count * each, grid_thw=grid)
            )
        return found

    def load_tower(self, device: torch.device, dtype: torch.dtype) -> Tower:
        """Read the tower's weights; those of an FP8 checkpoint are scaled back."""
        from triptych.families.towers.weights import load_weights

        tower = load_weights(
            self._build_tower, self.checkpoint, prefixes=PREFIXES, device=device, dtype=dtype
        )
        if device.type == "cuda":
            tower.align()
        return tower

    @abstractmethod
    def _build_tower(self) -> QwenTower:
        """The family's tower without weights; runs with the meta device as the default."""

    def embedding_inputs(
        self, items: Sequence[TicketItem], embeddings: Sequence[torch.Tensor]
    ) -> Mapping[Modality, Mapping[str, Any]]:
        """``{"image": {"image_embeds": (tokens, width), "image_grid_thw": (items, 3)}}``.

        Videos go under ``video`` by the same names, and with what `_timing` has of them.
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
            if modality == "video":
                timing = self._timing([items[index] for index in chosen])
                inputs[modality] = {**inputs[modality], **timing}
        return inputs

    def _check_agreement(self) -> None:
        """The processors, the tower and the language model must be made for one another."""
        vision = self.vision
        pairs = {"hidden_size": (self.hidden_size, vision.width)}
        for processor in (self.processor, self.video_processor):
            pairs |= {
                "patch_size": (processor.patch_size, vision.patch_size),
                "merge_size": (processor.merge_size, vision.spatial_merge_size),
                "temporal_patch_size": (processor.temporal_patch_size, vision.temporal_patch_size),
            }
            for field, (ours, tower) in pairs.items():
                if ours != tower:
                    raise ConfigurationError(
                        f"{self.checkpoint.path}: {field} is {ours}, but the vision tower has "
                        f"{tower}"
                    )
        if vision.in_channels != 3:
            raise ConfigurationError(
                f"{self.checkpoint.path}: the vision tower has {vision.in_channels} channels; "
                "served are 3"
            )

    def _timing(self, videos: Sequence[TicketItem]) -> Mapping[str, torch.Tensor]:
        """What else the language model must know of videos; Qwen2-VL: nothing."""
        return {}

    def _grid(self, steps: int, size: tuple[int, int]) -> GridTHW:
        patch = self.processor.patch_size
        return steps, size[0] // patch, size[1] // patch

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
