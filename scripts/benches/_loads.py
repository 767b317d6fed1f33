"""What the benches ask: one generator of requests for each kind of load, no two the same."""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

WORDS = "a red circle left of two small blue squares and one large green triangle below it"
CLIP_FRAMES, CLIP_RATE, CLIP_SIZE = 60, 12, (320, 240)
"""Five seconds."""


class Loads:
    """Bodies of ``POST /v1/chat/completions``, streamed and greedy.

    Args:
        model: The name in them.
        tokens: Of an answer to a text.
    """

    def __init__(self, model: str, tokens: int = 64) -> None:
        self._model = model
        self._numbers = itertools.count(1)
        self._plain = {size: photograph(size) for size in (256, 512, 1024)}
        self._clips = itertools.cycle([clip(seed) for seed in range(8)])
        self._same = self._picture(1024)
        self.kinds: dict[str, Callable[[], bytes]] = {
            "text": lambda: self._body([], tokens),
            "unique image": lambda: self._body([self._picture(1024)], 16),
            "same image": lambda: self._body([self._same], 16),
            "four images": lambda: self._body([self._picture(512) for _ in range(4)], 16),
            "small image": lambda: self._body([self._picture(256)], tokens),
            "clip": lambda: self._body([self._clip()], 16),
        }

    def take(self, kind: str, count: int) -> list[bytes]:
        """So many requests of a kind of load, all of them made before the first is sent."""
        return [self.kinds[kind]() for _ in range(count)]

    def hopeless(self, count: int) -> list[bytes]:
        """Requests whose answer no context has room for."""
        return [self._body([], 1 << 24) for _ in range(count)]

    def asking(self, pictures: int, size: int) -> bytes:
        """A request about so many pictures of ``size``² pixels."""
        return self._body([self._picture(size) for _ in range(pictures)], 16)

    def talk(self, turns: int, shown: int, size: int) -> list[bytes]:
        """The requests of one user, each with the pictures of the last but one, and a new one."""
        pictures = [self._picture(size) for _ in range(turns + shown - 1)]
        return [self._body(pictures[turn : turn + shown], 16) for turn in range(turns)]

    def _body(self, parts: list[dict[str, Any]], max_tokens: int) -> bytes:
        # The number stands first, so that no request finds the beginning of another in a cache
        # of keys and values, save where its picture is the same.
        text = f"{next(self._numbers)} {WORDS} {WORDS} {WORDS}. What is this?"
        return json.dumps(
            {
                "model": self._model,
                "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
                "max_tokens": max_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()

    def _picture(self, size: int) -> dict[str, Any]:
        shift = divmod(next(self._numbers), size)
        rolled = np.roll(self._plain[size], shift, axis=(0, 1))
        buffer = io.BytesIO()
        Image.fromarray(rolled).save(buffer, "JPEG")
        return _part("image", "image/jpeg", buffer.getvalue())

    def _clip(self) -> dict[str, Any]:
        # Bytes after the last box make it another file of the same frames.
        data = next(self._clips) + free_box(next(self._numbers))
        return _part("video", "video/mp4", data)


def photograph(size: int) -> Pixels:
    """Noise of every coarseness, the coarse stronger, as in a photograph: 1.5 bits a pixel."""
    random = np.random.default_rng(size)
    whole = np.zeros((size, size, 3))
    for octave in range(2, size.bit_length()):
        noise = random.integers(0, 256, (2**octave, 2**octave, 3), np.uint8)
        scaled = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
        whole += (np.asarray(scaled) - 127.5) * 0.62**octave
    return np.clip(127.5 + whole * (50 / whole.std()), 0, 255).astype(np.uint8)


def clip(seed: int, size: tuple[int, int] = CLIP_SIZE, frames: int = CLIP_FRAMES) -> bytes:
    """A photograph that moves, H.264 in MP4, ``size`` pixels wide and high."""
    width, height = size
    side = 1 << (max(size) - 1).bit_length()
    wide = np.roll(photograph(side), 40 * seed, axis=1)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=CLIP_RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            frame = np.roll(wide, 3 * number, axis=1)[:height, :width]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()


def _part(kind: str, mime: str, data: bytes) -> dict[str, Any]:
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def free_box(number: int) -> bytes:
    """ISO/IEC 14496-12, 8.1.2: a box that readers skip, so a file is another with it behind."""
    return (16).to_bytes(4) + b"free" + number.to_bytes(8)
