"""Callers who leave, and answers that are ended from elsewhere."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import openai
import pytest

from gateways import HELLO, LONG, MODEL, before, picture, text
from triptych.gateway import Gateway
from triptych.server import Server
from triptych_client import Client

pytestmark = pytest.mark.server

DELAY_S = 0.05


@pytest.fixture(scope="module")
def slow_server(start_server: Callable[..., Server]) -> Iterator[Server]:
    """Says one word after the other, and serves four requests at a time."""
    server = start_server("echo", echo_token_delay_s=DELAY_S, max_num_seqs=4)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def slow(slow_server: Server) -> Iterator[Gateway]:
    with before(slow_server, drain_timeout_s=0.5) as gateway:
        yield gateway


def seen(gateway: Gateway, name: str) -> float:
    """One of the gateway's numbers."""
    page = httpx.get(f"{gateway.url}/metrics").text
    lines = [line for line in page.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def left(gateway: Gateway) -> float:
    """How many callers went away."""
    routes = ("/v1/chat/completions", "/v1/completions")
    labels = [f'route="{route}",status="499"' for route in routes]
    return sum(seen(gateway, f"triptych_gateway_requests_total{{{each}}}") for each in labels)


def assert_the_engine_is_free(gateway: Gateway) -> None:
    """Its four slots are taken until generations end, which by itself takes fifteen seconds."""
    began = time.monotonic()
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 1}
    response = httpx.post(f"{gateway.url}/v1/chat/completions", json={**body, "n": 4}, timeout=30)
    assert response.status_code == 200
    assert time.monotonic() - began < 5.0


def ask_raw(gateway: Gateway, **options) -> socket.socket:
    """A request on a connection of its own, whose answer is left to the test."""
    messages = [{"role": "user", "content": LONG}]
    body = json.dumps({"model": MODEL, "messages": messages, "max_tokens": 1000, **options})
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body.encode())
    )
    return connection


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"n": 4}, {"n": 4, "stream": True}])
def test_leaving_ends_every_generation(slow: Gateway, options: dict) -> None:
    before = left(slow)
    with ExitStack() as stack:
        connections = [stack.enter_context(ask_raw(slow, **options)) for _ in range(4)]
        if "stream" in options:
            assert connections[0].recv(1000).startswith(b"HTTP/1.1 200 ")
        else:
            time.sleep(0.5)
    assert_the_engine_is_free(slow)
    assert left(slow) == before + 4


def test_leaving_at_any_point_ends_every_generation(slow: Gateway) -> None:
    """Two hundred come and go: in the request, before the first byte, in the answer."""
    dice = random.Random(0)

    def request(number: int) -> bytes:
        """A chat about text or a picture, or a prompt to go on with; every other one streamed."""
        path, content = b"/v1/chat/completions", [text(LONG)]
        asked: dict = {"messages": [{"role": "user", "content": content}]}
        if number % 4 == 1:
            content.insert(0, picture(seed=number))
        elif number % 4 == 3:
            path, asked = b"/v1/completions", {"prompt": LONG, "n": 2}
        asked |= {"model": MODEL, "stream": number % 8 < 4, "max_tokens": 1000}
        body = json.dumps(asked).encode()
        return (
            b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (path, len(body), body)
        )

    async def visit(number: int) -> bool:
        _, writer = await asyncio.open_connection("127.0.0.1", slow.port)
        whole = request(number)
        cut = dice.randrange(len(whole)) if number % 5 == 0 else len(whole)
        writer.write(whole[:cut])
        await writer.drain()
        await asyncio.sleep(dice.random() * 2)
        writer.transport.abort()
        return b"\r\n\r\n" in whole[:cut]

    async def visit_all() -> list[bool]:
        return await asyncio.gather(*(visit(number) for number in range(200)))

    before = left(slow)
    requests = sum(asyncio.run(visit_all()))
    assert_the_engine_is_free(slow)
    assert left(slow) == before + requests
    assert requests > 190
    assert seen(slow, "triptych_gateway_active_requests ") == 1  # this one


def test_the_sdk_closes_a_stream(slow: Gateway) -> None:
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=0) as client:
        streams = [
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": LONG}], stream=True
            )
            for _ in range(4)
        ]
        for stream in streams:
            next(iter(stream))
            stream.close()
    assert_the_engine_is_free(slow)


@pytest.mark.parametrize("stream", [False, True])
def test_the_timeout_of_the_gateway(slow: Gateway, slow_server: Server, stream: bool) -> None:
    with (
        before(slow_server, request_timeout_s=0.5) as gateway,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.APIError, match=r"0\.5 s") as error:
            list(
                client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": LONG}], stream=stream
                )
            )
        assert error.value.code == "deadline_exceeded"
        if not stream:
            assert isinstance(error.value, openai.InternalServerError)
            assert error.value.status_code == 504
    assert_the_engine_is_free(slow)


def test_a_generation_ended_from_elsewhere_is_told(slow: Gateway, slow_server: Server) -> None:
    """In a stream by an event, and no [DONE] follows."""
    with before(slow_server, drain_timeout_s=0.3) as gateway:
        body = {"model": MODEL, "messages": [{"role": "user", "content": LONG}], "stream": True}
        with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            gateway.stop()
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "unavailable"
    with Client(f"localhost:{slow_server.grpc_port}") as client:
        assert client.chat("a", model=MODEL, stream=False, max_tokens=1, timeout=2).text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{gateway.url}/health/live")
