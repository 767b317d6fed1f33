"""The gateway before the echo server, as its callers see it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from gateways import MODEL, before
from triptych.gateway import Gateway
from triptych.server import Server


@pytest.fixture(scope="module")
def gateway(echo_server: Server) -> Iterator[Gateway]:
    """Open to everybody, with aliases."""
    metrics = f"http://127.0.0.1:{echo_server.metrics_port}/metrics"
    names = ("tiny", f"org/other={MODEL}", "lost=chat_nothing")
    with before(echo_server, triton_metrics=metrics, served_model_name=names) as gateway:
        yield gateway


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    """A plain client."""
    with httpx.Client(base_url=gateway.url, trust_env=False, timeout=30) as client:
        yield client
