"""What the families with a CLIP tower have in common: its configuration, its image processor."""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from triptych.contract import ImagePlan, VideoPlan
from triptych.errors import ConfigurationError, MediaError
from triptych.families.fields import Activation, Positive

MAX_ASPECT_RATIO = 200
"""Longer side over shorter. The shorter side is scaled to the tower's, so the memory that a picture
takes grows with it; Qwen-VL has the same limit."""

Resample = Literal["bicubic", "bilinear", "lanczos"]
RESAMPLE: dict[int, Resample] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, which preprocessor_config.json holds."""

PlanType = TypeVar("PlanType", ImagePlan, VideoPlan)


class ClipVisionConfig(msgspec.Struct, frozen=True):
    """``vision_config``; the defaults are those of transformers' CLIPVisionConfig."""

    model_type: Literal["clip_vision_model"] = "clip_vision_model"
    hidden_size: Positive = 768
    intermediate_size: Positive = 3072
    num_hidden_layers: Positive = 12
    num_attention_heads: Positive = 12
    num_channels: Literal[3] = 3
    image_size: Positive = 224
    """Pixels along a side."""
    patch_size: Positive = 32
    """Pixels along a side."""
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Patches along a side; pixels that do not fill one are cut off."""
        return self.image_size // self.patch_size


class Extent(msgspec.Struct, frozen=True):
    """``size`` or ``crop_size``: both sides, or the shorter one alone."""

    shortest_edge: Positive | None = None
    height: Positive | None = None
    width: Positive | None = None

    @property
    def sides(self) -> tuple[int, int] | None:
        """(height, width), pixels, where both are given."""
        if self.height is None or self.width is None:
            return None
        return self.height, self.width


class ClipProcessor(msgspec.Struct, frozen=True):
    """preprocessor_config.json; the defaults are those of transformers' CLIPImageProcessor.

    The video processor of LLaVA-NeXT-Video has the same fields and the same defaults.
    """

    do_resize: bool = True
    do_center_crop: bool = True
    do_pad: bool = False
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resample: int = 3
    size: int | Extent = 224
    """An integer is the shortest edge."""
    crop_size: int | Extent = 224
    """An integer is both sides."""

    def check(self, image_size: int, where: str) -> None:
        """Whether every picture comes out as a square of ``image_size`` pixels a side.

        Raises:
            ConfigurationError: It does not; ``where`` names the processor.
        """
        if self.resample not in RESAMPLE or self.do_pad:
            raise ConfigurationError(
                f"{where} has resample={self.resample} and do_pad={self.do_pad}; served are "
                f"{list(RESAMPLE)} and false"
            )
        if self.do_resize and self._fixed is None and self._shortest_edge < 1:
            raise ConfigurationError(
                f"{where} has neither a shortest_edge nor a height and width, but {self.size}"
            )
        wanted = (image_size, image_size)
        got = self._crop if self.do_center_crop else self._fixed
        if got != wanted:
            raise ConfigurationError(
                f"{where} makes pictures of {got or 'any size'}, but the vision tower takes "
                f"{wanted}"
            )

    def plan(self, kind: type[PlanType], height: int, width: int, tokens: int) -> PlanType:
        """Sizes for a picture, or for every frame of a clip, of ``height`` × ``width`` pixels.

        As transformers' ``get_resize_output_image_size`` has it: the longer side is rounded down.

        Raises:
            MediaError: The picture is empty, or longer than `MAX_ASPECT_RATIO` times its width.
        """
        short, long = sorted((height, width))
        if short < 1 or long > MAX_ASPECT_RATIO * short:
            ratio = f"{long / short:.1f}" if short else "no"
            raise MediaError(
                f"a picture of {width}×{height} pixels has an aspect ratio of {ratio}, the limit "
                f"is {MAX_ASPECT_RATIO}"
            )
        resize = (height, width)
        if self.do_resize and self._fixed:
            resize = self._fixed
        elif self.do_resize:
            scaled = int(self._shortest_edge * long / short)
            resize = (
                (scaled, self._shortest_edge) if width <= height else (self._shortest_edge, scaled)
            )
        crop = self._crop if self.do_center_crop and self._crop != resize else None
        return kind(resize=resize, tokens=tokens, crop=crop, resample=RESAMPLE[self.resample])

    @property
    def _shortest_edge(self) -> int:
        """Pixels; 0: there is none."""
        return self.size if isinstance(self.size, int) else self.size.shortest_edge or 0

    @property
    def _fixed(self) -> tuple[int, int] | None:
        """(height, width) that every picture is scaled to; None: it depends on the picture."""
        if not self.do_resize or isinstance(self.size, int) or self.size.shortest_edge:
            return None
        return self.size.sides

    @property
    def _crop(self) -> tuple[int, int] | None:
        if isinstance(self.crop_size, int):
            return self.crop_size, self.crop_size
        return self.crop_size.sides
