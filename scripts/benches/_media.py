"""Requests about pictures and clips that were never sent before."""

from __future__ import annotations

import base64
import io
import itertools
import json

import numpy as np
from PIL import Image

from benches._loads import clip, free_box, photograph

CLIP_SIZE, CLIP_FRAMES = (1280, 720), 300


class Media:
    """REQUESTs, one medium each, as ``data:`` URIs."""

    def __init__(self) -> None:
        self._plain = {size: photograph(size) for size in (512, 1024, 4096)}
        self._numbers = itertools.count(1)
        self._clip = b""

    def picture(self, size: int = 1024) -> bytes:
        """A photograph of ``size``², JPEG of quality 75."""
        rolled = np.roll(self._plain[size], next(self._numbers), axis=1)
        buffer = io.BytesIO()
        Image.fromarray(rolled).save(buffer, "JPEG")
        return _request("image", "image/jpeg", buffer.getvalue())

    def clip(self) -> bytes:
        """A clip of 720p, of whose 300 frames nearly all must be decoded to have 8 of them."""
        self._clip = self._clip or clip(0, CLIP_SIZE, CLIP_FRAMES)
        return _request("video", "video/mp4", self._clip + free_box(next(self._numbers)))


def _request(kind: str, mime: str, data: bytes) -> bytes:
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    content = [
        {"type": f"{kind}_url", f"{kind}_url": {"url": url}},
        {"type": "text", "text": "What is this?"},
    ]
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
