"""Pictures and conversations that several tests use, drawn by the tiny model's own generator."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tiny.shapes import draw, example


@dataclass(frozen=True)
class Asked:
    """Pictures, a question about them, and the only right answer."""

    type: str
    pictures: Sequence[Image.Image]
    question: str
    answer: str


def asked(types: Sequence[str], each: int, seed: int, *, unseen: bool = False) -> list[Asked]:
    """``each`` questions of every type, about pictures of mixed sizes; ``unseen``: with pairs of
    shape and colour that no training picture had."""
    rng = random.Random(seed)
    found = []
    for kind in types:
        for _ in range(each):
            scenes, question = example(kind, rng, unseen=unseen)
            pictures = [draw(scene, _size(rng)) for scene in scenes]
            found.append(Asked(kind, pictures, question.text, question.answer))
    return found


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture in which every pixel matters."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    """The picture as a file's bytes."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _size(rng: random.Random) -> tuple[int, int]:
    return rng.choice(((224, 224), (320, 240), (196, 252), (512, 384)))
