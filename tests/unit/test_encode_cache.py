from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from triptych.contract import Item
from triptych.encode.cache import EmbeddingCache

CPU = torch.device("cpu")
ROW = 16 * 4
"""Bytes of one embedding of these tests."""


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def embeddings(tokens, fill=0.0):
    return torch.full((tokens, 16), fill)


def item(tokens):
    return Item("image", "any", "uint8", (28, 28, 3), 0, tokens, (1, 2, 2))


def make(rows, host_rows=0, **options):
    return EmbeddingCache(CPU, rows * ROW, host_rows * ROW, **options)


def put(cache, key, tokens=1, fill=0.0):
    """Whether it is kept."""
    entry = cache.put(key, item(tokens), embeddings(tokens, fill), 0.5)
    if entry is not None:
        assert entry.pins >= 1
        cache.release(entry)
    return entry is not None


def held(cache, key):
    """Whether it is there, without a trace of having asked but in the order of use."""
    entry = cache.use(key)
    if entry is not None:
        cache.release(entry)
    return entry is not None


def test_what_was_put_is_used():
    cache = make(10)
    assert cache.use("a") is None
    assert put(cache, "a", 3, fill=7.0)
    entry = cache.use("a")
    assert torch.equal(entry.embeddings, embeddings(3, 7.0))
    assert (entry.seconds, entry.item) == (0.5, item(3))
    assert cache.nbytes("device") == 3 * ROW


def test_the_least_recently_used_goes_first():
    cache = make(3)
    for key in "abc":
        put(cache, key)
    assert held(cache, "a")
    put(cache, "d")
    assert [key for key in "abcd" if held(cache, key)] == ["a", "c", "d"]
    assert cache.counters.evictions == {"device": 1, "host": 0}


def test_one_large_makes_as_much_room_as_it_takes():
    cache = make(4)
    for key in "abcd":
        put(cache, key)
    assert put(cache, "large", 3)
    assert [key for key in "abcd" if held(cache, key)] == ["d"]
    assert cache.nbytes("device") == 4 * ROW


def test_too_large_is_not_kept_and_evicts_nothing():
    cache = make(2)
    put(cache, "a")
    assert not put(cache, "large", 3)
    assert held(cache, "a")
    assert cache.counters.refused == 1


def test_nothing_is_kept_without_room():
    cache = make(0, 100)
    assert not cache.enabled
    assert not put(cache, "a")
    assert cache.use("a") is None
    assert cache.counters.refused == 0


def test_what_is_pinned_stays():
    cache = make(2)
    put(cache, "a")
    put(cache, "b")
    pinned = [cache.use("a"), cache.use("a"), cache.use("b")]
    assert not put(cache, "c")
    cache.release(pinned[0])
    assert not put(cache, "c"), "it was pinned twice"
    cache.release(pinned[1])
    assert put(cache, "c")
    assert [key for key in "abc" if held(cache, key)] == ["b", "c"]


def test_a_copy_is_kept_of_the_piece_alone():
    cache = make(10)
    batch = embeddings(8, 1.0)
    cache.release(cache.put("a", item(2), batch[:2], 0.0))
    batch.zero_()
    entry = cache.use("a")
    assert torch.equal(entry.embeddings, embeddings(2, 1.0))
    assert entry.embeddings.untyped_storage().nbytes() == 2 * ROW


def test_evicted_from_the_device_is_in_host_memory_and_comes_back():
    cache = make(2, 2)
    for index, key in enumerate("abc"):
        put(cache, key, fill=float(index))
    assert (cache.nbytes("device"), cache.nbytes("host")) == (2 * ROW, ROW)
    entry = cache.use("a")
    assert entry.tier == "device"
    assert torch.equal(entry.embeddings, embeddings(1, 0.0))
    assert (cache.nbytes("device"), cache.nbytes("host")) == (2 * ROW, ROW)
    assert cache.counters.evictions == {"device": 2, "host": 0}
    for key in "de":
        put(cache, key)
    assert cache.counters.evictions["host"] == 1
    assert not held(cache, "b")


def test_host_memory_serves_where_the_device_is_pinned():
    cache = make(1, 1)
    put(cache, "a")
    put(cache, "b", fill=2.0)
    pinned = cache.use("b")
    entry = cache.use("a")
    assert entry.tier == "host"
    assert torch.equal(entry.embeddings, embeddings(1, 0.0))
    cache.release(entry)
    cache.release(pinned)
    assert cache.use("a").tier == "device"


def test_a_lease_holds_until_it_is_redeemed():
    cache = make(1)
    put(cache, "a", fill=3.0)
    cache.claim("mine", "a", "note")
    token, note = cache.lease("mine")
    assert note == "note"
    assert not put(cache, "b"), "leased"
    entry = cache.redeem(token)
    assert torch.equal(entry.embeddings, embeddings(1, 3.0))
    assert not put(cache, "b"), "in use"
    cache.release(entry)
    assert put(cache, "b")


def test_a_lease_is_good_once():
    cache = make(1)
    put(cache, "a")
    cache.claim("mine", "a", "")
    token = cache.lease("mine").token
    cache.release(cache.redeem(token))
    assert cache.redeem(token) is None


