"""A corpus of hostile media: what a caller could send to break a server, with the right answer.

`corpus` is deterministic and makes its files as it goes. Each part is an OpenAI content part, so
the same corpus runs against the loader alone and through a real ensemble.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from media_files import clip, data_uri, embeddings, image_file, jpeg, pixels, sound

UNREADABLE = frozenset({"media_unreadable"})
BROKEN = UNREADABLE | {"media_type", "media_too_large", "media_timeout", "media_error"}
FORBIDDEN = frozenset({"media_forbidden"})
UNREACHED = frozenset({"media_forbidden", "media_unreachable", "media_unreadable"})
TOO_LARGE = frozenset({"media_too_large"})
TYPE = frozenset({"media_type"})
EMBEDDINGS = BROKEN | {"invalid_value", "media_forbidden"}


class Hostile(NamedTuple):
    """One thing to send."""

    name: str
    part: dict[str, Any]
    """A content part of an OpenAI chat message."""
    codes: frozenset[str]
    """The error codes (`triptych.errors`) that are right; besides these, ``unsupported_medium``
    where the model does not take the modality at all."""
    harmless: bool = False
    """The damage may leave a medium that is whole enough: an answer is right too."""


def corpus() -> Iterator[Hostile]:
    """Everything, more than a thousand of them."""
    yield from _damaged()
    yield from _bombs()
    yield from _headers()
    yield from _wrong_types()
    yield from _places()
    yield from _data_uris()


def part(kind: str, url: str) -> dict[str, Any]:
    """``{"type": "image_url", "image_url": {"url": …}}`` and its like."""
    return {"type": kind, kind: {"url": url}}


@lru_cache
def seeds() -> dict[str, tuple[str, str, bytes]]:
    """Whole files to damage: name to (kind of part, media type, bytes)."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    photo, flat = Image.fromarray(noise), Image.fromarray(pixels(64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "jpeg": image_file(flat, "JPEG", exif=exif),
        "progressive": image_file(photo, "JPEG", progressive=True),
        "cmyk": image_file(flat.convert("CMYK"), "JPEG"),
        "png": image_file(photo, "PNG"),
        "palette": image_file(flat.convert("P"), "PNG", transparency=3),
        "webp": image_file(photo, "WEBP"),
        "lossless": image_file(photo, "WEBP", lossless=True),
    }
    sounds = {
        "wav": sound(seconds=0.2),
        "flac": sound("flac", "flac", seconds=0.2),
        "mp3": sound("libmp3lame", "mp3", seconds=0.3),
        "opus": sound("libopus", "ogg", 48_000, seconds=0.3),
        "m4a": sound("aac", "ipod", seconds=0.3),
    }
    clips = {
        "h264": clip(frames=12),
        "hevc": clip("libx265", frames=12),
        "vp9": clip("libvpx-vp9", "webm", frames=12),
        "av1": clip("libsvtav1", "mp4", frames=12),
        "mpeg4": clip("mpeg4", "avi", frames=12),
    }
    return {
        **{name: ("image_url", "image/png", data) for name, data in images.items()},
        **{name: ("audio_url", "audio/wav", data) for name, data in sounds.items()},
        **{name: ("video_url", "video/mp4", data) for name, data in clips.items()},
        "safetensors": ("image_embeds", "application/octet-stream", embeddings(4)),
    }


