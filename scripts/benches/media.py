"""CPU time of one picture, from its JPEG to pixels at the tower's size, against Hugging Face's.

Ours is the whole of `MediaLoader.load` on a file: reading, hashing, the hop to a worker process
and back, decoding and scaling, in both processes. Theirs is ``PIL.Image.open`` and the PIL-backed
processor of Qwen2-VL with its default sizes, in this process. Both take turns in every round. The
pictures are made from a seed, with a spectrum like a photograph's, and saved in two qualities: 75,
Pillow's default, with 1.4 to 1.7 bits a pixel, and 90, with 2.7 to 3.2. A row is the median over
the rounds of both.
"""

from __future__ import annotations

import asyncio
import io
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benches import Row
from triptych.contract import ImagePlan
from triptych.engines import torchvision_ops
from triptych.families.qwen_processors import smart_resize
from triptych.media import MediaLoader
from triptych.settings import MediaSettings

QUALITIES = (75, 90)
SIZES = {"1024²": (1024, 1024), "1080p": (1080, 1920), "12 MP": (3000, 4000)}
GOALS = {
    "exact": {"1024²": 1 / 2, "1080p": 1 / 2, "12 MP": 1 / 2},
    "fast": {"1024²": 1 / 5, "1080p": 1 / 5, "12 MP": 1 / 8},
}
MIN_PIXELS, MAX_PIXELS, FACTOR = 56 * 56, 28 * 28 * 1280, 28


class Planner:
    """Sizes as Qwen2-VL's processor chooses them by default."""

    audio_rate = 16_000

    def plan_image(self, height: int, width: int) -> ImagePlan:
        """The size and its tokens."""
        size = smart_resize(
            height, width, factor=FACTOR, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS
        )
        return ImagePlan(size, tokens=size[0] * size[1] // FACTOR**2)


def run(quick: bool) -> list[Row]:
    """Measure; one row a mode and size."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_run(Path(folder), rounds=4 if quick else 15))


async def _run(folder: Path, rounds: int) -> list[Row]:
    reference = _hugging_face()
    rows = []
    async with _loader(folder, "exact") as exact, _loader(folder, "fast") as fast:
        for name, size in SIZES.items():
            ratios: dict[str, list[float]] = {mode: [] for mode in GOALS}
            for quality in QUALITIES:
                file = folder / f"{size[0]}-{quality}.jpg"
                data = _photograph(*size, quality)
                file.write_bytes(data)
                loaders = {"exact": exact, "fast": fast}
                times = await _rounds(data, file.as_uri(), rounds, reference, loaders)
                _tell(f"{name}, quality {quality}", times)
                for mode, found in ratios.items():
                    pairs = zip(times[mode], times["theirs"], strict=True)
                    found += [ours / theirs for ours, theirs in pairs]
            rows += [
                Row.of(f"image {mode}, {name}: CPU time ÷ Hugging Face's", found, GOALS[mode][name])
                for mode, found in ratios.items()
            ]
    return sorted(rows, key=lambda row: row.name)


async def _rounds(
    data: bytes,
    url: str,
    rounds: int,
    reference: Callable[[bytes], object],
    loaders: Mapping[str, MediaLoader],
) -> dict[str, list[float]]:
    """CPU seconds of each round, by who spent them; the first round warms up and is left out."""
    times: dict[str, list[float]] = {who: [] for who in ("theirs", *loaders)}
    for _ in range(rounds + 1):
        times["theirs"].append(_cpu(reference, data))
        for mode, loader in loaders.items():
            times[mode].append(await _our_cpu(loader, url))
    return {who: spent[1:] for who, spent in times.items()}


def _tell(picture: str, times: Mapping[str, list[float]]) -> None:
    shown = ", ".join(f"{who} {median(spent) * 1e3:.1f} ms" for who, spent in times.items())
    print(f"{picture}: {shown}", file=sys.stderr)


@asynccontextmanager
async def _loader(folder: Path, mode: str) -> AsyncIterator[MediaLoader]:
    loader = MediaLoader(
        MediaSettings(
            model="none",
            allowed_local_media_path=str(folder),
            image_mode=mode,  # type: ignore[arg-type]
            media_workers=1,
            media_cache_mb=0,
        ),
        Planner(),
    )
    try:
        yield loader
    finally:
        await loader.close()


async def _our_cpu(loader: MediaLoader, url: str) -> float:
    """Seconds of this process and of the worker."""
    clocks = [_clock(pid) for pid in loader.worker_pids]
    before, ours = [time.clock_gettime(clock) for clock in clocks], time.process_time()
    await loader.load("image", url, where="bench")
    spent = time.process_time() - ours
    return spent + sum(time.clock_gettime(c) - b for c, b in zip(clocks, before, strict=True))


def _clock(pid: int) -> int:
    """The CPU clock of another process, as clock_getcpuclockid(3) makes it."""
    return (~pid << 3) | 2


def _hugging_face() -> Callable[[bytes], object]:
    torchvision_ops.define_missing()
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil()
    return lambda data: processor(images=[Image.open(io.BytesIO(data))], return_tensors="np")


def _cpu(work: Callable[[bytes], object], data: bytes) -> float:
    start = time.process_time()
    work(data)
    return time.process_time() - start


def _photograph(height: int, width: int, quality: int) -> bytes:
    """A JPEG whose amplitudes fall with the frequency, to f^-1.2."""
    random = np.random.default_rng(height)
    scale = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    scale[0, 0] = 1.0
    scale **= 1.2
    planes = [_plane(random, scale, (height, width)) for _ in range(3)]
    luma, blue, red = planes[0], planes[1] * 0.3, planes[2] * 0.3
    rgb = np.stack([luma + red, luma - red / 2 - blue / 2, luma + blue], axis=-1)
    pixels = np.clip(128 + 45 * rgb, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _plane(random: np.random.Generator, scale: Any, shape: tuple[int, int]) -> Any:
    noise = np.fft.rfft2(random.standard_normal(shape)) / scale
    plane = np.fft.irfft2(noise, shape)
    return (plane - plane.mean()) / plane.std()
