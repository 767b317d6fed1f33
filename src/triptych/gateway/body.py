"""A request's bytes, up to a limit of length and of patience."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from triptych.errors import Cancelled
from triptych.gateway.faults import BodyTimeout, BodyTooLarge, BodyType
from triptych.gateway.options import GatewayOptions


async def read(request: Request, options: GatewayOptions) -> bytes:
    """The body of a request that says it is JSON.

    Raises:
        BodyType: It says that it is something else, or compressed.
        BodyTooLarge: It is longer than the limit, by its header or in fact.
        BodyTimeout: Its next bytes did not come in time.
        Cancelled: The caller left in the middle of it.
    """
    _check_type(request)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > options.max_body_bytes:
        raise _too_large(f"of {int(declared)} bytes", options)
    pieces: list[bytes] = []
    size = 0
    stream = request.stream()
    try:
        while True:
            async with asyncio.timeout(options.body_timeout_s):
                piece = await anext(stream, None)
            if piece is None:
                return b"".join(pieces)
            size += len(piece)
            if size > options.max_body_bytes:
                raise _too_large("without a length", options)
            pieces.append(piece)
    except TimeoutError:
        raise BodyTimeout(
            f"{size} bytes of the request came, then none for {options.body_timeout_s:g} s"
        ) from None
    except ClientDisconnect:
        raise Cancelled("the caller went away in the middle of the request") from None


def _check_type(request: Request) -> None:
    kind = request.headers.get("content-type", "application/json")
    mime = kind.partition(";")[0].strip().lower()
    if mime != "application/json":
        raise BodyType(f"the request must be application/json, got {kind[:100]!r}")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise BodyType(f"the request must not be compressed, got {coding[:100]!r}")


def _too_large(size: str, options: GatewayOptions) -> BodyTooLarge:
    return BodyTooLarge(f"a request {size} exceeds the limit of {options.max_body_mb} MiB")
