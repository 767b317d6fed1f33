from __future__ import annotations

import base64
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.errors import MediaError, MediaTooLarge, MediaType, MediaUnreadable
from triptych.media import datauri
from triptych.media.sniff import describe, sniff


@given(st.binary(max_size=300), st.sampled_from(["image/png", "", "video/MP4;codecs=x"]))
def test_round_trip(data, kind):
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    assert datauri.decode(uri, max_bytes=300) == (data, kind.lower().split(";")[0])


@given(st.text(max_size=80))
def test_no_text_breaks_it(text):
    for uri in (text, f"data:{text}", f"data:image/png;base64,{text}"):
        with suppress(MediaError):
            datauri.decode(uri, max_bytes=20)


@given(st.binary(max_size=64))
def test_no_bytes_break_sniffing(data):
    assert sniff(data) is not None or describe(data)


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("data:image/png,plain", MediaType),
        ("data:image/png;base64", MediaUnreadable),
        ("data:" + "x" * 300 + ";base64,AAAA", MediaUnreadable),
        ("data:image/png;base64,AAA", MediaUnreadable),
        ("data:image/png;base64,AA A", MediaUnreadable),
        ("data:image/png;base64,AAAA\n", MediaUnreadable),
        ("data:image/png;base64,AA-_", MediaUnreadable),
        ("data:image/png;base64,A===", MediaUnreadable),
        ("data:image/png;base64,ÄÄÄÄ", MediaUnreadable),
        ("data:image/png;base64," + "A" * 400, MediaTooLarge),
    ],
)
def test_refused(uri, error):
    with pytest.raises(error):
        datauri.decode(uri, max_bytes=200)


def test_the_limit_is_exact():
    uri = "data:;base64," + base64.b64encode(bytes(100)).decode()
    assert len(datauri.decode(uri, max_bytes=100)[0]) == 100
    with pytest.raises(MediaTooLarge, match=r"100 bytes, over the limit of 99"):
        datauri.decode(uri, max_bytes=99)
