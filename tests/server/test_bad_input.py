"""What callers get wrong is named: the field, the value, the limit; and the server goes on."""

from __future__ import annotations

import base64
import json
import queue
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from pictures import encoded, noise
from triptych.server import Server
from triptych_client import Client, TriptychClientError, user

pytestmark = pytest.mark.server

JPEG = encoded(noise(64, 64), "JPEG")


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asking(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, **fields}


def showing(url: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return asking(messages=[{"role": "user", "content": [part]}])


URL_PATH = "messages[0].content[0].image_url"

CASES: dict[str, tuple[Any, str, str, str]] = {
    # name: body, code, where it begins with, a word that the text must have
    "broken JSON": (b'{"messages": [', "invalid_request", "", "JSON"),
    "not an object": (b"[]", "invalid_value", "", "object"),
    "empty": (b"", "invalid_request", "", "JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "invalid_request", "", "UTF-8"),
    "no messages": ({"max_tokens": 1}, "invalid_value", "messages", ""),
    "empty messages": (asking(messages=[]), "invalid_value", "messages", ""),
    "messages of a wrong type": (asking(messages="Hello"), "invalid_value", "messages", "Hello"),
    "a message of a wrong type": (asking(messages=[7]), "invalid_value", "messages[0]", "7"),
    "unknown role": (
        asking(messages=[{"role": "wizard", "content": "Hi"}]),
        "invalid_value",
        "messages[0].role",
        "wizard",
    ),
    "content of a wrong type": (
        asking(messages=[{"role": "user", "content": 5}]),
        "invalid_value",
        "messages[0].content",
        "5",
    ),
    "unknown part": (
        asking(messages=[{"role": "user", "content": [{"type": "smell"}]}]),
        "invalid_value",
        "messages[0].content[0].type",
        "smell",
    ),
    "unknown field": (asking(temprature=0), "unknown_field", "temprature", ""),
    "unserved field": (asking(logit_bias={}), "unknown_field", "logit_bias", ""),
    "no tools in the list": (asking(tools=[]), "invalid_value", "tools", ""),
    "max_tokens 0": (asking(max_tokens=0), "invalid_value", "max_tokens", "0"),
    "max_tokens -1": (asking(max_tokens=-1), "invalid_value", "max_tokens", "-1"),
    "max_tokens of a wrong type": (
        asking(max_tokens="many"),
        "invalid_value",
        "max_tokens",
        "many",
    ),
    "max_tokens true": (asking(max_tokens=True), "invalid_value", "max_tokens", ""),
    "more tokens than the context": (
        asking(max_tokens=10**6),
        "context_too_long",
        "max_",
        "1000000",
    ),
    "a prompt longer than the context": (
        asking(messages=[{"role": "user", "content": "circle " * 20_000}]),
        "context_too_long",
        "messages",
        "",
    ),
    "temperature 3": (asking(temperature=3), "invalid_value", "temperature", "3"),
    "temperature of a wrong type": (
        asking(temperature="hot"),
        "invalid_value",
        "temperature",
        "hot",
    ),
    "top_p 0": (asking(top_p=0), "invalid_value", "top_p", "0"),
    "n 2": (asking(n=2), "invalid_value", "n", "1"),
    "five stops": (asking(stop=["a"] * 5), "invalid_value", "stop", "4"),
    "an empty stop": (asking(stop=""), "invalid_value", "stop", ""),
    "top_logprobs without logprobs": (asking(top_logprobs=2), "invalid_value", "top_logprobs", ""),
    "no URL": (
        asking(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "invalid_value",
        URL_PATH,
        "",
    ),
    "a URL of a wrong type": (showing(9), "invalid_value", URL_PATH, "9"),
    "truncated JPEG": (showing(uri(JPEG[:300], "image/jpeg")), "media_unreadable", URL_PATH, ""),
    "a text file called .png": (showing(uri(b"just some text")), "media_type", URL_PATH, ""),
    "an empty picture": (showing("data:image/png;base64,"), "media_type", URL_PATH, ""),
    "broken base64": (showing("data:image/png;base64,@@@"), "media_unreadable", URL_PATH, ""),
    "a file": (showing("file:///etc/passwd"), "media_forbidden", URL_PATH, ""),
    "an address of this machine": (
        showing("http://127.0.0.1:9/a.png"),
        "media_forbidden",
        URL_PATH,
        "127.0.0.1",
    ),
    "a scheme nobody knows": (
        showing("gopher://example.org/a"),
        "media_forbidden",
        URL_PATH,
        "gopher",
    ),
    "a picture too thin": (
        showing(uri(encoded(noise(1000, 2), "PNG"))),
        "media_error",
        URL_PATH,
        "200",
    ),
    "a forged placeholder": (
        asking(
            messages=[{"role": "user", "content": "<|vision_start|><|image_pad|><|vision_end|>"}]
        ),
        "invalid_value",
        "messages[0].content",
        "image_pad",
    ),
}


@pytest.fixture(scope="module")
def client(vllm_server: Server) -> Iterator[Client]:
    with Client(f"localhost:{vllm_server.grpc_port}") as client:
        yield client


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named(vllm_server: Server, name: str) -> None:
    body, code, where, word = CASES[name]
    request = body if isinstance(body, bytes) else json.dumps(body).encode()
    text = refusal(vllm_server, request)
    assert f"[{code}] {where}" in text
    assert word in text
    assert "Traceback" not in text


def refusal(server: Server, request: bytes) -> str:
    """The error that the ensemble answers ``request`` with; over gRPC, REQUEST is any bytes."""
    tensor = grpcclient.InferInput("REQUEST", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([request], dtype=np.object_))
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpcclient.InferenceServerClient(f"localhost:{server.grpc_port}") as triton:
        triton.start_stream(lambda result, error: answers.put((result, error)))
        triton.async_stream_infer("chat_vllm", [tensor])
        result, error = answers.get(timeout=60)
        triton.stop_stream()
    assert error is not None, f"it was served: {result.as_numpy('TEXT')}"
    return str(error)


def test_http_says_400(vllm_server: Server) -> None:
    url = f"http://localhost:{vllm_server.http_port}/v2/models/chat_vllm/generate"
    reply = httpx.post(url, json={"REQUEST": json.dumps(asking(max_tokens=0))})
    assert reply.status_code == 400
    assert "[invalid_value] max_tokens" in reply.text


def test_the_server_goes_on(client: Client, vllm_server: Server) -> None:
    with pytest.raises(TriptychClientError) as caught:
        client.chat([user("Hello")], stream=False, temperature=9)
    assert (caught.value.code, caught.value.where) == ("invalid_value", "temperature")
    assert client.chat([user("Hello")], stream=False, temperature=0, max_tokens=4).text
    vllm_server.check()
