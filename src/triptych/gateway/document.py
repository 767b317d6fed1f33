"""The OpenAPI document: FastAPI's of the routes, with the objects of `triptych.gateway.schema`."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from triptych.chat.chunks import Chunk
from triptych.gateway import schema, schema_requests

REF = "#/components/schemas/{name}"
DOCUMENTED = (
    schema_requests.ChatCompletionRequest,
    schema_requests.CompletionRequest,
    schema.ChatCompletion,
    schema.Completion,
    Chunk,
    schema.Model,
    schema.ModelList,
    schema.Health,
    schema.ErrorResponse,
)

REASONS = {
    400: "The request cannot be served as it is; `param` names the place.",
    401: "No API key, or a wrong one.",
    403: "A place that the server does not fetch from.",
    404: "No such model.",
    408: "The request, or a medium it names, did not come in time.",
    413: "The request, or a medium, is too large.",
    415: "The request, or a medium, is of a type that is not served.",
    422: "A medium is broken.",
    429: "Too many requests; try again later.",
    499: "The generation was ended from elsewhere.",
    500: "A fault of the server's; its log has the cause.",
    503: "The model cannot be asked now; try again later.",
    504: "The answer was not whole in time.",
}


def body(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The ``openapi_extra`` of a route that takes ``kind`` as JSON."""
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(kind)}}}
    }


def answers(
    kind: type[msgspec.Struct], *errors: int, stream: type[msgspec.Struct] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route: ``kind``, or one of ``errors``; ``stream``: an event's data."""
    content: dict[str, Any] = {"application/json": {"schema": _ref(kind)}}
    description = "OK"
    if stream is not None:
        content["text/event-stream"] = {"schema": _event(stream)}
        description = (
            f"The answer; with `stream`, events whose `data` is a `{stream.__name__}` each, then "
            "`[DONE]`. A fault on the way is an event with `error`, and no `[DONE]` follows."
        )
    found: dict[int | str, dict[str, Any]] = {200: {"description": description, "content": content}}
    problem = {"application/json": {"schema": _ref(schema.ErrorResponse)}}
    for status in sorted(errors):
        found[status] = {"description": REASONS[status], "content": problem}
    return found


def _event(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """One event of a stream."""
    said = f"JSON as `{kind.__name__}` or `ErrorResponse`; or `[DONE]`."
    data = {"type": "string", "description": said}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def install(app: FastAPI) -> None:
    """Make ``app`` show our objects."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, components = msgspec.json.schema_components(DOCUMENTED, ref_template=REF)
            document.setdefault("components", {}).setdefault("schemas", {}).update(components)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": REF.format(name=kind.__name__)}
