"""The command on a real terminal, before a server that says back word by word."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest

from pictures import encoded, noise
from triptych.server import Server

pytestmark = pytest.mark.server

COMMAND = str(Path(sys.executable).with_name("triptych"))
LONG = " ".join(f"word{number}" for number in range(400))
"""Takes the server twenty seconds to say back."""
WAIT_S = 60
"""For anything that is to appear; nothing here is timed."""
PROMPT = "› "


@pytest.fixture(scope="module")
def slow_server(start_server: Callable[..., Server]) -> Iterator[Server]:
    server = start_server("echo", echo_token_delay_s=0.05)
    yield server
    server.stop()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Where the sessions run, with a picture."""
    (tmp_path / "a picture.png").write_bytes(encoded(noise(64, 48, seed=9), "png"))
    return tmp_path


@contextmanager
def terminal(server: Server | str, here: Path, *arguments: str) -> Iterator[pexpect.spawn]:
    """``triptych chat`` on a terminal of its own."""
    address = server if isinstance(server, str) else f"localhost:{server.grpc_port}"
    child = pexpect.spawn(
        COMMAND,
        ["chat", *arguments, "--server", address, "--model", "chat_echo"],
        cwd=here,
        env={
            **os.environ,
            "TERM": "xterm-256color",
            "XDG_STATE_HOME": str(here / "state"),
            "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody here answers where the cursor is
        },
        encoding="utf-8",
        timeout=WAIT_S,
        dimensions=(50, 400),  # wide, so that what is looked for is not wrapped
    )
    try:
        yield child
    finally:
        child.close(force=True)


def ask(child: pexpect.spawn, line: str) -> None:
    child.expect(PROMPT)
    child.send(line + "\r")


def left(child: pexpect.spawn) -> int | None:
    """The exit code of a session that is to end."""
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def leave(child: pexpect.spawn) -> None:
    """Ctrl-D, which ends the session well."""
    child.expect(PROMPT)
    child.sendeof()
    assert left(child) == 0


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)


def test_a_conversation_with_a_picture(slow_server: Server, here: Path) -> None:
    with terminal(slow_server, here) as child:
        ask(child, "'a picture.png' What is **in** it?")
        child.expect(r"image 0: \d+×\d+ float32, crc32")
        child.expect("What is")  # said back
        child.expect("time to first token")
        child.expect("0 of 1 media cached")
        ask(child, "And now?")
        child.expect("image 0: ")
        child.expect("What is")
        child.expect("And now")
        child.expect("1 of 1 media cached")
        leave(child)


def test_ctrl_c_stops_the_answer_alone(slow_server: Server, here: Path) -> None:
    with terminal(slow_server, here) as child:
        ask(child, LONG)
        child.expect("prompt: ")
        child.expect("word7 ")
        child.sendintr()
        child.expect("stopped")
        assert "word399" not in plain(child.before)
        child.expect(PROMPT)
        child.send("half a line")
        child.sendintr()  # begins the line anew
        ask(child, "/save said.json")
        child.expect("saved 2 messages")
        ask(child, "/exit")
        assert left(child) == 0
    _, answer = json.loads((here / "said.json").read_text())
    assert "word7" in answer["content"]
    assert "word399" not in answer["content"]


def test_commands(slow_server: Server, here: Path) -> None:
    with terminal(slow_server, here, "a picture.png") as child:
        child.expect("attached: image a picture.png")
        ask(child, "/undo")
        child.expect("nothing is attached")
        ask(child, "/image 'a picture.png'")
        child.expect("attached: image a picture.png")
        ask(child, "/audio 'a picture.png'")
        child.expect("is no audio of a known format")
        child.send("\x15/claer\r")  # the line that failed stands there again
        child.expect("there is no command /claer")
        child.send("\x15/nowhere/b.png What?\r")
        child.expect("there is no file /nowhere/b.png")
        child.send("\x15One?\r")
        child.expect("image 0: ")
        child.expect("time to first token")
        ask(child, "Two?")
        child.expect("Two")
        child.expect("time to first token")
        ask(child, "/undo")
        child.expect("are forgotten")
        ask(child, "/save said.json")
        child.expect("saved 2 messages to said.json")
        ask(child, "/save said.json")
        child.expect("File exists")
        child.send("\x15/clear\r")
        child.expect("a new conversation")
        ask(child, "/help")
        child.expect("Alt-Enter")
        for name in ("/image", "/video", "/audio", "/undo", "/clear", "/save", "/exit"):
            assert name in plain(child.before)
        leave(child)
    question, answer = json.loads((here / "said.json").read_text())
    assert [part["type"] for part in question["content"]] == ["image_url", "text"]
    assert question["content"][1]["text"] == "One?"
    assert answer["role"] == "assistant"
    assert "One?" in answer["content"]


def test_lines_that_are_pasted_are_one_question(slow_server: Server, here: Path) -> None:
    with terminal(slow_server, here) as child:
        ask(child, "\x1b[200~first line\nsecond line\x1b[201~")
        child.expect("assistant")  # the end of what is said back
        said = plain(child.before)
        assert "first line" in said
        assert "second line" in said
        child.expect("time to first token")


def test_questions_are_kept_for_the_next_session(slow_server: Server, here: Path) -> None:
    with terminal(slow_server, here) as child:
        ask(child, "a rare word")
        child.expect("time to first token")
        leave(child)
    with terminal(slow_server, here) as child:
        child.expect(PROMPT)
        child.send("\x1b[A")
        child.expect("a rare word")
    kept = here / "state" / "triptych" / "questions"
    assert kept.stat().st_mode & 0o077 == 0


def test_tab_completes_commands_and_paths(slow_server: Server, here: Path) -> None:
    (here / "folder").mkdir()
    (here / "folder" / "b.png").write_bytes(encoded(noise(8, 8), "png"))
    with terminal(slow_server, here) as child:
        child.expect(PROMPT)
        child.send("/im")
        child.expect("im")
        child.send("\t")
        child.expect("age")
        child.send("fol\t")
        child.expect("der")
        child.send("/b\t")
        child.expect(".png")
        child.send("\r")
        child.expect("attached: image b.png")


def test_a_session_needs_a_server(here: Path) -> None:
    with terminal("localhost:1", here) as child:
        child.expect("no model chat_echo answers at localhost:1: start a server")
        assert left(child) == 1


def test_ctrl_c_ends_one_question_with_130(slow_server: Server, here: Path) -> None:
    with terminal(slow_server, here, LONG) as child:
        child.expect("waiting for the answer")
        child.expect("word3 ")
        child.sendintr()
        assert left(child) == 130
