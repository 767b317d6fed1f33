"""``/health/live``, ``/health/ready`` and ``/metrics``, for machines."""

from __future__ import annotations

import httpx
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from triptych.gateway import document, schema
from triptych.gateway.state import Shared, json_response

router = APIRouter(tags=["health"])


@router.get("/health/live", response_class=Response, responses=document.answers(schema.Health))
async def live() -> Response:
    """Whether the gateway runs."""
    return json_response(schema.Health())


@router.get(
    "/health/ready", response_class=Response, responses=document.answers(schema.Health, 503)
)
async def ready(state: Shared) -> Response:
    """Whether a chat would be answered: one was a moment ago, or is for this."""
    await state.readiness.check()
    return json_response(schema.Health())


@router.get(
    "/metrics",
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
