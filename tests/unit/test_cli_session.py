"""What a line of a session means, and how an answer is drawn."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from triptych.cli import compose
from triptych.cli.chat import is_medium
from triptych.cli.compose import Line
from triptych.cli.live import LiveAnswer, finished
from triptych.cli.meter import Meter
from triptych.cli.session import COMMANDS
from triptych_client import Chunk, MediaUnreachable, Stages, Usage

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 8


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with pictures, where the session is."""
    for name in ("a.png", "b c.png", "it's.png", "noend", "dir.d/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PNG)
    (tmp_path / "text.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "text", "media"),
    [
        ("What is it?", "What is it?", []),
        ("a.png What is it?", "What is it?", ["a.png"]),
        ("What is it? a.png", "What is it?", ["a.png"]),
        ("  'b c.png'   What is it?", "What is it?", ["b c.png"]),
        (r"b\ c.png What is it?", "What is it?", ["b c.png"]),
        ('"b c.png" a.png Compare.', "Compare.", ["b c.png", "a.png"]),
        ("Compare a.png with dir.d/d.png, please", "Compare a.png with dir.d/d.png, please", None),
        ("Compare a.png with dir.d/d.png please", "Compare a.png with d.png please", None),
        ("a.png", "", ["a.png"]),
        ("HERE/a.png what?", "what?", ["HERE/a.png"]),
        ("file://HERE/b%20c.png what?", "what?", ["HERE/b c.png"]),
        ("~/a.png what?", "what?", ["HERE/a.png"]),
        ('"it\'s.png" what?', "what?", ["it's.png"]),
        ("it's what it's", "it's what it's", []),
        ("https://a.example/x.JPG?y=1 what?", "what?", ["https://a.example/x.JPG?y=1"]),
        ("What does https://a.example/ say?", "What does https://a.example/ say?", []),
        ("read text.txt and noend", "read text.txt and noend", []),
        ("1/2 is and/or what?", "1/2 is and/or what?", []),
        ("a.png\nfirst line\nsecond line", "first line\nsecond line", ["a.png"]),
        ("", "", []),
        ("x" * 5000 + ".png", "x" * 5000 + ".png", []),
    ],
)
def test_a_question_and_the_media_in_it(
    here: Path, line: str, text: str, media: list[str] | None
) -> None:
    found = compose.read(line.replace("HERE", str(here)), COMMANDS)
    assert (found.command, found.text) == ("", text)
    if media is not None:
        assert list(found.media) == [source.replace("HERE", str(here)) for source in media]


def test_a_name_in_the_middle_is_a_medium_all_the_same() -> None:
    assert compose.read("Compare a.png with dir.d/d.png please", COMMANDS).media == (
        "a.png",
        "dir.d/d.png",
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/clear", Line(command="clear")),
        ("/image a.png 'b c.png'", Line("a.png 'b c.png'", command="image")),
        ("  /save  x.json ", Line("x.json", command="save")),
    ],
)
def test_commands(line: str, expected: Line) -> None:
    assert compose.read(line, COMMANDS) == expected


def test_what_begins_like_a_command(here: Path) -> None:
    with pytest.raises(ValueError, match="no command /claer; /help"):
        compose.read("/claer", COMMANDS)
    assert compose.read(f"{here}/a.png", COMMANDS).media == (f"{here}/a.png",)
    assert compose.read("/usr/bin is what?", COMMANDS).text == "/usr/bin is what?"


def test_a_file_that_is_not_there_is_not_sent_as_text() -> None:
    with pytest.raises(MediaUnreachable, match="there is no file /nowhere/x"):
        compose.read("/nowhere/x.png what?", COMMANDS)


def test_words_of_a_command() -> None:
    assert compose.words(r"""a.png 'b c' "d e" f\ g""") == ["a.png", "b c", "d e", "f g"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.png", True), ("What?", False), ("What is in /tmp/a.png?", False), ("text.txt", False)],
)
def test_a_medium_in_place_of_a_question(text: str, expected: bool) -> None:
    assert is_medium(text) is expected


def test_a_medium_in_place_of_a_question_that_is_not_there() -> None:
    with pytest.raises(MediaUnreachable):
        is_medium("./nothing.png")


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("one", "one"),
        ("one\ntwo", "one\ntwo"),
        ("one\n\ntwo", "two"),
        ("one\n \ntwo\n\n", ""),
        ("one\n\n```\ncode\n\nmore", "```\ncode\n\nmore"),
        ("```\ncode\n\nmore\n```\n\nend", "end"),
        ("\n\none", "\n\none"),
    ],
)
def test_what_is_finished_is_not_drawn_again(text: str, rest: str) -> None:
    assert text[finished(text) :] == rest


def test_an_answer_is_drawn_whole_and_obeys_nobody() -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=60, legacy_windows=False)
    pieces = ("# He", "ad\n\nfirst\x1b[2J\n\n", "- one\n- t", "wo\n\n```\nx = 1\n\ny = 2\n```")
    with LiveAnswer(console) as answer:
        for piece in pieces:
            answer.add(piece)
    assert answer.text == "".join(pieces)
    assert "\x1b[2J" not in terminal.getvalue()
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    shown = [line.strip() for line in plain.splitlines()]
    for line in ("Head", "first\N{REPLACEMENT CHARACTER}[2J", "• one", "• two", "x = 1", "y = 2"):
        assert line in shown
    assert shown.count("first\N{REPLACEMENT CHARACTER}[2J") == 1, "what is finished stays"


def test_what_an_answer_took() -> None:
    meter = Meter()
    stages = Stages(
        preprocess_ms=1, encode_ms=2, prefill_ms=3, decode_ms=4, media=2, media_cached=1
    )
    usage = Usage(prompt_tokens=9, completion_tokens=3, total_tokens=12)
    chunks = [
        Chunk(id="", model="", created=0, text="a"),
        Chunk(id="", model="", created=0, text="b", finish_reason="length"),
        Chunk(id="", model="", created=0, usage=usage, stages=stages),
    ]
    assert list(meter.watch(chunks)) == chunks
    first, tokens, speed, *rest = meter.facts()
    assert first.startswith("time to first token")
    assert tokens.startswith("3 tokens in")
    assert speed.endswith("tokens/s")
    assert rest == ["9 tokens of prompt", "1 of 2 media cached"]
    assert list(meter.details()) == [
        *("preprocess 1 ms", "encode 2 ms", "prefill 3 ms", "decode 4 ms"),
        "finish reason length",
    ]
