from __future__ import annotations

import base64
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych_client import (
    MediaType,
    MediaUnreachable,
    MediaUnreadable,
    ToolCall,
    assistant,
    audio,
    image,
    system,
    text,
    tool,
    user,
    video,
)
from triptych_client.media import modality_of, sniff

PICTURE = Image.fromarray(np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3))


def encoded(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, kind, **options)
    return file.getvalue()


def read(part) -> tuple[str, bytes]:
    """MIME type and bytes of a part with a data: URI."""
    kind = part["type"]
    head, _, body = part[kind]["url"].partition(",")
    assert head.startswith("data:")
    assert head.endswith(";base64")
    return head.removeprefix("data:").removesuffix(";base64"), base64.b64decode(body, validate=True)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


FORMATS = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "bmp": "image/bmp",
    "tiff": "image/tiff",
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_pictures_bytes_go_as_they_are(kind, tmp_path):
    data = encoded(kind)
    path = tmp_path / "a.txt"  # its name says nothing
    path.write_bytes(data)
    for source in (data, bytearray(data), memoryview(data), path, str(path)):
        assert read(image(source)) == (FORMATS[kind], data)
    assert modality_of(path) == "image"


@pytest.mark.parametrize(
    "url", ["http://a/b.png", "HTTPS://a/b", "data:image/png;base64,AA", "file:///a"]
)
def test_urls_go_as_they_are(url):
    assert image(url) == {"type": "image_url", "image_url": {"url": url}}
    assert video(url) == {"type": "video_url", "video_url": {"url": url}}
    assert audio(url) == {"type": "audio_url", "audio_url": {"url": url}}


def test_the_detail_goes_along():
    assert image("http://a", detail="low")["image_url"] == {"url": "http://a", "detail": "low"}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "LA", "I;16"])
def test_a_pil_image_loses_nothing(mode):
    picture = PICTURE.convert(mode) if mode != "I;16" else PICTURE.convert("I").convert("I;16")
    mime, data = read(image(picture))
    assert mime == "image/png"
    assert np.array_equal(pixels(data), np.asarray(picture))


def test_a_mode_that_png_has_not_becomes_rgb():
    picture = PICTURE.convert("CMYK")
    assert np.array_equal(pixels(read(image(picture))[1]), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (6, 5, 4), (1, 1)])
def test_an_array_loses_nothing(shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    assert np.array_equal(pixels(read(image(array))[1]), array)
    strided = np.repeat(array, 2, axis=1)[:, ::2]
    assert np.array_equal(pixels(read(image(strided))[1]), array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_array_that_is_no_picture_is_refused(array):
    with pytest.raises(MediaType, match=r"must be uint8 of shape .* got dtype"):
        image(array)


@pytest.mark.parametrize("source", [None, 3, object(), [1, 2]])
@pytest.mark.parametrize("make", [image, video, audio])
def test_other_objects_are_refused(make, source):
    with pytest.raises(MediaType, match=type(source).__name__):
        make(source)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MediaUnreachable, match=r"there is no file .*nothing\.png"):
        image(tmp_path / "nothing.png")
    with pytest.raises(MediaUnreachable, match="cannot be read: Is a directory"):
        image(tmp_path)
    with pytest.raises(MediaUnreachable, match="cannot be read"):
        image("a\0b")


def test_a_file_that_is_no_picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("hello there")
    with pytest.raises(
        MediaType, match=r"a\.png is no image of a known format: it begins with b'hello"
    ):
        image(path)
    path.write_bytes(b"")
    with pytest.raises(MediaUnreadable, match="is empty"):
        image(path)
    with pytest.raises(MediaUnreadable, match="is empty"):
        image(b"")
    path.write_bytes(b"RIFF....WAVEfmt ")
    with pytest.raises(MediaType, match="it is audio/wav"):
        image(path)
    with pytest.raises(MediaType, match="it is image/png"):
        audio(encoded("png"))


@pytest.mark.parametrize(
    ("head", "mime"),
    [
        (b"\0\0\0\x20ftypisom....", "video/mp4"),
        (b"\0\0\0\x20ftypqt  ....", "video/quicktime"),
        (b"\x1a\x45\xdf\xa3\x01\0\0\0........", "video/webm"),
        (b"RIFF....AVI LIST", "video/x-msvideo"),
        (b"RIFF....WAVEfmt ", "audio/wav"),
        (b"fLaC............", "audio/flac"),
        (b"ID3\x04............", "audio/mpeg"),
        (b"\xff\xfb\x90\x00............", "audio/mpeg"),
        (b"\xff\xf1\x50\x80............", "audio/aac"),
        (b"OggS............", "audio/ogg"),
        (b"\0\0\0\x20ftypM4A ....", "audio/mp4"),
        (b"\0\0\0\x20ftypavif....", "image/avif"),
        (b"#!/bin/sh\nexit 0", None),
        (b"", None),
        (b"\xff", None),
    ],
)
def test_types_by_their_first_bytes(head, mime):
    assert sniff(head) == mime


def test_a_container_may_hold_either():
    head = b"\0\0\0\x20ftypisom...."
    assert read(audio(head))[0] == "audio/mp4"
    assert read(video(head))[0] == "video/mp4"


def test_messages():
    assert user("a") == {"role": "user", "content": "a"}
    assert system("a")["role"] == "system"
    assert assistant("a")["role"] == "assistant"
    part = image("http://a")
    assert user("a", part, "b")["content"] == [text("a"), part, text("b")]
    assert user(part)["content"] == [part]
    assert user()["content"] == []


def test_pil_and_numpy_are_not_imported_for_files():
    program = (
        "import sys\n"
        "from triptych_client import image\n"
        f"image({encoded('png')!r})\n"
        "assert not {'PIL', 'torch', 'triptych'} & sys.modules.keys(), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_http_needs_no_grpc_and_grpc_no_httpx():
    for address, absent in (("http://localhost:1", "grpc"), ("localhost:1", "httpx")):
        program = (
            "import sys\n"
            "from triptych_client import Client\n"
            f"Client({address!r})\n"
            f"assert {absent!r} not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True)


def test_the_package_says_that_it_is_typed():
    import triptych_client

    assert (Path(triptych_client.__file__).parent / "py.typed").is_file()


def test_a_turn_with_calls_and_their_results():
    call = ToolCall(0, "call_1", "paint", '{"colour": "red"}')
    assert assistant(tool_calls=[call]) == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "paint", "arguments": '{"colour": "red"}'},
            }
        ],
    }
    assert tool(call, "done") == {"role": "tool", "tool_call_id": "call_1", "content": "done"}
