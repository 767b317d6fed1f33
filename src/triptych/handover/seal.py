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

import logging
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import xxhash

from triptych.contract import ITEM_ALIGNMENT
from triptych.errors import InvalidValue

logger = logging.getLogger("triptych.handover")

HEADER_BYTES = ITEM_ALIGNMENT
_HEADER = struct.Struct("<8sQ48x")
_MAGIC = b"TRIPTYCH"
_CHUNK = 1 << 20
"""Words that `_sum` takes at a time."""


def write_header(place: torch.Tensor, generation: int) -> None:
    """Put a header at ``place``, uint8, shape (64,)."""
    header = torch.frombuffer(bytearray(_HEADER.pack(_MAGIC, generation)), dtype=torch.uint8)
    # CUDA has taken bytes of pageable memory when it returns; nobody has to wait for the device.
    place.copy_(header, non_blocking=True)


def read_header(place: torch.Tensor) -> int | None:
    """The generation in the header at ``place``; None: there is no header."""
    return _generation(place.cpu().numpy().tobytes())


def _generation(header: bytes) -> int | None:
    magic, generation = _HEADER.unpack(header)
    return int(generation) if magic == _MAGIC else None


def wipe_header(place: torch.Tensor) -> None:
    """End the generation at ``place``."""
    place.zero_()


def checksums(pieces: Sequence[torch.Tensor], kind: str = "") -> list[str]:
    """``<kind>:<16 hex digits>`` of each of some uint8 tensors of shape (n,), on one device.

    Args:
        pieces: The tensors.
        kind: ``xxh3``, for the host, is XXH3-64 (https://xxhash.com). ``sum64``, which a GPU
            computes itself, is Σ (2i+1)·M·word[i] + bytes, modulo 2⁶⁴, M odd, so that whatever
            changes in one word changes it. Empty: the fitting one.
    """
    if not pieces:
        return []
    if (kind or ("sum64" if pieces[0].is_cuda else "xxh3")) == "xxh3":
        return [_xxh3(piece) for piece in pieces]
    sums = _sums(pieces).tolist()
    return [_sum64(*each) for each in zip(sums, pieces, strict=True)]


def examine(
    header: torch.Tensor, pieces: Sequence[torch.Tensor], expected: Sequence[str]
) -> tuple[int | None, list[bool]]:
    """What a reader verifies. The device is waited for once.

    Args:
        header: uint8, shape (64,).
        pieces: uint8, shape (n,) each.
        expected: The checksum of each.

    Returns:
        The generation in the header, None if there is no header; and of each piece, whether it
        has its checksum.

    Raises:
        InvalidValue: A checksum is of no form that `checksums` makes.
    """
    kinds = {checksum.partition(":")[0] for checksum in expected}
    if unknown := kinds - {"xxh3", "sum64"}:
        raise InvalidValue(f"there is no checksum {min(unknown)!r}")
    if kinds == {"sum64"} and header.device.type == "cuda":
        words = header.view(torch.int64)
        told = torch.cat([words, _sums(pieces)]).cpu()
        generation = _generation(told[: words.numel()].numpy().tobytes())
        sums = told[words.numel() :].tolist()
    else:
        generation = read_header(header)
        pieces = [piece.cpu() for piece in pieces]
        sums = _sums(pieces).tolist() if "sum64" in kinds else [0] * len(pieces)
    return generation, [
        wanted == (_xxh3(piece) if wanted.startswith("xxh3:") else _sum64(total, piece))
        for wanted, total, piece in zip(expected, sums, pieces, strict=True)
    ]


def _xxh3(piece: torch.Tensor) -> str:
    return f"xxh3:{xxhash.xxh3_64_intdigest(piece.numpy()):016x}"


def _sum64(total: int, piece: torch.Tensor) -> str:
    return f"sum64:{(total + piece.numel()) % (1 << 64):016x}"


def _sums(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ (2i+1)·M·word[i] of each, int64, shape (pieces,), where they are."""
    words = []
    for piece in pieces:
        # A copy, but for whole words: those of an empty tensor have no stride to be viewed by.
        if not piece.numel() or piece.numel() % 8:
            piece = torch.nn.functional.pad(piece, (0, -piece.numel() % 8 or 8))
        words.append(piece.contiguous().view(torch.int64))
    if words[0].is_cuda and (kernel := _kernel()):
        return kernel(words)
    return torch.stack([_sum(each) for each in words])


@lru_cache(maxsize=1)
def _kernel() -> Callable[[Sequence[torch.Tensor]], torch.Tensor] | None:
    """`_sum` of several tensors as one kernel each; None: this machine cannot compile it."""
    try:
        from triptych.handover.seal_cuda import sums

        sums([torch.zeros(1, dtype=torch.int64, device="cuda")])
    except Exception as error:
        logger.warning("embeddings are sealed with PyTorch's operations, more slowly: %s", error)
        return None
    return sums


def _sum(words: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK]
        weights = _weights(words.device)[: part.numel()] + _signed(2 * start * MIX)
        total += (part * weights).sum()
    return total


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


MIX = 0x9E3779B97F4A7C15 - (1 << 64)
"""M, as a signed word."""


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> torch.Tensor:
    return (torch.arange(_CHUNK, device=device) * 2 + 1) * MIX
