"""The model ``preprocess`` alone, in a real tritonserver, called as an ensemble calls it."""

from __future__ import annotations

import base64
import http.server
import io
import json
import queue
import threading
import time

import httpx
import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
from PIL import Image

from triptych import contract
from triptych.contract import ITEMS, MEDIA, PROMPT, REQUEST, Items, Prompt
from triptych.errors import (
    InternalError,
    InvalidRequest,
    InvalidValue,
    MediaError,
    TriptychError,
    UnknownField,
    UnsupportedMedium,
)
from triptych.server import Server, ServerOptions

pytestmark = pytest.mark.server

WAIT_S = 30.0
WORKERS_OF_THE_REPOSITORY = 2
"""Instances in preprocess's config.pbtxt."""


FAULT = "{% if 'divide by zero' in messages | string %}{{ 1 // 0 }}{% endif %}"
"""Ends the checkpoint's template: a fault that no caller made, for who knows the words."""


@pytest.fixture(scope="module")
def faulty_checkpoint(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    template = (checkpoint / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text(template + FAULT)
    return folder


@pytest.fixture(scope="module")
def server(faulty_checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("preprocess") / "log"
    options = ServerOptions(
        model=str(faulty_checkpoint),
        ensemble="preprocess",
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        settings={"allow_private_media_hosts": ("127.0.0.1",), "log_level": "debug"},
        log_file=str(log),
    )
    server = Server(options)
    try:
        server.start()
        ready = f"http://127.0.0.1:{server.http_port}/v2/models/preprocess/ready"
        until(lambda: answers(ready))
        yield server
    finally:
        assert server.stop(), "processes or shared memory were left"
    assert log.read_text().count("Traceback") <= 1, (
        "more than the one fault that is made on purpose"
    )


def answers(url):
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def until(condition):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def media_workers(server):
    descendants = psutil.Process(server.pid).children(recursive=True)
    return [each.pid for each in descendants if "triptych.media.worker" in each.cmdline()]


def test_every_instance_has_a_worker_before_its_first_medium(server):
    until(lambda: len(media_workers(server)) >= WORKERS_OF_THE_REPOSITORY)


class Calls:
    """One gRPC stream: requests go out under names, responses come back in any order."""

    def __init__(self, server):
        self._client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
        self._responses = queue.Queue()
        self._client.start_stream(lambda result, error: self._responses.put((result, error)))

    def send(self, body, name=""):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = grpcclient.InferInput(REQUEST, [1], "BYTES")
        request.set_data_from_numpy(np.array([data], dtype=np.object_))
        self._client.async_stream_infer(
            "preprocess", [request], request_id=name, enable_empty_final_response=True
        )

    def receive(self):
        """The next response: its name, and its three outputs or its error."""
        result, error = self._responses.get(timeout=WAIT_S)
        if error is not None:
            return "", TriptychError.parse(error.message())
        message = result.get_response()
        assert message.parameters["triton_final_response"].bool_param
        outputs = (
            contract.decode(result.as_numpy(PROMPT)[0], Prompt),
            result.as_numpy(MEDIA),
            contract.decode(result.as_numpy(ITEMS)[0, 0], Items),
        )
        return message.id, outputs

    def ask(self, body):
        self.send(body)
        return self.receive()[1]

    def cancel(self):
        self._client.stop_stream(cancel_requests=True)

    def close(self):
        self._client.stop_stream()
        self._client.close()


@pytest.fixture
def calls(server):
    calls = Calls(server)
    yield calls
    calls.close()


def said(*content, **fields):
    return {"messages": [{"role": "user", "content": list(content)}], **fields}


def text(words="what is it?"):
    return {"type": "text", "text": words}


def shown(url):
    return {"type": "image_url", "image_url": {"url": url}}


def picture(width, height, colour):
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return shown("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())


def test_text(calls):
    prompt, media, items = calls.ask(said(text(), stream=True, max_tokens=5))
    assert prompt.stream
    assert prompt.sampling.max_tokens == 5
    assert prompt.items == items.items == []
    assert media.shape == (1, 0)
    assert media.dtype == np.uint8


def test_pictures(calls):
    red, blue = (250, 3, 4), (5, 6, 240)
    prompt, media, items = calls.ask(said(picture(60, 40, red), text(), picture(90, 90, blue)))
    assert [item.hash for item in prompt.items] == [item.hash for item in items.items]
    for item, colour in zip(items.items, (red, blue), strict=True):
        pixels = media[0, item.offset : item.offset + item.nbytes].reshape(item.shape)
        assert (pixels == colour).all()
        assert item.offset % contract.ITEM_ALIGNMENT == 0


@pytest.mark.parametrize(
    ("body", "kind", "where"),
    [
        (b"", InvalidRequest, ""),
        (b"\xff\xfe\x00", InvalidRequest, ""),
        (b"[" * 50_000, InvalidRequest, ""),
        (said(), InvalidValue, "messages[0].content"),
        (said(text(), max_tokens=True), InvalidValue, "max_tokens"),
        (said(text("a\u00e9\n"), prediction={"a": "\u00e9"}), UnknownField, "prediction"),
        (
            said({"type": "audio_url", "audio_url": {"url": "x"}}),
            UnsupportedMedium,
            "messages[0].content[0].audio_url.url",
        ),
        (
            said(text(), shown("data:image/png;base64,AAAA")),
            MediaError,
            "messages[0].content[1].image_url.url",
        ),
        (said(text("<|image_pad|>")), InvalidValue, "messages[0].content[0].text"),
    ],
)
def test_a_callers_mistake_comes_back_whole(calls, body, kind, where):
    error = calls.ask(body)
    assert isinstance(error, kind)
    assert not isinstance(error, InternalError)
    assert error.where == where
    assert calls.ask(said(text()))[0].length > 0


def test_a_fault_of_ours_is_logged_and_not_told(server, calls):
    calls.send(said(text("divide by zero")), "unlucky")
    _, error = calls.receive()
    assert isinstance(error, InternalError)
    assert error.what == "the server failed on this request (request id 'unlucky')"
    until(lambda: "ZeroDivisionError" in server.log.tail(400))
    assert "request unlucky failed" in server.log.tail(400)
    assert calls.ask(said(text()))[0].length > 0


def test_many_at_a_time_keep_their_own(calls):
    kinds = {f"text {n}": said(text(f"number {n}"), max_tokens=n + 1) for n in range(40)} | {
        f"picture {n}": said(picture(30 + n, 40, (n, n, n)), max_tokens=n + 1) for n in range(40)
    }
    for name, body in kinds.items():
        calls.send(body, name)
    while kinds:
        name, (prompt, media, items) = calls.receive()
        body = kinds.pop(name)
        assert prompt.sampling.max_tokens == body["max_tokens"]
        if name.startswith("picture"):
            assert set(media[0]) == {body["max_tokens"] - 1}
            assert len(items.items) == 1


@pytest.fixture
def stalling_host():
    """An HTTP server that takes requests and answers when told; yields its port and the gate."""
    gate, arrived = threading.Event(), threading.Semaphore(0)
    body = io.BytesIO()
    Image.new("RGB", (30, 30), (1, 2, 3)).save(body, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            arrived.release()
            gate.wait(WAIT_S)
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(body.getvalue())))
            self.end_headers()
            self.wfile.write(body.getvalue())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as host:
        host.handle_error = lambda *args: None  # a caller that went away
        thread = threading.Thread(target=host.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{host.server_port}/", gate, arrived
        finally:
            gate.set()
            host.shutdown()
            thread.join()


def test_a_slow_url_holds_up_nobody(calls, stalling_host):
    url, gate, arrived = stalling_host
    slow = 4 * WORKERS_OF_THE_REPOSITORY
    for number in range(slow):
        calls.send(said(shown(f"{url}{number}")), f"slow {number}")
    for _ in range(slow):
        assert arrived.acquire(timeout=WAIT_S)
    for number in range(20):
        calls.send(said(text()), f"quick {number}")
    assert all(calls.receive()[0].startswith("quick") for _ in range(20))
    gate.set()
    assert all(calls.receive()[0].startswith("slow") for _ in range(slow))


def test_a_cancelled_request_gives_its_load_up(server, stalling_host):
    url, _, arrived = stalling_host
    calls = Calls(server)
    calls.send(said(shown(f"{url}cancelled")), "given-up")
    assert arrived.acquire(timeout=WAIT_S)
    calls.cancel()
    until(lambda: "request given-up was cancelled" in server.log.tail(400))
