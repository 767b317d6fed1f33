"""``triptych chat``: one question to a running server, its answer to the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from triptych.cli.compose import find
from triptych.cli.media import part_of
from triptych.cli.meter import Meter
from triptych.cli.output import CONTROLS, waiting
from triptych_client import (
    Answer,
    Chunk,
    Client,
    MediaError,
    MediaUnreachable,
    Message,
    TriptychClientError,
    system,
    user,
)

WAITING = "waiting for the answer"


def local_errors() -> tuple[type[Exception], ...]:
    """What is raised where the command line is wrong."""
    return (MediaError, ValueError)


class Asker(NamedTuple):
    """Of whom to ask, and how."""

    server: str
    """Address, as `Client` takes it."""
    model: str
    """The ensemble."""
    system: str | None
    """What the model is told first."""
    options: dict[str, Any]
    """Sampling and ``timeout``, as `Client.chat` takes them."""
    complain: Callable[[str], None]
    """Prints one line on stderr."""


def is_medium(text: str) -> bool:
    """Whether ``text`` is no question, but the path of a medium.

    Raises:
        MediaUnreachable: It can only be one, and is not there.
    """
    try:
        return bool(find(text))
    except MediaUnreachable:
        if any(map(str.isspace, text)):
            return False
        raise


def conversation(text: str, media: Sequence[str], instruction: str | None) -> list[Message]:
    """The messages of one question."""
    turns = [] if instruction is None else [system(instruction)]
    return [*turns, user(*map(part_of, media), text)]


def ask(
    asker: Asker, text: str, media: Sequence[str], *, stream: bool, as_json: bool, stats: bool
) -> int:
    """Ask once and print what comes; Ctrl-C ends the answer on the server too.

    Args:
        asker: Of whom.
        text: The question.
        media: Paths and URLs, which the model sees before the question.
        stream: Print the answer as it is written.
        as_json: Print it as JSON.
        stats: Tell what it took, on stderr.

    Returns:
        The exit code: 0, 1 where the server or the request failed, 130 after Ctrl-C.

    Raises:
        MediaError: A file is not there, or is no medium.
        ValueError: The address is none.
    """
    messages = conversation(text, media, asker.system)
    meter = Meter()
    show = show_json if as_json else show_text
    client = Client(asker.server)
    try:
        with client:
            if stream:
                chunks = client.chat(messages, model=asker.model, **asker.options)
                with chunks:
                    show(meter.watch(_begun(chunks)))
            else:
                with waiting(WAITING):
                    answer = client.chat(messages, model=asker.model, stream=False, **asker.options)
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
        asker.complain(f"{error} ({error.code})")
        return 1
    if stats:
        asker.complain(", ".join((*meter.facts(), *meter.details())))
    return 0


def converse(asker: Asker, media: Sequence[str]) -> int:
    """Hold a conversation on the terminal, the first question with ``media``.

    Returns:
        The exit code: 0, or 1 where there is no such server or model.

    Raises:
        MediaError: A file is not there, or is no medium.
        ValueError: The address is none.
    """
    from triptych.cli.session import Session

    with Client(asker.server) as client:
        session = Session(
            client,
            model=asker.model,
            instruction=asker.system,
            media=media,
            options=asker.options,
        )
        if not client.ready(asker.model):
            asker.complain(
                f"no model {asker.model} answers at {asker.server}: "
                "start a server with `triptych serve`"
            )
            return 1
        session.run()
    return 0


def _begun(chunks: Iterable[Chunk]) -> Iterable[Chunk]:
    """The same, shown as waited for until the first is there."""
    pieces = iter(chunks)
    with waiting(WAITING):
        first = next(pieces, None)
    if first is not None:
        yield first
        yield from pieces


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


def _end_line() -> None:
    """Put what follows on a line of its own."""
    if sys.stdout.isatty():
        sys.stdout.write("\n")
        sys.stdout.flush()
