"""``triptych chat``: one question to a running server, its answer to the terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import msgspec

from triptych_client import (
    Answer,
    Chunk,
    Client,
    MediaError,
    Message,
    Part,
    TriptychClientError,
    audio,
    image,
    system,
    user,
    video,
)
from triptych_client.media import Modality, is_url, modality_of

MAKE: dict[Modality, Callable[[str], Part]] = {"image": image, "video": video, "audio": audio}
SUFFIXES: dict[str, Modality] = {
    **dict.fromkeys((".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"), "video"),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".m4a", ".opus"), "audio"),
}
"""Of URLs; all else is taken for a picture. A file here tells by its first bytes."""

# A model may have learned to write escape sequences, and a terminal obeys them.
CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160))}
for _allowed in "\n\t":
    del CONTROLS[ord(_allowed)]


def local_errors() -> tuple[type[Exception], ...]:
    """What a `Question` raises where the command line is wrong."""
    return (MediaError, ValueError)


class Question:
    """What to ask, of whom.

    Args:
        text: The question.
        media: Paths and URLs, which the model sees before the question.
        system: What the model is told first.
        server: Address, as `Client` takes it.
        model: The ensemble.
        options: Sampling and ``timeout``, as `Client.chat` takes them.

    Raises:
        MediaError: A file is not there, or is no medium.
        ValueError: The address is none.
    """

    def __init__(
        self,
        *,
        text: str,
        media: Sequence[str],
        system: str | None,
        server: str,
        model: str,
        options: dict[str, Any],
    ) -> None:
        self.messages = conversation(text, media, system)
        self.client = Client(server)
        self.model = model
        self.options = options


def conversation(text: str, media: Sequence[str], instruction: str | None) -> list[Message]:
    """The messages of one question."""
    turns = [] if instruction is None else [system(instruction)]
    return [*turns, user(*(_part(source) for source in media), text)]


def ask(
    question: Question,
    *,
    stream: bool,
    as_json: bool,
    stats: bool,
    complain: Callable[[str], None],
) -> int:
    """Send it and print what comes; Ctrl-C ends the answer on the server too.

    Returns:
        The exit code: 0, 1 where the server or the request failed, 130 after Ctrl-C.
    """
    meter = Meter()
    show = show_json if as_json else show_text
    try:
        with question.client as client:
            if stream:
                chunks = client.chat(question.messages, model=question.model, **question.options)
                with chunks:
                    show(meter.watch(chunks))
            else:
                answer = client.chat(
                    question.messages, model=question.model, stream=False, **question.options
                )
                meter.whole(answer)
                show([answer])
    except KeyboardInterrupt:
        _end_line()
        return 130
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TriptychClientError as error:
        _end_line()
        complain(f"{error} ({error.code})")
        return 1
    if stats:
        complain(meter.summary())
    return 0


def show_text(pieces: Iterable[Chunk | Answer]) -> None:
    """The text as it comes, and a line's end."""
    is_terminal = sys.stdout.isatty()
    for piece in pieces:
        sys.stdout.write(piece.text.translate(CONTROLS) if is_terminal else piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def show_json(pieces: Iterable[Chunk | Answer]) -> None:
    """One line a piece: chunks as the server wrote them, an answer as an object."""
    for piece in pieces:
        line = piece.json if isinstance(piece, Chunk) else msgspec.json.encode(piece)
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()


@dataclass
class Meter:
    """Times of one answer, in seconds since it was asked for."""

    began: float = 0.0
    first: float | None = None
    last: float = 0.0
    tokens: int | None = None
    prompt_tokens: int | None = None
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.began = time.perf_counter()

    def watch(self, chunks: Iterable[Chunk]) -> Iterable[Chunk]:
        """Pass ``chunks`` on."""
        for chunk in chunks:
            if chunk.text:
                self.last = time.perf_counter() - self.began
                self.first = self.last if self.first is None else self.first
            self._note(chunk)
            yield chunk

    def whole(self, answer: Answer) -> None:
        """Note an answer that came in one piece, which has no first token."""
        self.last = time.perf_counter() - self.began
        self._note(answer)

    def _note(self, piece: Chunk | Answer) -> None:
        self.finish_reason = piece.finish_reason or self.finish_reason
        if piece.usage is not None:
            self.tokens = piece.usage.completion_tokens
            self.prompt_tokens = piece.usage.prompt_tokens

    def summary(self) -> str:
        """One line for a person."""
        parts = []
        if self.first is not None:
            parts.append(f"time to first token {self.first * 1000:.0f} ms")
        if self.tokens is not None:
            parts.append(f"{self.tokens} tokens in {self.last:.2f} s")
            # Between the first and the last, which is the speed of decoding alone.
            took = self.last - (self.first or 0.0)
            made = self.tokens - (self.first is not None)
            if took > 0 and made > 0:
                parts.append(f"{made / took:.1f} tokens/s")
            parts.append(f"{self.prompt_tokens} tokens of prompt")
        return ", ".join([*parts, f"finish reason {self.finish_reason}"])


def _part(source: str) -> Part:
    return MAKE[_modality_of_url(source) if is_url(source) else modality_of(Path(source))](source)


def _modality_of_url(url: str) -> Modality:
    parts = urlsplit(url)
    if parts.scheme.lower() == "data":
        kind = parts.path.partition("/")[0].lower()
        return "video" if kind == "video" else "audio" if kind == "audio" else "image"
    return SUFFIXES.get(PurePosixPath(parts.path).suffix.lower(), "image")


def _end_line() -> None:
    """Put what follows on a line of its own."""
    if sys.stdout.isatty():
        sys.stdout.write("\n")
        sys.stdout.flush()
