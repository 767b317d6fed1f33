"""Pictures in less time: JPEGs scaled while they are decoded, then by a filter half as wide.

What shrinks to a third or less is first scaled by libjpeg's inverse DCT, which then has less to
do. Pillow's bilinear filter does the rest: it reads half the pixels that bicubic does. A JPEG
with a flaw is left to the exact path, so that both modes refuse the same.
"""

from __future__ import annotations

from PIL import Image

REDUCING_GAP = 1.5
"""What is left to shrink after decoding, at least: the coarse step must not show."""
MAX_REDUCTION = 8
"""Of libjpeg's fast inverse DCTs, which are 1/2, 1/4 and 1/8."""
FILTER = "bilinear"


def reduction(picture: Image.Image, height: int, width: int) -> int:
    """By how much decoding itself may shrink ``picture`` on its way to ``height`` × ``width``."""
    shrinks = min(picture.height / height, picture.width / width)
    divisor = 1
    while divisor < MAX_REDUCTION and shrinks >= 2 * divisor * REDUCING_GAP:
        divisor *= 2
    return divisor
