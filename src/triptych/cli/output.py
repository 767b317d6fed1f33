"""What the commands print for programs."""

from __future__ import annotations

import sys

import msgspec


def print_json(value: object) -> None:
    """``value`` on a line of stdout, at once: whoever reads it may be waiting for it."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()
