"""The page on which a person tries the models: files as they are, under a strict policy.

The page asks the same API as everybody else, with the person's own key. It holds no secret, so
it is open.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

FILES: Final = Path(__file__).parents[1] / "playground"
TYPES: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""What the page may do: https://www.w3.org/TR/CSP3/. ``blob:`` shows a person's own files."""
HEADERS: Final = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
@router.get("/playground")
async def find() -> Response:
    """Go to the page."""
    return RedirectResponse("/playground/", headers=HEADERS)


@router.get("/playground/")
async def page(request: Request) -> Response:
    """The page itself."""
    return _answer("index.html", request)


@router.get("/playground/{name}")
async def file(name: str, request: Request) -> Response:
    """What it is made of."""
    return _answer(name, request)


def _answer(name: str, request: Request) -> Response:
    if name not in _CONTENTS:
        raise HTTPException(404)
    content = _CONTENTS[name]
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=TYPES[Path(name).suffix])


_CONTENTS = {path.name: path.read_bytes() for path in FILES.iterdir() if path.suffix in TYPES}
