"""Pictures, clips and sounds, from wherever they are, as URLs that a request can carry."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from triptych_client.errors import MediaType, MediaUnreachable, MediaUnreadable

try:
    from pybase64 import b64encode  # several times faster on large pictures
except ImportError:
    from base64 import b64encode  # type: ignore[assignment]  # less optional arguments

Modality = Literal["image", "video", "audio"]


class SupportsArray(Protocol):
    """A numpy array, or what lends its memory like one."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


class SupportsSave(Protocol):
    """A `PIL.Image.Image`."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Write the picture into a file."""
        ...


Source: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | SupportsArray | SupportsSave
)

_URL = re.compile(r"(https?|data|file):", re.IGNORECASE)

# (offset, bytes there, type). RIFF, ISO media and Matroska say more further in.
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (8, b"WEBP", "image/webp"),
    (0, b"GIF8", "image/gif"),
    (0, b"II*\x00", "image/tiff"),
    (0, b"MM\x00*", "image/tiff"),
    (4, b"ftypavif", "image/avif"),
    (4, b"ftypheic", "image/heic"),
    (4, b"ftypmif1", "image/heif"),
    (8, b"WAVE", "audio/wav"),
    (0, b"fLaC", "audio/flac"),
    (0, b"ID3", "audio/mpeg"),
    (0, b"\xff\xf1", "audio/aac"),
    (0, b"\xff\xf9", "audio/aac"),
    (4, b"ftypM4A", "audio/mp4"),
    (8, b"AIFF", "audio/aiff"),
    (4, b"ftypqt", "video/quicktime"),
    (4, b"ftyp", "video/mp4"),
    (8, b"AVI ", "video/x-msvideo"),
    (0, b"\x1a\x45\xdf\xa3", "video/webm"),
    (0, b"FLV\x01", "video/x-flv"),
    (0, b"\x00\x00\x01\xba", "video/mpeg"),
    (0, b"\x00\x00\x01\xb3", "video/mpeg"),
    (0, b"OggS", "audio/ogg"),
    (0, b"BM", "image/bmp"),
)

SAFETENSORS = "application/octet-stream"
"""The type of embeddings, in a file that goes wherever its medium does."""
MAX_HEADER = 1 << 20
"""Bytes of such a file that may say what it holds."""

_CONTAINERS = {"video/mp4", "video/webm", "video/quicktime", "audio/mp4", "audio/ogg"}
"""May hold a clip as well as a sound."""


def sniff(head: bytes) -> str | None:
    """The MIME type of a file that begins with ``head``; 16 bytes are enough. None: unknown."""
    for offset, magic, mime in _MAGIC:
        if head.startswith(magic, offset):
            return mime
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 in (0xE2, 0xE4):
        return "audio/mpeg"  # a frame of MPEG layer III or II without a tag before it
    # The length of a JSON object, then the object.
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return SAFETENSORS
    return None


def modality_of(path: Path) -> Modality:
    """What kind of medium the file holds, by its first bytes.

    Raises:
        MediaUnreachable: The file is not there or may not be read.
        MediaUnreadable: It is empty.
        MediaType: It is none.
    """
    data = _read(path, 16)
    mime = sniff(data)
    if mime == SAFETENSORS:
        return _modality_of_embeddings(_read(path, MAX_HEADER))
    if mime is None:
        raise MediaType(f"{path} is no picture, video or sound: it begins with {data[:8]!r}")
    kind: Modality = "image" if mime[0] == "i" else "video" if mime[0] == "v" else "audio"
    return kind


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL rather than a path."""
    return _URL.match(text) is not None


def locate(source: Source, modality: Modality) -> str:
    """The URL under which ``source`` goes into a request: its own, or a ``data:`` URI.

    Raises:
        MediaUnreachable: The file is not there or may not be read.
        MediaUnreadable: It is empty.
        MediaType: Its bytes are no such medium, or it is an object of another kind.
    """
    if isinstance(source, str) and is_url(source):
        return source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _data_uri(_read(path), modality, str(path))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _data_uri(bytes(source), modality, f"the {modality} of {len(source)} bytes")
    if modality == "image":
        return _data_uri(_png(source), modality, "the picture")
    raise MediaType(f"{modality}() takes a path, URL or bytes, got {type(source).__name__}")


def _data_uri(data: bytes, modality: Modality, name: str) -> str:
    if not data:
        raise MediaUnreadable(f"{name} is empty")
    mime = sniff(data)
    if mime == SAFETENSORS:
        return f"data:{mime};base64,{b64encode(data).decode('ascii')}"
    if mime is None or not (mime.startswith(modality) or _may_be(mime, modality)):
        found = f"it begins with {data[:8]!r}" if mime is None else f"it is {mime}"
        raise MediaType(f"{name} is no {modality} of a known format: {found}")
    if not mime.startswith(modality):
        mime = f"{modality}/{mime.partition('/')[2]}"
    return f"data:{mime};base64,{b64encode(data).decode('ascii')}"


def _modality_of_embeddings(head: bytes) -> Modality:
    """What embeddings are of, as `Encoded.safetensors` says or as their grid tells; or a picture's.

    Source of the format: https://github.com/huggingface/safetensors#format.
    """
    length = int.from_bytes(head[:8], "little")
    try:
        header = json.loads(head[8 : 8 + length])
        said = header.get("__metadata__", {}).get("modality")
    except (ValueError, AttributeError) as error:
        raise MediaUnreadable(f"the header of the safetensors file is broken: {error}") from None
    if said in ("video", "audio"):
        return said  # type: ignore[no-any-return]
    return "video" if "video_grid_thw" in header else "image"


def _may_be(mime: str, modality: Modality) -> bool:
    return mime in _CONTAINERS and modality != "image"


def _read(path: Path, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(size)
    except FileNotFoundError:
        raise MediaUnreachable(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaUnreachable(f"{path} cannot be read: {reason}") from None
    if not data:
        raise MediaUnreadable(f"{path} is empty")
    return data


def _png(source: Any) -> bytes:
    """A PIL image, or an array of uint8, as a PNG file: small enough, and nothing is lost."""
    # Whoever has a PIL image has imported PIL; nobody else should pay for it.
    pil = sys.modules.get("PIL.Image")
    if pil is None or not isinstance(source, pil.Image):
        source = _from_array(source)
    file = io.BytesIO()
    try:
        source.save(file, format="PNG", compress_level=1)
    except OSError:  # a mode that PNG has not, such as CMYK
        file = io.BytesIO()
        source.convert("RGB").save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _from_array(array: Any) -> Any:
    interface = getattr(array, "__array_interface__", None)
    if interface is None:
        raise MediaType(
            f"image() takes a path, URL, bytes, PIL image or array, got {type(array).__name__}"
        )
    shape, dtype = tuple(interface["shape"]), interface["typestr"]
    fits = (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))) and 0 not in shape
    if dtype != "|u1" or not fits:
        raise MediaType(
            "an array must be uint8 of shape (height, width), (height, width, 3) or "
            f"(height, width, 4), got {dtype = } {shape = }"
        )
    try:
        from PIL import Image
    except ImportError:
        raise MediaType("to send an array, install pillow, or give image() a file") from None
    return Image.fromarray(array)
