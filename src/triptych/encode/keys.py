"""What embeddings are known by. Imports no torch: preprocess makes the same keys."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import blake3
import msgspec

from triptych.contract import Item
from triptych.families.checkpoint import Checkpoint

_HEADER_LENGTH_BYTES = 8
"""A safetensors file begins with its header's length, little-endian."""
_MAX_HEADER_BYTES = 64 << 20


def content_key(item: Item, data: memoryview) -> str:
    """blake3, hex, of what the tower is given: the bytes, and how they are to be read.

    `Item.hash` has no part in it. Whoever reaches the encoder writes what he likes there, so it
    may name an item and never find one.

    Args:
        item: Its modality, dtype, shape, tokens and grid count.
        data: The item's bytes in MEDIA.
    """
    reading = (item.modality, item.dtype, item.shape, item.tokens, item.grid_thw)
    digest = blake3.blake3(msgspec.json.encode(reading))
    return digest.update(data).hexdigest()


def revision(checkpoint: Checkpoint, settings: Iterable[str]) -> str:
    """blake3, hex, of the weights and all else that decides what embeddings come out.

    The weights are known by what a changed file cannot keep: path, size, time of change and
    header. Reading them whole would take as long as loading them.

    Args:
        checkpoint: Its configurations and weight files count.
        settings: What else does: device kind, dtype.

    Raises:
        ConfigurationError: The checkpoint is broken.
    """
    digest = blake3.blake3(msgspec.json.encode([*settings]))
    for file in sorted(checkpoint.path.glob("*config*.json")):
        digest.update(file.name.encode()).update(file.read_bytes())
    for file in sorted(set(checkpoint.weight_files.values())):
        known = file.stat()
        digest.update(f"{file.name} {known.st_size} {known.st_mtime_ns}".encode())
        digest.update(_header(file))
    return digest.hexdigest()


def _header(file: Path) -> bytes:
    with open(file, "rb", buffering=0) as opened:
        length = int.from_bytes(opened.read(_HEADER_LENGTH_BYTES), "little")
        return os.pread(opened.fileno(), min(length, _MAX_HEADER_BYTES), _HEADER_LENGTH_BYTES)
