"""What a string of bytes is, by its first bytes; names and content types are not believed."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["image", "video", "audio", "embeddings", "pickle"]


class Format(NamedTuple):
    """One served format."""

    name: str
    """As the decoder calls it: Pillow's format name, FFmpeg's demuxer name."""
    kind: Kind


JPEG = Format("JPEG", "image")
PNG = Format("PNG", "image")
WEBP = Format("WEBP", "image")
SAFETENSORS = Format("safetensors", "embeddings")
PICKLE = Format("pickle", "pickle")

_PREFIXES: tuple[tuple[bytes, Format], ...] = (
    (b"\xff\xd8\xff", JPEG),
    (b"\x89PNG\r\n\x1a\n", PNG),
    (b"\x1a\x45\xdf\xa3", Format("matroska", "video")),
    (b"fLaC", Format("flac", "audio")),
    (b"OggS", Format("ogg", "audio")),
    (b"ID3", Format("mp3", "audio")),
    (b"RF64", Format("wav", "audio")),
    (b"PK\x03\x04", PICKLE),
    (b"\x80\x02", PICKLE),
)
_RIFF: dict[bytes, Format] = {
    b"WEBP": WEBP,
    b"WAVE": Format("wav", "audio"),
    b"AVI ": Format("avi", "video"),
}
_KNOWN_UNSERVED: tuple[tuple[bytes, str], ...] = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<!DOCTYPE", "HTML"),
    (b"<!doctype", "HTML"),
    (b"<html", "HTML"),
    (b"\x1f\x8b", "gzip"),
    (b"#EXTM3U", "HLS playlist"),
)
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")


def sniff(data: bytes | memoryview) -> Format | None:
    """The format of ``data``, or None when it is none that is served."""
    head = bytes(data[:16])
    for prefix, found in _PREFIXES:
        if head.startswith(prefix):
            return found
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":
        if head[8:12] in _STILL_BRANDS:
            return None
        audio = head[8:12] in (b"M4A ", b"M4B ")
        return Format("mov", "audio" if audio else "video")
    if head[4:8] in (b"moov", b"mdat", b"wide"):
        return Format("mov", "video")
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        return _mpeg_audio(head[1])
    if head[:1] == b"\x47" and len(data) > 188 and bytes(data[188:189]) == b"\x47":
        return Format("mpegts", "video")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return SAFETENSORS
    return None


def describe(data: bytes | memoryview) -> str:
    """A few words on bytes of a format that is not served, for an error message."""
    head = bytes(data[:16])
    if not head:
        return "nothing, 0 bytes"
    for prefix, name in _KNOWN_UNSERVED:
        if head.lstrip().startswith(prefix):
            return name
    if head[4:8] == b"ftyp":
        return "HEIF or AVIF"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "text"
    return f"bytes that start with {head[:8].hex()}"


def _mpeg_audio(second: int) -> Format | None:
    """An MPEG audio frame (layer I to III), or AAC in ADTS (layer 0), which is not served."""
    return Format("mp3", "audio") if second & 0x06 else Format("aac", "audio")
