"""The pool of encoders, against servers that speak gRPC on real ports."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import trustme

from encoder_pool import FakeEncoder, call, embeddings, encoders
from triptych.errors import (
    ConfigurationError,
    InternalError,
    InvalidValue,
    Overloaded,
    TriptychError,
    Unavailable,
)
from triptych.remote import Pool
from triptych.remote.balance import SLACK
from triptych.remote.call import Answer, Call
from triptych.remote.pool import TRIES
from triptych.remote.server import RemoteServer

STUB_DIED = (grpc.StatusCode.INTERNAL, "Stub process 'encoder_0_0' is not healthy.")


@asynccontextmanager
async def pool_of(servers: list[FakeEncoder], **options: Any) -> AsyncIterator[Pool]:
    times = {"timeout_s": 20.0, "interval_s": 0.05, "health_timeout_s": 1.0, **options}
    pool = Pool([server.address for server in servers], **times)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - of the servers, which know nothing of events
            await asyncio.sleep(0.005)


def seat(pool: Pool, server: FakeEncoder) -> RemoteServer:
    """What the pool has of a server."""
    return next(one for one in pool.servers if one.address == server.address)


def content(answer: Answer) -> bytes:
    assert answer.embeddings is not None
    return bytes(answer.embeddings)


def expected(asked: Call) -> bytes:
    return embeddings(asked.item, bytes(asked.pixels))


async def owner(pool: Pool, servers: list[FakeEncoder], name: str) -> FakeEncoder:
    """The server that a content goes to while there is nothing else to do."""
    [answer] = await pool.encode([call(name)])
    return next(server for server in servers if server.address == answer.server)


async def waiting(
    pool: Pool, servers: list[FakeEncoder], name: str
) -> tuple[FakeEncoder, asyncio.Future[list[Answer]]]:
    """An item that waits at its server until that one's gate is opened."""
    first = await owner(pool, servers, name)
    first.gate.clear()
    asking = asyncio.ensure_future(pool.encode([call(name)]))
    await until(lambda: first.seen.count(name) == 2)
    return first, asking


async def test_items_fan_out_and_come_back_in_order() -> None:
    async with encoders(3) as servers, pool_of(servers) as pool:
        for server in servers:
            server.gate.clear()
        calls = [call(f"picture {place}", 4 + place) for place in range(12)]
        asking = asyncio.ensure_future(pool.encode(calls))
        await until(lambda: sum(len(server.seen) for server in servers) == 12)
        tokens = [one.item.tokens for one in calls]
        assert sum(server.outstanding for server in pool.servers) == sum(tokens)
        # Who has what is for the addresses to say, which are others each time; this bound is not.
        most = SLACK * sum(tokens) / len(servers) + max(tokens)
        assert max(server.outstanding for server in pool.servers) <= most
        assert sum(bool(server.seen) for server in servers) >= 2
        for server in reversed(servers):
            server.gate.set()
        answers = await asking
        assert [content(answer) for answer in answers] == [expected(one) for one in calls]
        assert [server.outstanding for server in pool.servers] == [0, 0, 0]


async def test_a_content_goes_where_it_was() -> None:
    async with encoders(4) as servers, pool_of(servers) as pool:
        names = [f"picture {place}" for place in range(16)]
        first = [(await owner(pool, servers, name)).address for name in names]
        again = [(await owner(pool, servers, name)).address for name in reversed(names)]
        assert again[::-1] == first
        assert len({*first}) > 1


async def test_a_content_that_all_want_does_not_wait_for_one_server() -> None:
    async with encoders(2) as servers, pool_of(servers) as pool:
        for server in servers:
            server.gate.clear()
        asking = asyncio.ensure_future(pool.encode([call("wanted")] * 10))
        await until(lambda: sum(len(server.seen) for server in servers) == 10)
        assert min(len(server.seen) for server in servers) >= 3
        for server in servers:
            server.gate.set()
        await asking


