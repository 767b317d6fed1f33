"""What an engine that fetches embeddings itself makes of its requests' leases.

The names of requests and items are vLLM's to choose; what calls come in which order, the tests in
``tests/engines`` find out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
import torch

from handover import KEY, MIB, Owner, owner
from triptych.contract import NixlAgent, Order, Ticket, TicketItem
from triptych.errors import InternalError, InvalidValue, LeaseLost, TriptychError, Unavailable
from triptych.handover.intake import Intake
from triptych.handover.reader import NixlFetcher

TIMEOUT_S = 3.0
CAPACITY = 4 * MIB
SHAPE = (64, 256)
"""64 KiB of float32."""


@pytest.fixture(scope="module")
def far() -> Iterator[Owner]:
    with owner(64 * MIB) as started:
        yield started


@pytest.fixture
def fetcher() -> NixlFetcher:
    return NixlFetcher(CAPACITY, KEY, TIMEOUT_S)


@pytest.fixture
def intake(far: Owner, fetcher: NixlFetcher) -> Iterator[Intake]:
    intake = Intake(fetcher, torch.float32)
    yield intake
    far.leases(0)
    intake.close()


def values(seed: int, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def order(far: Owner, *tensors: torch.Tensor, ident: str = "id") -> bytes:
    """An order for embeddings that the encoder has."""
    dtypes = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    media = [
        (TicketItem("image", "", dtypes[tensor.dtype], tuple(tensor.shape), 0), tensor)  # type: ignore[arg-type]
        for tensor in tensors
    ]
    return msgspec.json.encode(Order(ident, far.hand_over(media)))


def wait(intake: Intake, request: str, told: bytes, names: Sequence[str], *needed: int) -> bool:
    """Ask as a scheduler does, until the request can begin or is lost."""
    end = time.monotonic() + 2 * TIMEOUT_S
    while not (ready := intake.ready(request, told, names, needed)) and not intake.take_lost():
        assert time.monotonic() < end
        time.sleep(0.001)
    return ready


def error(intake: Intake, ident: str = "id") -> TriptychError:
    return TriptychError.parse(intake.why(ident))


def test_what_is_ready_can_be_taken_and_its_lease_has_ended(intake: Intake, far: Owner) -> None:
    told = order(far, values(1), values(2))
    assert not intake.has("a")
    assert wait(intake, "r", told, "ab", 0, 1)
    far.leases(0)
    assert intake.has("a")
    assert torch.equal(intake.take("r", 0, "a"), values(1))
    assert torch.equal(intake.take("r", 1, "b"), values(2))
    intake.end("r", told)


def test_embeddings_come_in_the_engine_s_dtype(far: Owner, fetcher: NixlFetcher) -> None:
    intake = Intake(fetcher, torch.bfloat16)
    assert wait(intake, "r", order(far, values(1), values(2).bfloat16()), "ab", 0, 1)
    assert torch.equal(intake.take("r", 0, "a"), values(1).bfloat16())
    assert torch.equal(intake.take("r", 1, "b"), values(2).bfloat16())
    intake.close()


def test_what_is_not_needed_is_not_fetched_and_its_lease_ends_at_once(
    intake: Intake, far: Owner, fetcher: NixlFetcher
) -> None:
    told = order(far, values(1))
    assert intake.ready("r", told, "a", [])
    far.leases(0)
    assert fetcher.used == 0
    intake.end("r", told)


def test_a_request_that_ends_before_it_began_gives_its_lease_back(
    intake: Intake, far: Owner
) -> None:
    intake.end("r", order(far, values(1)))
    far.leases(0)


def test_an_order_that_no_request_brought_is_given_back(intake: Intake, far: Owner) -> None:
    intake.give_back(order(far, values(1)))
    far.leases(0)
    intake.give_back(b"{}")


def test_a_request_without_an_order_ends(intake: Intake) -> None:
    intake.end("text alone")


def test_embeddings_that_are_there_are_not_fetched_again(
    intake: Intake, far: Owner, fetcher: NixlFetcher
) -> None:
    first, second = order(far, values(1)), order(far, values(1))
    assert wait(intake, "r", first, "a", 0)
    cache = {"a": intake.take("r", 0, "a")}
    intake.end("r", first)
    used = fetcher.used
    assert wait(intake, "s", second, "a", 0)
    far.leases(0)
    assert fetcher.used == used
    assert torch.equal(intake.take("s", 0, "a"), cache["a"])
    intake.end("s", second)
    cache.clear()
    gc.collect()
    assert not intake.has("a")
    assert fetcher.used == 0


def test_the_same_embeddings_in_two_requests_at_once(intake: Intake, far: Owner) -> None:
    told = [order(far, values(1)) for _ in range(2)]
    assert wait(intake, "r", told[0], "a", 0)
    assert wait(intake, "s", told[1], "a", 0)
    far.leases(0)
    intake.end("r", told[0])
    assert torch.equal(intake.take("s", 0, "a"), values(1))
    intake.end("s", told[1])


def test_a_request_that_begins_anew_still_has_its_embeddings(intake: Intake, far: Owner) -> None:
    told = order(far, values(1))
    assert wait(intake, "r", told, "a", 0)
    intake.take("r", 0, "a")
    intake.used("r", 0)
    assert wait(intake, "r", told, "a", 0)
    assert torch.equal(intake.take("r", 0, "a"), values(1))
    intake.end("r", told)


def test_the_engine_gets_what_was_read_where_it_lies(
    intake: Intake, far: Owner, fetcher: NixlFetcher
) -> None:
    told = order(far, values(1))
    assert wait(intake, "r", told, "a", 0)
    taken = intake.take("r", 0, "a")
    assert taken is not None
    start = fetcher._arena.view(0, CAPACITY).data_ptr()
    assert start <= taken.data_ptr() < start + CAPACITY
    intake.end("r", told)


def test_where_memory_is_short_the_engine_gets_copies(
    intake: Intake, far: Owner, fetcher: NixlFetcher
) -> None:
    large = (3 * 1024, 256)
    told = order(far, values(1, large))
    assert wait(intake, "r", told, "a", 0)
    cache = {"a": intake.take("r", 0, "a")}
    assert fetcher.used == 0
    assert torch.equal(cache["a"], values(1, large))
    assert wait(intake, "r", told, "a", 0), "the engine's own is good enough"
    intake.end("r", told)


def test_a_request_that_begins_anew_without_them_is_lost(intake: Intake, far: Owner) -> None:
    told = order(far, values(1, (3 * 1024, 256)))
    assert wait(intake, "r", told, "a", 0)
    intake.take("r", 0, "a")
    assert not wait(intake, "r", told, "a", 0)
    assert isinstance(error(intake), LeaseLost)
    intake.end("r", told)


def test_a_request_that_ends_while_it_is_read_for_leaves_nothing(
    intake: Intake, far: Owner, fetcher: NixlFetcher
) -> None:
    told = order(far, values(1))
    intake.ready("r", told, "a", [0])
    intake.end("r", told)
    far.leases(0)
    end = time.monotonic() + TIMEOUT_S
    while fetcher.used:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert not intake.has("a")


def changed(told: bytes, **fields: Any) -> bytes:
    """The order with its one span changed."""
    read = msgspec.json.decode(told, type=Order)
    [item] = read.ticket.items
    assert item.nixl is not None
    span = msgspec.structs.replace(item.nixl, **fields)
    items = [msgspec.structs.replace(item, nixl=span)]
    return msgspec.json.encode(Order(read.id, Ticket(items, read.ticket.agents)))


def fails(intake: Intake, told: bytes, names: str = "a") -> TriptychError:
    """What a request fails with; nothing else does, and nothing is left of it."""
    assert not wait(intake, "r", told, names, 0)
    assert intake.take_lost() == {"r"}
    assert not intake.ready("r", told, names, [0]), "it is lost for good"
    found = error(intake)
    intake.end("r", told)
    assert not intake.take_lost()
    assert not intake.has("a")
    return found


def test_an_error_says_what_happened(intake: Intake, far: Owner) -> None:
    told = order(far, values(1))
    read = msgspec.json.decode(told, type=Order)
    ((name, agent),) = read.ticket.agents.items()
    span = read.ticket.items[0].nixl
    assert span is not None
    forged = Ticket(read.ticket.items, {name: NixlAgent(agent.metadata + b"!", agent.proof)})

    lost = fails(intake, changed(told, generation=span.generation + 1))
    assert isinstance(lost, LeaseLost)
    assert "no longer holds" in lost.what
    assert isinstance(fails(intake, changed(told, agent="nobody")), InvalidValue)
    assert "2 items" in fails(intake, told, names="ab").what
    far.leases(0)
    intake._fetcher.forget(name)
    assert "not proven" in fails(intake, msgspec.json.encode(Order("id", forged))).what
    assert isinstance(error(intake, "another"), InternalError)


def test_damaged_bytes_are_found(intake: Intake, far: Owner) -> None:
    told = order(far, values(1))
    span = msgspec.json.decode(told, type=Order).ticket.items[0].nixl
    assert span is not None
    far.ask("corrupt", span.address)
    found = fails(intake, told)
    assert isinstance(found, Unavailable)
    assert "damaged" in found.what


def test_values_that_are_not_finite_are_refused(intake: Intake, far: Owner) -> None:
    found = fails(intake, order(far, values(1) / 0))
    assert isinstance(found, InvalidValue)
    assert found.where == "TICKET.items[0]"


def test_more_than_there_is_memory_for_is_refused(intake: Intake, far: Owner) -> None:
    told = order(far, values(1, (8 * 1024, 256)))
    assert "handover_buffer_mb" in fails(intake, told).what
    far.leases(0)


def test_a_dead_encoder_is_an_error_in_time(intake: Intake) -> None:
    with owner(16 * MIB) as brief:
        told = [order(brief, values(1)) for _ in range(2)]
        brief.process.kill()
        brief.process.join()
    assert isinstance(fails(intake, told[0]), Unavailable)
    intake.end("never begun", told[1])
