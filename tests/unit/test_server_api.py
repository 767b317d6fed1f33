"""What `triptych serve` is told by a tritonserver, which answers in JSON."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from triptych.errors import InvalidRequest, TriptychError, Unavailable
from triptych.server.api import Api


@contextmanager
def refusing(body: bytes) -> Iterator[Api]:
    """An `Api` whose server refuses everything with ``body``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(400)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    api = Api("127.0.0.1", server.server_port, {})
    try:
        yield api
    finally:
        api.close()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_refused_greeting_says_what_the_stage_said_and_no_more() -> None:
    body = b'{"error":"[invalid_request] This model does not support generation"}'
    with refusing(body) as api, pytest.raises(InvalidRequest) as caught:
        api.greet("chat_vllm", 5)
    assert caught.value.what == "This model does not support generation"


def test_a_refusal_to_load_is_told_in_tritons_words() -> None:
    with refusing(b'{"error":"no such \\"model\\""}') as api, pytest.raises(Unavailable) as caught:
        api.load("chat_vllm")
    assert caught.value.what == 'tritonserver does not load chat_vllm: no such "model"'


def test_what_is_no_json_is_told_as_it_is() -> None:
    with refusing(b"Bad Gateway") as api, pytest.raises(TriptychError, match="Bad Gateway"):
        api.greet("chat_vllm", 5)
