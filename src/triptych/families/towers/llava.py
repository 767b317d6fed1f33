"""LLaVA's tower: CLIP, and the projector to the language model's width.

After transformers' ``LlavaModel.get_image_features``; parameters have the hub's names and shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from triptych.contract import Item
from triptych.families.towers.activations import ACTIVATIONS
from triptych.families.towers.clip import ClipVisionTower, Normalise
from triptych.families.towers.patches import Normalisation

if TYPE_CHECKING:
    from triptych.families.llava import LlavaConfig


class Projector(nn.Module):
    """Two linear maps with an activation between them.

    Args:
        config: The checkpoint's.
        width: Of the language model.
    """

    def __init__(self, config: LlavaConfig, width: int) -> None:
        super().__init__()
        bias = config.multimodal_projector_bias
        joined = config.vision_config.hidden_size * len(config.layers)
        self.linear_1 = nn.Linear(joined, width, bias=bias)
        self.activation = ACTIVATIONS[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, hidden × layers) → (…, width)."""
        return cast(torch.Tensor, self.linear_2(self.activation(self.linear_1(hidden))))


class LlavaTower(nn.Module):
    """Pictures, all of one size, to embeddings.

    Args:
        vision: Gives the hidden states that are wanted.
        projector: Takes them side by side.
        processor: Says how pixels are normalised.
        keep_class: Whether the class embedding is one of the tokens (HF's strategy ``full``).
    """

    def __init__(
        self,
        vision: ClipVisionTower,
        projector: Projector,
        processor: Normalisation,
        *,
        keep_class: bool,
    ) -> None:
        super().__init__()
        self.normalise = Normalise(processor)
        self.vision = vision
        self.projector = projector
        self.first = 0 if keep_class else 1

    def encode(self, items: Sequence[Item], media: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Embeddings of several pictures in one forward pass; see `Tower`."""
        return self.run(self.layout(items), media)

    def layout(self, items: Sequence[Item]) -> tuple[()]:
        """See `StaticTower`; all pictures are alike."""
        return ()

    def run(self, layout: tuple[()], media: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `StaticTower`."""
        return list(self(torch.stack(list(media))).unbind())

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Run the tower.

        Args:
            pictures: uint8, shape (pictures, image_size, image_size, 3).

        Returns:
            Shape (pictures, tokens, width), in the dtype of the weights.
        """
        states = self.vision(self.normalise(pictures))
        hidden = torch.cat([state[:, self.first :] for state in states], dim=-1)
        return cast(torch.Tensor, self.projector(hidden))
