"""Attention within segments of different lengths, without padding, masks or flash-attn.

Segments of one length stand next to one another, so each length is one batched call of scaled
dot-product attention on a view. Torch then has a fused kernel for it on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from triptych.contract import GridTHW

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """How a sequence of patches falls into segments that attend within themselves."""

    runs: tuple[tuple[int, int], ...]
    """(count, length): so many segments of so many patches, one after another."""
    order: torch.Tensor | None = None
    """int64, (patches,): the places to take the patches from so that ``runs`` holds; None: it
    holds already."""
    inverse: torch.Tensor | None = None
    """int64, (patches,): the way back."""

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Softmax attention within each segment.

        Args:
            qkv: Shape (patches, 3, heads, head size): queries, keys, values.

        Returns:
            Shape (patches, heads × head size).
        """
        if self.order is not None:
            qkv = qkv[self.order]
        out = torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format)
        for count, length, here in self._slices():
            query, key, value = (
                part.unflatten(0, (count, length)).transpose(1, 2) for part in qkv[here].unbind(1)
            )
            attended = scaled_dot_product_attention(query, key, value)
            out[here].unflatten(0, (count, length)).copy_(attended.transpose(1, 2))
        if self.inverse is not None:
            out = out[self.inverse]
        return out.flatten(1)

    def _slices(self) -> Iterator[tuple[int, int, slice]]:
        start = 0
        for count, length in self.runs:
            yield count, length, slice(start, start + count * length)
            start += count * length


WHOLE_FRAME = 1 << 30
"""A window that is larger than any frame: with it, a frame is one window."""


@dataclass(frozen=True)
class WindowLayout:
    """The order in which a tower with windows sees the patches of a batch.

    Tokens (squares of ``merge²`` patches) are sorted by the length of their window, then by
    image, frame and window, and stay so through the whole tower.
    """

    patch_order: torch.Tensor
    """int64, (patches,): the places to take the patches from."""
    token_inverse: torch.Tensor
    """int64, (tokens,): the places to take the merged tokens from to have them in prompt order."""
    positions: torch.Tensor
    """int64, (patches, 2): row and column of each patch in its frame, in the tower's order."""
    sizes: torch.Tensor
    """int64, (patches, 2): rows and columns of each patch's frame, in the tower's order."""
    windows: Segments
    frames: Segments

    @classmethod
    def of(
        cls, grids: list[GridTHW], *, merge: int, window: int, device: torch.device
    ) -> WindowLayout:
        """The layout of a batch.

        Args:
            grids: Patches in time, height and width of each item.
            merge: Patches along the side of a token.
            window: Tokens along the side of a window.
            device: Where the tensors go.
        """
        shapes = [(rows, columns) for steps, rows, columns in grids for _ in range(steps)]
        frames = [_frame(rows // merge, columns // merge, window) for rows, columns in shapes]
        sizes = np.array([len(order) for order, _ in frames])
        starts = np.cumsum(sizes) - sizes
        order = np.concatenate([order + at for (order, _), at in zip(frames, starts, strict=True)])
        lengths = np.concatenate([lengths for _, lengths in frames])

        by_window = np.argsort(np.repeat(lengths, lengths), kind="stable")
        order = order[by_window]
        frame = np.repeat(np.arange(len(sizes)), sizes)[by_window]
        by_frame = np.lexsort((frame, sizes[frame]))
        positions = np.concatenate([_positions(rows, cols, merge) for rows, cols in shapes])

        def put(array: Indices) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        several = len(sizes) > 1
        patch_order = _spread(order, merge**2)
        return cls(
            patch_order=put(patch_order),
            token_inverse=put(np.argsort(order)),
            positions=put(positions[patch_order]),
            sizes=put(np.repeat(np.array(shapes)[frame], merge**2, axis=0)),
            windows=Segments(_runs(lengths * merge**2)),
            frames=Segments(
                _runs(sizes * merge**2),
                put(_spread(by_frame, merge**2)) if several else None,
                put(_spread(np.argsort(by_frame), merge**2)) if several else None,
            ),
        )


@lru_cache(maxsize=1024)
def _frame(rows: int, columns: int, window: int) -> tuple[Indices, Indices]:
    """The tokens of one frame, window by window, and the length of each window in tokens.

    Windows at the right and lower edge are cut off there, as in transformers'
    ``get_vision_window_index``.
    """
    across = -(-columns // window)
    of_row, of_column = np.arange(rows) // window, np.arange(columns) // window
    windows = (of_row[:, None] * across + of_column[None, :]).ravel()
    return np.argsort(windows, kind="stable"), np.bincount(windows)


@lru_cache(maxsize=1024)
def _positions(rows: int, columns: int, merge: int) -> Indices:
    """Row and column of each patch of a frame, square of ``merge²`` after square; (patches, 2)."""
    grid = np.indices((rows, columns), dtype=np.int64)
    blocks = grid.reshape(2, rows // merge, merge, columns // merge, merge)
    return blocks.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def _spread(tokens: Indices, unit: int) -> Indices:
    """Indices of tokens as indices of their ``unit`` patches each."""
    return (tokens[:, None] * unit + np.arange(unit)).ravel()


def _runs(lengths: Indices) -> tuple[tuple[int, int], ...]:
    """(count, length) of equal lengths, shortest first."""
    values, counts = np.unique(lengths, return_counts=True)
    return tuple(zip(counts.tolist(), values.tolist(), strict=True))
