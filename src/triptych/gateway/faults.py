"""Every error in OpenAI's form, ``{"error": {"message", "type", "param", "code"}}``.

The gateway's own, beside those of `triptych.errors` and the client's:

    InvalidRequest
    ├── BadKey            invalid_api_key         401
    ├── ModelNotFound     model_not_found         404
    ├── BodyTimeout       request_timeout         408
    ├── BodyTooLarge      request_too_large       413
    └── BodyType          unsupported_media_type  415
    Unavailable
    └── NotReady          unavailable             503
"""

from __future__ import annotations

import logging
from typing import TypeAlias

import msgspec

from triptych.errors import InvalidRequest, TriptychError, Unavailable
from triptych.gateway.schema import Error, ErrorResponse
from triptych_client.errors import ConnectionFailed, TriptychClientError

logger = logging.getLogger("triptych.gateway")

Fault: TypeAlias = TriptychError | TriptychClientError
FAULTS = (TriptychError, TriptychClientError)
"""What is raised on purpose; all else is a fault of the gateway's own."""

RETRY_AFTER_S = 1
"""What a caller who was turned away is told to wait."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    499: "request_cancelled",
}


class BadKey(InvalidRequest):
    """No API key, or one that opens nothing."""

    code, http_status = "invalid_api_key", 401


class ModelNotFound(InvalidRequest):
    """No ensemble, and no alias of one, has the name."""

    code, http_status = "model_not_found", 404


class BodyTimeout(InvalidRequest):
    """The request did not come to its end."""

    code, http_status = "request_timeout", 408


class BodyTooLarge(InvalidRequest):
    """More bytes than the gateway takes."""

    code, http_status = "request_too_large", 413


class BodyType(InvalidRequest):
    """The request is no JSON by its own account."""

    code, http_status = "unsupported_media_type", 415


class NotReady(Unavailable):
    """Told to whoever asks whether a chat would be answered, which is no failure of a request."""


def error_json(fault: Fault, request_id: str) -> bytes:
    """OpenAI's error object for ``fault``. What is not the caller's doing is logged."""
    message = fault.what
    if fault.http_status >= 500 and not isinstance(fault, NotReady):
        logger.warning("request %s: %s: %s", request_id, fault.code, fault.what)
        message = public(fault, request_id)
    return write_error(fault.http_status, message, param=fault.where or None, code=fault.code)


def public(fault: Fault, request_id: str) -> str:
    """What a caller may know of a fault that is not theirs: no address, no words of Triton's."""
    if isinstance(fault, ConnectionFailed):
        return "the model server does not answer"
    if fault.http_status == 500:
        return f"the server failed on this request (request id {request_id!r})"
    return fault.what


def write_error(status: int, message: str, *, code: str, param: str | None = None) -> bytes:
    """OpenAI's error object."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    if param:
        message = f"{param}: {message}"
    return msgspec.json.encode(ErrorResponse(Error(message, kind, param, code)))


def headers_of(fault: Fault) -> dict[str, str]:
    """What goes with a fault's status."""
    if fault.http_status == 401:
        return {"www-authenticate": "Bearer"}
    if fault.http_status in (429, 503):
        return {"retry-after": str(RETRY_AFTER_S)}
    return {}
