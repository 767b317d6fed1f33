"""The gateway before a tritonserver of the tests, and what comes from it."""

from __future__ import annotations

import base64
import json

import httpx

from pictures import encoded, noise
from triptych.gateway import Gateway, GatewayOptions
from triptych.server import Server

MODEL = "chat_echo"
KEY = "sk-test-1"
HELLO = [{"role": "user", "content": "Hello there"}]
LONG = " ".join(f"word{number}" for number in range(300))
"""Takes a server that says a word each 50 ms about fifteen seconds to say back."""


def before(server: Server, **options) -> Gateway:
    """One in front of ``server``, on a port that is free."""
    options = {"triton": f"127.0.0.1:{server.grpc_port}", "port": 0, **options}
    return Gateway(GatewayOptions(**options))


def picture(kind: str = "png", seed: int = 0) -> dict:
    """A content part."""
    data = base64.b64encode(encoded(noise(64, 48, seed=seed), kind)).decode()
    url = f"data:image/{kind};base64,{data}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def text(content: str) -> dict:
    """A content part."""
    return {"type": "text", "text": content}


def events(response: httpx.Response) -> list:
    """The events of a stream; the last of one that came to its end is ``[DONE]``."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    bodies = [line.removeprefix("data: ") for line in lines]
    return [body if body == "[DONE]" else json.loads(body) for body in bodies]


def problem(response: httpx.Response) -> dict:
    """The error of a response, whose shape is OpenAI's."""
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error
