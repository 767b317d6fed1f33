"""Pictures: JPEG, PNG and still WebP to RGB at the size the family plans.

Exact mode gives the pixels of Hugging Face's PIL-backed image processors: the picture upright, in
RGB, ``PIL.Image.resize`` with the plan's filter, centre crop. Where the caller's picture has alpha
it is laid over white. libjpeg-turbo through simplejpeg and our own `resample` give the same pixels
as Pillow and take less time for it; whatever is unusual goes through Pillow.

Fast mode (see `fast`) scales while it decodes, and by a cheaper filter than the plan's.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, PngImagePlugin

from triptych.contract import ImagePlan, VideoPlan
from triptych.errors import MediaError, MediaTooLarge, MediaType, MediaUnreadable
from triptych.media import fast, resample
from triptych.media.base import MediaOptions, Pixels, Planner, Room, fresh
from triptych.media.sniff import JPEG, PNG, WEBP, describe, sniff

Mode = Literal["exact", "fast"]
Turn = Image.Transpose | None

FORMATS = (JPEG, PNG, WEBP)
LOW_DETAIL = 512
"""Pixels a side that OpenAI's ``detail: low`` means."""

_ORIENTATION = 0x0112
_UPRIGHT: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what makes the picture upright (EXIF 2.32, tag 0x0112)."""
_SIDEWAYS = frozenset({_UPRIGHT[5], _UPRIGHT[6], _UPRIGHT[7], _UPRIGHT[8]})
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}

SCRATCH_BYTES = 64 << 20
"""A worker keeps at most this much memory from one picture to the next: 16 megapixels."""
_room: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

Image.MAX_IMAGE_PIXELS = None
_core: Any = Image.core  # type: ignore[attr-defined]
_core.set_blocks_max(SCRATCH_BYTES // _core.get_block_size())
PngImagePlugin.MAX_TEXT_MEMORY = PngImagePlugin.MAX_TEXT_CHUNK


def load(
    data: bytes | memoryview,
    planner: Planner,
    *,
    max_pixels: int,
    mode: Mode = "exact",
    options: MediaOptions | None = None,
    room: Room = fresh,
) -> tuple[Pixels, ImagePlan]:
    """Decode one picture to its planned size.

    Args:
        data: The file.
        planner: Says which size.
        max_pixels: Width × height that the header may claim.
        mode: ``exact`` or ``fast``.
        options: `MediaOptions.detail` counts.
        room: Where the pixels are put if it spares a copy.

    Returns:
        Pixels (height, width, 3), C-contiguous, of ``plan.shape``, and the plan.

    Raises:
        MediaType: Not JPEG, PNG or still WebP.
        MediaTooLarge: More pixels than ``max_pixels``.
        MediaUnreadable: Truncated or broken.
    """
    found = sniff(data)
    if found not in FORMATS:
        got = found.name if found else describe(data)
        raise MediaType(f"the image must be JPEG, PNG or WebP, got {got}")
    with _reading(found.name):
        image = Image.open(io.BytesIO(data), formats=(found.name,))
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise MediaTooLarge(
                f"the image has {width}×{height} = {width * height} pixels, "
                f"over the limit of {max_pixels}"
            )
        if found == WEBP and getattr(image, "is_animated", False):
            raise MediaType("an animated WebP is not served; send one still picture")
        with _reading(found.name):
            turn = _turn(image)  # which decodes a PNG, whose EXIF may come last
        if turn in _SIDEWAYS:
            height, width = width, height
        plan = planner.plan_image(*_asked(height, width, options or MediaOptions()))
        with _reading(found.name):
            return _pixels(image, data, turn, plan, mode, room), plan


def _pixels(
    image: Image.Image,
    data: bytes | memoryview,
    turn: Turn,
    plan: ImagePlan,
    mode: Mode,
    room: Room,
) -> Pixels:
    if mode == "fast":
        return _fast(image, data, turn, plan, room)
    pixels = _turbo(data, image) if _plain_jpeg(image) else None
    picture = _rgb(image) if pixels is None else pixels
    if turn is not None:
        picture = _picture(picture).transpose(turn)
    return fit(picture, plan, room)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """What goes wrong in here is the file's fault, whatever Pillow calls it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MediaError:
        raise
    except MemoryError:
        raise MediaTooLarge("decoding the image takes more memory than a worker may use") from None
    except (AttributeError, ImportError, NameError):
        raise  # ours, or Pillow's own: for the log, not for the caller
    except Exception as error:  # Pillow's decoders raise whatever their parsing runs into
        raise MediaUnreadable(f"the {name} cannot be read: {_reason(error)}") from error


def _turn(image: Image.Image) -> Turn:
    """What makes the picture upright; a broken EXIF block says nothing, as for any viewer."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:
        return None


def _asked(height: int, width: int, options: MediaOptions) -> tuple[int, int]:
    """The size to plan for, which ``detail: low`` makes smaller."""
    scale = LOW_DETAIL / max(height, width)
    if options.detail != "low" or scale >= 1:
        return height, width
    return max(1, round(height * scale)), max(1, round(width * scale))


def _plain_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _turbo(
    data: bytes | memoryview, image: Image.Image, route: fast.Route = fast.WHOLE
) -> Pixels | None:
    """The JPEG decoded by libjpeg-turbo; None: it has a flaw for Pillow to judge.

    The pixels lie in a buffer that the next call overwrites: fresh pages for every picture would
    cost as much as half the decoding.

    Args:
        data: The file.
        image: The same, opened and not decoded.
        route: What may be left out.

    Returns:
        Shape (height, width, 4), red, green, blue and one byte of nothing.
    """
    least = {
        "min_height": -(-image.height // route.reduction),
        "min_width": -(-image.width // route.reduction),
    }
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data,
            "RGBX",
            buffer=_scratch(image),
            fastupsample=route.coarse_colour,
            **(least if route.reduction > 1 else {}),
        )
    except ValueError:
        return None
    return pixels


def _picture(pixels: Image.Image | Pixels) -> Image.Image:
    """Pixels of four bytes as a Pillow picture in the same memory."""
    if isinstance(pixels, Image.Image):
        return pixels
    size = (pixels.shape[1], pixels.shape[0])
    # As Image.frombuffer does for RGBX; Pillow keeps RGB in the same four bytes a pixel, and
    # scales three of them in less time than four.
    return Image.Image()._new(_core.map_buffer(pixels, size, "raw", 0, ("RGB", 0, 1)))


def _scaled(
    source: Image.Image | Pixels,
    target: tuple[int, int],
    resampling: str,
    room: Room,
    size: tuple[float, float] | None = None,
) -> Pixels:
    """Shape (height, width, 3), as ``PIL.Image.resize`` makes it of ``size`` of ``source``."""
    height, width = target
    if resample.available():
        pixels = source if isinstance(source, np.ndarray) else _four_bytes(source)
        rows, columns = pixels.shape[:2]
        scaled = resample.resize(pixels, size or (rows, columns), target, resampling, room)
        if scaled is not None:
            return scaled
    box = (0.0, 0.0, size[1], size[0]) if size else None
    picture = _picture(source).resize((width, height), _FILTERS[resampling], box)
    return _packed(picture, "RGB")


def _four_bytes(picture: Image.Image) -> Pixels:
    return _packed(picture, "RGBX")


def _packed(picture: Image.Image, layout: str) -> Pixels:
    packed = np.frombuffer(picture.tobytes("raw", layout), np.uint8)
    return packed.reshape(picture.height, picture.width, len(layout))


def _scratch(image: Image.Image) -> npt.NDArray[np.uint8] | None:
    """Room for the decoded picture; None: it is too large to keep room for."""
    global _room
    need = image.height * image.width * 4
    if need > SCRATCH_BYTES:
        return None
    if _room.size < need:
        _room = np.empty(need, np.uint8)
    return _room


def _rgb(image: Image.Image) -> Image.Image:
    """Decode with Pillow, to RGB; alpha lies over white, 16-bit grey is scaled to 8."""
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        alpha = image.convert("RGBA")
        white = Image.new("RGBA", alpha.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, alpha).convert("RGB")
    return image.convert("RGB")


def fit(picture: Image.Image | Pixels, plan: ImagePlan | VideoPlan, room: Room = fresh) -> Pixels:
    """Scale and crop an RGB or RGBX picture as ``transformers.image_transforms`` does."""
    if plan.crop is None:
        return _scaled(picture, plan.resize, plan.resample, room)
    return _cropped(_scaled(picture, plan.resize, plan.resample, fresh), plan.crop)


def _cropped(pixels: Pixels, crop: tuple[int, int]) -> Pixels:
    return np.ascontiguousarray(_centre_crop(pixels, *crop))


def _centre_crop(pixels: Pixels, height: int, width: int) -> Pixels:
    """``transformers.image_transforms.center_crop``: what is too small gets black borders."""
    rows, columns = pixels.shape[:2]
    if rows < height or columns < width:
        top, left = -(-(max(height, rows) - rows) // 2), -(-(max(width, columns) - columns) // 2)
        canvas = np.zeros((max(height, rows), max(width, columns), 3), np.uint8)
        canvas[top : top + rows, left : left + columns] = pixels
        top = max(0, (rows - height) // 2 + top)
        left = max(0, (columns - width) // 2 + left)
        return canvas[top : top + height, left : left + width]
    top, left = (rows - height) // 2, (columns - width) // 2
    return pixels[top : top + height, left : left + width]


def _fast(
    image: Image.Image, data: bytes | memoryview, turn: Turn, plan: ImagePlan, room: Room
) -> Pixels:
    """Scaled as cheaply as can be, then turned upright, when it is small."""
    height, width = plan.resize
    if turn in _SIDEWAYS:
        height, width = width, height
    final = room if turn is None and plan.crop is None else fresh
    route = fast.route(image, height, width, plan.resample)
    pixels = _turbo(data, image, route) if _plain_jpeg(image) else None
    if pixels is None:
        scaled = _scaled(_rgb(image), (height, width), fast.FILTER, final)
    else:
        size = (image.height / route.reduction, image.width / route.reduction)
        scaled = _scaled(pixels, (height, width), route.resample, final, size)
    if turn is not None:
        scaled = np.asarray(Image.fromarray(scaled).transpose(turn))
    return scaled if plan.crop is None else _cropped(scaled, plan.crop)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
