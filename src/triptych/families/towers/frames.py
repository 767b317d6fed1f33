"""No tower: hands frames on to an engine that encodes them itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from triptych.contract import Item


class Frames:
    """Pixels as they are, a row a token."""

    def encode(self, items: Sequence[Item], media: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Uint8 (frames, height, width, 3) → (tokens, bytes a token), without a copy."""
        return [clip.reshape(item.tokens, -1) for item, clip in zip(items, media, strict=True)]
