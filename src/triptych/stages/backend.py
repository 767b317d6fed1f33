"""What every stage needs of Triton's Python backend: tensors, errors, settings, the log.

The names in ``pb_utils`` appear only inside a running stub, so they are used in functions and
never while this module is imported.
"""

from __future__ import annotations

import json
import locale
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from triptych import logs, settings
from triptych.errors import (
    ConfigurationError,
    InternalError,
    InvalidRequest,
    InvalidValue,
    TriptychError,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("triptych.stages")

TURN_S = 0.0005
"""Seconds."""
FINAL = 1
"""``TRITONSERVER_RESPONSE_COMPLETE_FINAL``, which pb_utils has only in a running stub."""


def configure_logging(level: str | None = None) -> None:
    """Send ``triptych.*`` to tritonserver's log, and fix the locale.

    A stub starts in the C locale, where Python reads and writes files as ASCII.
    """
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    logs.configure(level)


def take_turns() -> None:
    """Let a thread of this process that wants to run wait `TURN_S` for Python's lock, and no more.

    For stages in which one thread works in the background while others answer: Python's 5 ms are
    longer than all that a request of text alone takes there.
    """
    sys.setswitchinterval(TURN_S)


def model_settings(
    kind: type[settings.SettingsType], args: Mapping[str, str]
) -> settings.SettingsType:
    """The stage's settings from config.pbtxt's ``parameters`` and the environment.

    Args:
        kind: The stage's struct.
        args: What Triton gives to ``initialize``; ``model_config`` in it is JSON.

    Raises:
        ConfigurationError: An unknown name, or a value of the wrong type or range.
    """
    parameters = json.loads(args["model_config"]).get("parameters", {})
    values = {name: value.get("string_value", "") for name, value in parameters.items()}
    return settings.load(kind, values)


def read_bytes(request: Any, name: str) -> bytes:
    """The one element of the BYTES input ``name``.

    Raises:
        InvalidValue: The input is missing, or does not hold exactly one element.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        raise InvalidValue("this input is missing", where=name)
    elements = tensor.as_numpy().reshape(-1)
    if elements.size != 1:
        raise InvalidValue(f"one element is served, got {elements.size}", where=name)
    element = elements[0]
    if not isinstance(element, bytes):
        raise InvalidValue(f"must be BYTES, got {elements.dtype}", where=name)
    return element


def read_octets(request: Any, name: str, limit: int | None = None) -> npt.NDArray[np.uint8] | None:
    """A copy of the UINT8 input ``name``, of one dimension; None: the request is without it.

    Raises:
        InvalidValue: It is of another type.
        InvalidRequest: It has more bytes than ``limit``.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    octets = tensor.as_numpy()
    if octets.dtype != np.uint8:
        raise InvalidValue(f"must be UINT8, got {octets.dtype}", where=name)
    if limit is not None and octets.nbytes > limit:
        raise InvalidRequest(f"{name} has {octets.nbytes} bytes, the limit is {limit}")
    return np.array(octets).reshape(-1)


def read_row(request: Any, name: str) -> torch.Tensor | None:
    """The UINT8 input ``name`` of shape (1, bytes) as (bytes,), on the device that it came on.

    The caller's own: copied on a GPU, and on the host once, as the request came in. None: the
    request is without it.

    Raises:
        InvalidValue: It is of another type or shape.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    import torch

    if tensor.is_cpu():
        # as_numpy() is a copy that numpy owns; a view of Triton's memory would not outlive this
        # execute.
        data = torch.from_numpy(tensor.as_numpy())
    else:
        # Device memory is Triton's too, which gives it to another request as soon as a decoupled
        # model's execute returns, whatever keeps the capsule.
        data = torch.from_dlpack(tensor.to_dlpack()).clone()
        if data.is_cuda:
            torch.cuda.current_stream(data.device).synchronize()
    if data.dtype != torch.uint8 or data.ndim != 2 or data.shape[0] != 1:
        raise InvalidValue(
            f"must be UINT8 of shape (1, bytes), got {data.dtype} of shape {tuple(data.shape)}",
            where=name,
        )
    return data[0]


def parameter(request: Any, name: str) -> str:
    """The parameter ``name`` that a caller gave with a request; empty: none."""
    given = request.parameters()
    return str(json.loads(given).get(name, "")) if given else ""


def text_tensor(name: str, text: bytes | str, shape: Sequence[int] = (1,)) -> Any:
    """A BYTES tensor of one element."""
    data = text.encode() if isinstance(text, str) else text
    elements = np.empty(1, dtype=np.object_)
    elements[0] = data
    return pb_utils.Tensor(name, elements.reshape(tuple(shape)))


def uint8_tensor(name: str, data: npt.NDArray[np.uint8]) -> Any:
    """A UINT8 tensor of the shape of ``data``."""
    return pb_utils.Tensor(name, data)


def response(*tensors: Any) -> Any:
    """A response that holds ``tensors``."""
    return pb_utils.InferenceResponse(output_tensors=list(tensors))


def error_response(error: BaseException, request_id: str = "") -> Any:
    """The response for a request that failed.

    A `TriptychError` crosses with its own code and text. Anything else is a fault of ours: it is
    logged here with its traceback, and the caller learns only that, and the request's id.
    """
    if not isinstance(error, TriptychError):
        logger.error("request %s failed", request_id or "without id", exc_info=error)
        error = InternalError(f"the server failed on this request (request id {request_id!r})")
    elif isinstance(error, (InternalError, ConfigurationError)):
        logger.error("request %s failed", request_id or "without id", exc_info=error)
    return pb_utils.InferenceResponse(error=triton_error(error))


def triton_error(error: TriptychError) -> Any:
    """``error`` as Triton carries it: one status code and one string."""
    return pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.triton_code))
