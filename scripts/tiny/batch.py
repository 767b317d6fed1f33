"""A batch of conversations as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

IGNORED = -100
"""The label of what nothing is learned from."""


@dataclass
class Group:
    """Media of one size.

    Attributes:
        inputs: What the tower takes. Qwen2.5-VL: pictures or pairs of a video's frames, uint8,
            shape (pictures, 1 or 2 frames, height, width, 3). LLaVA: pictures or a clip's frames,
            uint8, shape (pictures, height, width, 3). Qwen2-Audio: samples, int16, shape
            (sounds, samples).
        slots: Where each token belongs among the batch's, flattened, shape (media, tokens).
        dense: What each token shows, classes as in the recipe's `dense_classes`, or IGNORED, shape
            (media, tokens, kinds of classes).
    """

    inputs: torch.Tensor
    slots: torch.Tensor
    dense: torch.Tensor

    def to(self, device: torch.device) -> Group:
        """The same on another device."""
        return Group(
            *(t.to(device, non_blocking=True) for t in (self.inputs, self.slots, self.dense))
        )

    def pin_memory(self) -> Group:
        """The same in pinned memory, from which copies to a GPU run in the background."""
        return Group(self.inputs.pin_memory(), self.slots.pin_memory(), self.dense.pin_memory())


@dataclass
class Batch:
    """Conversations, padded on the right.

    Attributes:
        ids: Token ids, shape (chats, length).
        positions: Time, row and column of every token, shape (3, chats, length).
        labels: The answers' tokens where they are predicted, else IGNORED, shape (chats, length).
        weights: Each label's share in the loss, shape (chats, length).
        groups: The media, by size.
        types: The type of each chat's last turn.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    groups: list[Group]
    types: list[str]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        groups = [group.to(device) for group in self.groups]
        return self._each(lambda t: t.to(device, non_blocking=True), groups)

    def pin_memory(self) -> Batch:
        """The same in pinned memory."""
        return self._each(torch.Tensor.pin_memory, [group.pin_memory() for group in self.groups])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor], groups: list[Group]) -> Batch:
        ids, positions = change(self.ids), change(self.positions)
        return Batch(ids, positions, change(self.labels), change(self.weights), groups, self.types)
