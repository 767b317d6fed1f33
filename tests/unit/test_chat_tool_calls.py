from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.chat.tool_calls import CLOSE, OPEN, ToolCallReader

NAMES = ["paint", "get_weather"]


def read(*pieces: str) -> tuple[str, list[list[str]]]:
    """The content, and each call's name and arguments, of an answer that comes in pieces."""
    reader = ToolCallReader(NAMES)
    content, calls = "", []
    for found in [*(reader.feed(piece) for piece in pieces), reader.end()]:
        content += found.content
        for piece in found.calls:
            if piece.id:
                assert piece.index == len(calls)
                calls.append([piece.name, ""])
            calls[piece.index][1] += piece.arguments
    assert reader.count == len(calls)
    return content, calls


def call(name: str = "paint", arguments: str = "{}") -> str:
    return f'{OPEN}\n{{"name": "{name}", "arguments": {arguments}}}\n{CLOSE}'


TRICKY = '{"a": "} </tool_call> \\" {", "b": [{"c": {}}], "d": "\\\\"}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (call(), "", [["paint", "{}"]]),
        (f"First.\n{call()}\nThen.", "First.\n\nThen.", [["paint", "{}"]]),
        (f"{call()}\n{call('get_weather')}\n", "", [["paint", "{}"], ["get_weather", "{}"]]),
        (call(arguments=TRICKY), "", [["paint", TRICKY]]),
        (
            '<tool_call>{"name":"paint","arguments":{"a":1}}</tool_call>',
            "",
            [["paint", '{"a":1}']],
        ),
        (
            '<tool_call>{"arguments": {"a": 1}, "name": "paint"}</tool_call>',
            "",
            [["paint", '{"a":1}']],
        ),
        (
            '<tool_call>{"name": "paint", "arguments": "{\\"a\\": 1}"}</tool_call>',
            "",
            [["paint", '{"a": 1}']],
        ),
        # What breaks off where the answer does, is told as far as it came.
        (call(arguments=TRICKY)[:60], "", [["paint", '{"a": "} </tool_c']]),
        (call()[: -len(CLOSE)], "", [["paint", "{}"]]),
    ],
)
def test_calls(text: str, content: str, calls: list) -> None:
    assert read(text) == (content, calls)
    assert read(*text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "Just text, with <b>tags</b> and a {brace}.",
        "An end: <tool_ca",
        "<tool_call>",
        "<tool_call> is how a call begins.",
        "<tool_call>{} and no more",
        call("unknown"),
        '<tool_call>{"name": "paint"}</tool_call>',
        '<tool_call>{"name": "paint", "arguments": 7}</tool_call>',
        "<tool_call>{not json}</tool_call> and text",
        '<tool_call>{"name": "pai',
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert read(text) == (text, [])
    assert read(*text) == (text, [])


def test_a_call_after_what_was_none_is_found() -> None:
    text = f"Say <tool_call> like so: {call('unknown')} {call()}"
    assert read(*text) == (f"Say <tool_call> like so: {call('unknown')} ", [["paint", "{}"]])


def test_what_stands_where_a_call_should_end_is_not_lost() -> None:
    text = '<tool_call>{"name": "paint", "arguments": {}} and so on'
    assert read(*text) == ("and so on", [["paint", "{}"]])


def test_arguments_come_as_they_are_written() -> None:
    reader = ToolCallReader(NAMES)
    head, rest = call(arguments='{"a": "b"}').split("{", 1)[0], call(arguments='{"a": "b"}')
    assert reader.feed(head).calls == []
    pieces = [reader.feed(rest[start : start + 4]) for start in range(len(head), len(rest), 4)]
    told = [piece.arguments for found in pieces for piece in found.calls if piece.arguments]
    assert "".join(told) == '{"a": "b"}'
    assert len(told) > 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(), JSON, max_size=3))
WORDS = st.text(st.characters(exclude_characters="<"), min_size=1)


@given(st.lists(CALLS, max_size=3), WORDS, st.lists(st.integers(0, 300), max_size=6))
def test_every_call_is_read_however_the_text_is_cut(
    calls: list, words: str, cuts: list[int]
) -> None:
    written = [call(name, json.dumps(arguments)) for name, arguments in calls]
    text = "\n".join([words, *written])
    edges = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    content, found = read(*pieces)
    assert [[name, json.loads(text)] for name, text in found] == [list(pair) for pair in calls]
    assert content.strip() == words.strip()


@given(st.text(st.sampled_from('<>{}"\\/tool_call namegumts:, \n'), max_size=80), st.text())
def test_no_text_is_lost(some: str, more: str) -> None:
    text = f"{some}{more}"
    content, calls = read(*text)
    assert calls or content == text
