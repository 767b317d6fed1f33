"""The client library against a real tritonserver: what arrives, and that leaving ends the work."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from media_server import Request, serving
from pictures import encoded, noise
from triptych.server import Server
from triptych_client import (
    Answer,
    AsyncClient,
    ChatStream,
    Chunk,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidValue,
    MediaUnreadable,
    NotFound,
    TriptychClientError,
    UnknownField,
    assistant,
    image,
    system,
    user,
)

pytestmark = pytest.mark.server

MODEL = "chat_echo"
DELAY_S = 0.05
LONG = " ".join(f"word{number}" for number in range(150))
"""Takes the slow server about eight seconds to say back."""
GRPC, HTTP = "localhost:{0.grpc_port}", "http://localhost:{0.http_port}"
transports = pytest.mark.parametrize("form", [GRPC, HTTP], ids=["grpc", "http"])


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


@pytest.fixture
def client(echo_server: Server, form: str) -> Iterator[Client]:
    with Client(form.format(echo_server)) as client:
        yield client


@pytest.fixture
async def asynchronous(echo_server: Server, form: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(form.format(echo_server)) as client:
        yield client


CONVERSATION = [
    system("Say it back. ünï 你好 🙂 \u2028"),
    user(image(noise(64, 48)), "first", image(encoded(noise(40, 40, seed=1), "jpeg"))),
    assistant("yes"),
    user("second"),
]


@transports
def test_streamed_whole_and_collected_are_one_answer(client: Client) -> None:
    chunks = list(client.chat(CONVERSATION, model=MODEL, max_tokens=500))
    whole = client.chat(CONVERSATION, model=MODEL, max_tokens=500, stream=False)

    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert client.chat(CONVERSATION, model=MODEL, max_tokens=500).text == whole.text
    assert "image 1" in whole.text
    assert "ünï 你好 🙂 \u2028" in whole.text
    assert whole.finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.image_tokens > 0
    assert chunks[-1].usage == whole.usage
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]


@transports
async def test_the_asynchronous_client_says_the_same(
    asynchronous: AsyncClient, echo_server: Server
) -> None:
    chunks = [chunk async for chunk in asynchronous.chat(CONVERSATION, model=MODEL)]
    whole = await asynchronous.chat(CONVERSATION, model=MODEL, stream=False)
    with Client(GRPC.format(echo_server)) as client:
        expected = await asyncio.to_thread(lambda: client.chat(CONVERSATION, model=MODEL).text)
    assert "".join(chunk.text for chunk in chunks) == whole.text == expected


@transports
def test_logprobs_arrive(client: Client) -> None:
    answer = client.chat("a b c", model=MODEL, stream=False, logprobs=True, top_logprobs=2)
    assert answer.logprobs is not None
    assert answer.usage is not None
    assert len(answer.logprobs) == answer.usage.completion_tokens
    assert "".join(entry.token for entry in answer.logprobs) == answer.text
    assert all(entry.top_logprobs[0].token == entry.token for entry in answer.logprobs)


@transports
@pytest.mark.parametrize("stream", [True, False])
def test_mistakes_come_back_typed_and_placed(client: Client, stream: bool) -> None:
    def ask(*parts, **options):
        return finished(client.chat([user(*parts)], model=MODEL, stream=stream, **options))

    with pytest.raises(InvalidValue) as error:
        ask("a", temperature=9)
    assert error.value.where == "temperature"
    assert "9" in error.value.what
    assert error.value.http_status == 400
    with pytest.raises(UnknownField) as error:
        ask("a", tempreature=1)
    assert error.value.where == "tempreature"
    whole = encoded(noise(64, 64), "png")
    with pytest.raises(MediaUnreadable) as error:
        ask("a", image(whole[: len(whole) // 2]))
    assert error.value.where.startswith("messages[0].content[1]")
    assert client.chat("still there", model=MODEL, stream=False).text


@transports
def test_an_unknown_model_is_named(client: Client) -> None:
    with pytest.raises(NotFound, match="chat_nothing"):
        client.chat("a", model="chat_nothing", stream=False)
    assert client.chat("still there", model=MODEL, stream=False).text


@transports
async def test_what_the_server_has(client: Client, asynchronous: AsyncClient) -> None:
    assert client.ready(MODEL)
    assert not client.ready("chat_nothing")
    assert await asynchronous.ready(MODEL)
    assert not await asynchronous.ready("chat_nothing")
    models = client.models()
    assert {model.name for model in models} >= {MODEL, "preprocess", "decode_echo"}
    assert models == await asynchronous.models()


@transports
def test_threads_share_a_client(client: Client) -> None:
    def ask(number: int) -> str:
        return client.chat(f"number {number} of many", model=MODEL).text

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(48)))
    assert all(f"number {number} of many" in text for number, text in enumerate(answers))


@transports
async def test_tasks_share_a_client(asynchronous: AsyncClient) -> None:
    answers = await asyncio.gather(
        *(asynchronous.chat(f"number {n} of many", model=MODEL, stream=False) for n in range(48))
    )
    assert all(f"number {n} of many" in answer.text for n, answer in enumerate(answers))


def leave_the_loop(stream: ChatStream) -> None:
    for chunk in stream:
        if "word1" in chunk.text:
            break


def leave_the_block(stream: ChatStream) -> None:
    with stream:
        next(iter(stream))


def fail_in_the_loop(stream: ChatStream) -> None:
    def fail(chunk: Chunk) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(map(fail, stream))


def cancel_in_the_loop(stream: ChatStream) -> None:
    for _ in stream:
        stream.cancel()
    assert stream.cancelled
    assert stream.collect().finish_reason is None


def cancel_from_a_thread(stream: ChatStream) -> None:
    threading.Timer(0.5, stream.cancel).start()
    began = time.monotonic()
    assert stream.text
    assert time.monotonic() - began < 2
    assert stream.cancelled


def interrupt(stream: ChatStream) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        stream.collect()


WAYS = [
    leave_the_loop,
    leave_the_block,
    fail_in_the_loop,
    cancel_in_the_loop,
    cancel_from_a_thread,
    interrupt,
]


def finished(answer: Answer | ChatStream) -> Answer:
    return answer.collect() if isinstance(answer, ChatStream) else answer


def assert_the_engine_is_free(client: Client) -> None:
    """The only slot is taken until a generation ends: by itself that would take seconds."""
    assert client.chat("a", model=MODEL, stream=False, max_tokens=1, timeout=2).text


@transports
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_leaving_ends_the_generation(
    slow_server: Server, form: str, way: Callable[[ChatStream], None]
) -> None:
    with Client(form.format(slow_server)) as client:
        way(client.chat(LONG, model=MODEL, max_tokens=500))
        assert_the_engine_is_free(client)


@transports
@pytest.mark.parametrize("stream", [True, False])
def test_a_timeout_ends_the_generation(slow_server: Server, form: str, stream: bool) -> None:
    with Client(form.format(slow_server)) as client:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"0\.5 s"):
            finished(client.chat(LONG, model=MODEL, max_tokens=500, timeout=0.5, stream=stream))
        assert 0.4 < time.monotonic() - began < 1.5
        assert_the_engine_is_free(client)


@transports
@pytest.mark.parametrize("way", ["task", "loop", "cancel", "timeout", "whole"])
async def test_leaving_ends_the_generation_of_a_task_too(
    slow_server: Server, form: str, way: str
) -> None:
    async with AsyncClient(form.format(slow_server)) as client:
        stream = client.chat(LONG, model=MODEL, max_tokens=500)
        if way == "task":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.collect(), 0.5)
        elif way == "loop":
            async for _ in stream:
                break
        elif way == "cancel":
            reader = asyncio.create_task(stream.collect())
            await asyncio.sleep(0.5)
            await stream.cancel()
            assert (await reader).text
            assert stream.cancelled
        elif way == "timeout":
            with pytest.raises(DeadlineExceeded):
                await client.chat(LONG, model=MODEL, max_tokens=500, timeout=0.5).collect()
        else:
            answer = client.chat(LONG, model=MODEL, max_tokens=500, stream=False)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(answer, 0.5)
        free = await client.chat("a", model=MODEL, stream=False, max_tokens=1, timeout=2)
        assert free.text


@transports
async def test_leaving_ends_the_loading_of_media(slow_server: Server, form: str) -> None:
    """Triton tells preprocess nothing of it, and the engine has not heard of the request yet."""

    async def drip(request: Request) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n")
        while True:
            await request.send(b"x")
            await asyncio.sleep(0.01)

    async def until(path: str, counts: Counter[str]) -> None:
        async with asyncio.timeout(10):
            while not counts[path]:  # noqa: ASYNC110 - a server counts
                await asyncio.sleep(0.01)

    async with serving() as media, AsyncClient(form.format(slow_server)) as client:
        media.routes["/drip"] = drip
        shown = user(image(f"http://127.0.0.1:{media.port}/drip"))
        reader = asyncio.create_task(client.chat([shown], model=MODEL).collect())
        await until("/drip", media.hits)
        reader.cancel()
        await until("/drip", media.gone)
        assert (await client.chat("a", model=MODEL, stream=False, max_tokens=1)).text


@transports
def test_leaving_at_any_moment_harms_nothing(echo_server: Server, form: str) -> None:
    """Triton has crashed on streams that were cancelled just as their last response went out."""

    def leave_after(pieces: int) -> None:
        stream = client.chat("a b c d e", model=MODEL)
        for _, chunk in zip(range(pieces), stream, strict=False):
            if chunk.finish_reason:
                break

    with Client(form.format(echo_server)) as client, ThreadPoolExecutor(8) as pool:
        list(pool.map(leave_after, [*range(12)] * 10))
        echo_server.check()
        assert client.chat("still there", model=MODEL, stream=False).text


@transports
async def test_tasks_cancelled_at_any_moment_harm_nothing(
    asynchronous: AsyncClient, echo_server: Server
) -> None:
    async def cancelled_after(seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return bool(await asynchronous.chat("a b c d e", model=MODEL).text())
        except TimeoutError:
            return False

    outcomes = [await cancelled_after(step / 4000) for step in range(120)]
    assert len(set(outcomes)) == 2, "neither too early nor too late every time"
    echo_server.check()
    assert (await asynchronous.chat("still there", model=MODEL, stream=False)).text


@transports
def test_a_program_that_ends_ends_its_answers(slow_server: Server, form: str) -> None:
    address = form.format(slow_server)
    program = (
        "from triptych_client import Client\n"
        f"pieces = iter(Client({address!r}).chat({LONG!r}, model={MODEL!r}, max_tokens=500))\n"
        "print(next(pieces).text)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30)
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr == b""
    with Client(address) as client:
        assert_the_engine_is_free(client)


def test_a_server_that_dies_is_told(start_server: Callable[..., Server]) -> None:
    server = start_server("echo", echo_token_delay_s=DELAY_S)
    streams = []
    for form in (GRPC, HTTP):
        pieces = iter(Client(form.format(server)).chat(LONG, model=MODEL, max_tokens=500))
        next(pieces)
        streams.append(pieces)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    for pieces in streams:
        with pytest.raises(ConnectionFailed, match="broke"):
            list(pieces)
    server.stop()
    for form in (GRPC, HTTP):
        with Client(form.format(server)) as client:
            assert not client.ready(MODEL)
            with pytest.raises(ConnectionFailed, match="triptych serve"):
                client.models()
            with pytest.raises(TriptychClientError, match="triptych serve"):
                client.chat("a", model=MODEL, stream=False)


def chat(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "import sys; from triptych.cli import main; sys.exit(main())"]
    return subprocess.Popen(
        [*command, "chat", "--model", MODEL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@transports
def test_the_command_asks_about_pictures(echo_server: Server, form: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        noise(40, 40).save(tmp_path / name)
    Image.new("RGB", (30, 30)).save(tmp_path / "c", "webp")
    files = [str(path) for path in sorted(tmp_path.iterdir())]
    process = chat("How many?", *files, "--server", form.format(echo_server), "--stats")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "image 2" in out
    assert "How many?" in out
    assert err.startswith("triptych: time to first token")
    assert len(err.splitlines()) == 1


@transports
def test_the_command_tells_a_mistake_in_one_line(echo_server: Server, form: str) -> None:
    process = chat("a", "--server", form.format(echo_server), "--temperature", "9")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.startswith("triptych: temperature: ")
    assert "(invalid_value)" in err
    assert len(err.splitlines()) == 1


@transports
def test_ctrl_c_ends_the_answer_of_the_command(slow_server: Server, form: str) -> None:
    process = chat(LONG, "--server", form.format(slow_server), "--max-tokens", "500")
    assert process.stdout is not None
    assert process.stdout.read(4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == ""
    with Client(form.format(slow_server)) as client:
        assert_the_engine_is_free(client)
