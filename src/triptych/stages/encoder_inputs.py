"""Reads the inputs of ``encoder`` and ``remote_encoder``, and refuses what nobody should write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from triptych import contract
from triptych.errors import InvalidValue
from triptych.stages import backend
from triptych.stages.arrival import check

if TYPE_CHECKING:
    import torch


def read_items(request: Any) -> list[contract.Item]:
    """The request's ITEMS.

    Raises:
        InvalidValue: It is missing or not what preprocess writes.
        DeadlineExceeded: Nobody waits for what would be made of it.
    """
    data = backend.read_bytes(request, contract.ITEMS)
    try:
        items = contract.decode(data, contract.Items)
    except msgspec.MsgspecError as error:
        raise InvalidValue(str(error), where=contract.ITEMS) from None
    check(items.deadline, "before its media were encoded")
    return items.items


def read_media(request: Any) -> torch.Tensor:
    """The request's MEDIA: uint8, shape (bytes,), on the device that it came on.

    Raises:
        InvalidValue: It is missing or has more than one row.
    """
    media = backend.read_row(request, contract.MEDIA)
    if media is None:
        raise InvalidValue("this input is missing", where=contract.MEDIA)
    return media


def read_pixels(request: Any) -> memoryview:
    """The bytes of the request's MEDIA on the host, a copy of our own; imports no torch.

    Raises:
        InvalidValue: It is missing.
    """
    media = backend.read_octets(request, contract.MEDIA)
    if media is None:
        raise InvalidValue("this input is missing", where=contract.MEDIA)
    return media.data
