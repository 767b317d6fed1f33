"""The client against counterparts that fail as a real server does only now and then."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from triptych_client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    InternalError,
    NotFound,
    Overloaded,
    Unavailable,
    conversation,
)


def chunk(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    head = {"id": "i", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return json.dumps({**head, "choices": [choice]}, ensure_ascii=False).encode()


class Script:
    """What a counterpart does with a chat: pieces to send, texts of errors, or actions.

    An abort ends it as it ends a generation, unless it is ``deaf``.
    """

    def __init__(self, *steps: bytes | str | Callable[[], object], deaf: bool = False) -> None:
        self._steps = steps
        self._deaf = deaf
        self.aborts: list[str] = []
        self.requests: list[str] = []
        self.release = threading.Event()

    def wait(self) -> None:
        self.release.wait(20)

    def abort(self, request_id: str) -> None:
        self.aborts.append(request_id)
        if not self._deaf:
            self.release.set()

    def play(self) -> Iterator[bytes | str]:
        for step in self._steps:
            if self.release.is_set():
                yield "[cancelled] the generation was ended"
                return
            if callable(step):
                step()
            else:
                yield step


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Plays a script over gRPC; what is sent to ``decode_x`` is an abort."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def ModelConfig(self, request, context):
        response = service_pb2.ModelConfigResponse()
        step = response.config.ensemble_scheduling.step.add(model_name="decode_x")
        step.output_map["OUT"] = "CHUNK"
        return response

    def ModelStreamInfer(self, requests, context):
        for request in requests:
            if request.model_name == "decode_x":
                self.script.abort(request.parameters["abort"].string_param)
                continue
            self.script.requests.append(request.id)
            for step in self.script.play():
                response = service_pb2.ModelStreamInferResponse()
                if isinstance(step, str):
                    response.error_message = step
                else:
                    response.infer_response.outputs.add(name="CHUNK", datatype="BYTES", shape=[1])
                    response.infer_response.raw_output_contents.append(
                        len(step).to_bytes(4, "little") + step
                    )
                yield response


@contextlib.contextmanager
def over_grpc(script: Script) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Triton(script), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        script.release.set()
        server.stop(0).wait()


@contextlib.contextmanager
def over_http(script: Script) -> Iterator[str]:
    """Plays a script over HTTP, on bare sockets, so that bodies can be cut anywhere."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head, _, body = connection.recv(1 << 16).partition(b"\r\n\r\n")
            path = head.split(b" ")[1].decode()
            if not path.startswith("/v2/"):  # HTTP/2, which gRPC speaks
                return
            while len(body) < int(dict(_headers(head)).get(b"content-length", b"0")):
                body += connection.recv(1 << 16)
            if path.endswith("/config"):
                step = {"model_name": "decode_x", "output_map": {"OUT": "CHUNK"}}
                _reply(connection, json.dumps({"ensemble_scheduling": {"step": [step]}}).encode())
            elif "/decode_x/" in path:
                script.abort(json.loads(body)["abort"])
                _reply(connection, b"")
            else:
                script.requests.append(json.loads(body)["id"])
                _play(connection, script)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=serve, args=(connection,), daemon=True))
                threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        script.release.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for thread in threads:
            thread.join()


def _headers(head: bytes) -> Iterator[tuple[bytes, bytes]]:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        yield name.lower(), value.strip()


def _reply(connection: socket.socket, body: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


def _play(connection: socket.socket, script: Script) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for step in script.play():
        content = {"error": step} if isinstance(step, str) else {"CHUNK": step.decode()}
        event = f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
        # One byte a piece cuts every character of several bytes.
        for place in range(len(event)):
            connection.sendall(b"1\r\n" + event[place : place + 1] + b"\r\n")
    connection.sendall(b"0\r\n\r\n")


transports = pytest.mark.parametrize("over", [over_grpc, over_http], ids=["grpc", "http"])


async def read_async(address: str, **options: object) -> str:
    async with AsyncClient(address) as client:
        return await client.chat("a", **options).text()


def read_sync(address: str, **options: object) -> str:
    with Client(address) as client:
        return client.chat("a", **options).text


def read_in_a_loop(address: str, **options: object) -> str:
    return asyncio.run(read_async(address, **options))


clients = pytest.mark.parametrize("read", [read_sync, read_in_a_loop], ids=["sync", "async"])


@transports
@clients
def test_characters_survive(over, read):
    text = "ünï 你好 🙂 \u2028\x85\x1c\n\ndata: "
    script = Script(*(chunk(character) for character in text), chunk("", "stop"))
    with over(script) as address:
        assert read(address) == text
    assert script.aborts == []


@transports
@clients
def test_an_error_in_the_middle(over, read):
    script = Script(chunk("a"), "in ensemble 'chat_vllm', [overloaded] max_num_seqs: at most 64")
    with over(script) as address, pytest.raises(Overloaded) as error:
        read(address)
    assert error.value.where == "max_num_seqs"
    assert error.value.what == "at most 64"
    assert script.aborts == [], "it has ended there"


@transports
@clients
def test_a_stream_that_ends_too_early(over, read):
    with over(Script(chunk("a"))) as address, pytest.raises(Unavailable, match="before the answer"):
        read(address)


@transports
@clients
def test_a_chunk_that_cannot_be_read_ends_the_generation(over, read):
    script = Script(chunk("a"), b"{}", lambda: script.wait())
    with over(script) as address:
        with pytest.raises(InternalError, match="CHUNK"):
            read(address)
        assert script.aborts == script.requests


@transports
@clients
def test_a_timeout_counts_the_whole_answer(over, read):
    """Each piece comes in time; the answer as a whole does not."""
    steps = [step for n in range(50) for step in (chunk(str(n)), lambda: time.sleep(0.05))]
    script = Script(*steps, chunk("", "stop"))
    with over(script) as address:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"0\.4 s"):
            read(address, timeout=0.4)
        assert 0.3 < time.monotonic() - began < 1.2
        assert script.aborts == script.requests


