"""The routes, and what stands around them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import httpx
import msgspec
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.exceptions import HTTPException

import triptych
from triptych.errors import TriptychError
from triptych.gateway import asked, body, document, schema
from triptych.gateway.backend import Backend, Served
from triptych.gateway.chat import ChatResponse
from triptych.gateway.faults import BadKey, ModelNotFound, error_json, headers_of, write_error
from triptych.gateway.health import Readiness
from triptych.gateway.observe import REQUEST_ID, Metrics, Observe, record_of
from triptych.gateway.options import GatewayOptions
from triptych_client.errors import TriptychClientError

JSON = "application/json"
METRICS_TIMEOUT_S = 5.0
UPSTREAM = (408, 429, 499, 500, 503, 504)
"""Statuses that are Triton's to give."""


class State:
    """What the routes share; belongs to the running event loop."""

    def __init__(self, options: GatewayOptions, metrics: Metrics) -> None:
        self.options = options
        self.metrics = metrics
        self.backend = Backend(options)
        self.readiness = Readiness(self.backend, options.model)
        self.closing = asyncio.Event()
        """Set when answers that still run must end."""
        self.started = int(time.time())
        self.http = httpx.AsyncClient(timeout=METRICS_TIMEOUT_S, trust_env=False)

    async def close(self) -> None:
        """End what is not over, and let go of the connections."""
        await self.backend.close()
        await self.http.aclose()


def create_app(options: GatewayOptions) -> FastAPI:
    """The ASGI application; its lifespan holds the connection to Triton.

    Raises:
        ConfigurationError: Something in the options is wrong.
    """
    options.check()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.gateway = State(options, metrics)
        yield
        await app.state.gateway.close()

    app = FastAPI(
        title="Triptych",
        version=triptych.__version__,
        description="OpenAI's chat API in front of Triton: text, pictures, clips and sounds.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.include_router(_guarded(options))
    app.include_router(_open)
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
    app.add_middleware(Observe, metrics=metrics)
    document.install(app)
    return app


def state_of(request: Request) -> State:
    """The gateway behind a request."""
    state: State = request.app.state.gateway
    return state


Shared = Annotated[State, Depends(state_of)]

_v1 = APIRouter(prefix="/v1")
_open = APIRouter()
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

    router = APIRouter(dependencies=[Depends(check)] if options.keys else [])
    router.include_router(_v1)
    return router


@_v1.post(
    "/chat/completions",
    tags=["chat"],
    response_class=Response,
    responses=document.answers(
        schema.ChatCompletion, 400, 401, 403, 404, 413, 415, *UPSTREAM, stream=True
    ),
    openapi_extra=document.body(schema.ChatCompletionRequest),
)
async def create_chat_completion(request: Request, state: Shared) -> Response:
    """Answer a conversation."""
    wanted = asked.read(await body.read(request, state.options))
    record = record_of(request)
    ensemble = record.model = await state.backend.resolve(wanted.model)
    timeout = state.options.request_timeout_s
    pieces = [
        state.backend.chat(ensemble, each, record.request_id, timeout) for each in wanted.bodies
    ]
    return ChatResponse(wanted, pieces, record, state.closing)


@_v1.post("/completions", include_in_schema=False)
async def create_completion() -> Response:
    """Say where to go: the models know conversations only."""
    raise ModelNotFound("the models here chat: use /v1/chat/completions, not /v1/completions")


@_v1.get(
    "/models",
    tags=["models"],
    response_class=Response,
    responses=document.answers(schema.ModelList, 401, 500, 503, 504),
)
async def list_models(state: Shared) -> Response:
    """Every name that goes into ``model``: the ensembles that are loaded, and their aliases."""
    found = [_model(served, state) for served in await state.backend.served()]
    return _json(schema.ModelList(data=found))


@_v1.get(
    "/models/{model:path}",
    tags=["models"],
    response_class=Response,
    responses=document.answers(schema.Model, 401, 404, 500, 503, 504),
)
async def retrieve_model(model: str, state: Shared) -> Response:
    """One of them."""
    return _json(_model(Served(model, await state.backend.resolve(model)), state))


@_open.get(
    "/health/live",
    tags=["health"],
    response_class=Response,
    responses=document.answers(schema.Health),
)
async def live() -> Response:
    """Whether the gateway runs."""
    return _json(schema.Health())


@_open.get(
    "/health/ready",
    tags=["health"],
    response_class=Response,
    responses=document.answers(schema.Health, 503),
)
async def ready(state: Shared) -> Response:
    """Whether a chat would be answered: one was a moment ago, or is for this."""
    await state.readiness.check()
    return _json(schema.Health())


@_open.get(
    "/metrics",
    tags=["health"],
    response_class=Response,
    responses={200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}},
)
async def metrics(state: Shared) -> Response:
    """The gateway's numbers, and Triton's where the gateway knows their address."""
    theirs = b""
    if url := state.options.triton_metrics:
        try:
            theirs = (await state.http.get(url)).raise_for_status().content
        except httpx.HTTPError:
            state.metrics.triton.set(0)
        else:
            state.metrics.triton.set(1)
    own = generate_latest(state.metrics.registry)
    return Response(own + theirs, media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _model(served: Served, state: State) -> schema.Model:
    return schema.Model(id=served.name, root=served.ensemble, created=state.started)


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type=JSON)


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
