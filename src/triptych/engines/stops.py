"""Stop strings, for engines whose library does not find them in text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for stop strings in a text that comes in pieces.

    What may be the beginning of one is held back, since it must not be part of the answer.

    Args:
        stops: None is empty; none at all: everything passes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Take the next piece.

        Returns:
            What may be said now, and whether it ends before a stop string; then nothing follows.
        """
        text = self._held + text
        found = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        end = len(text) - max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[end:]
        return text[:end], False

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        return self._held


def _begun(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` begins with, all of it left out."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