def _damaged() -> Iterator[Hostile]:
    """Every whole file cut off at many places, and with bits flipped, bytes lost and gained."""
    for name, (kind, media_type, data) in seeds().items():
        chance = random.Random(name)
        codes = EMBEDDINGS if kind == "image_embeds" else BROKEN
        for step in range(22):
            end = len(data) * step // 22
            url = data_uri(data[:end], media_type)
            yield Hostile(f"{name} cut at {end}", part(kind, url), codes, kind != "image_embeds")
        for step in range(26):
            broken = bytearray(data)
            # Headers are short and matter most, so half of the damage is done there.
            reach = min(len(data), 256) if step % 2 else len(data)
            places = sorted(chance.randrange(reach) for _ in range(1 + step // 6))
            for place in places:
                broken[place] ^= 1 << chance.randrange(8)
            url = data_uri(bytes(broken), media_type)
            yield Hostile(
                f"{name} flipped {step} at {places}", part(kind, url), codes, harmless=True
            )
        for step in range(10):
            place, length = chance.randrange(len(data)), chance.randrange(1, 64)
            filler = chance.randbytes(length) if step % 2 else b""
            url = data_uri(data[:place] + filler + data[place + length :], media_type)
            yield Hostile(f"{name} lost {step} at {place}", part(kind, url), codes, harmless=True)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", head) + b"".join(chunks)


def _bombs() -> Iterator[Hostile]:
    """Little that becomes much."""
    zeros = zlib.compress(bytes(30_000_000), 9)
    bombs = {
        "png of a gigapixel": (_png(32_768, 32_768, _png_chunk(b"IDAT", zeros)), TOO_LARGE),
        "png of 2^31 columns": (_png(0x7FFFFFFF, 1, _png_chunk(b"IDAT", zeros)), BROKEN),
        "png text bomb": (_png(8, 8, _png_chunk(b"zTXt", b"k\0\0" + zeros)), BROKEN),
        "png itxt bomb": (_png(8, 8, _png_chunk(b"iTXt", b"k\0\1\0\0\0" + zeros)), BROKEN),
        "png profile bomb": (_png(8, 8, _png_chunk(b"iCCP", b"k\0\0" + zeros)), BROKEN),
        "png that inflates past its size": (_png(8, 8, _png_chunk(b"IDAT", zeros)), BROKEN),
        "grey png of 64 megapixels": (
            _png(8_000, 8_000, _png_chunk(b"IDAT", zeros), colour=0),
            TOO_LARGE,
        ),
    }
    for name, (data, codes) in bombs.items():
        url = data_uri(data, "image/png")
        yield Hostile(name, part("image_url", url), codes, harmless=codes is BROKEN)
    for side in (7_072, 16_000, 65_500):
        data = _resized_jpeg(side, side)
        yield Hostile(
            f"jpeg of {side}²", part("image_url", data_uri(data, "image/jpeg")), TOO_LARGE
        )
    silence = data_uri(sound("flac", "flac", 8_000, seconds=1_200, hertz=0), "audio/flac")
    yield Hostile("twenty minutes of silence", part("audio_url", silence), TOO_LARGE)


def _resized_jpeg(height: int, width: int) -> bytes:
    """A small JPEG whose header says another size."""
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _headers() -> Iterator[Hostile]:
    """Absurd values in headers."""
    for height, width in ((0, 0), (0, 60), (40, 0), (1, 50_000), (50_000, 1), (65_535, 700)):
        url = data_uri(_resized_jpeg(height, width), "image/jpeg")
        yield Hostile(f"jpeg of {height}×{width}", part("image_url", url), BROKEN, harmless=True)
    for width in (0, 1, -1, 2**16, 2**31 - 1):
        for depth in (0, 1, 3, 16, 255):
            data = _png(width, 9, _png_chunk(b"IDAT", zlib.compress(bytes(100))), depth=depth)
            url = data_uri(data, "image/png")
            name = f"png of {width} columns and {depth} bits"
            yield Hostile(name, part("image_url", url), BROKEN, harmless=True)
    wav = seeds()["wav"][2]
    for offset, size in ((4, 4), (16, 4), (20, 2), (22, 2), (24, 4), (28, 4), (32, 2), (34, 2)):
        for value in (0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1):
            data = wav[:offset] + value.to_bytes(size, "little") + wav[offset + size :]
            name = f"wav with {value} at {offset}"
            yield Hostile(name, part("audio_url", data_uri(data, "audio/wav")), BROKEN, True)
    tensors = embeddings(4)[8:]
    for length in (0, 1, 7, 2**20 + 1, 2**31, 2**63, 2**64 - 1):
        url = data_uri(length.to_bytes(8, "little") + tensors)
        yield Hostile(f"safetensors header of {length}", part("image_embeds", url), EMBEDDINGS)
    shapes: list[Any] = [[], [0, 64], [4], [-4, 64], [2**63, 2], [4, 64, 1, 1, 1], "x", [4.5, 64]]
    for shape in shapes:
        head = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 1024]}})
        url = data_uri(len(head).to_bytes(8, "little") + head.encode() + bytes(1024))
        yield Hostile(f"safetensors of shape {shape}", part("image_embeds", url), EMBEDDINGS)


