from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from triptych.engines.token_bytes import token_bytes


@given(st.text(min_size=1))
def test_reads_what_a_byte_level_tokenizer_writes(text: str) -> None:
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert b"".join(token_bytes(piece) or b"" for piece, _ in pieces) == text.encode()


@pytest.mark.parametrize(
    ("piece", "expected"),
    [("<0xE2>", b"\xe2"), ("Ġred", b" red"), ("▁red", None), ("日", None)],
)
def test_other_forms(piece: str, expected: bytes | None) -> None:
    assert token_bytes(piece) == expected
