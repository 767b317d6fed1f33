from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.engines.stops import StopStrings


def said(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """What is let through of each piece and at the end, and whether a stop string ended it."""
    found, passed = StopStrings(stops), []
    for piece in pieces:
        text, stopped = found.add(piece)
        passed.append(text)
        if stopped:
            return passed, True
    return [*passed, found.rest()], False


@given(
    text=st.text("abc", max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    cuts=st.sets(st.integers(0, 12)),
)
def test_however_it_is_cut_the_answer_ends_before_the_first(
    text: str, stops: list[str], cuts: set[int]
) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    passed, stopped = said(pieces, stops)
    # The first that is complete ends it; of several in one piece, the first to begin.
    whole = "".join(passed)
    assert text.startswith(whole)
    assert not any(stop in whole for stop in stops)
    assert stopped == any(stop in text for stop in stops)
    if stopped:
        assert any(text.startswith(stop, len(whole)) for stop in stops)
    else:
        assert whole == text


@pytest.mark.parametrize(
    ("pieces", "passed", "stopped"),
    [
        (["a", "b", "c"], ["a", "b", "c", ""], False),
        (["x<", "en", "d>y"], ["x", "", ""], True),
        (["x<e", "lse"], ["x", "<else", ""], False),
        (["x<e"], ["x", "<e"], False),
        (["<<end>"], ["<"], True),
        (["<<e", "nd>"], ["<", ""], True),
    ],
)
def test_only_what_may_begin_a_stop_string_is_held_back(
    pieces: list[str], passed: list[str], stopped: bool
) -> None:
    assert said(pieces, ["<end>"]) == (passed, stopped)
