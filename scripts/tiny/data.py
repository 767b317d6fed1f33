"""Conversations made into batches of token ids, positions and pictures, by worker processes."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from .batch import IGNORED, Batch, Group
from .chats import DEFAULT_SYSTEM, Chat, Turn, random_chat
from .examples import example, video_example
from .model import MAX_PIXELS, MERGED
from .questions import IMAGE_TYPES, PAIR_TYPES, VIDEO_TYPES, VideoScene
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
        """Use this tokenizer, one of `model.build_tokenizer`."""
        ids: dict[str, int] = tokenizer.get_vocab()
        self.start, self.end = ids["<|im_start|>"], ids["<|im_end|>"]
        self.vision = [ids["<|vision_start|>"], ids["<|vision_end|>"]]
        self.image, self.video = ids["<|image_pad|>"], ids["<|video_pad|>"]
        self.encode = lru_cache(20000)(
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        )

    def batch(self, chats: list[Chat], rng: random.Random, most_tokens: int | None = None) -> Batch:
        """One batch of pictures that have one size, or two at random, of at most so many tokens."""
        if most_tokens is None:
            most_tokens = rng.choice((36, 64, 100, 144))
        grids = [random_grid(rng, most_tokens) for _ in range(rng.randint(1, 2))]
        assert max(r * c for r, c in grids) * MERGED**2 <= MAX_PIXELS
        pixels: list[list[Pixels]] = [[] for _ in grids]
        dense: list[list[Classes]] = [[] for _ in grids]
        slots: list[list[tuple[int, int]]] = [[] for _ in grids]
        rows = []
        for index, chat in enumerate(chats):
            row = _Row()
            if chat.system is not None:
                row.text(
                    [
                        self.start,
                        *self.encode("system\n" + chat.system),
                        self.end,
                        *self.encode("\n"),
                    ]
                )
            for turn in chat.turns:
                row.text([self.start, *self.encode("user\n")])
                for part in turn.parts:
                    if isinstance(part, str):
                        row.text(self.encode(part))
                        continue
                    media = chat.media[part]
                    row.text(self.vision[:1])
                    group = rng.randrange(len(grids))
                    area = grids[group][0] * grids[group][1]
                    if isinstance(media, VideoScene):
                        units, step = (
                            max(2, min(rng.randint(2, 4), 200 // area)),
                            rng.choice((1, 2, 2, 3, 4)),
                        )
                        frames = [render_frame(s, grids[group]) for s in media.frames(2 * units)]
                        pixels[group] += [
                            np.stack(frames[i : i + 2]) for i in range(0, 2 * units, 2)
                        ]
                        dense[group] += [np.full((area, len(DENSE_CLASSES)), IGNORED)] * units
                    else:
                        units, step = 1, 1
                        pixels[group].append(render(media, grids[group], rng)[None])
                        dense[group].append(dense_classes(media, grids[group]))
                    slots[group] += [(index, len(row.ids) + area * u) for u in range(units)]
                    # Whether text goes on after a video's last moment or only after its last row
                    # and column has changed between versions of transformers: learn both.
                    token = self.video if isinstance(media, VideoScene) else self.image
                    row.media(token, grids[group], units, step, by_time=rng.random() < 0.5)
                    row.text(self.vision[1:])
                row.text([self.end, *self.encode("\n"), self.start, *self.encode("assistant\n")])
                row.answer([*self.encode(turn.answer), self.end])
                row.text(self.encode("\n"))
            rows.append(row)
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
        groups = [
            Group(
                torch.from_numpy(_stack(pixels[g])),
                torch.tensor([b * length + o for b, o in slots[g]])[:, None]
                + torch.arange(grids[g][0] * grids[g][1]),
                torch.from_numpy(np.stack(dense[g])),
            )
            for g in range(len(grids))
            if pixels[g]
        ]
        return Batch(
            ids, positions, labels, weights, groups, [chat.turns[-1].type for chat in chats]
        )


def render_frame(scene: Scene, grid: tuple[int, int]) -> Pixels:
    """One frame of a video, (rows * 28, columns * 28, 3), uint8."""
    return np.asarray(draw(scene, (grid[1] * MERGED, grid[0] * MERGED)))


def _stack(pictures: list[NDArray[Any]]) -> NDArray[Any]:
    """All in one array; beside a video's pairs of frames a still picture is its own second one."""
    frames = max(p.shape[0] for p in pictures)
    return np.stack([p if p.shape[0] == frames else np.repeat(p, frames, 0) for p in pictures])


class _Row:
    """One conversation as it grows."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.weights: list[float] = []
        self.positions: list[Classes] = []
        self.next = 0

    def text(self, ids: list[int]) -> None:
        self._append(ids, [IGNORED] * len(ids), 0.0)

    def answer(self, ids: list[int]) -> None:
        self._append(ids, ids, len(ids) ** -0.5)  # long answers must not drown the short ones

    def media(
        self, token: int, grid: tuple[int, int], units: int, step: int, *, by_time: bool
    ) -> None:
        t, y, x = np.meshgrid(
            np.arange(units) * step, np.arange(grid[0]), np.arange(grid[1]), indexing="ij"
        )
        self.ids += [token] * t.size
        self.labels += [IGNORED] * t.size
        self.weights += [0.0] * t.size
        self.positions.append(np.stack([t, y, x]).reshape(3, -1) + self.next)
        self.next += max((units - 1) * step + 1, *grid) if by_time else max(grid)

    def _append(self, ids: list[int], labels: list[int], weight: float) -> None:
        self.ids += ids
        self.labels += labels
        self.weights += [weight] * len(ids)
        self.positions.append(
            np.broadcast_to(np.arange(self.next, self.next + len(ids)), (3, len(ids)))
        )
        self.next += len(ids)


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
            yield collator.batch([random_chat(rng, videos) for _ in range(size)], rng, tokens)


def one_question(type_: str, rng: random.Random, *, unseen: bool = False) -> Chat:
    """A conversation of one question of this type, as the evaluation asks it."""
    chat = Chat(DEFAULT_SYSTEM)
    if type_ in VIDEO_TYPES:
        video, asked = video_example(type_, rng, unseen=unseen)
        chat.media.append(video)
    else:
        scenes, asked = example(type_, rng, unseen=unseen)
        chat.media += scenes
    chat.turns.append(Turn([*range(len(chat.media)), asked.text], asked.answer, type_))
    return chat


ALL_TYPES = IMAGE_TYPES + PAIR_TYPES + VIDEO_TYPES
