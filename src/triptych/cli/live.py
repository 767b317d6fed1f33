"""An answer on a terminal as it is written, its Markdown set.

Paragraphs that are finished are printed and stay; only the last one, which still grows, is drawn
anew. So nothing flickers, and what has scrolled away is in the terminal's own history.
"""

from __future__ import annotations

import contextlib
import sys
import termios
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.spinner import Spinner

from triptych.cli.output import CONTROLS

FENCE = "```"
PER_SECOND = 15
"""Drawings, at most."""


class LiveAnswer:
    """A place on the terminal for one answer; a context.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console) -> None:
        self.text = ""
        """All of it, as it came."""
        self._console = console
        self._printed = 0
        self._quiet = contextlib.ExitStack()
        self._live = Live(Spinner("dots"), console=console, refresh_per_second=PER_SECOND)

    def add(self, text: str) -> None:
        """The next piece."""
        self.text += text
        rest = self.text[self._printed :]
        if end := finished(rest):
            self._printed += end
            self._live.console.print(_render(rest[:end]), end="\n\n")
            rest = rest[end:]
        if rest.strip() or end:
            self._live.update(_render(rest))

    def __enter__(self) -> LiveAnswer:
        self._quiet.enter_context(no_echo())
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        rest = self.text[self._printed :]
        self._live.transient = not rest.strip()
        self._live.update(_render(rest))
        self._live.stop()
        self._quiet.close()


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """What is typed meanwhile is read later, and does not stand in the middle of the answer."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def finished(text: str) -> int:
    """Length of what will not change in ``text``: up to the last blank line outside of code."""
    end = at = 0
    in_code = False
    for line in text.splitlines(keepends=True):
        at += len(line)
        if line.startswith(FENCE):
            in_code = not in_code
        if not in_code and not line.strip() and line.endswith("\n"):
            end = at
    return end if text[:end].strip() else 0


def _render(text: str) -> Markdown:
    return Markdown(text.translate(CONTROLS).strip("\n"), hyperlinks=False)
