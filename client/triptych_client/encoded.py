"""What a server's encoder makes of one medium, as a file that the API takes in its place.

Source of the format: https://github.com/huggingface/safetensors#format; which tensors a file of
embeddings holds is written in the server's ``triptych.media.embeddings``.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, Literal

import msgspec

from triptych_client.errors import InternalError, InvalidRequest, LeaseLost, UnsupportedMedium
from triptych_client.media import Modality
from triptych_client.requests import EMBEDDINGS, ITEMS, MEDIA, REQUEST, TICKET, Call
from triptych_client.transport import Input, Transport

DType = Literal["float16", "bfloat16", "float32"]

_CODES: dict[DType, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_ITEM_SIZE: dict[DType, int] = {"float16": 2, "bfloat16": 2, "float32": 4}


class Encoded(msgspec.Struct, frozen=True, kw_only=True):
    """What a server's encoder makes of one medium."""

    data: bytes
    """C-contiguous, little-endian."""
    dtype: DType
    shape: tuple[int, int]
    """(tokens, width)."""
    modality: Modality
    grid_thw: tuple[int, int, int] | None = None
    """Patches in time, height and width, where the model wants them."""
    second_per_grid: float | None = None
    """Seconds from one temporal patch of a clip to the next."""

    def __repr__(self) -> str:
        return f"Encoded({self.modality}, {self.shape}, {self.dtype}, {self.grid_thw})"

    def safetensors(self) -> bytes:
        """The file's bytes; `triptych_client.image` and its like take them as they take a file."""
        tensors: list[tuple[str, str, list[int], bytes]] = []
        if self.grid_thw is not None:
            grid = struct.pack("<3q", *self.grid_thw)
            tensors.append((f"{self.modality}_grid_thw", "I64", [1, 3], grid))
        if self.second_per_grid is not None:
            seconds = struct.pack("<d", self.second_per_grid)
            tensors.append(("second_per_grid_ts", "F64", [1], seconds))
        tensors.append(("ec_cache", _CODES[self.dtype], list(self.shape), self.data))
        header: dict[str, Any] = {"__metadata__": {"modality": self.modality}}
        offset = 0
        for name, dtype, shape, data in tensors:
            ends = [offset, offset := offset + len(data)]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": ends}
        text = msgspec.json.encode(header)
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        parts = (struct.pack("<Q", len(text)), text, *(data for *_, data in tensors))
        return b"".join(parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file.

        Raises:
            OSError: It cannot be written.
        """
        Path(path).write_bytes(self.safetensors())


class _Item(msgspec.Struct, frozen=True):
    modality: Modality
    dtype: str
    shape: tuple[int, int]
    offset: int
    grid_thw: tuple[int, int, int] | None = None
    second_per_grid: float | None = None


class _Ticket(msgspec.Struct, frozen=True):
    items: list[_Item]


async def encode(transport: Transport, call: Call) -> Encoded:
    """What the encoder makes of the one medium in ``call``, a chat.

    The steps of the ensemble that is to answer the chat are asked in its place.

    Raises:
        InvalidRequest: The model is no ensemble that chats, or the server is spoken to in HTTP.
        UnsupportedMedium: The engine is given such media as they are, and encodes them itself.
        TriptychClientError: What the server says of the medium.
    """
    makers = await transport.outputs(call.model)
    if not {ITEMS, TICKET} <= makers.keys():
        raise InvalidRequest(f"{call.model!r} is no ensemble with an encoder")
    request = [Input(REQUEST, "BYTES", (1,), call.body)]
    try:
        return await _ask(transport, makers, request, call.timeout)
    except LeaseLost:  # evicted between the two steps
        return await _ask(transport, makers, request, call.timeout)


async def _ask(
    transport: Transport, makers: dict[str, str], request: list[Input], timeout_s: float | None
) -> Encoded:
    read = await transport.infer(makers[ITEMS], request, timeout_s)
    media = [
        Input(MEDIA, "UINT8", (1, len(read[MEDIA])), read[MEDIA]),
        Input(ITEMS, "BYTES", (1, 1), read[ITEMS]),
    ]
    made = await transport.infer(makers[TICKET], media, timeout_s)
    try:
        [item] = msgspec.json.decode(made[TICKET], type=_Ticket).items
    except (msgspec.MsgspecError, KeyError, ValueError) as error:
        raise InternalError(f"the server sent a TICKET that cannot be read: {error}") from None
    if item.dtype not in _CODES:
        raise UnsupportedMedium(f"the engine encodes such a {item.modality} itself")
    tokens, width = item.shape
    end = item.offset + tokens * width * _ITEM_SIZE[item.dtype]
    return Encoded(
        data=made[EMBEDDINGS][item.offset : end],
        dtype=item.dtype,
        shape=item.shape,
        modality=item.modality,
        grid_thw=item.grid_thw,
        second_per_grid=item.second_per_grid,
    )