async def test_tickets_name_their_owners() -> None:
    async with encoders(2) as servers, pool_of(servers) as pool:
        answers = await pool.encode([call(f"{place}", inline=False) for place in range(8)])
        assert {answer.server for answer in answers} == {server.address for server in servers}
        for answer in answers:
            assert [*answer.agents] == [answer.server]
            assert answer.embeddings is None


async def test_nothing_to_encode_needs_no_server() -> None:
    async with encoders(1) as servers, pool_of(servers) as pool:
        await servers[0].kill()
        assert await pool.encode([]) == []


async def test_another_takes_over_from_one_that_is_killed() -> None:
    async with encoders(2) as servers, pool_of(servers) as pool:
        first, asking = await waiting(pool, servers, "picture")
        await first.kill()
        [answer] = await asking
        assert content(answer) == expected(call("picture"))
        assert answer.server != first.address

        await until(lambda: seat(pool, first).state == "lost")
        assert await owner(pool, servers, "picture") is not first
        first.gate.set()
        await first.restart()
        await until(lambda: seat(pool, first).state == "ready")
        assert await owner(pool, servers, "picture") is first


async def test_another_takes_over_from_one_that_falls_silent() -> None:
    async with encoders(2) as servers, pool_of(servers, health_timeout_s=0.3) as pool:
        first = await owner(pool, servers, "picture")
        first.silent = True
        [answer] = await pool.encode([call("picture")])
        assert answer.server != first.address
        assert seat(pool, first).state == "lost"
        first.silent = False
        await until(lambda: seat(pool, first).state == "ready")


async def test_one_whose_encoder_died_gets_nothing_though_it_calls_itself_ready() -> None:
    async with encoders(2) as servers, pool_of(servers) as pool:
        first = await owner(pool, servers, "picture")
        first.failure, first.dead = STUB_DIED, True
        await pool.encode([call("picture")])
        assert seat(pool, first).state == "failing"
        await until(lambda: seat(pool, first).state == "lost")
        seen = first.seen.count("picture")
        await pool.encode([call("picture")] * 5)
        assert first.seen.count("picture") == seen
        first.failure = None
        await until(lambda: seat(pool, first).state == "ready")


async def test_one_that_is_drained_finishes_what_it_has() -> None:
    async with encoders(2) as servers, pool_of(servers) as pool:
        first, asking = await waiting(pool, servers, "picture")
        first.ready = False
        await until(lambda: seat(pool, first).state == "draining")
        assert await owner(pool, servers, "picture") is not first
        first.gate.set()
        [answer] = await asking
        assert answer.server == first.address
        first.ready = True
        await until(lambda: seat(pool, first).state == "ready")


async def test_one_that_refuses_because_it_stops_still_finishes_what_it_has() -> None:
    async with encoders(2) as servers, pool_of(servers, interval_s=60.0) as pool:
        first, asking = await waiting(pool, servers, "picture")
        first.failure = (grpc.StatusCode.UNAVAILABLE, "Server is stopping")
        assert await owner(pool, servers, "picture") is not first
        assert seat(pool, first).state == "failing"
        first.gate.set()
        [answer] = await asking
        assert answer.server == first.address


async def test_a_callers_mistake_is_told_at_once_with_its_place() -> None:
    async with encoders(2) as servers, pool_of(servers) as pool:
        mistake = InvalidValue("got 3 axes", where="items[0]")
        for server in servers:
            server.failure = (grpc.StatusCode.INVALID_ARGUMENT, f"in ensemble: {mistake}")
        with pytest.raises(InvalidValue, match=r"got 3 axes") as caught:
            await pool.encode([call("0"), call("1")])
        assert caught.value.where in ("items[0]", "items[1]")
        assert all(one.state == "ready" for one in pool.servers)
        assert sum(len(server.seen) for server in servers) <= 2


