"""Turns the media of several requests into embeddings on one device, a batch at a time."""

from __future__ import annotations

from triptych.encode.encoder import Encoded, Encoder

__all__ = ["Encoded", "Encoder"]
