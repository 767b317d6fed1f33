"""What the pool is made of: the choice of a server, tickets, and what is kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder_pool import call
from triptych.contract import ITEM_ALIGNMENT, NixlAgent, TicketItem
from triptych.remote.balance import SLACK, choose
from triptych.remote.call import Answer
from triptych.remote.kept import KEEP_S, Kept, Sent
from triptych.remote.tickets import join, merge


@dataclass(frozen=True)
class Place:
    address: str
    outstanding: int = 0


SIX = [Place(f"encoder-{place}:8001") for place in range(6)]
NAMES = [f"content {place}" for place in range(3000)]


def test_contents_spread_over_idle_servers() -> None:
    counts = Counter(choose(SIX, name, 1).address for name in NAMES)
    assert len(counts) == 6
    assert max(counts.values()) < 1.25 * len(NAMES) / 6


def test_a_server_that_goes_moves_its_own_contents_alone() -> None:
    gone = SIX[2]
    left = [server for server in SIX if server is not gone]
    for name in NAMES:
        before = choose(SIX, name, 1)
        if before is not gone:
            assert choose(left, name, 1) is before


def test_the_order_of_the_servers_does_not_matter() -> None:
    assert all(choose(SIX, name, 1) is choose(SIX[::-1], name, 1) for name in NAMES[:50])


@given(
    st.lists(st.integers(0, 100_000), min_size=1, max_size=20),
    st.text(max_size=8),
    st.integers(1, 50_000),
)
def test_nobody_gets_more_than_their_share(loads: list[int], name: str, tokens: int) -> None:
    servers = [Place(f"{place}", load) for place, load in enumerate(loads)]
    chosen = choose(servers, name, tokens)
    assert chosen.outstanding < SLACK * (sum(loads) + tokens) / len(loads)


def test_a_busy_server_gives_its_contents_to_the_same_second_one() -> None:
    name = NAMES[0]
    first = choose(SIX, name, 1)
    busy = [Place(one.address, 1000 if one is first else 10) for one in SIX]
    second = choose(busy, name, 1)
    assert second.address == choose([one for one in SIX if one is not first], name, 1).address


def answer(name: str, tokens: int, server: str, data: bytes | None = None) -> Answer:
    item = TicketItem("image", name, "uint8", (tokens, 10), 640)
    agents = {} if data is not None else {server: NixlAgent(server.encode(), b"")}
    return Answer(item, agents, server, None if data is None else memoryview(data))


def test_tensors_are_joined_in_order_where_views_can_be_made() -> None:
    parts = [b"a" * 30, b"b" * 70, b"c" * 640]
    answers = [answer(f"{place}", len(part) // 10, "s", part) for place, part in enumerate(parts)]
    whole, ticket = join(answers)
    assert whole.shape == (1, 64 + 128 + 640)
    for item, part in zip(ticket.items, parts, strict=True):
        assert item.offset % ITEM_ALIGNMENT == 0
        assert whole[0, item.offset : item.offset + item.nbytes].tobytes() == part
    assert join([])[0].shape == (1, 0)


def test_a_ticket_may_have_several_owners() -> None:
    ticket = merge([answer("0", 1, "a"), answer("1", 2, "b"), answer("2", 3, "a")])
    assert [item.hash for item in ticket.items] == ["0", "1", "2"]
    assert {name: agent.metadata for name, agent in ticket.agents.items()} == {"a": b"a", "b": b"b"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def sent(name: str) -> Sent:
    """84 bytes of pixels."""
    made = call(name)
    return Sent(made.item, made.pixels, "server")


def test_what_is_kept_is_there_once() -> None:
    kept = Kept(1000)
    token = kept.put(sent("a"))
    assert token
    assert kept.nbytes == 84
    assert kept.take(token) == sent("a")
    assert kept.take(token) is None
    assert (kept.nbytes, len(kept)) == (0, 0)


def test_the_oldest_make_room() -> None:
    kept = Kept(200)
    first, second, third = (kept.put(sent(name)) for name in "abc")
    assert (kept.nbytes, len(kept)) == (168, 2)
    assert first
    assert kept.take(first) is None
    assert second
    assert third
    assert kept.take(second) == sent("b")
    assert kept.take(third) == sent("c")


@pytest.mark.parametrize("limit", [0, 83])
def test_what_is_larger_than_all_is_not_kept(limit: int) -> None:
    kept = Kept(limit)
    assert kept.put(sent("a")) is None
    assert kept.nbytes == 0


def test_nothing_is_kept_for_ever() -> None:
    clock = Clock()
    kept = Kept(1000, clock)
    old = kept.put(sent("a"))
    clock.now = KEEP_S / 2
    young = kept.put(sent("b"))
    clock.now = KEEP_S
    kept.expire()
    assert (kept.nbytes, len(kept)) == (84, 1)
    assert old
    assert kept.take(old) is None
    assert young
    assert kept.take(young) == sent("b")
