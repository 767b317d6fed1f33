"""More than the server may have in hand is turned away at once, and harms nobody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import httpx
import pytest

from conftest import ServerFactory
from media_server import Request, serving
from triptych.cli.scrape import Page
from triptych.server import Server
from triptych_client import (
    Answer,
    AsyncClient,
    Message,
    Overloaded,
    TriptychClientError,
    image,
    user,
)

pytestmark = pytest.mark.server

MODEL = "chat_echo"
LIMIT = 4
WAIT_S = 60.0
LONG = " ".join(f"word{number}" for number in range(40))


@pytest.fixture(scope="module")
def small_server(start_server: ServerFactory) -> Server:
    """Has four requests in hand at most, and takes two seconds for a long answer."""
    return start_server(
        "echo",
        echo_token_delay_s=0.05,
        max_num_seqs=LIMIT,
        max_inflight_requests=LIMIT,
        max_inflight_media_mb=1,
        allow_private_media_hosts=("127.0.0.1",),
    )


async def test_what_is_too_much_is_refused_before_any_work(small_server: Server) -> None:
    async with AsyncClient(f"localhost:{small_server.grpc_port}") as client:

        async def ask() -> tuple[float, Answer | TriptychClientError]:
            began = time.monotonic()
            try:
                return 0.0, await client.chat(LONG, model=MODEL, stream=False)
            except TriptychClientError as error:
                return time.monotonic() - began, error

        running = [asyncio.create_task(ask()) for _ in range(LIMIT)]
        await asyncio.sleep(0.5)
        refused = [await ask() for _ in range(10)]
        answered = [answer for _, answer in await asyncio.gather(*running)]
        assert all(isinstance(answer, Answer) for answer in answered)
        for _, error in refused:
            assert isinstance(error, Overloaded)
            assert f"the limit is {LIMIT}" in str(error)
        after = await client.chat("a", model=MODEL, stream=False)
        assert after.text


async def test_media_leave_room_for_text(small_server: Server) -> None:
    arrived = asyncio.Queue[None]()

    async def silence(request: Request) -> None:
        arrived.put_nowait(None)
        await asyncio.sleep(3600)

    async with serving() as media, AsyncClient(f"localhost:{small_server.grpc_port}") as client:

        async def ask(number: int) -> Answer:
            media.routes[f"/{number}"] = silence
            slow = image(f"http://127.0.0.1:{media.port}/{number}")
            return await client.chat([user(slow)], model=MODEL, stream=False)

        loading = [asyncio.create_task(ask(number)) for number in range(3)]
        for _ in loading:
            await arrived.get()
        with pytest.raises(Overloaded, match="3 requests with media in hand, the limit is 3"):
            await ask(3)
        assert (await client.chat("a", model=MODEL, stream=False)).text
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)


async def test_bytes_of_media_are_counted_as_they_come(small_server: Server) -> None:
    sent = asyncio.Event()

    async def half(request: Request) -> None:
        headers = "content-type: image/jpeg\r\ncontent-length: 1000000"
        await request.send(f"HTTP/1.1 200 OK\r\n{headers}\r\n\r\n".encode() + bytes(900_000))
        sent.set()
        await asyncio.sleep(3600)

    def bringing(nbytes: int) -> Message:
        return user(image(f"data:image/png;base64,{'A' * nbytes}"))

    async with serving() as media, AsyncClient(f"localhost:{small_server.grpc_port}") as client:
        with pytest.raises(TriptychClientError, match=r"the limit is 1048576") as never:
            await client.chat([bringing(1_100_000)], model=MODEL, stream=False)
        assert never.value.code == "media_too_large"
        media.routes["/half"] = half
        slow = user(image(f"http://127.0.0.1:{media.port}/half"))
        loading = asyncio.create_task(client.chat([slow], model=MODEL, stream=False))
        await sent.wait()
        await becomes(small_server, "media_bytes", lambda count: count > 900_000)
        with pytest.raises(Overloaded, match=r"bytes of media in hand .* the limit is 1048576"):
            await client.chat([bringing(200_000)], model=MODEL, stream=False)
        assert (await client.chat("a", model=MODEL, stream=False)).text
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await becomes(small_server, "media_bytes", lambda count: count == 0)
        with pytest.raises(TriptychClientError) as read:  # and found to be no picture
            await client.chat([bringing(200_000)], model=MODEL, stream=False)
        assert read.value.code == "media_type"


async def test_what_is_in_hand_is_told(small_server: Server) -> None:
    async with AsyncClient(f"localhost:{small_server.grpc_port}") as client:
        streams = [client.chat(LONG * 10, model=MODEL) for _ in range(LIMIT)]
        running = [asyncio.create_task(stream.collect()) for stream in streams]
        await becomes(small_server, "requests", lambda count: count == LIMIT)
        for stream in streams:
            await stream.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await becomes(small_server, "requests", lambda count: count == 0)


async def becomes(server: Server, what: str, wanted: Callable[[float], bool]) -> None:
    """Wait until the metrics say that the server has so much in hand."""
    url, name = f"http://127.0.0.1:{server.metrics_port}/metrics", f"triptych_{what}_in_hand"
    deadline = time.monotonic() + WAIT_S
    with httpx.Client(trust_env=False) as http:
        while not wanted(count := Page.read(http, [url]).total(name)):
            assert time.monotonic() < deadline, f"{count} {what} are in hand"
            await asyncio.sleep(0.2)
