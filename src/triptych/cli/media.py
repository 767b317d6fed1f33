"""Files and URLs on the command line as parts of a message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from triptych_client import Part, audio, image, video
from triptych_client.media import Modality, is_url, modality_of

MAKE: dict[Modality, Callable[[str], Part]] = {"image": image, "video": video, "audio": audio}
SUFFIXES: dict[str, Modality] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp"), "image"),
    **dict.fromkeys((".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"), "video"),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".m4a", ".opus"), "audio"),
}
"""Of URLs; a file here tells by its first bytes."""


def part_of(source: str) -> Part:
    """The content part of a medium.

    Raises:
        MediaError: The file is not there, or is no medium.
    """
    return MAKE[modality(source)](source)


def modality(source: str) -> Modality:
    """What a file or URL holds, by the file's bytes or the URL's end; or else a picture.

    Raises:
        MediaError: The file is not there, or is no medium.
    """
    if not is_url(source):
        return modality_of(Path(source))
    parts = urlsplit(source)
    if parts.scheme.lower() == "data":
        kind = parts.path.partition("/")[0].lower()
        return "video" if kind == "video" else "audio" if kind == "audio" else "image"
    return suffix_of(source) or "image"


def suffix_of(text: str) -> Modality | None:
    """What the end of a path or URL says that it is; None: nothing."""
    return SUFFIXES.get(PurePosixPath(urlsplit(text).path).suffix.lower())
