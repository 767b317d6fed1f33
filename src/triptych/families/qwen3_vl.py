"""Qwen3-VL, with and without a mixture of experts: images, videos, embeddings for several layers.

The tower gives, beside what goes into the language model's first layer, the features of some of
its own layers (deepstack), which the language model adds behind its first layers. All stand side
by side in one row a token. A clip is a picture after another in the prompt, each after its time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from triptych.contract import GridTHW, Modality, PromptItem, TicketItem
from triptych.errors import ConfigurationError, InvalidValue
from triptych.families.fields import Activation
from triptych.families.qwen_processors import PixelSize, Size, VideoProcessor, smart_resize
from triptych.families.qwen_vl import QwenVisionConfig, QwenVL

if TYPE_CHECKING:
    from triptych.families.towers.qwen_vl import QwenTower


class VisionConfig(QwenVisionConfig, frozen=True):
    """``vision_config``; the defaults are those of transformers' Qwen3VLVisionConfig."""

    depth: int = 27
    num_heads: int = 16
    hidden_act: Activation = "gelu_pytorch_tanh"
    patch_size: int = 16
    hidden_size: int = 1152
    intermediate_size: int = 4304
    out_hidden_size: int = 3584
    num_position_embeddings: int = 2304
    """A square number: the learned positions lie in a square grid."""
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    """Blocks whose output goes to the language model too."""

    @property
    def width(self) -> int:
        """``out_hidden_size``."""
        return self.out_hidden_size

    @property
    def grid_side(self) -> int:
        """Learned positions along a side of their grid."""
        return math.isqrt(self.num_position_embeddings)


class Qwen3VideoProcessor(VideoProcessor, frozen=True):
    """video_preprocessor_config.json; defaults of transformers' Qwen3VLVideoProcessor."""

    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    size: PixelSize = PixelSize(128 * 32 * 32, 768 * 32 * 32)
    """Of all frames of a clip together."""
    patch_size: int = 16
    max_video_tokens: int = 768
    """Of a frame."""

    def fit(self, frames: int, height: int, width: int) -> Size:
        """The size for each frame of a clip; `MediaError` if there is none."""
        frames = max(frames, self.temporal_patch_size)  # a shorter clip is filled up
        least, most = self.area
        if self.cap_pixels_per_frame:
            share = min(self.max_video_tokens * self.factor**2, most // frames)
            most = max(share, int(least * 1.05)) * frames
        if min(height, width) < self.factor:
            grow = max(self.factor / height, self.factor / width)
            height, width = int(height * grow), int(width * grow)
        return smart_resize(
            height,
            width,
            factor=self.factor,
            min_pixels=least,
            max_pixels=most,
            frames=frames,
            step=self.temporal_patch_size,
        )


class Qwen3_VL(QwenVL):
    """Qwen3-VL."""

    name = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    vision_type = VisionConfig
    video_processor_type = Qwen3VideoProcessor
    vision: VisionConfig

    @property
    def embedding_width(self) -> int:
        """The language model's hidden size, for its first layer and for each deepstack one."""
        return self.hidden_size * (1 + len(self.vision.deepstack_visual_indexes))

    def prompt_times(
        self, grid_thw: GridTHW | None, frames: Sequence[float], second_per_grid: float | None
    ) -> tuple[float, ...]:
        """The middle between the first and the last frame of each step, as in transformers.

        Embeddings of a caller's own are taken to be of evenly spaced frames.
        """
        if grid_thw is None:
            return ()
        size = self.video_processor.temporal_patch_size
        if not frames:
            if second_per_grid is None:
                raise InvalidValue(f"{self.name} needs second_per_grid_ts with embeddings of video")
            gap = second_per_grid / size
            frames = [frame * gap for frame in range(grid_thw[0] * size)]
        filled = [*frames, *[frames[-1]] * (-len(frames) % size)]
        return tuple(
            (filled[first] + filled[first + size - 1]) / 2 for first in range(0, len(filled), size)
        )

    def prompt_text(self, grid_thw: GridTHW | None, times: Sequence[float]) -> str:
        """The time before every step, and every step between marks of its own."""
        if grid_thw is None:
            return ""
        pads = self.placeholder("video") * self._tokens((1, *grid_thw[1:]))
        step = f"<|vision_start|>{pads}<|vision_end|>"
        return "".join(f"<{time:.1f} seconds>{step}" for time in times)

    def prompt_inputs(
        self, places: Sequence[PromptItem], items: Sequence[TicketItem]
    ) -> Mapping[Modality, Mapping[str, Any]]:
        """``{"video": {"timestamps": [[seconds, …], …]}}``, which vLLM writes the text from."""
        timestamps = []
        for index, (place, item) in enumerate(zip(places, items, strict=True)):
            if place.modality != "video":
                continue
            if item.grid_thw is None or len(place.times) != item.grid_thw[0]:
                raise InvalidValue(
                    f"{len(place.times)} times for a grid of {item.grid_thw}",
                    where=f"items[{index}]",
                )
            timestamps.append(list(place.times))
        return {"video": {"timestamps": timestamps}} if timestamps else {}

    def _build_tower(self) -> QwenTower:
        from triptych.families.towers.qwen3_vl import VisionTower

        return VisionTower(self.vision, self.processor, self.video_processor)

    def _check_agreement(self) -> None:
        super()._check_agreement()
        vision = self.vision
        if vision.grid_side**2 != vision.num_position_embeddings:
            raise ConfigurationError(
                f"{self.checkpoint.path}: num_position_embeddings is "
                f"{vision.num_position_embeddings}, not a square number"
            )
        indexes = vision.deepstack_visual_indexes
        if list(indexes) != sorted(set(indexes) & set(range(vision.depth))):
            raise ConfigurationError(
                f"{self.checkpoint.path}: deepstack_visual_indexes must rise within the "
                f"{vision.depth} blocks, got {indexes}"
            )