def test_a_lease_runs_out():
    clock = Clock()
    cache = make(1, lease_s=10, clock=clock)
    put(cache, "a")
    cache.claim("mine", "a", "")
    token = cache.lease("mine").token
    clock.now = 9.9
    assert cache.leases == 1
    assert not put(cache, "b")
    clock.now = 10.1
    assert cache.leases == 0
    assert put(cache, "b")
    assert cache.redeem(token) is None
    assert cache.lease("mine") is None


def test_leases_cannot_be_guessed_and_name_their_encoder():
    cache = make(1, name="encoder@encoder_0_1")
    put(cache, "a")
    cache.claim("mine", "a", "")
    first, second = cache.lease("mine").token, cache.lease("mine").token
    assert first != second
    assert first.startswith("encoder@encoder_0_1/")
    assert len(first.partition("/")[2]) == 32


@pytest.mark.parametrize("order", ["claim first", "content first"])
def test_a_claim_and_its_content_come_in_any_order(order):
    cache = make(1)
    steps = [lambda: cache.claim("mine", "a", ""), lambda: put(cache, "a")]
    for step in steps if order == "claim first" else reversed(steps):
        assert cache.lease("mine") is None
        step()
    assert cache.lease("mine")


def test_claims_and_leases_are_bounded(monkeypatch):
    monkeypatch.setattr("triptych.encode.cache.MAX_CLAIMS", 3)
    monkeypatch.setattr("triptych.encode.cache.MAX_LEASES", 2)
    cache = make(1)
    put(cache, "a")
    for claim in "abcd":
        cache.claim(claim, "a", "")
    leases = [cache.lease(claim) for claim in "abcd"]
    assert [lease is not None for lease in leases] == [False, True, True, False]


def test_a_promise_pins_nothing_and_is_good_once():
    cache = make(1, name="encoder@encoder_0_1")
    put(cache, "a", fill=3.0)
    token, broken = cache.promise("a"), cache.promise("a")
    assert token.startswith("encoder@encoder_0_1/")
    entry = cache.redeem(token)
    assert torch.equal(entry.embeddings, embeddings(1, 3.0))
    assert not put(cache, "b"), "in use"
    cache.release(entry)
    assert cache.redeem(token) is None
    assert put(cache, "b")
    assert cache.redeem(broken) is None


def test_promises_are_bounded(monkeypatch):
    monkeypatch.setattr("triptych.encode.cache.MAX_PROMISES", 2)
    cache = make(1)
    put(cache, "a")
    tokens = [cache.promise("a") for _ in range(3)]
    assert [cache.redeem(token) is not None for token in tokens] == [False, True, True]


def test_what_is_pinned_leaves_room_for_the_rest():
    cache = make(4)
    put(cache, "a", 3)
    assert cache.could_keep(4 * ROW)
    assert not cache.could_keep(5 * ROW)
    cache.use("a")
    assert cache.could_keep(ROW)
    assert not cache.could_keep(2 * ROW)


def test_hits_are_counted_where_a_lease_is_given():
    cache = make(4)
    put(cache, "a")
    cache.claim("mine", "a", "")
    lease = cache.lease("mine")
    cache.release(cache.redeem(lease.token))
    entry = cache.use("a")
    cache.release(cache.redeem(cache.lease_entry(entry)))
    assert (cache.counters.hits, cache.counters.seconds_saved) == (1, 0.5)


class Machine(RuleBasedStateMachine):
    """Whatever is done, bytes are bounded, and what is pinned or leased is there and unchanged."""

    keys = st.integers(0, 7)
    pins = Bundle("pins")
    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.cache = make(6, 4, lease_s=10, clock=self.clock)

    @rule(key=keys, tokens=st.integers(1, 7))
    def put(self, key, tokens):
        kept = put(self.cache, str(key), tokens, float(key))
        entry = self.cache.use(str(key))
        assert (entry is not None) == kept
        if entry:
            self.cache.release(entry)

    @rule(key=keys, target=pins)
    def use(self, key):
        return key, self.cache.use(str(key))

    @rule(pin=consumes(pins))
    def release(self, pin):
        key, entry = pin
        if entry:
            assert (entry.embeddings == float(key)).all()
            assert self.cache.use(str(key)) is entry
            self.cache.release(entry)
            self.cache.release(entry)

    @rule(key=keys)
    def claim(self, key):
        self.cache.claim(f"claim {key}", str(key), "")

    @rule(key=keys, target=leases)
    def lease(self, key):
        return key, self.cache.lease(f"claim {key}"), self.clock.now

    @rule(lease=consumes(leases))
    def redeem(self, lease):
        key, leased, since = lease
        if leased:
            entry = self.cache.redeem(leased.token)
            assert (entry is not None) == (self.clock.now < since + 10)
            if entry:
                assert (entry.embeddings == float(key)).all()
                self.cache.release(entry)

    @rule(seconds=st.integers(1, 6))
    def wait(self, seconds):
        self.clock.now += seconds

    @invariant()
    def bounded_and_counted(self):
        entries = list(self.cache._entries.values())
        for name, limit in (("device", 6), ("host", 4)):
            there = [entry for entry in entries if entry.tier == name]
            assert self.cache.nbytes(name) == sum(entry.nbytes for entry in there) <= limit * ROW
            idle = {entry.key for entry in there if not entry.pins}
            assert set(self.cache._tiers[name].idle) == idle


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
