"""From uint8 pixels to normalised patches, bit for bit as Hugging Face's processors do it.

Those for pictures are the ones that use PIL and numpy; those for clips use torchvision, which
rounds in another order.
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import torch

from triptych.families.qwen_processors import ImageProcessor, VideoProcessor


class Normalisation(Protocol):
    """The fields of an image processor that say what becomes of a pixel's value."""

    @property
    def do_rescale(self) -> bool: ...  # noqa: D102 - named as in preprocessor_config.json
    @property
    def do_normalize(self) -> bool: ...  # noqa: D102
    @property
    def rescale_factor(self) -> float: ...  # noqa: D102
    @property
    def image_mean(self) -> tuple[float, float, float]: ...  # noqa: D102
    @property
    def image_std(self) -> tuple[float, float, float]: ...  # noqa: D102


def normalisation_table(processor: Normalisation) -> torch.Tensor:
    """What each of the 256 values of a uint8 channel becomes.

    The steps and their precisions are those of transformers' ``rescale`` (float64, then rounded
    to float32) and ``normalize`` (float32), so a look-up equals them exactly.

    Returns:
        float32, shape (3, 256), on the CPU.
    """
    values = np.arange(256, dtype=np.uint8)
    if processor.do_rescale:
        table = (values.astype(np.float64) * processor.rescale_factor).astype(np.float32)
    else:
        table = values.astype(np.float32)
    table = np.tile(table, (3, 1))
    if processor.do_normalize:
        mean = np.array(processor.image_mean, dtype=np.float32)[:, None]
        std = np.array(processor.image_std, dtype=np.float32)[:, None]
        table = (table - mean) / std
    return torch.from_numpy(table)


def video_normalisation_table(processor: Normalisation) -> torch.Tensor:
    """What each of the 256 values of a uint8 channel becomes in a clip.

    transformers' ``rescale_and_normalize`` scales mean and standard deviation instead of the
    pixels, in float32.

    Returns:
        float32, shape (3, 256), on the CPU.
    """
    values = torch.arange(256, dtype=torch.float32, device="cpu").repeat(3, 1)
    if not processor.do_normalize:
        return values * processor.rescale_factor if processor.do_rescale else values
    mean = torch.tensor(processor.image_mean, dtype=torch.float32, device="cpu")[:, None]
    std = torch.tensor(processor.image_std, dtype=torch.float32, device="cpu")[:, None]
    if processor.do_rescale:
        mean, std = (part * (1.0 / processor.rescale_factor) for part in (mean, std))
    return (values - mean) / std


class Patchify(torch.nn.Module):
    """Cuts images and clips into the flat patches that Qwen-VL's patch embedding takes."""

    image_table: torch.Tensor
    """float32, shape (3, 256)."""
    video_table: torch.Tensor
    """float32, shape (3, 256)."""

    def __init__(self, image: ImageProcessor, video: VideoProcessor) -> None:
        super().__init__()
        self.patch = image.patch_size
        self.merge = image.merge_size
        self.temporal = image.temporal_patch_size
        self.register_buffer("image_table", normalisation_table(image), persistent=False)
        self.register_buffer("video_table", video_normalisation_table(video), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The patches of one image or clip.

        Args:
            pixels: uint8, shape (height, width, 3) or (frames, height, width, 3); the sides are
                multiples of ``patch_size × merge_size``. A clip whose frames do not fill the last
                step in time is filled up with its last frame.

        Returns:
            float32, shape (patches, 3 × temporal_patch_size × patch_size²); the patches of each
            ``merge_size²`` square follow one another, row by row.
        """
        still = pixels.ndim == 3
        frames = pixels[None] if still else self._fill(pixels)
        temporal = 1 if still else self.temporal
        steps = frames.shape[0] // temporal
        rows, columns = frames.shape[1] // self.patch, frames.shape[2] // self.patch
        blocks = frames.view(
            steps,
            temporal,
            rows // self.merge,
            self.merge,
            self.patch,
            columns // self.merge,
            self.merge,
            self.patch,
            3,
        )
        # → steps, block row, block column, row in block, column in block, channel, time, y, x
        patches = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
        table = self.image_table if still else self.video_table
        patches = _normalise(patches.reshape(-1, 3, temporal, self.patch**2), table)
        if still:
            patches = patches.expand(-1, -1, self.temporal, -1)
        return patches.reshape(patches.shape[0], -1)

    def _fill(self, frames: torch.Tensor) -> torch.Tensor:
        missing = -frames.shape[0] % self.temporal
        return torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) if missing else frames


def _normalise(patches: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Look every value up; one channel at a time is five times as fast as a joint index."""
    shape = (patches.shape[0], *patches.shape[2:])
    channels = [
        table[channel].index_select(0, patches[:, channel].flatten().int()).view(shape)
        for channel in range(3)
    ]
    return cast(torch.Tensor, torch.stack(channels, dim=1))
