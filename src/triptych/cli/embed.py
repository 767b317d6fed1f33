"""``triptych embed``: what a running server's encoder makes of media, as files for its API."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import msgspec

from triptych.cli.media import part_of
from triptych.cli.output import print_json, waiting
from triptych_client import Client, Encoded, Part, TriptychClientError
from triptych_client.media import is_url

SUFFIX = ".safetensors"


class Work(msgspec.Struct, frozen=True):
    """One medium, and the file that it becomes."""

    source: str
    part: Part
    target: Path


class Row(msgspec.Struct, frozen=True):
    """What ``--json`` tells of a file."""

    source: str
    file: str
    modality: str
    tokens: int
    width: int
    dtype: str
    grid_thw: tuple[int, int, int] | None
    bytes: int
    """Of the file."""
    seconds: float
    """From the question to the answer."""


def plan(media: Sequence[str], output: str, *, force: bool) -> list[Work]:
    """What to encode into which file.

    Args:
        media: Files and URLs.
        output: A directory, or for a single medium a file; empty: this directory.
        force: Overwrite files that are there.

    Raises:
        MediaError: A file is not there, or is no medium.
        ValueError: There is no such directory, or a file is there already.
    """
    place = Path(output or ".")
    if place.is_dir():
        targets = [place / (_stem(source) + SUFFIX) for source in media]
    elif len(media) > 1:
        raise ValueError(f"{len(media)} media go into a directory, and {place} is none")
    elif not place.parent.is_dir():
        raise ValueError(f"there is no directory {place.parent}")
    else:
        targets = [place]
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(f"two media would become {target}")
        if target.exists() and not force:
            raise ValueError(f"{target} is there already; --force overwrites it")
    return [Work(*each) for each in zip(media, map(part_of, media), targets, strict=True)]


def embed(
    works: Sequence[Work],
    client: Client,
    *,
    model: str,
    timeout: float | None,
    as_json: bool,
    complain: Callable[[str], None],
) -> int:
    """Encode and write one after the other, and print a line for each; stop at the first failure.

    Returns:
        The exit code.
    """
    with client:
        for count, work in enumerate(works, 1):
            began = time.perf_counter()
            of = f" ({count} of {len(works)})" if len(works) > 1 else ""
            try:
                with waiting(f"encoding {work.source}{of}"):
                    encoded = client.embed(work.part, model=model, timeout=timeout)
                encoded.save(work.target)
            except TriptychClientError as error:
                complain(f"{work.source}: {error.what} ({error.code})")
                return 1
            except OSError as error:
                complain(f"{work.target} cannot be written: {error.strerror}")
                return 1
            row = _row(work, encoded, time.perf_counter() - began)
            print_json(row) if as_json else _print(row)
    return 0


def _row(work: Work, encoded: Encoded, seconds: float) -> Row:
    tokens, width = encoded.shape
    return Row(
        source=work.source,
        file=str(work.target),
        modality=encoded.modality,
        tokens=tokens,
        width=width,
        dtype=encoded.dtype,
        grid_thw=encoded.grid_thw,
        bytes=work.target.stat().st_size,
        seconds=round(seconds, 4),
    )


def _print(row: Row) -> None:
    print(  # noqa: T201
        f"{row.file}: {row.modality}, {row.tokens} tokens × {row.width} {row.dtype}, "
        f"{row.bytes / 1024:.0f} KiB, {row.seconds:.2f} s"
    )


def _stem(source: str) -> str:
    if not is_url(source):
        return Path(source).stem
    parts = urlsplit(source)
    return (PurePosixPath(parts.path).stem if parts.scheme != "data" else "") or "medium"
