"""One contract for all roads; NIXL between two real processes."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace

from engine_end import EngineEnd
from handover import KEY, MIB, Owner, Spec, made, owner, publish, registered, same, usage
from triptych import contract
from triptych.contract import Ticket
from triptych.errors import InvalidValue, LeaseLost, Overloaded, TriptychError, Unavailable
from triptych.handover import Fetcher, TensorFetcher, TensorPublisher
from triptych.handover.reader import NixlFetcher

TIMEOUT_S = 3.0

Reader = NixlFetcher | EngineEnd
"""An end of the road NIXL: decode's, or the one in an engine's process."""


class Road:
    """Publishes at one end and fetches at the other."""

    def __init__(self, fetcher: Fetcher, far: Owner | None) -> None:
        self.fetcher = fetcher
        self.far = far
        self.near = TensorPublisher(torch.device("cpu"))

    def publish(self, *specs: Spec) -> Any:
        """What `fetch` takes."""
        if self.far:
            return self.far.publish(*specs), None
        embeddings, ticket = publish(self.near, [made(spec) for spec in specs])
        return contract.decode(contract.encode(ticket), Ticket), embeddings

    def fetch(self, published: Any) -> list[torch.Tensor]:
        return self.fetcher.fetch(*published).result(10)


@pytest.fixture(scope="module")
def far() -> Iterator[Owner]:
    with owner(700 * MIB) as started:
        yield started


Reader = NixlFetcher | EngineEnd
"""An end of the road NIXL: decode's, or the one in an engine's process."""


@pytest.fixture(scope="module")
def fetcher() -> Iterator[NixlFetcher]:
    fetcher = NixlFetcher(700 * MIB, KEY, TIMEOUT_S)
    yield fetcher
    fetcher.close()


@pytest.fixture(params=["nixl", "connector"])
def reader(request: pytest.FixtureRequest, fetcher: NixlFetcher) -> Reader:
    return fetcher if request.param == "nixl" else EngineEnd(fetcher, TIMEOUT_S)


@pytest.fixture(params=["tensor", "nixl", "connector"])
def road(request: pytest.FixtureRequest, fetcher: NixlFetcher, far: Owner) -> Road:
    if request.param == "tensor":
        return Road(TensorFetcher(), None)
    return Road(fetcher if request.param == "nixl" else EngineEnd(fetcher, TIMEOUT_S), far)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
def test_every_dtype_arrives_bit_for_bit(road: Road, dtype: Any) -> None:
    # What is not finite never gets into an engine.
    spec = Spec(1, (7, 33), dtype, nans=not isinstance(road.fetcher, EngineEnd))
    assert same(road.fetch(road.publish(spec))[0], spec)


@pytest.mark.parametrize("mib", [1 / 1024, 1, 16, 64, 256])
def test_every_size_arrives_bit_for_bit(road: Road, mib: float) -> None:
    spec = Spec(2, (int(mib * 1024), 256))
    assert same(road.fetch(road.publish(spec))[0], spec)


def test_no_items_are_no_embeddings(road: Road) -> None:
    assert road.fetch(road.publish()) == []


def test_several_items_arrive_in_their_order(road: Road) -> None:
    specs = [
        Spec(3, (1, 1), "uint8"),
        Spec(4, (100, 63), "bfloat16"),
        Spec(5, (3, 5)),
        Spec(6, (9, 9)),
    ]
    tensors = road.fetch(road.publish(*specs))
    # An engine's end makes all of one dtype, here of the widest.
    tensors = [t.to(getattr(torch, s.dtype)) for t, s in zip(tensors, specs, strict=True)]
    assert [same(*pair) for pair in zip(tensors, specs, strict=True)] == [True] * 4


def test_items_of_several_leases_may_share_a_ticket(far: Owner, reader: Reader) -> None:
    specs = [Spec(30, (5, 8)), Spec(31, (6, 8)), Spec(32, (7, 8))]
    first, second = far.publish(*specs[:2]), far.publish(specs[2])
    items = [second.items[0], *first.items]
    tensors = reader.fetch(Ticket(items, first.agents)).result(10)
    expected = [specs[2], *specs[:2]]
    assert all(same(*pair) for pair in zip(tensors, expected, strict=True))
    far.leases(0)


def test_64_at_a_time_do_not_mix(road: Road) -> None:
    specs = [Spec(100 + place, (64 + place, 256)) for place in range(64)]
    published = [road.publish(spec) for spec in specs]
    with ThreadPoolExecutor(64) as pool:
        tensors = list(pool.map(road.fetch, published))
    assert all(same(tensor[0], spec) for tensor, spec in zip(tensors, specs, strict=True))


def test_what_is_held_stays_while_others_come_and_go_out_of_order(road: Road) -> None:
    held = {seed: road.fetch(road.publish(Spec(seed, (50 * seed, 64)))) for seed in range(1, 17)}
    for seed in (9, 3, 16, 1, 8, 12):
        del held[seed]
        fresh = Spec(1000 + seed, (30 * seed, 64))
        assert same(road.fetch(road.publish(fresh))[0], fresh)
    assert all(same(tensors[0], Spec(seed, (50 * seed, 64))) for seed, tensors in held.items())


def test_nothing_is_left_when_all_was_read_and_dropped(road: Road) -> None:
    for seed in range(20):
        road.fetch(road.publish(Spec(seed, (512, 256))))
    if road.far:
        road.far.leases(0)
        assert road.far.ask("stats")["used"] == 0
        assert isinstance(road.fetcher, Reader)
        assert road.fetcher.used == 0


def test_a_ticket_of_another_road_is_refused(road: Road) -> None:
    ticket = publish(road.near, [made(Spec(1, (2, 2)))])[1]
    if road.far is None:
        ticket = Ticket([replace(ticket.items[0], where="nixl")])
    with pytest.raises(InvalidValue, match="among those"):
        road.fetcher.fetch(ticket, torch.zeros(64, dtype=torch.uint8)).result(1)


@pytest.fixture(scope="module")
def brief() -> Iterator[Owner]:
    with owner(MIB, lease_s=0.3) as started:
        yield started


@pytest.fixture(scope="module")
def small() -> Iterator[Owner]:
    with owner(MIB) as started:
        yield started


def test_an_expired_lease_is_lost_and_its_memory_used_again(brief: Owner, reader: Reader) -> None:
    ticket = brief.publish(Spec(1, (700, 256)))
    brief.leases(0)
    with pytest.raises(LeaseLost, match="no longer holds"):
        reader.fetch(ticket).result(10)
    for _ in range(20):  # a busy machine may take longer than a lease lasts
        again = brief.publish(Spec(2, (700, 256)))
        with suppress(LeaseLost):
            assert same(reader.fetch(again).result(10)[0], Spec(2, (700, 256)))
            break
    else:
        pytest.fail("no lease could be redeemed")
    with pytest.raises(LeaseLost):
        reader.fetch(ticket).result(10)


def test_a_full_arena_turns_requests_away_and_recovers(small: Owner, reader: Reader) -> None:
    held = [small.publish(Spec(seed, (300, 256))) for seed in range(3)]
    with pytest.raises(Overloaded, match="3 leases"):
        small.publish(Spec(9, (300, 256)))
    with pytest.raises(TriptychError, match="handover_arena_mb"):
        small.publish(Spec(9, (3000, 256)))
    reader.fetch(held[1]).result(10)
    fresh = small.publish(Spec(9, (300, 256)))
    for ticket, seed in ((fresh, 9), (held[0], 0), (held[2], 2)):
        assert same(reader.fetch(ticket).result(10)[0], Spec(seed, (300, 256)))
    small.leases(0)


def change(ticket: Ticket, **fields: Any) -> Ticket:
    """The ticket with its one span changed."""
    item = ticket.items[0]
    assert item.nixl is not None
    return Ticket([replace(item, nixl=replace(item.nixl, **fields))], ticket.agents)


def test_a_wrong_generation_is_found(far: Owner, reader: Reader) -> None:
    ticket = far.publish(Spec(1, (10, 10)))
    span = ticket.items[0].nixl
    assert span is not None
    with pytest.raises(LeaseLost):
        reader.fetch(change(ticket, generation=span.generation + 1)).result(10)
    reader.fetch(ticket).result(10)


@pytest.mark.parametrize("place", [0, 12345, 4 * 100 * 100 - 1])
def test_one_wrong_bit_is_found(far: Owner, reader: Reader, place: int) -> None:
    ticket = far.publish(Spec(1, (100, 100)))
    span = ticket.items[0].nixl
    assert span is not None
    far.ask("corrupt", span.address + place)
    with pytest.raises(Unavailable, match="damaged"):
        reader.fetch(ticket).result(10)
    far.leases(0)


def test_a_forged_ticket_is_refused_before_nixl_sees_it(far: Owner, reader: Reader) -> None:
    ticket = far.publish(Spec(1, (10, 10)))
    ((name, agent),) = ticket.agents.items()
    forged = {
        "not proven": Ticket(ticket.items, {name: replace(agent, metadata=agent.metadata + b"!")}),
        "no agent": Ticket(ticket.items, {}),
        "no embeddings": change(ticket, header=ticket.items[0].nixl.address + 64),  # type: ignore[union-attr]
        "no checksum": change(ticket, checksum="md5:00"),
    }
    for message, one in forged.items():
        reader.forget(name)
        with pytest.raises(InvalidValue, match=message):
            reader.fetch(one).result(10)
    with pytest.raises(Unavailable):  # memory that is not registered
        reader.fetch(change(ticket, header=4096, address=4160)).result(10)
    again = far.publish(Spec(2, (10, 10)))
    assert same(reader.fetch(again).result(10)[0], Spec(2, (10, 10)))


def test_a_dead_owner_is_an_error_in_time_and_its_successor_works(reader: Reader) -> None:
    with owner(16 * MIB) as first:
        assert reader.fetch(first.publish(Spec(1, (10, 10)))).result(10)
        ticket = first.publish(Spec(2, (1000, 1000)))
        unmet = first.publish(Spec(3, (10, 10)))
        first.process.kill()
        first.process.join()
    begun = time.monotonic()
    with pytest.raises(Unavailable, match="send the request again"):
        reader.fetch(ticket).result(10)
    with pytest.raises(Unavailable):
        reader.fetch(unmet).result(10)
    assert time.monotonic() - begun < 2 * TIMEOUT_S + 1
    with owner(16 * MIB) as second:
        spec = Spec(4, (1000, 1000))
        assert same(reader.fetch(second.publish(spec)).result(10)[0], spec)


def test_a_dead_reader_s_leases_come_back(far: Owner) -> None:
    with owner(16 * MIB, lease_s=3.0) as brief:
        fetcher = NixlFetcher(16 * MIB, KEY, TIMEOUT_S)
        fetcher.fetch(brief.publish(Spec(1, (10, 10)))).result(10)
        brief.leases(0)
        fetcher.close()
        for seed in range(10):
            brief.publish(Spec(seed, (100, 100)))
        assert brief.ask("stats")["leases"] == 10
        brief.leases(0, within_s=10)
        assert brief.ask("stats")["used"] == 0


def test_nobody_spins_when_nothing_is_to_do(far: Owner, reader: Reader) -> None:
    reader.fetch(far.publish(Spec(1, (10, 10)))).result(10)
    far.leases(0)
    time.sleep(0.1)
    begun = time.process_time()
    assert far.ask("cpu", 1.0) < 0.01
    assert time.process_time() - begun < 0.02


def test_10000_transfers_and_1000_abandoned_leave_nothing(
    reader: Reader, fetcher: NixlFetcher
) -> None:
    with owner(64 * MIB, lease_s=2.0) as used:

        def many() -> list[Ticket]:
            data = used.ask("publish many", 100, Spec(7, (20, 64)))
            return msgspec.json.decode(data, type=list[Ticket])

        def transfer(count: int) -> None:
            for _ in range(count // 100):
                for ticket in many():
                    reader.fetch(ticket).result(10)

        def stats() -> list[dict[str, int]]:
            gc.collect()
            return [used.ask("stats"), {**usage(), "registered": registered(fetcher)}]

        transfer(1000)
        used.leases(0)
        before = stats()
        transfer(10_000)
        for _ in range(10):
            many()
        used.leases(0)
        after = stats()
    assert after[0]["used"] == 0
    assert reader.used == 0
    for then, now in zip(before, after, strict=True):
        assert now["fds"] <= then["fds"]
        assert now["threads"] <= then["threads"]
        assert now["registered"] == then["registered"] > 0
        assert now["rss"] - then["rss"] < 8 * MIB
