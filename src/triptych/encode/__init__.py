"""Turns the media of several requests into embeddings on one device, and none of them twice.

    encoder        the tower: requests in, embeddings and tickets out, a batch at a time
    jobs           what there is to encode in a batch, every medium once
    cache          embeddings kept by content: LRU, bounded, pinned while in use
    keys           what a content is known by
    lookup         how preprocess learns what is held: messages and sockets
    lookup_server  the encoder's side       lookup_client  preprocess's side
    peers          leases of other instances

The names are bound on first use: preprocess needs the look-up, and must not pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triptych.encode.encoder import Encoded, Encoder

__all__ = ["Encoded", "Encoder"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("triptych.encode.encoder"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
