"""``data:`` URIs (RFC 2397), base64 only, strict."""

from __future__ import annotations

import binascii

import pybase64

from triptych.errors import MediaTooLarge, MediaType, MediaUnreadable

_HEADER_LIMIT = 256
"""Characters before the comma."""


def decode(uri: str, *, max_bytes: int) -> tuple[bytes, str]:
    """The bytes in ``uri`` and their declared media type, in lower case, perhaps empty.

    Raises:
        MediaUnreadable: Not a data: URI, or its base64 is not strictly that.
        MediaType: Not base64.
        MediaTooLarge: More than ``max_bytes``; found before decoding.
    """
    comma = uri.find(",", 0, _HEADER_LIMIT)
    if uri[:5].lower() != "data:" or comma < 0:
        raise MediaUnreadable(f"not a data: URI with a comma in its first {_HEADER_LIMIT} bytes")
    media_type, *parameters = (part.strip().lower() for part in uri[5:comma].split(";"))
    if not parameters or parameters[-1] != "base64":
        raise MediaType("a data: URI must be base64 (data:<type>;base64,<data>)")
    size = (len(uri) - comma - 1) * 3 // 4 - uri.count("=", -2)
    if size > max_bytes:
        raise MediaTooLarge(f"the data: URI holds {size} bytes, over the limit of {max_bytes}")
    try:
        data = pybase64.b64decode(uri[comma + 1 :].encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaUnreadable(f"the data: URI's base64 is broken: {_reason(error)}") from None
    if len(data) > max_bytes:
        raise MediaTooLarge(f"the data: URI holds {len(data)} bytes, over the limit of {max_bytes}")
    return data, media_type


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"a character outside ASCII at {error.start}"
    return str(error) or type(error).__name__
