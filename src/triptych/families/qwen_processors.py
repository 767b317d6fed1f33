"""How Qwen-VL's pictures and clips are scaled: what the processors' JSON files say, and the sizes.

A picture is scaled so that both sides are multiples of ``patch_size × merge_size`` and its area
lies between two bounds; so are the frames of a clip, whose bounds Qwen3-VL holds for all frames
together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

from triptych.errors import ConfigurationError, MediaError
from triptych.families.fields import read_config

MAX_ASPECT_RATIO = 200
"""Longer side over shorter; Hugging Face's processor refuses more."""

Resample = Literal["bicubic", "bilinear", "lanczos"]
RESAMPLE: dict[int, Resample] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, which preprocessor_config.json holds."""

Size = tuple[int, int]
"""(height, width), pixels."""

ProcessorType = TypeVar("ProcessorType", bound="Processor")


class PixelSize(msgspec.Struct, frozen=True):
    """``size`` as Qwen-VL means it: areas in pixels, whatever the names say."""

    shortest_edge: int = 56 * 56
    longest_edge: int = 28 * 28 * 1280


class Processor(msgspec.Struct, frozen=True):
    """What the processors of pictures and clips have in common."""

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

    @property
    def area(self) -> tuple[int, int]:
        """Least and greatest area, pixels."""
        return (
            self.min_pixels or self.size.shortest_edge,
            self.max_pixels or self.size.longest_edge,
        )

    @property
    def filter(self) -> Resample:
        """``resample`` by its name."""
        return RESAMPLE[self.resample]


class ImageProcessor(Processor, frozen=True):
    """preprocessor_config.json; the defaults are those of transformers' Qwen2VLImageProcessor."""

    def fit(self, height: int, width: int) -> Size:
        """The size for a picture; `MediaError` if there is none."""
        least, most = self.area
        return smart_resize(height, width, factor=self.factor, min_pixels=least, max_pixels=most)


class VideoProcessor(Processor, frozen=True):
    """video_preprocessor_config.json; defaults of transformers' Qwen2VLVideoProcessor."""

    size: PixelSize = PixelSize(128 * 28 * 28, 768 * 28 * 28)
    cap_pixels_per_frame: bool | None = None
    """Whether a clip's frames share a budget; transformers takes null for false until 5.22."""
    max_video_tokens: int = 128_000
    """What the budget is 90 % of, in tokens of the clip."""

    def fit(self, frames: int, height: int, width: int) -> Size:
        """The size for each frame of a clip; `MediaError` if there is none."""
        least, most = self.area
        if self.cap_pixels_per_frame:
            budget = int(self.max_video_tokens * self.factor**2 * 0.9)
            share = budget * self.temporal_patch_size // frames
            most = max(min(most, share), int(least * 1.05))
        return smart_resize(height, width, factor=self.factor, min_pixels=least, max_pixels=most)


def read_processor(kind: type[ProcessorType], raw: Mapping[str, Any], what: str) -> ProcessorType:
    """A processor's JSON object as ``kind``, held against what is served.

    Raises:
        ConfigurationError: A field is wrong, or says what is not served; ``what`` names the file.
    """
    values = {
        # transformers takes a flag that is null for false, other nulls not at all.
        name: False if value is None and name.startswith("do_") else value
        for name, value in raw.items()
    }
    processor = read_config(kind, values, what)
    if not processor.do_resize or processor.resample not in RESAMPLE:
        raise ConfigurationError(
            f"{what} has do_resize={processor.do_resize} and resample={processor.resample}; "
            f"served are true and {list(RESAMPLE)}"
        )
    return processor


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    frames: int = 1,
    step: int = 1,
) -> Size:
    """The size to scale a picture to, exactly as transformers' ``smart_resize`` has it.

    Args:
        height: Pixels.
        width: Pixels.
        factor: Both sides of the answer are multiples of it.
        min_pixels: Least area of the answer.
        max_pixels: Greatest area of the answer, unless one side is down to ``factor``.
        frames: How many pictures the two areas are for together.
        step: They are counted by so many, rounded, to find out whether an area is passed, but
            not to mend that.

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
    counted = round(frames / step) * step * new_height * new_width
    if counted > max_pixels:
        shrink = math.sqrt((frames * height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif counted < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width
