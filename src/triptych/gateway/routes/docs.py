"""``/docs``: the OpenAPI document as a page, of which nothing comes from elsewhere.

Swagger UI's files are those that the package fastapi-offline ships.
"""

from __future__ import annotations

from importlib import resources
from typing import Final

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

TYPES: Final = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
HEADERS: Final = {
    # Swagger UI sets styles of its own, and draws with data URIs.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
PAGE: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Triptych: the API</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="docs/favicon.png">
</head>
<body>
<div id="api"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
START: Final = """\
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#api",
  validatorUrl: null,  // else it would ask a server elsewhere whether the document is valid
});
"""

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def page() -> Response:
    """The page."""
    return Response(PAGE, headers=HEADERS, media_type="text/html")


@router.get("/docs/start.js")
async def start() -> Response:
    """What opens the document in it."""
    return Response(START, headers=HEADERS, media_type="text/javascript")


@router.get("/docs/{name}")
async def file(name: str) -> Response:
    """What it is made of."""
    if name not in TYPES:
        raise HTTPException(404)
    content = resources.files("fastapi_offline").joinpath("static", name).read_bytes()
    return Response(content, headers=HEADERS, media_type=TYPES[name])
