"""The application: the routes, and what stands around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

import triptych
from triptych.errors import TriptychError
from triptych.gateway import document, routes
from triptych.gateway.faults import BadKey, error_json, headers_of, write_error
from triptych.gateway.observe import REQUEST_ID, Metrics, Observe, record_of
from triptych.gateway.options import GatewayOptions
from triptych.gateway.state import JSON, State
from triptych.gateway.tracing import Tracer
from triptych_client.errors import TriptychClientError


def create_app(options: GatewayOptions) -> FastAPI:
    """The ASGI application; its lifespan holds the connection to Triton.

    Raises:
        ConfigurationError: Something in the options is wrong.
    """
    options.check()
    metrics = Metrics()
    tracer = Tracer(options.otlp_endpoint) if options.otlp_endpoint else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.gateway = State(options, metrics)
        yield
        await app.state.gateway.close()
        if tracer is not None:
            tracer.close()

    app = FastAPI(
        title="Triptych",
        version=triptych.__version__,
        description="OpenAI's API in front of Triton: text, pictures, clips and sounds.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere: `routes.docs`
        redoc_url=None,
    )
    app.include_router(_guarded(options))
    for router in (*routes.OPEN, *((routes.PLAYGROUND,) if options.playground else ())):
        app.include_router(router)
    for fault in (TriptychError, TriptychClientError):
        app.add_exception_handler(fault, _answer_fault)
    app.add_exception_handler(HTTPException, _answer_http)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "retry-after"],
        )
    app.add_middleware(Observe, metrics=metrics, tracer=tracer)
    document.install(app)
    return app


_bearer = HTTPBearer(auto_error=False, description="One of the gateway's API keys, if it has any.")


def _guarded(options: GatewayOptions) -> APIRouter:
    """The routes under ``/v1``, behind the keys if there are any."""

    async def check(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> None:
        if given is None:
            raise BadKey("an API key is needed: Authorization: Bearer KEY")
        if given.credentials not in options.keys:
            raise BadKey("the API key is not known here")

    guarded = APIRouter(prefix="/v1", dependencies=[Depends(check)] if options.keys else [])
    for router in routes.GUARDED:
        guarded.include_router(router)
    return guarded


async def _answer_fault(request: Request, error: Exception) -> Response:
    assert isinstance(error, TriptychError | TriptychClientError)
    text = error_json(error, record_of(request).request_id)
    return Response(text, error.http_status, headers_of(error), JSON)


async def _answer_http(request: Request, error: Exception) -> Response:
    """What the router itself refuses: a path or a method that there is not."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = str(error.detail).lower().replace(" ", "_")
    return Response(
        write_error(error.status_code, message, code=code), error.status_code, error.headers, JSON
    )
