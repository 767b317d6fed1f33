"""The bytes of one token, where its text cannot show them."""

from __future__ import annotations

import re

_HEX = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the rest from U+0100 on.

    Source: ``bytes_to_unicode`` in https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(rest)
    }


_ALPHABET = _byte_alphabet()


def token_bytes(piece: str) -> bytes | None:
    """The bytes of a token from its form in the vocabulary.

    Args:
        piece: As a byte-level BPE writes it (``Ġred``), or SentencePiece a single byte
            (``<0xE2>``).

    Returns:
        None for a form that is neither.
    """
    if match := _HEX.fullmatch(piece):
        return bytes([int(match[1], 16)])
    if all(letter in _ALPHABET for letter in piece):
        return bytes(_ALPHABET[letter] for letter in piece)
    return None
