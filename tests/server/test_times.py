"""What an answer says of its stages, through a real server."""

from __future__ import annotations

import time

import httpx
import pytest

from pictures import encoded, noise
from triptych.gateway import Gateway, GatewayOptions
from triptych.server import Server
from triptych_client import Client, Stages, image, text, user

pytestmark = pytest.mark.server

MODEL = "chat_echo"


def whole(stages: Stages) -> float:
    """Seconds in the server."""
    took = (stages.preprocess_ms, stages.encode_ms, stages.prefill_ms, stages.decode_ms)
    return sum(took) / 1000


@pytest.mark.parametrize("stream", [True, False])
def test_a_picture_that_comes_again_is_told_as_cached(echo_server: Server, stream: bool) -> None:
    picture = image(encoded(noise(640, 480, seed=70 + stream), "png"))
    told = []
    with Client(f"localhost:{echo_server.grpc_port}") as client:
        for _ in range(2):
            began = time.monotonic()
            asked = client.chat([user("What?", picture)], model=MODEL, stream=stream)
            stages = (asked.collect() if stream else asked).stages
            assert stages is not None
            assert 0 < whole(stages) <= time.monotonic() - began
            told.append(stages)
    first, second = told
    assert (first.media, first.media_cached) == (1, 0)
    assert (second.media, second.media_cached) == (1, 1)
    assert first.preprocess_ms > 0
    assert first.encode_ms > 0


def test_the_gateway_tells_them_with_the_usage(echo_server: Server) -> None:
    body = {"model": MODEL, "messages": [user(text("Hello"))]}
    options = GatewayOptions(triton=f"127.0.0.1:{echo_server.grpc_port}", port=0)
    with Gateway(options) as gateway, httpx.Client(base_url=gateway.url, trust_env=False) as http:
        answer = http.post("/v1/chat/completions", json=body).json()
        streamed = {**body, "stream": True}
        quiet = http.post("/v1/chat/completions", json=streamed).text
        loud = http.post(
            "/v1/chat/completions",
            json={**streamed, "stream_options": {"include_usage": True}},
        ).text
        several = http.post("/v1/chat/completions", json={**body, "n": 2}).json()
    assert answer["triptych"]["media"] == 0
    assert answer["triptych"]["decode_ms"] >= 0
    assert '"triptych"' not in quiet
    assert loud.count('"triptych"') == 1
    assert "triptych" not in several
