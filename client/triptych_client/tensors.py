"""Embeddings that a caller has made, beside a request and not in it: bytes of the input TENSORS.

Parts of the request name their piece by offset, shape and dtype, so nothing is copied into JSON.
"""

from __future__ import annotations

import sys
from typing import Any

from triptych_client.errors import InvalidValue

DTYPES = ("float32", "float16", "bfloat16")
ALIGNMENT = 64
"""Bytes; a piece begins at a multiple, so that whoever reads it may take it where it lies."""


class Embeddings:
    """Embeddings of one medium, until their place among the request's is known.

    Args:
        source: A numpy array or a torch tensor, on any device, of shape (tokens, width).

    Raises:
        InvalidValue: It is neither, or of another shape or dtype.
    """

    data: memoryview
    """The values row by row, little-endian."""
    shape: tuple[int, int]
    dtype: str

    def __init__(self, source: Any) -> None:
        self.shape, self.dtype = _kind(source)
        self.data = memoryview(_octets(source)).cast("B")

    def __repr__(self) -> str:
        return f"Embeddings({self.shape}, {self.dtype})"


class Layout:
    """The TENSORS of one request: what is met while its JSON is written, end to end."""

    def __init__(self) -> None:
        self._offsets: dict[int, tuple[int, Embeddings]] = {}
        self._end = 0

    def place(self, value: object) -> dict[str, object]:
        """What stands for ``value`` in the JSON; what is met again has one place.

        Raises:
            TypeError: It is no `Embeddings`.
        """
        if not isinstance(value, Embeddings):
            raise TypeError(f"{type(value).__name__} is no JSON")
        if id(value) not in self._offsets:
            start = -(-self._end // ALIGNMENT) * ALIGNMENT
            self._offsets[id(value)] = (start, value)
            self._end = start + value.data.nbytes
        offset, _ = self._offsets[id(value)]
        return {"offset": offset, "shape": value.shape, "dtype": value.dtype}

    def join(self) -> bytes:
        """All pieces at their places."""
        whole = bytearray(self._end)
        for offset, piece in self._offsets.values():
            whole[offset : offset + piece.data.nbytes] = piece.data
        return bytes(whole)


def _kind(source: Any) -> tuple[tuple[int, int], str]:
    shape = tuple(getattr(source, "shape", ()))
    dtype = str(getattr(source, "dtype", type(source).__name__)).removeprefix("torch.")
    dtype = dtype.replace(">f4", "float32").replace(">f2", "float16")
    if len(shape) != 2 or min(shape) < 1 or dtype not in DTYPES:
        raise InvalidValue(
            f"embeddings are an array of {', '.join(DTYPES)} of shape (tokens, width), "
            f"got {dtype} of {shape = }"
        )
    return (int(shape[0]), int(shape[1])), dtype


def _octets(source: Any) -> Any:
    """The memory of an array, as uint8; a copy where it does not lie in one piece on the host."""
    # Whoever has a tensor has imported torch; nobody else should pay for it.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        return source.detach().cpu().contiguous().view(torch.uint8).numpy()
    import numpy as np

    array = np.ascontiguousarray(source)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.view(np.uint8)
