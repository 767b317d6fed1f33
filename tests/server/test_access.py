"""What callers may not do to a server unless it was started so: its own memory, its models."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException, shared_memory

from triptych.server import Server
from triptych_client import Client

pytestmark = pytest.mark.server

MODEL = "chat_echo"
HEADER = "triptych-key"
SECRET = "nobody reads this in a log"

Clients = list[tuple[str, Any]]


def clients(server: Server) -> Clients:
    return [
        ("http", httpclient.InferenceServerClient(f"127.0.0.1:{server.http_port}")),
        ("grpc", grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")),
    ]


@pytest.fixture
def closed(echo_server: Server) -> Iterator[Clients]:
    """Clients of a server that was started without any flag."""
    found = clients(echo_server)
    yield found
    for _, client in found:
        client.close()


FORBIDDEN: dict[str, Callable[[Any], Any]] = {
    "register system memory": lambda c: c.register_system_shared_memory("a", "/a", 8),
    "register CUDA memory": lambda c: c.register_cuda_shared_memory("a", b"YWFh", 0, 8),
    "list regions": lambda c: c.get_system_shared_memory_status(),
    "unregister all": lambda c: c.unregister_system_shared_memory(),
    "load code": lambda c: c.load_model(
        "mine", config='{"backend": "python"}', files={"file:1/model.py": b"import os"}
    ),
    "unload": lambda c: c.unload_model(MODEL),
    "list the repository": lambda c: c.get_model_repository_index(),
    "change the log": lambda c: c.update_log_settings({"log_file": "/tmp/mine"}),
    "change the traces": lambda c: c.update_trace_settings(settings={"trace_level": ["TENSORS"]}),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_caller_is_refused_and_told_why(closed: Clients, what: str) -> None:
    for _, client in closed:
        with pytest.raises(InferenceServerException, match=f"restricted, expecting.*{HEADER}"):
            FORBIDDEN[what](client)


def test_a_guess_is_refused_too(echo_server: Server) -> None:
    url = f"http://127.0.0.1:{echo_server.http_port}/v2/repository/models/{MODEL}/unload"
    for headers in ({HEADER: ""}, {HEADER: "a" * 32}):
        refused = httpx.post(url, json={}, headers=headers, trust_env=False)
        assert refused.status_code == httpx.codes.FORBIDDEN
    with Client(f"localhost:{echo_server.grpc_port}") as client:
        assert client.ready(MODEL), "and nothing was done"


def test_what_callers_need_is_open(echo_server: Server, closed: Clients) -> None:
    for address in (
        f"localhost:{echo_server.grpc_port}",
        f"http://localhost:{echo_server.http_port}",
    ):
        with Client(address) as client:
            assert MODEL in {model.name for model in client.models()}
            assert client.chat("Hello", model=MODEL, stream=False).text
    for _, client in closed:
        assert client.is_model_ready(MODEL)
        assert client.get_model_metadata(MODEL)
        assert client.get_inference_statistics(MODEL)


def test_the_key_is_in_no_log(echo_server: Server) -> None:
    """It is on the command line, which the users of the host alone can see."""
    command = " ".join(psutil.Process(echo_server.pid).cmdline())
    key = command.partition(f"{HEADER}=")[2].split()[0]
    assert len(key) == 32
    assert key not in echo_server.log.tail(10_000)


def test_with_the_flags_it_is_open_and_tells_no_secrets(
    start_server: Callable[..., Server],
) -> None:
    open_server = start_server(
        "echo",
        options={"allow_shared_memory": True, "allow_model_control": True},
        handover_key=SECRET,
        log_level="debug",
        log_content=True,
    )
    name = f"triptych-test-{uuid.uuid4().hex[:8]}"
    region = shared_memory.create_shared_memory_region(name, f"/{name}", 64)
    try:
        for _, client in clients(open_server):
            client.register_system_shared_memory(name, f"/{name}", 64)
            assert client.get_system_shared_memory_status()
            client.unregister_system_shared_memory(name)
            client.unload_model(MODEL)
            assert not client.is_model_ready(MODEL)
            client.load_model(MODEL)
            assert client.is_model_ready(MODEL)
            client.update_log_settings({"log_verbose_level": 0})
            client.close()
        with Client(f"localhost:{open_server.grpc_port}") as asking:
            assert asking.chat("Hello", model=MODEL, stream=False).text
        assert SECRET not in open_server.log.tail(10_000)
    finally:
        shared_memory.destroy_shared_memory_region(region)
        open_server.stop()
