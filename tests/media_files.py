"""Files to load, made by every encoder there is."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pybase64
import safetensors.numpy
from PIL import Image

from media_planner import WIDTH
from triptych.settings import MediaSettings


def settings(**values: Any) -> MediaSettings:
    """One worker, unless ``values`` say otherwise."""
    return MediaSettings(**{"model": "none", "media_workers": 1, **values})


def data_uri(data: bytes, media_type: str = "application/octet-stream") -> str:
    return f"data:{media_type};base64,{pybase64.b64encode(data).decode()}"


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours, so that lossy codecs keep them."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (5, 5, max(channels, 3)), dtype=np.uint8)
    mode = "RGBA" if channels == 4 else "RGB"
    scaled = np.asarray(Image.fromarray(small, mode=None).convert(mode).resize((width, height), 3))
    return scaled[..., 0] if channels == 1 else scaled


def image_file(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(height: int = 40, width: int = 60, seed: int = 0, **options: Any) -> bytes:
    return image_file(Image.fromarray(pixels(height, width, seed=seed)), "JPEG", **options)


CLIPS = [
    ("libx264", "mp4"),
    ("libx264", "mov"),
    ("libx264", "matroska"),
    ("libx264", "mpegts"),
    ("libx264", "avi"),
    ("libx265", "mp4"),
    ("libvpx", "webm"),
    ("libvpx-vp9", "webm"),
    ("libvpx-vp9", "mp4"),
    ("libsvtav1", "mp4"),
    ("mpeg4", "avi"),
    ("mpeg4", "mp4"),
]
"""(encoder, container) of every served codec and container."""
SOUNDS = [
    ("pcm_s16le", "wav", 44_100),
    ("pcm_u8", "wav", 8_000),
    ("pcm_s24le", "wav", 96_000),
    ("pcm_f32le", "wav", 48_000),
    ("flac", "flac", 44_100),
    ("libmp3lame", "mp3", 44_100),
    ("libopus", "ogg", 48_000),
    ("libopus", "webm", 48_000),
    ("vorbis", "ogg", 44_100),
    ("vorbis", "webm", 48_000),
    ("aac", "mp4", 44_100),
    ("aac", "ipod", 22_050),
    ("aac", "adts", 44_100),
    ("alac", "ipod", 44_100),
]
"""(encoder, container, samples a second)."""
_EXPERIMENTAL = {"vorbis": {"strict": "experimental"}}
_QUIET = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"svtav1-params": "lp=1"}}


def clip(
    codec: str = "libx264",
    form: str = "mp4",
    *,
    frames: int = 50,
    rate: int = 10,
    height: int = 96,
    width: int = 160,
    times: list[int] | None = None,
    rotation: int = 0,
) -> bytes:
    """A video whose frame ``n`` is grey of value ``5 n``, with a red upper left corner."""
    buffer = io.BytesIO()
    with _same_schedule(), av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options=_QUIET.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 12
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            picture = np.full((height, width, 3), 5 * number % 250, np.uint8)
            picture[: height // 2, : width // 4] = (255, 0, 0)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = times[number] if times else number
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@contextlib.contextmanager
def _same_schedule() -> Iterator[None]:
    """Take back what SVT-AV1 does to a thread of root that encodes: it gets real-time priority.

    Every process that a test starts afterwards would have it too, and no other would run.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of a `clip` these are, read from a lower right pixel."""
    height, width = frames.shape[1:3]
    return [round(float(frame[-height // 4, -width // 4].mean()) / 5) for frame in frames]


def sound(
    codec: str = "pcm_s16le",
    form: str = "wav",
    rate: int = 44_100,
    *,
    seconds: float = 1.5,
    hertz: float = 440.0,
    layout: str = "stereo",
) -> bytes:
    """A sine of half the full scale on all channels."""
    buffer = io.BytesIO()
    count = int(seconds * rate)
    wave = (0.5 * np.sin(2 * np.pi * hertz * np.arange(count) / rate)).astype(np.float32)
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options=_EXPERIMENTAL.get(codec, {}))
        stream.layout = layout
        channels = stream.codec_context.channels
        frame = av.AudioFrame.from_ndarray(np.tile(wave, (channels, 1)), "fltp", layout)
        frame.sample_rate, frame.pts = rate, 0
        fifo = av.AudioFifo()
        fifo.write(frame)
        convert = av.AudioResampler(format=stream.format, layout=layout, rate=rate)
        size = stream.codec_context.frame_size or 1024
        while part := fifo.read(size, partial=True):
            for converted in convert.resample(part):
                container.mux(stream.encode(converted))
        container.mux(stream.encode())
    return buffer.getvalue()


def he_aac(**options: Any) -> bytes:
    """A `sound` in HE-AAC, as far as it can be made here: none of PyAV's encoders makes any.

    It is AAC-LC whose header says that spectral band replication doubles its rate to 44.1 kHz, as
    the standard has it (ISO/IEC 14496-3, 1.6.5, syncExtensionType 0x2B7); the upper band is empty.
    """
    data = sound("aac", "ipod", 22_050, **options)
    without, with_sbr = bytes.fromhex("56e500"), bytes.fromhex("56e5a0")
    assert data.count(without) == 1
    return data.replace(without, with_sbr)


def embeddings(rows: int = 12, width: int = WIDTH, **others: np.ndarray) -> bytes:
    """A safetensors file as an encoder elsewhere would write it."""
    random = np.random.default_rng(0)
    main = random.standard_normal((rows, width)).astype(np.float32)
    return safetensors.numpy.save({"ec_cache": main, **others})


def package_file(package: str, path: str) -> Path:
    """A file that a package for tests brings."""
    from importlib.util import find_spec

    spec = find_spec(package)
    assert spec is not None, f"{package} is in requirements/test.txt"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], path)
