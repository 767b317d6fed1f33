"""What is seen of every request: an id, a line in the log, Prometheus' numbers."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triptych.chat.chunks import Usage
from triptych.contract import Modality
from triptych.errors import InternalError
from triptych.gateway import tracing
from triptych.gateway.faults import error_json
from triptych.gateway.tracing import Tracer

logger = logging.getLogger("triptych.gateway")

REQUEST_ID = "x-request-id"
QUIET = ("/health/live", "/health/ready", "/metrics")
"""Asked every few seconds by machines: no line in the log."""

_ID = re.compile(r"[A-Za-z0-9._\-]{1,64}")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Record:
    """One request as it is seen so far."""

    def __init__(self, request_id: str, traceparent: str = "") -> None:
        self.request_id = request_id
        self.traceparent = traceparent
        """The place in a trace of what is done for it; empty: it has none."""
        self.began = time.monotonic()
        self.status: int | None = None
        """HTTP's; 499 where the caller went away, 500 and above where a stream broke."""
        self.model = ""
        """The ensemble that was asked."""
        self.first_s: float | None = None
        """Time to the first piece of a streamed answer, seconds."""
        self.usage: Usage | None = None
        """Of the answers that came to their end."""

    def first(self) -> None:
        """A stream's first piece is there."""
        self.first_s = time.monotonic() - self.began


def record_of(request: Request) -> Record:
    """The record of a request."""
    record: Record = request.scope["state"]["record"]
    return record


class Metrics:
    """The gateway's numbers; `registry` has them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "triptych_gateway_requests",
            "Requests by route and status; 499: the caller went away.",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "triptych_gateway_request_seconds",
            "From a request's headers to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first = Histogram(
            "triptych_gateway_time_to_first_token_seconds",
            "From a request's headers to the first piece of its streamed answer.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "triptych_gateway_prompt_tokens",
            "Tokens of prompts whose answers came to their end, media included.",
            ["model"],
            registry=self.registry,
        )
        self.cached_tokens = Counter(
            "triptych_gateway_cached_prompt_tokens",
            "Of the prompts' tokens, those that the engine still had.",
            ["model"],
            registry=self.registry,
        )
        self.media_tokens = Counter(
            "triptych_gateway_media_tokens",
            "Of the prompts' tokens, those that stand for media.",
            ["model", "modality"],
            registry=self.registry,
        )
        self.answer_tokens = Counter(
            "triptych_gateway_answer_tokens",
            "Tokens of answers that came to their end.",
            ["model"],
            registry=self.registry,
        )
        self.active = Gauge(
            "triptych_gateway_active_requests", "Requests under way.", registry=self.registry
        )
        self.triton = Gauge(
            "triptych_gateway_triton_metrics_up",
            "Whether Triton's metrics could be read for this page.",
            registry=self.registry,
        )

    def observe(self, route: str, record: Record) -> None:
        """A request is over."""
        self.requests.labels(route, str(record.status or 500)).inc()
        self.seconds.labels(route).observe(time.monotonic() - record.began)
        if record.first_s is not None:
            self.first.labels(record.model).observe(record.first_s)
        if record.usage is not None:
            self._count(record.model, record.usage)

    def _count(self, model: str, usage: Usage) -> None:
        self.prompt_tokens.labels(model).inc(usage.prompt_tokens)
        self.answer_tokens.labels(model).inc(usage.completion_tokens)
        if details := usage.prompt_tokens_details:
            self.cached_tokens.labels(model).inc(details.cached_tokens)
            for modality in get_args(Modality):
                tokens = getattr(details, f"{modality}_tokens")
                self.media_tokens.labels(model, modality).inc(tokens)


class Observe:
    """Middleware, outside of all others: what it does not catch nobody does."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: Tracer | None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = Record(_request_id(headers), tracing.read(headers.get(tracing.TRACEPARENT, "")))
        span = None
        if self._tracer is not None and scope["path"] not in QUIET:
            span = self._tracer.start(record.traceparent)
            record.traceparent = tracing.inside(span)
        scope.setdefault("state", {})["record"] = record

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = record.request_id
            await send(message)

        with self._metrics.active.track_inprogress():
            try:
                await self._app(scope, receive, tagged)
            except Exception:
                logger.exception("request %s failed", record.request_id)
                if record.status is not None:
                    raise  # uvicorn closes the connection: half an answer is not to look whole
                await _send_internal(record, tagged)
        self._metrics.observe(_route(scope), record)
        if self._tracer is not None and span is not None:
            self._tracer.end(span, _route(scope), record.status or 500, record.request_id)
        _log(scope, record)


async def _send_internal(record: Record, send: Send) -> None:
    body = error_json(InternalError("see the log"), record.request_id)
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _request_id(headers: Headers) -> str:
    """The caller's own, if it can stand in a log."""
    given = headers.get(REQUEST_ID, "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def _route(scope: MutableMapping[str, Any]) -> str:
    """The route's path as it is declared: what callers make up must not make numbers."""
    return str(getattr(scope.get("route"), "path", "other"))


def _log(scope: MutableMapping[str, Any], record: Record) -> None:
    if scope["path"] in QUIET:
        return
    took = time.monotonic() - record.began
    first = "" if record.first_s is None else f", first token after {record.first_s:.3f} s"
    logger.info(
        "%s %s %s in %.3f s%s (%s)",
        scope["method"],
        _route(scope),
        record.status,
        took,
        first,
        record.request_id,
    )
