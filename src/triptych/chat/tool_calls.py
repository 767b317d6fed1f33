"""Finds the calls of tools in the text that a model writes, while it writes.

The form is that of Hermes, which the templates of Qwen 2.5 and 3 have too::

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Source: https://github.com/NousResearch/Hermes-Function-Calling.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection
from typing import Any

import msgspec

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]+)"\s*,\s*"arguments"\s*:\s*(?=\{)')


class CallPiece(msgspec.Struct, frozen=True):
    """What a piece of text adds to a call."""

    index: int
    """Of the call in the answer."""
    arguments: str
    """What they go on with: JSON, as the model writes it."""
    id: str = ""
    """In the first piece of a call alone, as ``name``."""
    name: str = ""


class Found(msgspec.Struct, frozen=True):
    """What a piece of text turns out to be."""

    content: str
    """All that is no call."""
    calls: list[CallPiece]


class ToolCallReader:
    """Reads one answer, piece by piece.

    Text that may become a call is held back until it is one, or cannot be one any more; then it is
    content like any other. Arguments go out as they come. They break off where the answer does,
    and unless the engine was held to a schema they are whatever the model wrote.

    Args:
        names: Of the tools that there are; a call of another is content.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.count = 0
        """Calls so far."""
        self._names = names
        self._held = ""
        """Text that is not known yet to be one or the other."""
        self._step = self._outside
        """Takes what it can from what is held; tells whether the next step may take more."""
        self._content: list[str] = []
        self._calls: list[CallPiece] = []
        self._arguments = _ObjectEnd()
        self._after_call = False
        """Nothing but white space has come since the last call."""

    def feed(self, text: str) -> Found:
        """Take the text that the answer adds."""
        self._held += text
        while self._step():
            pass
        return self._found()

    def end(self) -> Found:
        """What was held back when the answer ended."""
        if self._step == self._at_head:
            self._content.append(OPEN)
        if self._step != self._at_tail and not (self._after_call and self._held.isspace()):
            self._content.append(self._held)
        self._held = ""
        return self._found()

    def _found(self) -> Found:
        content, calls = "".join(self._content), self._calls
        self._content, self._calls = [], []
        return Found(content, calls)

    def _outside(self) -> bool:
        before, found, after = self._held.partition(OPEN)
        kept = 0 if found else _overlap(before, OPEN)
        said = before[: len(before) - kept]
        if said.strip() or not self._after_call:  # else it only keeps calls apart
            self._content.append(said)
            self._after_call = False
            self._held = self._held[len(said) :]
        if found:
            self._held, self._step = after, self._at_head
        return bool(found)

    def _at_head(self) -> bool:
        if (match := _HEAD.match(self._held)) and match[1] in self._names:
            self._begin(match[1])
            self._held, self._step = self._held[match.end() :], self._inside
            self._arguments = _ObjectEnd()
            return True
        body, closed, after = self._held.partition(CLOSE)
        if closed and not match and self._take_whole(body):
            return self._leave(after)
        if not match and not closed and OPEN not in body and body.lstrip()[:1] in ("", "{"):
            return False
        self._content.append(OPEN)  # a word like any other
        self._step, self._after_call = self._outside, False
        return True

    def _inside(self) -> bool:
        taken = self._arguments.find(self._held)
        if taken:
            self._add(CallPiece(self.count - 1, self._held[:taken]))
        self._held = self._held[taken:]
        if self._arguments.found:
            self._step = self._at_tail
        return self._arguments.found

    def _at_tail(self) -> bool:
        rest = self._held.lstrip().removeprefix("}").lstrip()
        if CLOSE.startswith(rest):
            return self._leave("") if rest == CLOSE else False
        return self._leave(rest.removeprefix(CLOSE))

    def _leave(self, rest: str) -> bool:
        self._held, self._step, self._after_call = rest, self._outside, True
        return True

    def _take_whole(self, body: str) -> bool:
        """A call whose fields stand in another order, or whose arguments are JSON in a string."""
        try:
            call = msgspec.json.decode(body, type=_Written)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return False
        if call.name not in self._names:
            return False
        arguments = call.arguments
        if not isinstance(arguments, str):
            arguments = msgspec.json.encode(arguments).decode()
        self._begin(call.name, arguments)
        return True

    def _begin(self, name: str, arguments: str = "") -> None:
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        self._add(CallPiece(self.count, arguments, call_id, name))
        self.count += 1

    def _add(self, piece: CallPiece) -> None:
        """Each call once in what is found: clients tell the entries of one delta by their index."""
        if self._calls and self._calls[-1].index == piece.index:
            last = self._calls.pop()
            piece = msgspec.structs.replace(last, arguments=last.arguments + piece.arguments)
        self._calls.append(piece)


class _Written(msgspec.Struct):
    name: str
    arguments: dict[str, Any] | str


class _ObjectEnd:
    """Where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.found = False

    def find(self, text: str) -> int:
        """How many characters of the next piece, ``text``, belong to the object."""
        for index, letter in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if not self._depth:
                    self.found = True
                    return index + 1
        return len(text)


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
