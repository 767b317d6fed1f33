"""Triton's ``timeout`` of a request bounds the whole of its life, whatever it waits for."""

from __future__ import annotations

import asyncio
import json
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tritonclient.grpc as triton

from media_server import Request, serving
from triptych.errors import TriptychError
from triptych.server import Server
from triptych_client import AsyncClient, Client, DeadlineExceeded, image, user
from triton_inputs import bytes_input

pytestmark = pytest.mark.server

MODEL = "chat_echo"
DELAY_S = 0.05
LONG = " ".join(f"word{number}" for number in range(150))
"""Takes the slow server about eight seconds to say back."""
TIMEOUT_S = 0.4


@pytest.fixture(scope="module")
def slow_server(start_server: Callable[..., Server]) -> Iterator[Server]:
    """Says one word after the other, and serves one request at a time."""
    server = start_server(
        "echo",
        echo_token_delay_s=DELAY_S,
        max_num_seqs=1,
        allow_private_media_hosts=("127.0.0.1",),
    )
    yield server
    server.stop()


def ask(server: Server, content: Any, **options: Any) -> str:
    """The error of a streamed request by a plain tritonclient; empty: it was answered."""
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(
            MODEL,
            [bytes_input("REQUEST", body, (1,))],
            enable_empty_final_response=True,
            **options,
        )
        while True:
            result, error = answers.get(timeout=30)
            if error is not None:
                return TriptychError.parse(error.message()).code
            if result.get_response().parameters["triton_final_response"].bool_param:
                return ""


def test_an_answer_that_takes_longer_is_cut_off_and_its_slot_free(slow_server: Server) -> None:
    assert ask(slow_server, LONG, timeout=int(TIMEOUT_S * 1e6)) == "deadline_exceeded"
    assert ask(slow_server, "a", timeout=5_000_000) == ""


def test_waiting_for_the_engine_counts(slow_server: Server) -> None:
    with Client(f"localhost:{slow_server.grpc_port}") as client:
        stream = client.chat(LONG, model=MODEL)
        pieces = iter(stream)
        next(pieces)
        assert ask(slow_server, "a", timeout=int(TIMEOUT_S * 1e6)) == "deadline_exceeded"
        assert next(pieces).text
        stream.cancel()


async def test_the_loading_of_media_counts(slow_server: Server) -> None:
    async def silence(request: Request) -> None:
        await asyncio.sleep(3600)

    async with serving() as media, AsyncClient(f"localhost:{slow_server.grpc_port}") as client:
        media.routes["/silence"] = silence
        url = f"http://127.0.0.1:{media.port}/silence"
        part = {"type": "image_url", "image_url": {"url": url}}
        began = time.monotonic()
        code = await asyncio.to_thread(ask, slow_server, [part], timeout=int(TIMEOUT_S * 1e6))
        assert code == "deadline_exceeded"
        assert time.monotonic() - began >= TIMEOUT_S
        with pytest.raises(DeadlineExceeded):
            await client.chat([user(image(url))], model=MODEL, timeout=TIMEOUT_S).collect()


def test_no_time_at_all_is_no_work_at_all(slow_server: Server) -> None:
    assert ask(slow_server, "a", timeout=1) == "deadline_exceeded"


@pytest.mark.parametrize("form", ["localhost:{0.grpc_port}", "http://localhost:{0.http_port}"])
def test_the_clients_timeout_is_the_requests(slow_server: Server, form: str) -> None:
    """The server ends it too, also when the client has no time left to say so."""
    with Client(form.format(slow_server)) as client:
        with pytest.raises(DeadlineExceeded):
            client.chat(LONG, model=MODEL, timeout=TIMEOUT_S).collect()
        assert client.chat("a", model=MODEL, stream=False, timeout=5).text
