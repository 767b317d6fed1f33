"""What a reader verifies: a header before the bytes, and a checksum of each item's bytes.

The header names the generation of what lies there. The owner wipes it when a lease ends, so a
reader that comes late learns that, whatever lies there by then. A checksum finds what came late
during the transfer, and bytes that were damaged on the way.

    bytes   0  8  magic, "TRIPTYCH"
            8  8  generation, little-endian
           16 48  zero

Checksums, measured over 16 MB on one core of a server's CPU: xxh3 0.27 ms, blake3 1.9 ms, crc32
2.5 ms; a copy takes 0.5 ms. They are against accidents, not against malice: who may write into
an encoder's memory needs no collision.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
import xxhash

from triptych.contract import ITEM_ALIGNMENT
from triptych.errors import InvalidValue

HEADER_BYTES = ITEM_ALIGNMENT
_HEADER = struct.Struct("<8sQ48x")
_MAGIC = b"TRIPTYCH"
_CHUNK = 1 << 20
"""Words that `_sum64` takes at a time."""


def write_header(place: torch.Tensor, generation: int) -> None:
    """Put a header at ``place``, uint8, shape (64,)."""
    place.copy_(torch.frombuffer(bytearray(_HEADER.pack(_MAGIC, generation)), dtype=torch.uint8))


def read_header(place: torch.Tensor) -> int | None:
    """The generation in the header at ``place``; None: there is no header."""
    magic, generation = _HEADER.unpack(place.cpu().numpy().tobytes())
    return int(generation) if magic == _MAGIC else None


def wipe_header(place: torch.Tensor) -> None:
    """End the generation at ``place``."""
    place.zero_()


def checksum(data: torch.Tensor, kind: str = "") -> str:
    """``<kind>:<16 hex digits>`` of uint8 bytes of shape (n,).

    Args:
        data: On any device.
        kind: ``xxh3``, which is XXH3-64 (https://xxhash.com), or ``sum64``, which a GPU can
            compute (written for it, never run on one); empty: the fitting one.

    Raises:
        InvalidValue: There is no such kind.
    """
    kind = kind or ("xxh3" if data.device.type == "cpu" else "sum64")
    if kind == "xxh3":
        value: int = xxhash.xxh3_64_intdigest(data.cpu().numpy())
    elif kind == "sum64":
        value = _sum64(data)
    else:
        raise InvalidValue(f"there is no checksum {kind!r}")
    return f"{kind}:{value:016x}"


def verify(data: torch.Tensor, expected: str) -> bool:
    """Whether ``data`` has the checksum ``expected``.

    Raises:
        InvalidValue: ``expected`` is not of a form that `checksum` makes.
    """
    return checksum(data, expected.partition(":")[0] or "none") == expected


def _sum64(data: torch.Tensor) -> int:
    """Σ (2i+1)·M·word[i] + bytes, modulo 2⁶⁴, M odd: whatever changes in one word changes it."""
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, data.numel(), 8 * _CHUNK):
        part = data[start : start + 8 * _CHUNK]
        if short := -part.numel() % 8:
            part = torch.nn.functional.pad(part, (0, short))
        words = part.contiguous().view(torch.int64)
        weights = _weights(data.device)[: words.numel()] + _signed((start // 4) * _MIX)
        total += (words * weights).sum()
    value: int = int(total.item()) + data.numel()
    return value % (1 << 64)


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_MIX = 0x9E3779B97F4A7C15 - (1 << 64)


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> torch.Tensor:
    return (torch.arange(_CHUNK, device=device) * 2 + 1) * _MIX