@transports
@clients
def test_a_timeout_before_anything_has_come(over, read):
    script = Script(lambda: script.wait())
    with over(script) as address:
        with pytest.raises(DeadlineExceeded):
            read(address, timeout=0.3)
        assert script.aborts == script.requests
        assert len(script.aborts) == 1


@transports
@clients
def test_a_server_that_does_not_hear_the_abort_is_left(over, read, monkeypatch):
    monkeypatch.setattr(conversation, "GRACE_S", 0.1)
    answered = threading.Event()
    script = Script(lambda: script.wait(), answered.set, deaf=True)
    with over(script) as address:
        with pytest.raises(DeadlineExceeded):
            read(address, timeout=0.2)
        assert not answered.is_set()
        assert script.aborts == script.requests


@transports
def test_an_answer_that_nobody_reads_ends_with_its_timeout(over):
    script = Script(chunk("a"), lambda: script.wait())
    with over(script) as address, Client(address) as client:
        stream = client.chat("a", timeout=0.3)
        pieces = iter(stream)
        next(pieces)
        time.sleep(0.6)
        assert script.aborts == script.requests
        with pytest.raises(DeadlineExceeded):
            next(pieces)
        assert not stream.cancelled


@transports
@clients
def test_leaving_a_whole_answer_aborts_nothing_and_reads_to_the_end(over, read):
    """A gRPC stream that is cancelled just as its last response goes out can crash Triton."""
    ended = threading.Event()
    script = Script(chunk("a", "stop"), lambda: time.sleep(0.2), chunk(""), ended.set)
    with over(script) as address:
        if read is read_sync:
            with Client(address) as client:
                for piece in client.chat("a"):
                    if piece.finish_reason:
                        break
        else:
            asyncio.run(leave_at_the_finish(address))
        assert ended.is_set()
    assert script.aborts == []


async def leave_at_the_finish(address: str) -> None:
    async with AsyncClient(address) as client:
        async for piece in client.chat("a"):
            if piece.finish_reason:
                break


@transports
def test_a_failed_answer_stays_failed(over):
    with (
        over(Script(chunk("a"), "[not_found] no such thing")) as address,
        Client(address) as client,
    ):
        stream = client.chat("a")
        for _ in range(2):
            with pytest.raises(NotFound):
                stream.collect()
        assert not stream.cancelled


@transports
def test_closing_the_client_ends_its_answers(over):
    script = Script(chunk("a"), lambda: script.wait())
    with over(script) as address:
        client = Client(address)
        pieces = iter(client.chat("a"))
        assert next(pieces).text == "a"
        client.close()
        assert script.aborts == script.requests
        assert list(pieces) == []


@transports
def test_cancelling_twice_or_after_the_end_does_nothing(over):
    script = Script(chunk("a", "stop"))
    with over(script) as address, Client(address) as client:
        stream = client.chat("a")
        assert stream.text == "a"
        stream.cancel()
        stream.cancel()
        assert not stream.cancelled
        assert stream.text == "a"
    assert script.aborts == []


@transports
def test_a_cancel_before_the_request_has_left_sends_nothing(over):
    script = Script(chunk("a", "stop"))
    with over(script) as address, Client(address) as client:
        stream = client.chat("a")
        stream.cancel()
        assert stream.text == ""
        assert stream.cancelled
    assert script.requests == []


@transports
def test_a_cancel_wakes_a_reader_that_waits_for_the_first_piece(over):
    script = Script(lambda: script.wait())
    with over(script) as address, Client(address) as client:
        stream = client.chat("a")
        timer = threading.Timer(0.3, stream.cancel)
        timer.start()
        began = time.monotonic()
        assert stream.text == ""
        assert time.monotonic() - began < 2
        timer.join()
        assert script.aborts == script.requests


@transports
async def test_a_task_that_waits_for_the_first_piece_is_woken(over):
    script = Script(lambda: script.wait())
    with over(script) as address:
        async with AsyncClient(address) as client:
            stream = client.chat("a")
            reader = asyncio.create_task(stream.collect())
            await asyncio.sleep(0.3)
            await stream.cancel()
            assert (await asyncio.wait_for(reader, 2)).text == ""
        assert script.aborts == script.requests


@transports
async def test_a_request_is_sent_once(over):
    """Also when its task is cancelled before the server has said anything."""
    script = Script(lambda: script.wait())
    with over(script) as address:
        async with AsyncClient(address) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.chat("a", stream=False), 0.3)
        assert len(script.requests) == 1
        assert script.aborts == script.requests


@transports
def test_an_abort_that_fails_is_logged_and_not_raised(over, caplog):
    script = Script(chunk("a"), lambda: script.wait())
    with over(script) as address:
        client = Client(address)
        pieces = iter(client.chat("a"))
        next(pieces)
    pieces.close()
    assert "may go on unread" in caplog.text
    client.close()


@pytest.mark.parametrize("scheme", ["", "http://"])
@clients
def test_no_server(scheme, read):
    with socket.socket() as taken:  # bound, not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionFailed, match=f"no server at {address}: start it with"):
            read(address)
        assert not Client(address).ready()


@clients
def test_the_wrong_port_is_guessed(read):
    script = Script(chunk("a", "stop"))
    with over_grpc(script) as address, pytest.raises(ConnectionFailed, match="for gRPC give"):
        read(f"http://{address}")
    with over_http(script) as address, pytest.raises(ConnectionFailed, match="http://"):
        read(address.removeprefix("http://"))
