"""What the routes share, and how each of them gets it."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import httpx
import msgspec
from fastapi import Depends, Request, Response

from triptych.gateway.backend import Backend
from triptych.gateway.health import Readiness
from triptych.gateway.observe import Metrics
from triptych.gateway.options import GatewayOptions

JSON = "application/json"
METRICS_TIMEOUT_S = 5.0


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


def state_of(request: Request) -> State:
    """The gateway behind a request."""
    state: State = request.app.state.gateway
    return state


Shared = Annotated[State, Depends(state_of)]


def json_response(answer: msgspec.Struct) -> Response:
    """``answer`` as JSON."""
    return Response(msgspec.json.encode(answer), media_type=JSON)
