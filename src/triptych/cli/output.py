"""What every command prints in the same way: JSON for programs, waiting for a person."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import msgspec

# A model may have learned to write escape sequences, and a terminal obeys them.
CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160))}
for _allowed in "\n\t":
    del CONTROLS[ord(_allowed)]


def print_json(value: object) -> None:
    """``value`` on a line of stdout, at once: whoever reads it may be waiting for it."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show on stderr that something takes its time, if a person is there to see it."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield
