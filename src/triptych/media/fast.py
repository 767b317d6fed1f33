"""Pictures in less time: JPEGs scaled while they are decoded, areas averaged instead of bicubic.

What shrinks to a third or less is scaled by libjpeg's inverse DCT, which then has less to do. What
does not stays in YCbCr until FFmpeg's scaler makes it RGB at its final size, in one pass. A JPEG
that either of them finds flawed is left to the exact path, so that both modes refuse the same.
"""

from __future__ import annotations

import av
import av.error
import numpy as np
import simplejpeg
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from PIL import Image

from triptych.media.base import Pixels

_CODEC_OPTIONS = {"err_detect": "explode"}
REDUCING_GAP = 1.5
"""What is left to shrink after decoding, at least: the coarse step must not show."""
MAX_REDUCTION = 8
"""Of libjpeg's fast inverse DCTs, which are 1/2, 1/4 and 1/8."""


def jpeg(data: bytes | memoryview, picture: Image.Image, height: int, width: int) -> Pixels | None:
    """The JPEG at ``height`` × ``width``, not yet upright; None: take the exact path.

    Args:
        data: The file.
        picture: The same, opened and not decoded.
        height: In pixels.
        width: In pixels.
    """
    if picture.mode != "RGB" or picture.size == (width, height):
        return None
    shrinks = min(picture.height / height, picture.width / width)
    reduction = 1
    while reduction < MAX_REDUCTION and shrinks >= 2 * reduction * REDUCING_GAP:
        reduction *= 2
    try:
        frame = _reduced(data, picture, reduction) if reduction > 1 else _planes(data)
        if frame is None:
            return None
        scaled = VideoReformatter().reformat(
            frame, width, height, "rgb24", interpolation="AREA", threads=1
        )
    except (ValueError, av.error.FFmpegError):
        return None
    return np.ascontiguousarray(scaled.to_ndarray(), dtype=np.uint8)


def _reduced(data: bytes | memoryview, picture: Image.Image, reduction: int) -> VideoFrame:
    """Decoded to 1/``reduction``."""
    pixels = simplejpeg.decode_jpeg(
        data,
        "RGB",
        fastdct=True,
        fastupsample=True,
        min_height=-(-picture.height // reduction),
        min_width=-(-picture.width // reduction),
    )
    return VideoFrame.from_numpy_buffer(pixels, "rgb24")


def _planes(data: bytes | memoryview) -> VideoFrame | None:
    """Decoded as it is stored, luma and chroma apart; None: stored in some other way."""
    codec = av.CodecContext.create("mjpeg", "r")
    codec.thread_count = 1
    codec.options = _CODEC_OPTIONS
    frames: list[VideoFrame] = codec.decode(av.Packet(bytes(data)))
    if len(frames) != 1 or frames[0].is_corrupt or not frames[0].format.name.startswith("yuvj"):
        return None
    return frames[0]
