"""Pillow's ``resize`` of RGB by a compiled kernel, where the installation has it.

``resample.c`` is built when Triptych is installed, if there is a C compiler. Where it is not, or
the processor has no AVX2, Pillow does the same work, bit for bit, in about five times the time.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from triptych.media.base import Pixels, Room, fresh

logger = logging.getLogger("triptych.media")

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
"""What the kernel knows, by its own numbers: 0 and 1."""
_NUMBERS = {name: number for number, name in enumerate(FILTERS)}
_TALL = 100
"""From this ratio of height to width on Pillow 12 works in an order of its own."""
_PROBES = (((40, 90), (31, 61)), ((17, 35), (33, 80)))
"""Sizes (height, width) from and to, of the comparison with Pillow at the start."""

Kernel = Callable[[int, int, int, float, float, int, int, int, int], int]


def available() -> bool:
    """Whether the kernel is there and gives what the installed Pillow gives."""
    return _load()[0] is not None


def describe() -> str:
    """Who scales pictures here, in words; where it is Pillow, why."""
    return _load()[1]


def resize(
    pixels: Pixels,
    size: tuple[float, float],
    target: tuple[int, int],
    resample: str,
    room: Room = fresh,
) -> Pixels | None:
    """Scale a picture as ``PIL.Image.resize`` does.

    Args:
        pixels: Shape (height, width, 4), uint8, C-contiguous; the fourth band is passed over.
        size: (height, width) of the picture in ``pixels``: the ``box`` of ``PIL.Image.resize``
            without its corner. It is less than theirs by a part of the last row or column where
            a JPEG of odd size was decoded to half of it.
        target: (height, width) of the result.
        resample: The filter, as `triptych.contract.ImagePlan` names it.
        room: Where the result goes.

    Returns:
        Shape (height, width, 3), C-contiguous; None: this one is for Pillow.
    """
    kernel, _ = _load()
    if kernel is None or resample not in _NUMBERS:
        return None
    if not _across_first(pixels.shape[0], pixels.shape[1], *target):
        return None
    return _run(kernel, pixels, size, target, _NUMBERS[resample], room)


def _across_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Whether every served Pillow scales the rows of such a picture before its columns.

    The order shows, since there is rounding between. Pillow 13 turns it round where the height
    loses more than twice the pixels that the width does, Pillow 12 for very tall pictures.
    """
    lost = height - new_height
    return height < _TALL * width and not (lost > 0 and lost > 2 * (width - new_width))


def _run(
    kernel: Kernel,
    pixels: Pixels,
    size: tuple[float, float],
    target: tuple[int, int],
    number: int,
    room: Room = fresh,
) -> Pixels:
    scaled = room((*target, 3))
    source = (pixels.ctypes.data, pixels.shape[0], pixels.shape[1], *size)
    if kernel(*source, scaled.ctypes.data, *target, number):
        raise MemoryError("no memory to scale the picture")
    return scaled


@cache
def _load() -> tuple[Kernel | None, str]:
    """The kernel, and what `describe` says."""
    why = "the kernel was not built at installation, which needs a C compiler"
    for path in Path(__file__).parent.glob("_resample*.so"):
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:  # another platform's
            logger.debug("%s: %s", path, error)
            why = f"{path.name} cannot be loaded: {error}"
            continue
        if not library.triptych_resize_served():
            why = "this processor has no AVX2"
            continue
        kernel: Any = library.triptych_resize
        kernel.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_double, ctypes.c_double),
            *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        )
        if _agrees(kernel):
            return kernel, f"{path.name}, AVX2"
        why = f"{path.name} does not give this Pillow's pixels"
        logger.warning("%s and is left out", why)
    return None, f"Pillow, about five times slower: {why}"


def _agrees(kernel: Kernel) -> bool:
    """Whether kernel and Pillow scale pictures of extremes alike."""
    random = np.random.default_rng(0)
    for source, target in _PROBES:
        pixels = random.integers(0, 2, (*source, 4), dtype=np.uint8) * np.uint8(255)
        picture = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
        for number, resampling in enumerate(FILTERS.values()):
            theirs = np.asarray(picture.resize(target[::-1], resampling))
            if not np.array_equal(_run(kernel, pixels, source, target, number), theirs):
                return False
    return True
