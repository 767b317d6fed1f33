"""Fetches embeddings from another instance of the same encoder.

Triton sends a request to whichever instance is free, and preprocess may have its lease from
another: one a GPU, or two on one GPU so that a long video does not hold up a picture.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch

from triptych.contract import Item
from triptych.encode import lookup, recall
from triptych.encode.lookup import Take, Taken

logger = logging.getLogger("triptych.encode.lookup")

TIMEOUT_S = 5.0
"""For the whole of one transfer's step; the other side answers while it encodes."""


@dataclass(frozen=True)
class Fetched:
    """What another instance held."""

    key: str
    item: Item
    embeddings: torch.Tensor
    """(tokens, width), in host memory."""
    seconds: float
    """What encoding it took there."""


class Peers:
    """The other encoder instances of this tritonserver, and its preprocess.

    Args:
        folder: Where their sockets are.
        revision: Of this instance's tower; another's is refused.
    """

    def __init__(self, folder: Path, revision: str) -> None:
        self._folder = folder
        self._revision = revision

    def again(self, lost: str) -> str | None:
        """Another lease for one that nobody has any more, if preprocess can come by one."""
        return recall.again(self._folder, lost)

    def take(self, lease: str) -> Fetched | None:
        """What another instance leased; None: it has none such, or cannot be asked."""
        try:
            address = lookup.address(self._folder, lease.partition("/")[0])
            if not lookup.private(self._folder):
                return None
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(TIMEOUT_S)
                connection.connect(str(address))
                connection.sendall(lookup.line(Take(0, lease, self._revision)))
                with connection.makefile("rb") as stream:
                    return _read(stream)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            logger.warning("another encoder instance could not be asked: %s", error)
            return None


def _read(stream: BinaryIO) -> Fetched | None:
    reply = lookup.read_reply(stream.readline(lookup.MAX_LINE_BYTES))
    if not isinstance(reply, Taken):
        return None
    data = bytearray(reply.nbytes)
    view, done = memoryview(data), 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise ConnectionResetError(f"{done} of {len(view)} bytes came")
        done += count
    embeddings = torch.frombuffer(data, dtype=getattr(torch, reply.dtype)).view(reply.shape)
    return Fetched(reply.key, reply.item, embeddings, reply.seconds)