async def test_one_without_room_is_passed_over_and_stays_ready() -> None:
    async with encoders(2) as servers, pool_of(servers) as pool:
        first = await owner(pool, servers, "picture")
        first.failure = (grpc.StatusCode.UNAVAILABLE, str(Overloaded("no room for 5 bytes")))
        [answer] = await pool.encode([call("picture")])
        assert answer.server != first.address
        assert seat(pool, first).state == "ready"
        for server in servers:
            server.failure = first.failure
        with pytest.raises(Overloaded, match="no room for 5 bytes"):
            await pool.encode([call("picture")])


async def test_what_every_encoder_fails_on_is_not_given_to_all() -> None:
    async with encoders(TRIES + 2) as servers, pool_of(servers) as pool:
        for server in servers:
            server.failure = (grpc.StatusCode.INTERNAL, str(InternalError("failed on this item")))
        with pytest.raises(Unavailable, match="failed on this item"):
            await pool.encode([call("bad")])
        assert sum(len(server.seen) for server in servers) == TRIES


async def test_no_encoder_left_is_an_error_at_once_that_says_why() -> None:
    async with encoders(2) as servers, pool_of(servers) as pool:
        await servers[0].kill()
        servers[1].ready = False
        await until(lambda: {one.state for one in pool.servers} == {"lost", "draining"})
        with pytest.raises(Unavailable) as caught:
            await pool.encode([call("picture")])
        assert "no encoder is left" in caught.value.what
        assert f"{servers[0].address} is lost" in caught.value.what
        assert f"{servers[1].address} is draining" in caught.value.what
        assert servers[1].seen == []


async def test_servers_may_come_up_after_the_pool() -> None:
    late = FakeEncoder()
    async with encoders(1) as servers:
        await late.start()
        await late.kill()
        async with pool_of([*servers, late]) as pool:
            assert seat(pool, late).state == "lost"
            await late.restart()
            await until(lambda: seat(pool, late).state == "ready")
    await late.kill()


async def test_servers_to_avoid_are_the_last_to_be_asked() -> None:
    async with encoders(2) as servers, pool_of(servers) as pool:
        first = await owner(pool, servers, "picture")
        [answer] = await pool.encode([call("picture")], avoid={first.address})
        assert answer.server != first.address
        [answer] = await pool.encode(
            [call("picture")], avoid={server.address for server in servers}
        )
        assert answer.server == first.address


async def test_an_answer_to_something_else_is_none() -> None:
    async with encoders(2) as servers, pool_of(servers) as pool:
        first = await owner(pool, servers, "picture")
        first.extra = 1
        [answer] = await pool.encode([call("picture")])
        assert answer.server != first.address
        assert content(answer) == expected(call("picture"))


async def test_a_request_has_an_end() -> None:
    async with encoders(1) as servers, pool_of(servers, timeout_s=0.2) as pool:
        servers[0].gate.clear()
        with pytest.raises(Unavailable, match="DEADLINE_EXCEEDED"):
            await pool.encode([call("picture")])
        assert pool.servers[0].outstanding == 0


async def test_what_waits_when_the_pool_closes_is_told() -> None:
    async with encoders(1) as servers:
        async with pool_of(servers) as pool:
            servers[0].gate.clear()
            asking = asyncio.ensure_future(pool.encode([call("picture")]))
            await until(lambda: servers[0].seen)
        with pytest.raises(TriptychError, match="stopping"):
            await asking


@pytest.mark.parametrize("addresses", [(), ("a:1", "b:1", "a:1")])
async def test_each_server_is_named_once(addresses: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="encoder_addresses"):
        Pool(addresses)


async def test_tls(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setitem(os.environ, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", str(tmp_path / "ca.pem"))
    chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
    server = FakeEncoder()
    credentials = grpc.ssl_server_credentials([(issued.private_key_pem.bytes(), chain)])
    await server.start(credentials=credentials)
    pool = Pool([f"grpcs://{server.address}"])
    await pool.start()
    try:
        [answer] = await pool.encode([call("picture")])
        assert content(answer) == expected(call("picture"))
    finally:
        await pool.close()
        await server.kill()
