"""Batches for LLaVA: every picture, and every frame of a clip, is a square of one size."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from .batch import Batch, Group
from .chats import Chat, random_chat
from .clips import random_clip_chat
from .data import Classes, Pixels, dense_classes
from .llava import GRID, POOL, SIDE
from .questions import VideoScene
from .rows import ChatWriter, Row, Rows
from .scenes import Scene, draw

FRAMES = (2, 4, 4, 6, 6, 8, 8, 8, 12)
"""How many frames a clip has, one as likely as the other."""


def render(scene: Scene, size: tuple[int, int], smooth: int = 2) -> Pixels:
    """The scene drawn at (width, height) and scaled as the processor does: (SIDE, SIDE, 3)."""
    picture = draw(scene, size, smooth=smooth)
    if size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def random_size(rng: random.Random) -> tuple[int, int]:
    """Width and height of a picture; half are what the tower takes."""
    if rng.random() < 0.5:
        return SIDE, SIDE
    width = rng.randint(90, 260)
    return width, min(280, max(84, round(width * rng.uniform(0.6, 1.7))))


class Collator:
    """Turns conversations into batches."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Use this tokenizer, one of `llava.write_files`."""
        self.writer = ChatWriter(tokenizer)
        self.image = self.writer.ids["<image>"]
        self.video = self.writer.ids["<video>"]

    def batch(self, chats: list[Chat], rng: random.Random) -> Batch:
        """One batch; chats with pictures and with clips do not mix, as their tokens differ."""
        pixels: list[Pixels] = []
        dense: list[Classes] = []
        places: list[tuple[int, int]] = []
        grid = GRID
        rows: list[Row] = []
        for chat in chats:

            def place(row: Row, index: int, chat: Chat = chat) -> None:
                nonlocal grid
                media, size = chat.media[index], random_size(rng)
                if isinstance(media, VideoScene):
                    scenes, grid = media.frames(rng.choice(FRAMES)), GRID // POOL
                else:
                    assert isinstance(media, Scene)
                    scenes = [media]
                smooth = rng.choice((1, 2, 2))
                for scene in scenes:
                    places.append((len(rows), row.column))
                    row.tokens(*[self.video if grid != GRID else self.image] * grid**2)
                    pixels.append(render(scene, size, smooth))
                    dense.append(dense_classes(scene, (grid, grid)))
                row.say("\n")

            rows.append(self.writer.row(chat, place))
        padded = Rows.of(rows)
        groups = []
        if pixels:
            inputs, classes = (torch.from_numpy(np.stack(arrays)) for arrays in (pixels, dense))
            groups.append(Group(inputs, padded.slots(places, grid**2), classes))
        types = [chat.turns[-1].type for chat in chats]
        return Batch(padded.ids, padded.positions, padded.labels, padded.weights, groups, types)


class Chats(IterableDataset[Batch]):  # type: ignore[misc]  # mypy skips torch
    """Endless batches of random conversations, different in every worker."""

    def __init__(self, tokenizer_file: str, size: int, seed: int, *, video: bool) -> None:
        """Batches of `size` conversations, of fewer where they are long."""
        self.tokenizer_file, self.size, self.seed, self.video = tokenizer_file, size, seed, video

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this worker."""
        torch.set_num_threads(1)
        info = get_worker_info()
        rng = random.Random(f"{self.seed} {info.id if info else 0}")
        collator = Collator(Tokenizer.from_file(self.tokenizer_file))
        while True:
            draw_chat: Callable[[random.Random], Chat]
            size = self.size
            if self.video:
                draw_chat, size = random_clip_chat, max(1, size // 2)
            elif rng.random() < 0.6:
                draw_chat = partial(random_chat, shares=(90, 0, 0, 0, 10))
            else:
                draw_chat, size = partial(random_chat, shares=(0, 65, 35, 0, 0)), size * 5 // 9
            yield collator.batch([draw_chat(rng) for _ in range(max(1, size))], rng)
