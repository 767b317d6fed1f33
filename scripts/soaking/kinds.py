"""What is asked of a server: every medium in every form, and what it must refuse."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import itertools
import threading
import wave
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from benches._loads import clip, free_box
from faults.load import picture
from triptych_client import Client, image

WORDS = "Say all that you see in it, and where, and then say it once more. " * 2
PICTURES, CLIPS, SOUNDS = 16, 4, 4
"""Drawn before anything is asked; a number behind the last byte makes each another file."""
FILLING = 256 << 10
"""Bytes."""
SOUND_RATE = 16_000

Parts = list[dict[str, Any]]


class Kind(NamedTuple):
    """One kind of request."""

    name: str
    make: Callable[[], Parts]
    """The content of the one turn; each is another one."""
    refusal: str = ""
    """Code of the error that must come; empty: an answer."""
    fields: Mapping[str, Any] = MappingProxyType({})
    """Beside ``messages``."""


class Kinds:
    """Every kind of request that a model is to be asked.

    Args:
        modalities: What the model takes.
        media_url: Where pictures are served; each path is another one.
        grpc: A running server, which makes embeddings out of pictures.
        model: Its ensemble.
    """

    def __init__(self, modalities: Collection[str], media_url: str, grpc: str, model: str) -> None:
        self._numbers = itertools.count(1)
        self._url = media_url
        made = {
            "image": itertools.cycle([picture(seed) for seed in range(PICTURES)]),
            "video": itertools.cycle([clip(seed, (160, 120), 24) for seed in range(CLIPS)]),
            "audio": itertools.cycle([sound(220.0 * (1 + seed)) for seed in range(SOUNDS)]),
        }
        self._media = {kind: media for kind, media in made.items() if kind in modalities}
        self._embeddings = itertools.cycle([])
        if "image" in modalities:
            self._embeddings = itertools.cycle(_embeddings(grpc, model))

    def all(self) -> list[Kind]:
        """Each of them; the first is text alone."""
        found = [Kind("text", list)]
        for kind in self._media:
            found.append(Kind(kind, lambda kind=kind: [self._medium(kind)]))  # type: ignore[misc]
        if "image" in self._media:
            found += [
                Kind("images", lambda: [self._medium("image") for _ in range(3)]),
                Kind("same image", lambda: [_part("image", picture(0))]),
                Kind("image by URL", lambda: [_by_url("image", self._fresh_url())]),
                Kind("embeddings", lambda: [_part("image", next(self._embeddings))]),
                Kind("broken image", self._broken, "media_unreadable"),
                Kind("forbidden URL", _forbidden, "media_forbidden"),
            ]
        return [
            *found,
            Kind("field out of range", list, "invalid_value", {"temperature": 9}),
            Kind("prompt too long", _endless, "context_too_long"),
        ]

    def filling(self) -> Kind:
        """What fills whatever is bounded by bytes of media, by a part that no decoder reads."""
        kind = "image" if "image" in self._media else next(iter(self._media))
        return Kind("filling", lambda: [self._medium(kind, FILLING) for _ in range(3)])

    def _medium(self, kind: str, padding: int = 0) -> dict[str, Any]:
        number = next(self._numbers)
        tail = free_box(number) if kind == "video" else number.to_bytes(8)
        return _part(kind, next(self._media[kind]) + tail + bytes(padding))

    def _broken(self) -> Parts:
        return [_part("image", picture(1)[:200] + next(self._numbers).to_bytes(8))]

    def _fresh_url(self) -> str:
        return f"{self._url}/{next(self._numbers)}.png"


def sound(hertz: float, seconds: float = 1.0) -> bytes:
    """A tone, as WAV."""
    times = np.arange(int(SOUND_RATE * seconds)) / SOUND_RATE
    samples = (np.sin(2 * np.pi * hertz * times) * 12_000).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SOUND_RATE)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


@contextmanager
def media_server() -> Iterator[str]:
    """A server of pictures on loopback, each with a tag; its URL."""
    pictures = [picture(seed) for seed in range(PICTURES)]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            """A picture, whatever the path."""
            data = pictures[hash(self.path) % PICTURES]
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{self.path}"')
            with contextlib.suppress(ConnectionError):  # its reader has left
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def _embeddings(grpc: str, model: str) -> list[bytes]:
    with Client(grpc) as client:
        pictures = [image(picture(seed)) for seed in range(3)]
        return [client.embed(part, model=model).safetensors() for part in pictures]


def _endless() -> Parts:
    return [{"type": "text", "text": WORDS * 400}]


def _forbidden() -> Parts:
    return [_by_url("image", "http://169.254.169.254/latest/meta-data")]


def _part(kind: str, data: bytes) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    return _by_url(kind, f"data:application/octet-stream;base64,{encoded}")


def _by_url(kind: str, url: str) -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