def _wrong_types() -> Iterator[Hostile]:
    """One thing in the place of another."""
    strangers = {
        "gif": image_file(Image.new("RGB", (8, 8)), "GIF"),
        "bmp": image_file(Image.new("RGB", (8, 8)), "BMP"),
        "tiff": image_file(Image.new("RGB", (8, 8)), "TIFF"),
        "ico": image_file(Image.new("RGB", (16, 16)), "ICO"),
        "ppm": image_file(Image.new("RGB", (8, 8)), "PPM"),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "html": b"<!DOCTYPE html><script>alert(1)</script>",
        "text": b"a text file that is called .png",
        "pdf": b"%PDF-1.7 hello",
        "gzip": b"\x1f\x8b\x08\0" + bytes(60),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        "hls": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "dash": b"<?xml version='1.0'?><MPD><BaseURL>file:///etc/</BaseURL></MPD>",
        "elf": b"\x7fELF" + bytes(60),
        "zeros": bytes(1000),
        "nothing": b"",
        "one byte": b"\xff",
    }
    types = {"image_url": "image/png", "video_url": "video/mp4", "audio_url": "audio/wav"}
    for name, data in strangers.items():
        for kind, media_type in types.items():
            url = data_uri(data, media_type)
            yield Hostile(f"{name} as {kind}", part(kind, url), TYPE | UNREADABLE)
        url = data_uri(data)
        yield Hostile(f"{name} as embeddings", part("image_embeds", url), EMBEDDINGS)
    for name, (kind, _, data) in seeds().items():
        for wrong, media_type in types.items():
            soundless = kind == "video_url" and wrong == "audio_url"
            if wrong != kind and kind != "image_embeds":
                url = data_uri(data, media_type)
                codes = UNREADABLE if soundless else TYPE | UNREADABLE
                yield Hostile(f"{name} as {wrong}", part(wrong, url), codes)
    for name, data in {"pickle": b"\x80\x02cos\nsystem\n(S'id'\ntR.", "zip": b"PK\x03\x04"}.items():
        url = data_uri(data + bytes(40))
        yield Hostile(f"{name} as embeddings", part("image_embeds", url), FORBIDDEN)


