"""Conversations made into batches of token ids, positions and pictures, by worker processes."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from .batch import IGNORED, Batch, Group
from .chats import Chat, Media, random_chat
from .model import MAX_PIXELS, MERGED
from .questions import VideoScene
from .rows import ChatWriter, Row, Rows
from .scenes import COLOURS, KINDS, PLACES, SIZES, Scene, draw, outline, paint

Pixels = NDArray[np.uint8]
Classes = NDArray[np.int64]
DENSE_CLASSES = {
    "kind": len(KINDS) + 1,
    "colour": len(COLOURS) + 1,
    "size": len(SIZES) + 1,
    "place": len(PLACES) + 1,
    "centre": len(KINDS) + 1,
}
"""What the vision tower learns of every token: what covers it, and whose centre it holds."""


def random_grid(rng: random.Random, most: int) -> tuple[int, int]:
    """Rows and columns of tokens of a picture, 3 to 13 each and at most `most` together."""
    while True:
        rows = rng.randint(3, 12)
        columns = rows if rng.random() < 0.4 else rng.randint(max(3, rows // 2), min(13, rows * 2))
        if rows * columns <= most:
            return rows, columns


def render(scene: Scene, grid: tuple[int, int], rng: random.Random) -> Pixels:
    """The scene as the processor would hand it on: (rows * 28, columns * 28, 3), uint8."""
    height, width = grid[0] * MERGED, grid[1] * MERGED
    # Half of all pictures come in a size that must be changed, some far larger than the model sees.
    roll = rng.random()
    size = (width, height)
    if roll < 0.5:
        scale = rng.uniform(1.3, 2.2) if roll < 0.12 else 1.0
        size = (
            round((width + rng.randint(-13, 13)) * scale),
            round((height + rng.randint(-13, 13)) * scale),
        )
    picture = draw(scene, size, smooth=rng.choice((1, 2, 2)))
    if rng.random() < 0.1:
        packed = io.BytesIO()
        picture.save(packed, "JPEG", quality=rng.randint(60, 95))
        picture = Image.open(packed)
    if size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def dense_classes(scene: Scene, grid: tuple[int, int]) -> Classes:
    """The classes of DENSE_CLASSES for every token, 0 for none, shape (tokens, 5)."""
    rows, columns = grid
    fine = 8
    size = (columns * fine, rows * fine)
    mask = Image.new("L", size)
    canvas = ImageDraw.Draw(mask)
    classes = np.zeros((len(scene.shapes) + 1, 4), np.int64)
    centres = np.zeros((rows, columns), np.int64)
    for index, shape in enumerate(scene.shapes, 1):
        paint(canvas, shape, size, index)
        classes[index] = (
            KINDS.index(shape.kind) + 1,
            COLOURS.index(shape.colour) + 1,
            SIZES.index(shape.size) + 1,
            PLACES.index(shape.place) + 1,
        )
        xs, ys = zip(*outline(shape, size), strict=True)
        x, y = (min(xs) + max(xs)) / 2 / fine, (min(ys) + max(ys)) / 2 / fine
        centres[min(int(y), rows - 1), min(int(x), columns - 1)] = KINDS.index(shape.kind) + 1
    cells = (
        np.asarray(mask)
        .reshape(rows, fine, columns, fine)
        .transpose(0, 2, 1, 3)
        .reshape(rows * columns, -1)
    )
    covered = np.stack([(cells == i).sum(1) for i in range(1, len(scene.shapes) + 1)], 1)
    owner = np.where(covered.max(1) >= fine * fine // 10, covered.argmax(1) + 1, 0)
    return np.concatenate([classes[owner], centres.reshape(-1, 1)], 1)


class Collator:
    """Turns conversations into batches."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Use this tokenizer, one of `model.write_files`."""
        self.writer = ChatWriter(tokenizer)
        ids = self.writer.ids
        self.vision = [ids["<|vision_start|>"], ids["<|vision_end|>"]]
        self.image, self.video = ids["<|image_pad|>"], ids["<|video_pad|>"]

    def batch(self, chats: list[Chat], rng: random.Random, most_tokens: int | None = None) -> Batch:
        """One batch of pictures that have one size, or two at random, of at most so many tokens."""
        if most_tokens is None:
            most_tokens = rng.choice((36, 64, 100, 144))
        drawn = [Drawn(random_grid(rng, most_tokens)) for _ in range(rng.randint(1, 2))]
        rows: list[Row] = []
        for chat in chats:

            def place(row: Row, index: int, chat: Chat = chat) -> None:
                row.tokens(self.vision[0])
                group = rng.choice(drawn)
                units, step = group.add(chat.media[index], (len(rows), row.column), rng)
                # Whether text goes on after a video's last moment or only after its last row
                # and column has changed between versions of transformers: learn both.
                token = self.video if isinstance(chat.media[index], VideoScene) else self.image
                row.grid(token, group.grid, units, step, by_time=rng.random() < 0.5)
                row.tokens(self.vision[1])

            rows.append(self.writer.row(chat, place))
        padded = Rows.of(rows)
        groups = [
            Group(
                torch.from_numpy(_stack(group.pixels)),
                padded.slots(group.places, group.area),
                torch.from_numpy(np.stack(group.dense)),
            )
            for group in drawn
            if group.pixels
        ]
        return Batch(
            padded.ids,
            padded.positions,
            padded.labels,
            padded.weights,
            groups,
            [chat.turns[-1].type for chat in chats],
        )


