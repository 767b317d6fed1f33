"""Every error that Triptych raises on purpose, and how each crosses a wire.

    TriptychError
    ├── InvalidRequest          invalid_request      INVALID_ARG   400
    │   ├── InvalidValue        invalid_value        INVALID_ARG   400
    │   ├── UnknownField        unknown_field        INVALID_ARG   400
    │   ├── ContextTooLong      context_too_long     INVALID_ARG   400
    │   ├── UnsupportedMedium   unsupported_medium   UNSUPPORTED   400
    │   └── MediaError          media_error          INVALID_ARG   400
    │       ├── MediaUnreadable media_unreadable     INVALID_ARG   422
    │       ├── MediaType       media_type           INVALID_ARG   415
    │       ├── MediaTooLarge   media_too_large      INVALID_ARG   413
    │       ├── MediaForbidden  media_forbidden      INVALID_ARG   403
    │       ├── MediaUnreachable media_unreachable   INVALID_ARG   400
    │       └── MediaTimeout    media_timeout        INVALID_ARG   408
    ├── NotFound                not_found            NOT_FOUND     404
    ├── Cancelled               cancelled            CANCELLED     499
    ├── Overloaded              overloaded           UNAVAILABLE   429
    ├── DeadlineExceeded        deadline_exceeded    UNAVAILABLE   504
    ├── Unavailable             unavailable          UNAVAILABLE   503
    │   └── LeaseLost           lease_lost           UNAVAILABLE   503
    ├── ConfigurationError      configuration        INTERNAL      500
    └── InternalError           internal             INTERNAL      500

Triton carries an error as one status code and one string, so the string has a form
that can be read back: ``[code] where: what``.  ``where`` is the JSON path of the field
at fault, or empty.  `TriptychError.parse` finds that form anywhere in a text, because
Triton puts words of its own in front of it.
"""

from __future__ import annotations

import re
from typing import ClassVar

_WIRE = re.compile(r"\[(?P<code>[a-z_]+)\] (?:(?P<where>\S+): )?(?P<what>.*)", re.DOTALL)


class TriptychError(Exception):
    """The root: has a ``code``, the Triton status ``triton_code`` and the ``http_status``.

    Args:
        what: One sentence for the person who must act on it; it names the value that was
            got and the limit that it broke.
        where: JSON path of the field at fault, such as ``messages[0].content[1]``.
    """

    code: ClassVar[str] = "error"
    triton_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __init__(self, what: str, *, where: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where

    def __str__(self) -> str:
        """The wire form, ``[code] where: what``."""
        where = f"{self.where}: " if self.where else ""
        return f"[{self.code}] {where}{self.what}"

    def at(self, where: str) -> TriptychError:
        """This error with its place set, if it had none: who raises it often cannot know."""
        if not self.where:
            self.where = where
        return self

    @staticmethod
    def parse(text: str) -> TriptychError:
        """Read an error back from its wire form; a text of another form is an `InternalError`."""
        for match in _WIRE.finditer(text):
            if found := BY_CODE.get(match["code"]):
                return found(match["what"], where=match["where"] or "")
        return InternalError(text)


class InvalidRequest(TriptychError):
    """The caller's request cannot be served as it is."""

    code, triton_code, http_status = "invalid_request", "INVALID_ARG", 400


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

    code, triton_code = "unsupported_medium", "UNSUPPORTED"


class MediaError(InvalidRequest):
    """An image, clip, sound or embedding that the caller gave cannot be used."""

    code = "media_error"


class MediaUnreadable(MediaError):
    """The bytes are broken, truncated or not what they claim to be."""

    code, http_status = "media_unreadable", 422


class MediaType(MediaError):
    """The bytes are whole, but of a format that is not served."""

    code, http_status = "media_type", 415


class MediaTooLarge(MediaError):
    """More bytes, pixels, frames or seconds than the limit."""

    code, http_status = "media_too_large", 413


class MediaForbidden(MediaError):
    """A place that the policy does not let a caller name."""

    code, http_status = "media_forbidden", 403


class MediaUnreachable(MediaError):
    """The place the caller named did not give the medium."""

    code = "media_unreachable"


class MediaTimeout(MediaError):
    """The place the caller named, or the decoder, took longer than the limit."""

    code, http_status = "media_timeout", 408


class NotFound(TriptychError):
    """There is no such model or generation."""

    code, triton_code, http_status = "not_found", "NOT_FOUND", 404


class Cancelled(TriptychError):
    """The caller went away or asked for an end."""

    code, triton_code, http_status = "cancelled", "CANCELLED", 499


class Overloaded(TriptychError):
    """The request was turned away before any work was done on it."""

    code, triton_code, http_status = "overloaded", "UNAVAILABLE", 429


class DeadlineExceeded(TriptychError):
    """The request's own timeout ran out."""

    code, triton_code, http_status = "deadline_exceeded", "UNAVAILABLE", 504


class Unavailable(TriptychError):
    """A stage or engine that the request needs is not there now."""

    code, triton_code, http_status = "unavailable", "UNAVAILABLE", 503


class LeaseLost(Unavailable):
    """Embeddings that the encoder had promised to keep are gone; sent again, the request works."""

    code = "lease_lost"


class ConfigurationError(TriptychError):
    """A setting, checkpoint or model repository is wrong; the server does not start with it."""

    code = "configuration"


class InternalError(TriptychError):
    """A fault of ours; its cause is in the server's log, not in the answer."""

    code = "internal"


def _tree(root: type[TriptychError]) -> list[type[TriptychError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


BY_CODE: dict[str, type[TriptychError]] = {error.code: error for error in _tree(TriptychError)}
"""Every class by its wire code."""
