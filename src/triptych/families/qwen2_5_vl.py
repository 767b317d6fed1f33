"""Qwen2.5-VL: images and videos at their own resolution, a tower with windowed attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from triptych.contract import TicketItem
from triptych.errors import ConfigurationError
from triptych.families.fields import Activation
from triptych.families.qwen_vl import QwenVisionConfig, QwenVL

if TYPE_CHECKING:
    import torch

    from triptych.families.towers.qwen_vl import QwenTower


class VisionConfig(QwenVisionConfig, frozen=True):
    """``vision_config``; the defaults are those of transformers' Qwen2_5_VLVisionConfig."""

    depth: int = 32
    num_heads: int = 16
    hidden_act: Activation = "silu"
    hidden_size: int = 3584
    intermediate_size: int = 3420
    window_size: int = 112
    """Pixels along the side of an attention window."""
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    """Blocks whose attention spans the whole frame."""

    @property
    def width(self) -> int:
        """``out_hidden_size``."""
        return self.out_hidden_size

    @property
    def window_tokens(self) -> int:
        """Tokens along the side of an attention window."""
        return self.window_size // self.spatial_merge_size // self.patch_size


class Qwen2_5_VL(QwenVL):
    """Qwen2.5-VL."""

    name = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    vision_type = VisionConfig
    vision: VisionConfig

    def _build_tower(self) -> QwenTower:
        from triptych.families.towers.qwen2_5_vl import VisionTower

        return VisionTower(self.vision, self.processor, self.video_processor)

    def _timing(self, videos: Sequence[TicketItem]) -> Mapping[str, torch.Tensor]:
        """``second_per_grid_ts``, which sets how far the steps of a clip lie apart in the prompt.

        Embeddings of a caller's own may come without: transformers then takes 1 s.
        """
        import torch

        seconds = [video.second_per_grid for video in videos]
        return {"second_per_grid_ts": torch.tensor([1.0 if s is None else s for s in seconds])}

    def _check_agreement(self) -> None:
        super()._check_agreement()
        if self.vision.hidden_act != "silu":
            raise ConfigurationError(
                f"{self.checkpoint.path}: the vision tower has hidden_act="
                f"{self.vision.hidden_act!r}; served is 'silu'"
            )
        if self.vision.window_tokens < 1:
            raise ConfigurationError(
                f"{self.checkpoint.path}: an attention window of {self.vision.window_size} pixels "
                "is smaller than a token"
            )
