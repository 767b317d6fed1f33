"""LLaVA-NeXT-Video: clips, whose frames the engine encodes itself.

vLLM's model of this family takes pixels alone: embeddings of a video are passed over in silence,
and pictures, which LLaVA-NeXT cuts into tiles, are not served at all. So the frames are scaled and
cropped here, as Hugging Face's processor does, and go on to the engine as they are. On the way
they count as embeddings: a clip of ``tokens`` tokens is a matrix of uint8, one row a token, whose
bytes end to end are the frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import msgspec

from triptych.contract import GridTHW, ImagePlan, Item, Modality, TicketItem, VideoPlan
from triptych.errors import ConfigurationError, InvalidValue, UnsupportedMedium
from triptych.families.base import Family, Tower
from triptych.families.checkpoint import Checkpoint
from triptych.families.clip import ClipProcessor, ClipVisionConfig
from triptych.families.fields import Positive, read_config
from triptych.families.text import text_config

if TYPE_CHECKING:
    import torch

MAX_VIDEOS = 1
"""Of one request, in vLLM's model of the family."""


class LlavaNextVideoConfig(msgspec.Struct, frozen=True):
    """config.json; the defaults are those of transformers' LlavaNextVideoConfig."""

    vision_config: ClipVisionConfig
    vision_feature_select_strategy: Literal["default"] = "default"
    """The class embedding has no place in the grid that is pooled."""
    spatial_pool_mode: Literal["average", "max"] = "average"
    """Neither vLLM's model nor its weights have ``conv``."""
    spatial_pool_stride: Positive = 2
    """Patches along the side of a token."""

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame."""
        side: int = self.vision_config.grid // self.spatial_pool_stride
        return side**2


class LlavaNextVideo(Family):
    """LLaVA-NeXT-Video."""

    name = "LLaVA-NeXT-Video"
    model_types = ("llava_next_video",)
    modalities = frozenset[Modality]({"video"})
    unserved = MappingProxyType[Modality, str](
        {"image": "vLLM's model of the family serves no images"}
    )
    engine_encodes = frozenset[Modality]({"video"})

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        where = str(checkpoint.path / "config.json")
        self.text = text_config(checkpoint, "llama")
        self.config = read_config(LlavaNextVideoConfig, checkpoint.config, where)
        vision = self.config.vision_config
        side = self.config.spatial_pool_stride * vision.patch_size
        if vision.image_size % side:
            # vLLM rounds the tokens along a side up, its pooling rounds them down.
            raise ConfigurationError(
                f"{where}: frames of {vision.image_size} pixels a side do not fall into tokens of "
                f"{side}"
            )
        if vision.image_size < vision.patch_size**2:
            # vLLM's pooling multiplies and divides by that quotient, and ends when it is 0.
            raise ConfigurationError(
                f"{where}: frames of {vision.image_size} pixels a side are less than patches of "
                f"{vision.patch_size} squared, which vLLM cannot pool"
            )
        where = f"{checkpoint.path}: the video processor"
        self.processor = read_config(ClipProcessor, checkpoint.video_processor, where)
        self.processor.check(vision.image_size, where)

    @property
    def embedding_width(self) -> int:
        """Bytes of a frame's pixels that are one token's share."""
        return 3 * (self.config.spatial_pool_stride * self.config.vision_config.patch_size) ** 2

    @property
    def context_length(self) -> int:
        """``max_position_embeddings`` of the language model."""
        return self.text.max_position_embeddings

    def placeholder(self, modality: Modality) -> str:
        """``<video>``."""
        if modality != "video":
            raise UnsupportedMedium(f"{self.name} takes no {modality}, but video")
        return "<video>"

    def plan_image(self, height: int, width: int) -> ImagePlan:
        """No size: no engine serves the family's pictures."""
        raise UnsupportedMedium(f"{self.name} takes no image, but video")

    def plan_video(self, frames: int, height: int, width: int, fps: float) -> VideoPlan:
        """The sizes that Hugging Face's processor would scale and crop every frame to."""
        return self.processor.plan(VideoPlan, height, width, frames * self.config.frame_tokens)

    def plan_embeddings(
        self, modality: Modality, shape: tuple[int, int], grid_thw: GridTHW | None
    ) -> None:
        """Refuse them: the engine would pass them over."""
        raise UnsupportedMedium(
            f"{self.name} takes videos, but no embeddings of them: its engine encodes the frames"
        )

    def check_item(self, item: Item) -> None:
        """Hold a clip's shape and token count against the tower's."""
        super().check_item(item)
        frames = item.shape[0] if item.shape else 0
        wanted = ("uint8", self._shape(frames), frames * self.config.frame_tokens, None)
        got = (item.dtype, item.shape, item.tokens, item.grid_thw)
        if got != wanted or frames < 1:
            raise InvalidValue(f"a clip must be (dtype, shape, tokens, grid) {wanted}, got {got}")

    def load_tower(self, device: torch.device, dtype: torch.dtype) -> Tower:
        """What hands frames on; no weights are read."""
        from triptych.families.towers.frames import Frames

        return Frames()

    def embedding_inputs(
        self, items: Sequence[TicketItem], embeddings: Sequence[torch.Tensor]
    ) -> Mapping[Modality, Sequence[torch.Tensor]]:
        """``{"video": [(frames, image_size, image_size, 3)]}``, uint8."""
        import torch

        if len(items) != len(embeddings) or len(items) > MAX_VIDEOS:
            raise InvalidValue(
                f"{self.name} takes {MAX_VIDEOS} video a request, got {len(items)} items and "
                f"{len(embeddings)} tensors"
            )
        clips = []
        for index, (item, pixels) in enumerate(zip(items, embeddings, strict=True)):
            where = f"items[{index}]"
            if item.modality != "video":
                raise UnsupportedMedium(f"{self.name} takes no {item.modality}", where=where)
            frames, rest = divmod(item.shape[0], self.config.frame_tokens)
            shape = (item.shape[0], self.embedding_width)
            if rest or frames < 1 or item.shape != shape or tuple(pixels.shape) != shape:
                raise InvalidValue(
                    f"frames must be a matrix of {self.config.frame_tokens} × frames rows and "
                    f"{self.embedding_width} columns, got {tuple(pixels.shape)}, and {item.shape} "
                    "in the ticket",
                    where=where,
                )
            if item.dtype != "uint8" or pixels.dtype != torch.uint8:
                raise InvalidValue(
                    f"frames must be uint8, got {pixels.dtype}, and {item.dtype} in the ticket",
                    where=where,
                )
            clips.append(pixels.reshape(self._shape(frames)))
        return {"video": clips} if clips else {}

    def _shape(self, frames: int) -> tuple[int, int, int, int]:
        size = self.config.vision_config.image_size
        return frames, size, size, 3
