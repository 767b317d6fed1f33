"""What a line of a session means: a command, or a question with the media that it names.

A file that is dragged onto a terminal arrives as its path, quoted or escaped as a shell would have
it, or as a ``file:`` URL.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from triptych.cli.media import SUFFIXES, suffix_of
from triptych_client import MediaUnreachable
from triptych_client.media import is_url, sniff

# Quoted, or without spaces but for escaped ones. A quote within a word is an apostrophe.
_WORD = re.compile(r"""'([^']+)'(?=\s|$)|"([^"]+)"(?=\s|$)|((?:\\.|\S)+)""")


class Line(msgspec.Struct, frozen=True):
    """A line that was read."""

    text: str = ""
    """Of the question, or what goes with the command."""
    media: tuple[str, ...] = ()
    """Files and URLs, in order."""
    command: str = ""
    """Without its slash; empty: it is a question."""


def read(line: str, commands: Collection[str]) -> Line:
    """What ``line`` means.

    Args:
        line: As it was typed, pasted or dragged; it may have several lines.
        commands: The names that there are, without the slash.

    Raises:
        ValueError: It begins like a command, and is none.
        MediaUnreachable: It names a file, by its directory and ending, that is not there.
    """
    line = line.strip()
    first, _, rest = line.partition(" ")
    if first.startswith("/"):
        if first[1:] in commands:
            return Line(rest.strip(), command=first[1:])
        if first.count("/") == 1 and not find(first):
            raise ValueError(f"there is no command {first}; /help lists those that there are")
    return _question(line)


def words(text: str) -> list[str]:
    """The paths in ``text``, without the quotes and escapes of a shell."""
    return [_plain(match) for match in _WORD.finditer(text)]


def find(word: str) -> str:
    """The medium that a word names; empty: it names none.

    Raises:
        MediaUnreachable: It names a file, by its directory and ending, that is not there.
    """
    if word.lower().startswith("file:"):
        word = unquote(urlsplit(word).path)
    elif is_url(word):
        return word if suffix_of(word) else ""
    if not {"/", "."} & set(word):
        return ""
    path = Path(word).expanduser()
    try:
        if path.is_file():
            with path.open("rb") as file:
                return str(path) if sniff(file.read(16)) else ""
    except (OSError, ValueError):  # too long for a name, or not ours to read
        return ""
    if "/" in word and path.suffix.lower() in SUFFIXES:
        raise MediaUnreachable(f"there is no file {word}")
    return ""


def _question(line: str) -> Line:
    """Media at the ends of the text leave it; one in the middle leaves its name."""
    pieces: list[str] = []
    media = []
    end = 0
    for match in _WORD.finditer(line):
        if found := find(_plain(match)):
            pieces += [line[end : match.start()], found]
            media.append(found)
            end = match.end()
    pieces.append(line[end:])
    while len(pieces) > 1 and not pieces[0].strip():
        del pieces[:2]
    while len(pieces) > 1 and not pieces[-1].strip():
        del pieces[-2:]
    pieces[1::2] = [Path(urlsplit(found).path).name for found in pieces[1::2]]
    return Line("".join(pieces).strip(), tuple(media))


def _plain(match: re.Match[str]) -> str:
    single, double, bare = match.groups()
    return single or double or re.sub(r"\\(.)", r"\1", bare)