_HOSTS = [
    *("127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1"),
    *("017700000001", "127.0.0.1.", "localhost", "LOCALHOST", "localhost.", "0", "0.0.0.0"),
    *("[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    *("[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]"),
    *("10.0.0.1", "10.1", "167772161", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.1"),
    *("169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518"),
    *("[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[fd00:ec2::254]", "[fe80::1]"),
    *("[fe80::1%25eth0]", "[fc00::1]", "[ff02::1]", "100.64.0.1", "100.100.100.200"),
    *("168.63.129.16", "192.0.0.192", "198.18.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1"),
    *("192.0.2.1", "203.0.113.7", "１２７.０.０.１", "127。0。0。1", "①②⑦.⓪.⓪.①"),
]


def _places() -> Iterator[Hostile]:
    """Where a server must not be sent."""
    for host in _HOSTS:
        for scheme, port in (("http", ""), ("https", ":8443"), ("http", ":22")):
            url = f"{scheme}://{host}{port}/latest/meta-data/x.png"
            yield Hostile(f"fetch {url}", part("image_url", url), UNREACHED)
    tricks = [
        *("http://user:word@127.0.0.1/", "http://a.test@127.0.0.1/", "http://127.0.0.1#@a.test/"),
        *(
            "http://127.0.0.1\\@a.test/",
            "http://a.test:99999/",
            "http://:80/",
            "http:///x",
            "http:",
        ),
        *("http://[::1", "http://a b/", "http://127.0.0.1:0/", "http://%31%32%37.0.0.1/"),
        *("http://\x00127.0.0.1/", "http://127.0.0.1\r\nHost: x/", "HTTP://127.0.0.1/", "http://."),
        *("ftp://127.0.0.1/x", "gopher://127.0.0.1:6379/_INFO", "dict://127.0.0.1:11211/stat"),
        *("ldap://127.0.0.1/", "jar:http://127.0.0.1!/", "javascript:alert(1)", "about:blank"),
        *("rtsp://127.0.0.1/", "tcp://127.0.0.1:1", "concat:/etc/passwd|/etc/hosts", "pipe:0"),
        *("unix:/var/run/docker.sock", "/etc/passwd", "etc/passwd", "", " ", "x", "::", "?", "#"),
        *("crypto:file:///etc/passwd", "subfile:/etc/passwd", "http://" + "a" * 300 + ".test/"),
        *("http://a.test/" + "x" * 10_000, "blob:http://127.0.0.1/x", "ws://127.0.0.1/"),
    ]
    kinds = ("image_url", "video_url", "audio_url", "image_embeds")
    for number, url in enumerate(tricks):
        kind = kinds[number % len(kinds)]
        codes = UNREACHED | {"invalid_value", "media_type"}
        yield Hostile(f"{kind} {url[:40]!r}", part(kind, url), codes)
    paths = [
        *("/etc/passwd", "/etc/shadow", "/proc/self/environ", "/proc/self/mem", "/dev/zero"),
        *(
            "/dev/random",
            "/dev/stdin",
            "/sys/kernel/notes",
            str(Path.home() / ".ssh" / "id_rsa"),
            "/",
            "/tmp",
        ),
        *("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/etc/passwd%00.png", "//etc/passwd"),
    ]
    for path in paths:
        for prefix in ("file://", "file:", "FILE://", "file://localhost", "file://127.0.0.1"):
            codes = FORBIDDEN | UNREADABLE
            yield Hostile(f"{prefix}{path}", part("image_url", prefix + path), codes)


def _data_uris() -> Iterator[Hostile]:
    """URIs that are none, or of another type."""
    good = data_uri(jpeg(), "image/jpeg").partition(",")[2]
    uris = {
        "no comma": "data:image/png;base64",
        "no base64": "data:image/png,hello",
        "percent": "data:image/png,%89PNG",
        "spaces": f"data:image/png;base64, {good}",
        "line breaks": f"data:image/png;base64,{good[:40]}\n{good[40:]}",
        "url alphabet": f"data:image/png;base64,{good.replace('/', '_').replace('+', '-')}",
        "no padding": "data:image/png;base64,AAAAA",
        "padding inside": f"data:image/png;base64,{good[:40]}=={good[40:]}",
        "twice": f"data:image/png;base64,data:image/png;base64,{good}",
        "html": f"data:text/html;base64,{good}",
        "svg": f"data:image/svg+xml;utf8,{good}",
        "video": f"data:video/mp4;base64,{good}",
        "long header": "data:image/png;" + "x=y;" * 200 + f"base64,{good}",
        "empty": "data:",
        "empty base64": "data:;base64,",
        "nothing": "data:,",
        "nulls": "data:image/png;base64,\0\0\0\0",
        "unicode": "data:image/png;base64,ÿÿÿÿ",
        "surrogate pair": "data:image/png;base64,😀😀",
        "too long": "data:image/png;base64," + "A" * (70 << 20),
    }
    for name, url in uris.items():
        yield Hostile(f"data: URI, {name}", part("image_url", url), BROKEN)
