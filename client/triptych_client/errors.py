"""Every error that the client raises on purpose.

    TriptychClientError
    ├── InvalidRequest          invalid_request      400
    │   ├── InvalidValue        invalid_value        400
    │   ├── UnknownField        unknown_field        400
    │   ├── ContextTooLong      context_too_long     400
    │   ├── UnsupportedMedium   unsupported_medium   400
    │   └── MediaError          media_error          400
    │       ├── MediaUnreadable media_unreadable     422
    │       ├── MediaType       media_type           415
    │       ├── MediaTooLarge   media_too_large      413
    │       ├── MediaForbidden  media_forbidden      403
    │       ├── MediaUnreachable media_unreachable   400
    │       └── MediaTimeout    media_timeout        408
    ├── NotFound                not_found            404
    ├── Cancelled               cancelled            499
    ├── Overloaded              overloaded           429
    ├── DeadlineExceeded        deadline_exceeded    504
    ├── Unavailable             unavailable          503
    │   ├── LeaseLost           lease_lost           503
    │   └── ConnectionFailed    connection_failed    503
    ├── ConfigurationError      configuration        500
    └── InternalError           internal             500

All but `ConnectionFailed` are the server's own; the client raises them too where it sees the
same fault first (a file that is not there, a timeout). The server sends them as text in the form
``[code] where: what``, with words of Triton's in front, and `from_text` reads that back.
"""

from __future__ import annotations

import re
from typing import ClassVar

_WIRE = re.compile(r"\[(?P<code>[a-z_]+)\] (?:(?P<where>\S+): )?(?P<what>.*)", re.DOTALL)


class TriptychClientError(Exception):
    """The root of all.

    Args:
        what: What is wrong, for a person, with the value and the limit.
        where: JSON path of the field at fault, such as ``messages[0].content[1]``; or empty.
    """

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500

    def __init__(self, what: str, *, where: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class InvalidRequest(TriptychClientError):
    """The request cannot be served as it is."""

    code, http_status = "invalid_request", 400


class InvalidValue(InvalidRequest):
    """A field holds a value of the wrong type or out of its range."""

    code = "invalid_value"


class UnknownField(InvalidRequest):
    """A field that the API does not have, or has and does not serve."""

    code = "unknown_field"


class ContextTooLong(InvalidRequest):
    """Prompt and answer together do not fit the model's context."""

    code = "context_too_long"


class UnsupportedMedium(InvalidRequest):
    """The model, or its engine, does not take this kind of medium."""

    code = "unsupported_medium"


class MediaError(InvalidRequest):
    """An image, clip, sound or embedding cannot be used."""

    code = "media_error"


class MediaUnreadable(MediaError):
    """The bytes are broken, truncated or not what they claim to be."""

    code, http_status = "media_unreadable", 422


class MediaType(MediaError):
    """The bytes are of a format that is not served."""

    code, http_status = "media_type", 415


class MediaTooLarge(MediaError):
    """More bytes, pixels, frames or seconds than the limit."""

    code, http_status = "media_too_large", 413


class MediaForbidden(MediaError):
    """A place that the server's policy does not let a caller name."""

    code, http_status = "media_forbidden", 403


class MediaUnreachable(MediaError):
    """The place that was named did not give the medium."""

    code = "media_unreachable"


class MediaTimeout(MediaError):
    """Fetching or decoding took longer than the server's limit."""

    code, http_status = "media_timeout", 408


class NotFound(TriptychClientError):
    """There is no such model or generation."""

    code, http_status = "not_found", 404


class Cancelled(TriptychClientError):
    """Someone else ended this answer: another client's abort, or the server."""

    code, http_status = "cancelled", 499


class Overloaded(TriptychClientError):
    """The server turned the request away before any work was done on it; try again later."""

    code, http_status = "overloaded", 429


class DeadlineExceeded(TriptychClientError):
    """The ``timeout`` ran out before the answer was whole."""

    code, http_status = "deadline_exceeded", 504


class Unavailable(TriptychClientError):
    """Something that the request needs is not there now."""

    code, http_status = "unavailable", 503


class LeaseLost(Unavailable):
    """Embeddings that the encoder had promised to keep are gone; sent again, the request works."""

    code = "lease_lost"


class ConnectionFailed(Unavailable):
    """No server answers at the address, or the connection to it broke."""

    code = "connection_failed"


class ConfigurationError(TriptychClientError):
    """A setting, checkpoint or model repository of the server is wrong."""

    code = "configuration"


class InternalError(TriptychClientError):
    """A fault of the server's; its cause is in the server's log."""

    code, http_status = "internal", 500


def _tree(root: type[TriptychClientError]) -> list[type[TriptychClientError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


BY_CODE: dict[str, type[TriptychClientError]] = {
    error.code: error for error in _tree(TriptychClientError)
}
"""Every class by its code."""

_BY_STATUS: dict[int, type[TriptychClientError]] = {
    400: InvalidRequest,
    404: NotFound,
    499: Cancelled,
    503: Unavailable,
    504: DeadlineExceeded,
}

# Triton's own words, where it says no more than the text: on a gRPC stream there is no status.
# (Its ``triton_grpc_error`` header would give one, but with it tritonserver 2.51 crashes on the
# name of a model that it does not have.)
_TRITON_SAYS: tuple[tuple[str, type[TriptychClientError]], ...] = (
    ("Exceeds maximum queue size", Overloaded),
    ("Request timeout expired", DeadlineExceeded),
    ("Server is stopping", Unavailable),
    ("Server not ready", Unavailable),
    ("Failed to increase the shared memory pool", Unavailable),
    ("has no available versions", Unavailable),
    ("unknown model", NotFound),
    ("is not found", NotFound),
    ("missing required input", InvalidRequest),
    ("is not ready", Unavailable),
    ("is not healthy", Unavailable),
)


def from_text(text: str, *, http_status: int = 500) -> TriptychClientError:
    """The error that a server's text tells of.

    Args:
        text: Holds ``[code] where: what`` somewhere, or is Triton's own.
        http_status: What the text came with; decides where the text itself does not.
    """
    for match in _WIRE.finditer(text):
        if found := BY_CODE.get(match["code"]):
            return found(match["what"], where=match["where"] or "")
    for words, kind in _TRITON_SAYS:
        if words in text:
            return kind(text)
    return _BY_STATUS.get(http_status, InternalError)(text)
