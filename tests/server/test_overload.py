"""More than the server may have in hand is turned away at once, and harms nobody else."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from conftest import ServerFactory
from media_server import Request, serving
from triptych.cli.scrape import Page
from triptych.server import Server
from triptych_client import Answer, AsyncClient, Overloaded, TriptychClientError, image, user

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


async def test_what_is_in_hand_is_told(small_server: Server) -> None:
    url = f"http://127.0.0.1:{small_server.metrics_port}/metrics"

    async def becomes(count: int) -> None:
        deadline = time.monotonic() + WAIT_S
        with httpx.Client(trust_env=False) as http:
            while Page.read(http, [url]).total("triptych_requests_in_hand") != count:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)

    async with AsyncClient(f"localhost:{small_server.grpc_port}") as client:
        streams = [client.chat(LONG * 10, model=MODEL) for _ in range(LIMIT)]
        running = [asyncio.create_task(stream.collect()) for stream in streams]
        await becomes(LIMIT)
        for stream in streams:
            await stream.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await becomes(0)
