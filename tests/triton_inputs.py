"""Inputs for Triton over gRPC."""

from __future__ import annotations

from typing import Any

import numpy as np
import tritonclient.grpc as triton


def bytes_input(name: str, data: bytes, shape: tuple[int, ...]) -> Any:
    """One element of BYTES."""
    return array_input(name, np.array([data], dtype=np.object_).reshape(shape), "BYTES")


def array_input(name: str, array: np.ndarray[Any, Any], datatype: str) -> Any:
    """An array as Triton's client sends it."""
    made = triton.InferInput(name, array.shape, datatype)
    made.set_data_from_numpy(array)
    return made
