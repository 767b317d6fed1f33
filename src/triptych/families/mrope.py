"""Positions of Qwen-VL's tokens, for engines that do not work them out themselves.

M-RoPE gives each token a position in time, height and width. Text has the same in all three; the
tokens of a picture lie on its merged grid; what follows goes on after the largest position so far.

Source: ``get_rope_index`` in transformers' modeling_qwen2_vl.py; pictures are alike in Qwen2-VL,
Qwen2.5-VL and Qwen3-VL, while each has a time of its own for clips, which are not served here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from triptych.contract import GridTHW, Prompt, TicketItem
from triptych.errors import InvalidValue

if TYPE_CHECKING:
    import torch


def positions(prompt: Prompt, items: Sequence[TicketItem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of a prompt with its placeholders spread out.

    Args:
        prompt: Whose places are those of ``items``.
        items: Pictures, each with its grid.

    Returns:
        int32, (3, 1, tokens): time, height and width. And int32, (1,): what to add to the index
        of a later token for its position.

    Raises:
        InvalidValue: An item is no picture, or has no grid.
    """
    import torch

    parts, following, read = [], 0, 0
    for index, (place, item) in enumerate(zip(prompt.items, items, strict=True)):
        if item.modality != "image" or item.grid_thw is None:
            raise InvalidValue("only pictures with a grid have positions", where=f"items[{index}]")
        text = place.position - read
        parts.append(_text(text, following))
        following += text
        parts.append(_picture(item.grid_thw, place.tokens) + following)
        following = int(parts[-1].max()) + 1
        read = place.position + 1
    text = len(prompt.token_ids) - read
    parts.append(_text(text, following))
    found = torch.cat(parts, dim=1).to(torch.int32)
    after = following + text - found.shape[1]
    return found[:, None], torch.tensor([after], dtype=torch.int32)


def _text(tokens: int, start: int) -> torch.Tensor:
    import torch

    return torch.arange(start, start + tokens).expand(3, -1)


def _picture(grid: GridTHW, tokens: int) -> torch.Tensor:
    """(3, tokens) from 0 on; ``tokens`` tells how many patches one token is merged of."""
    import torch

    merge = math.isqrt(math.prod(grid) // tokens)
    steps, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    return torch.cartesian_prod(torch.arange(steps), torch.arange(rows), torch.arange(columns)).T
