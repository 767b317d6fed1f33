"""Media: from what a caller names to arrays that a tower takes.

    policy      who may be asked: hosts, addresses, files
    fetch       http and https               datauri     data: URIs
    sniff       what the bytes are           cache       content, URLs, work in flight
    pool        bounded worker processes     worker      what runs in them
    image, video, audio, embeddings          the decoders; they run in workers only
    loader      all of it behind one call, `MediaLoader.load`

The names are bound on first use, because a worker process imports this package and must not
pay for the HTTP client that only the loader needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from triptych.media.base import Loaded, MediaOptions, Planner

if TYPE_CHECKING:
    from triptych.media.loader import MediaLoader

__all__ = ["Loaded", "MediaLoader", "MediaOptions", "Planner"]


def __getattr__(name: str) -> object:
    if name == "MediaLoader":
        return import_module("triptych.media.loader").MediaLoader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
