"""Conversations as rows of token ids, in ChatML, and rows as the tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .batch import IGNORED
from .chats import Chat

Positions = NDArray[np.int64]


class Row:
    """One conversation as it grows."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        """Texts become tokens by `encode`, neighbouring ones together."""
        self._encode = encode
        self._unwritten = ""
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.weights: list[float] = []
        self.positions: list[Positions] = []
        self.next = 0

    @property
    def column(self) -> int:
        """Where the next token comes."""
        self._write()
        return len(self.ids)

    def say(self, text: str) -> None:
        """What the model reads."""
        self._unwritten += text

    def tokens(self, *ids: int) -> None:
        """Special tokens."""
        self._write()
        self._append(list(ids), [IGNORED] * len(ids), 0.0)

    def answer(self, ids: list[int]) -> None:
        """What it must say; long answers must not drown the short ones."""
        self._write()
        self._append(ids, ids, len(ids) ** -0.5)

    def grid(
        self, token: int, grid: tuple[int, int], units: int, step: int, *, by_time: bool
    ) -> None:
        """Placeholders of a picture or a video, with Qwen2.5-VL's positions in three dimensions."""
        self._write()
        t, y, x = np.meshgrid(
            np.arange(units) * step, np.arange(grid[0]), np.arange(grid[1]), indexing="ij"
        )
        self.ids += [token] * t.size
        self.labels += [IGNORED] * t.size
        self.weights += [0.0] * t.size
        self.positions.append(np.stack([t, y, x]).reshape(3, -1) + self.next)
        self.next += max((units - 1) * step + 1, *grid) if by_time else max(grid)

    def _write(self) -> None:
        ids = self._encode(self._unwritten) if self._unwritten else []
        self._unwritten = ""
        self._append(ids, [IGNORED] * len(ids), 0.0)

    def _append(self, ids: list[int], labels: list[int], weight: float) -> None:
        self.ids += ids
        self.labels += labels
        self.weights += [weight] * len(ids)
        self.positions.append(
            np.broadcast_to(np.arange(self.next, self.next + len(ids)), (3, len(ids)))
        )
        self.next += len(ids)


@dataclass(frozen=True)
class Rows:
    """Rows padded on the right; the fields are those of `batch.Batch`."""

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Rows:
        """All as long as the longest, rounded up."""
        length = -(-max(len(row.ids) for row in rows) // 32) * 32
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED)
        weights = torch.zeros(len(rows), length)
        positions = torch.zeros(3, len(rows), length, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = torch.tensor(row.ids)
            positions[:, index, : len(row.ids)] = torch.from_numpy(np.concatenate(row.positions, 1))
            # A token's successor is what it must predict.
            labels[index, : len(row.ids) - 1] = torch.tensor(row.labels[1:])
            weights[index, : len(row.ids) - 1] = torch.tensor(row.weights[1:])
        return cls(ids, positions, labels, weights)

    def slots(self, places: Sequence[tuple[int, int]], tokens: int) -> torch.Tensor:
        """Where media begin, as (row, column), made into `batch.Group`'s slots."""
        starts = torch.tensor([row * self.ids.shape[1] + column for row, column in places])
        return starts[:, None] + torch.arange(tokens)


class ChatWriter:
    """Writes conversations as rows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Use this tokenizer, one of `build_tokenizer`."""
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self.start, self.end = self.ids["<|im_start|>"], self.ids["<|im_end|>"]
        self.encode = lru_cache(20000)(
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        )

    def row(self, chat: Chat, place: Callable[[Row, int], None]) -> Row:
        """One conversation; `place` writes the medium of that index in the chat."""
        row = Row(self.encode)
        if chat.system is not None:
            row.tokens(self.start)
            row.say("system\n" + chat.system)
            row.tokens(self.end)
            row.say("\n")
        for turn in chat.turns:
            row.tokens(self.start)
            row.say("user\n")
            for part in turn.parts:
                if isinstance(part, str):
                    row.say(part)
                else:
                    place(row, part)
            row.tokens(self.end)
            row.say("\n")
            row.tokens(self.start)
            row.say("assistant\n")
            row.answer([*self.encode(turn.answer), self.end])
            row.say("\n")
        return row
