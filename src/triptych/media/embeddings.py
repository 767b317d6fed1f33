"""Embeddings that a caller made: a safetensors file, or a pickle where that is allowed.

One file is one item: a matrix (tokens, width) under ``ec_cache`` or ``mm_embeddings``, or the only
tensor there is, and beside it what the model needs to place it, such as ``image_grid_thw``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors

from triptych.contract import DType, GridTHW, Modality
from triptych.errors import InvalidValue, MediaTooLarge, MediaUnreadable, TriptychError
from triptych.media.base import Array, Given, Planner

KEYS = ("ec_cache", "mm_embeddings")
GRIDS = ("image_grid_thw", "video_grid_thw", "grid_thw")
SECONDS = ("second_per_grid_ts", "second_per_grid")
MAX_HEADER = 1 << 20
"""Bytes of a safetensors header."""
MAX_TENSORS = 16
MAX_GRID = 1 << 16
"""Patches along one axis."""

_FLOATS: Mapping[str, tuple[DType, str]] = {
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
}
_NUMBERS = {"I64": "<i8", "I32": "<i4", "F32": "<f4", "F64": "<f8"}
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"} | {
    "int64": "I64",
    "int32": "I32",
    "float64": "F64",
}


class Tensor(NamedTuple):
    """One tensor of a file."""

    dtype: str
    """As safetensors writes it: ``F32``, ``BF16``, …"""
    shape: tuple[int, ...]
    data: bytes


class Embeddings(NamedTuple):
    """One item, checked."""

    array: Array
    """Shape (tokens, width); bfloat16 held as uint16."""
    dtype: DType
    grid_thw: GridTHW | None
    second_per_grid: float | None


def load(data: bytes, modality: Modality, planner: Planner, *, max_tokens: int) -> Embeddings:
    """Embeddings from a safetensors file.

    Raises:
        MediaUnreadable: Not strictly a safetensors file.
        MediaTooLarge: More tokens than ``max_tokens``.
        InvalidValue: Tensors, dtype, shape or grid that the model does not take, or values that
            are not finite.
    """
    return _checked(_parse(data), modality, planner, max_tokens)


def check(given: Given, modality: Modality, planner: Planner, *, max_tokens: int) -> Embeddings:
    """Embeddings that came as bare bytes; ``given.data`` are as many as its shape takes.

    Raises:
        MediaTooLarge: More tokens than ``max_tokens``.
        InvalidValue: As for `load`.
    """
    code = next(name for name, (dtype, _) in _FLOATS.items() if dtype == given.dtype)
    tensors = {KEYS[0]: Tensor(code, given.shape, given.data)}
    if given.grid_thw is not None:
        grid = np.array(given.grid_thw, _NUMBERS["I64"]).tobytes()
        tensors[GRIDS[0]] = Tensor("I64", (3,), grid)
    return _checked(tensors, modality, planner, max_tokens)


def load_pickle(
    data: bytes, modality: Modality, planner: Planner, *, max_tokens: int
) -> Embeddings:
    """Embeddings from ``torch.save``; only for a process that is confined and ends afterwards."""
    import torch

    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        named = found if isinstance(found, dict) else {KEYS[0]: found}
        tensors = {str(name): _tensor(value, torch) for name, value in named.items()}
    except TriptychError:
        raise
    except MemoryError:
        raise MediaTooLarge("the embeddings take more memory than a worker may use") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise MediaUnreadable(f"the file is no pickle of tensors alone: {reason}") from error
    return _checked(tensors, modality, planner, max_tokens)


def _parse(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file; the library checks offsets, overlaps and sizes."""
    header = int.from_bytes(data[:8], "little")
    if header > MAX_HEADER:
        raise MediaTooLarge(f"the safetensors header has {header} bytes, limit {MAX_HEADER}")
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise MediaUnreadable(f"not a safetensors file: {str(error)[:200]}") from error
    return {
        name: Tensor(_spelled(entry["dtype"]), tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in entries
    }


def _spelled(dtype: str) -> str:
    return _NAMES.get(dtype, dtype)


def _tensor(value: Any, torch: Any) -> Tensor:
    """A torch tensor as its bytes; plain numbers and lists are auxiliary data."""
    tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    dtype = str(tensor.dtype).removeprefix("torch.")
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Tensor(_spelled(dtype), tuple(tensor.shape), raw)


def _checked(
    tensors: Mapping[str, Tensor], modality: Modality, planner: Planner, max_tokens: int
) -> Embeddings:
    if len(tensors) > MAX_TENSORS:
        raise MediaTooLarge(f"the file has {len(tensors)} tensors, over the limit {MAX_TENSORS}")
    name = _main(tensors)
    array, dtype = _matrix(name, tensors[name], max_tokens)
    grid = _grid(tensors)
    planner.plan_embeddings(modality, (array.shape[0], array.shape[1]), grid)
    if not _finite(array, dtype):
        raise InvalidValue(f"the embeddings {name!r} have values that are not finite")
    return Embeddings(array, dtype, grid, _seconds(tensors))


def _main(tensors: Mapping[str, Tensor]) -> str:
    """The name of the embeddings among the tensors."""
    others = [name for name in tensors if name not in GRIDS + SECONDS]
    known = [name for name in others if name in KEYS]
    if len(others) != 1:
        raise InvalidValue(
            f"the file must hold one tensor of embeddings ({' or '.join(KEYS)}) and beside it "
            f"{', '.join(GRIDS + SECONDS)}; got {sorted(name[:40] for name in tensors)}"
        )
    return known[0] if known else others[0]


def _matrix(name: str, tensor: Tensor, max_tokens: int) -> tuple[Array, DType]:
    if tensor.dtype not in _FLOATS:
        raise InvalidValue(f"embeddings must be {', '.join(_FLOATS)}, got {tensor.dtype}")
    shape = tensor.shape[1:] if len(tensor.shape) == 3 and tensor.shape[0] == 1 else tensor.shape
    if len(shape) != 2 or 0 in shape:
        raise InvalidValue(
            f"embeddings must be (tokens, width) or (1, tokens, width), {name!r} is {tensor.shape}"
        )
    if shape[0] > max_tokens:
        raise MediaTooLarge(f"the embeddings have {shape[0]} tokens, over the limit {max_tokens}")
    dtype, code = _FLOATS[tensor.dtype]
    return np.frombuffer(tensor.data, code).reshape(shape), dtype


def _grid(tensors: Mapping[str, Tensor]) -> GridTHW | None:
    given = [name for name in GRIDS if name in tensors]
    if not given:
        return None
    tensor = tensors[given[0]]
    if len(given) > 1 or tensor.dtype not in ("I64", "I32") or tensor.shape not in ((3,), (1, 3)):
        raise InvalidValue(
            f"one grid of int64 and shape (1, 3) goes with the embeddings of one item, got "
            f"{', '.join(f'{name} {tensors[name].dtype} {tensors[name].shape}' for name in given)}"
        )
    time, height, width = (int(extent) for extent in _numbers(tensor))
    if not all(0 < extent <= MAX_GRID for extent in (time, height, width)):
        raise InvalidValue(f"{given[0]} must be from 1 to {MAX_GRID}, got {time, height, width}")
    return time, height, width


def _seconds(tensors: Mapping[str, Tensor]) -> float | None:
    for name in SECONDS:
        if name in tensors:
            tensor = tensors[name]
            if tensor.dtype not in _NUMBERS or tensor.shape not in ((), (1,)):
                raise InvalidValue(f"{name} must be one number, got {tensor.dtype} {tensor.shape}")
            value = float(_numbers(tensor)[0])
            if not 0 < value < 1e6:
                raise InvalidValue(f"{name} must be positive seconds, got {value}")
            return value
    return None


def _numbers(tensor: Tensor) -> Array:
    return np.frombuffer(tensor.data, _NUMBERS[tensor.dtype])


def _finite(array: Array, dtype: DType) -> bool:
    if dtype == "bfloat16":
        exponents = array.view(np.uint16) & np.uint16(0x7F80)
        return not bool((exponents == 0x7F80).any())
    return bool(np.isfinite(array).all())