class Drawn:
    """Pictures of one size, as they are drawn."""

    def __init__(self, grid: tuple[int, int]) -> None:
        """Of so many rows and columns of tokens."""
        self.grid = grid
        self.area = grid[0] * grid[1]
        assert self.area * MERGED**2 <= MAX_PIXELS
        self.pixels: list[Pixels] = []
        self.dense: list[Classes] = []
        self.places: list[tuple[int, int]] = []

    def add(self, media: Media, at: tuple[int, int], rng: random.Random) -> tuple[int, int]:
        """Draw a picture or a video, whose tokens begin at this row and column of the batch.

        Returns:
            How many moments of two frames it has, and how far in time they are apart.
        """
        if isinstance(media, VideoScene):
            units = max(2, min(rng.randint(2, 4), 200 // self.area))
            step = rng.choice((1, 2, 2, 3, 4))
            frames = [render_frame(s, self.grid) for s in media.frames(2 * units)]
            self.pixels += [np.stack(frames[i : i + 2]) for i in range(0, 2 * units, 2)]
            self.dense += [np.full((self.area, len(DENSE_CLASSES)), IGNORED)] * units
        else:
            assert isinstance(media, Scene)
            units, step = 1, 1
            self.pixels.append(render(media, self.grid, rng)[None])
            self.dense.append(dense_classes(media, self.grid))
        self.places += [(at[0], at[1] + self.area * unit) for unit in range(units)]
        return units, step


def render_frame(scene: Scene, grid: tuple[int, int]) -> Pixels:
    """One frame of a video, (rows * 28, columns * 28, 3), uint8."""
    return np.asarray(draw(scene, (grid[1] * MERGED, grid[0] * MERGED)))


def _stack(pictures: list[NDArray[Any]]) -> NDArray[Any]:
    """All in one array; beside a video's pairs of frames a still picture is its own second one."""
    frames = max(p.shape[0] for p in pictures)
    return np.stack([p if p.shape[0] == frames else np.repeat(p, frames, 0) for p in pictures])


class Chats(IterableDataset[Batch]):  # type: ignore[misc]  # mypy skips torch
    """Endless batches of random conversations, different in every worker."""

    def __init__(self, tokenizer_file: str, size: int, seed: int) -> None:
        """Batches of `size` conversations, of fewer where the pictures are large."""
        self.tokenizer_file, self.size, self.seed = tokenizer_file, size, seed

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this worker."""
        torch.set_num_threads(1)
        info = get_worker_info()
        rng = random.Random(f"{self.seed} {info.id if info else 0}")
        collator = Collator(Tokenizer.from_file(self.tokenizer_file))
        while True:
            tokens = rng.choice((36, 64, 64, 100, 144))
            size = self.size * 64 // max(64, tokens)
            # Videos come together, in a third of the batches: beside one, pictures cost double.
            videos = rng.choice((0, 0, 35))
            yield collator.batch(
                [random_chat(rng, (58, 19, 8, videos, 5)) for _ in range(size)], rng, tokens
            )
