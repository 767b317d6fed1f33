"""Embeddings kept by the content they were made of: LRU, bounded by bytes, pinned while in use.

    claims    what preprocess calls a medium  →  content key
    entries   content key                     →  embeddings, on the device or in host memory
    leases    token                           →  entry, pinned until it is fetched or time is up
    promises  token                           →  content key; pins nothing, may be broken

Entries come from pixels alone: the encoder hashes what it encodes, so nobody can put embeddings
under somebody else's content. Claims and leases are for those who send no pixels. They are made
only over `triptych.encode.lookup`'s socket, which callers of Triton cannot reach, and a lease is a
random token that is good for one use. So is a promise, which goes into the ticket of whoever has
brought the pixels, or a lease, lest the embeddings be lost on their way.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from triptych.contract import Item

TierName = Literal["device", "host"]

MAX_CLAIMS = 65_536
"""Remembered names of media; each is some 500 bytes."""
MAX_LEASES = 65_536
"""Leases at a time. Beyond it preprocess sends pixels."""
MAX_PROMISES = 65_536
"""Promises at a time; the oldest go first."""


@dataclass(eq=False, slots=True)
class Entry:
    """One medium's embeddings. It is pinned, hence stays where it is, while ``pins`` > 0."""

    key: str
    item: Item
    """The item that it was made of."""
    embeddings: torch.Tensor
    """(tokens, width), the only tensor on its storage."""
    seconds: float
    """What encoding it took."""
    pins: int = 0
    tier: TierName = "device"

    @property
    def nbytes(self) -> int:
        """Length of the embeddings, bytes."""
        return int(self.embeddings.nbytes)

    def __repr__(self) -> str:
        return (
            f"Entry({self.key[:12]}…, {tuple(self.embeddings.shape)}, {self.tier}, "
            f"pins={self.pins})"
        )


@dataclass(slots=True)
class Counters:
    """What the cache did since it was made."""

    hits: int = 0
    """Items answered without being encoded."""
    misses: int = 0
    """Items that were encoded."""
    lost: int = 0
    """Leases that were asked for and not there."""
    refused: int = 0
    """Embeddings that were not kept: too large, or all else was pinned."""
    evictions: dict[TierName, int] = field(default_factory=lambda: {"device": 0, "host": 0})
    seconds_saved: float = 0.0


class Leased(NamedTuple):
    """The answer to who has a claim and no pixels."""

    token: str
    note: str
    """As it was given with the claim."""


class _Lease(NamedTuple):
    entry: Entry
    ends: float


class _Tier:
    """One kind of memory: how much of it is taken, and what could be given up for more."""

    def __init__(self, name: TierName, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.bytes = 0
        self.idle: OrderedDict[str, Entry] = OrderedDict()
        """Entries that are not pinned, the least recently used first."""

    def add(self, entry: Entry) -> None:
        entry.tier = self.name
        self.bytes += entry.nbytes
        if not entry.pins:
            self.idle[entry.key] = entry

    def remove(self, entry: Entry) -> None:
        self.bytes -= entry.nbytes
        self.idle.pop(entry.key, None)

    def fits(self, nbytes: int) -> bool:
        return self.bytes + nbytes <= self.limit


class EmbeddingCache:
    """The embeddings that one encoder keeps. Any thread may call.

    Args:
        device: Where the encoder computes.
        device_bytes: Of embeddings there, at most; 0 keeps nothing anywhere.
        host_bytes: Of embeddings in host memory, for what had to leave the device.
        lease_s: How long a lease holds, in seconds.
        name: Of the encoder among those of its server; the tokens begin with it.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        device: torch.device,
        device_bytes: int,
        host_bytes: int = 0,
        *,
        lease_s: float = 60.0,
        name: str = "encoder",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.counters = Counters()
        self._device = device
        self._lease_s = lease_s
        self._clock = clock
        self._lock = threading.Lock()
        self._tiers = {"device": _Tier("device", device_bytes), "host": _Tier("host", host_bytes)}
        self._entries: dict[str, Entry] = {}
        self._claims: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._leases: OrderedDict[str, _Lease] = OrderedDict()
        self._promises: OrderedDict[str, str] = OrderedDict()

    @property
    def enabled(self) -> bool:
        """Whether it keeps anything."""
        return self._tiers["device"].limit > 0

    def nbytes(self, tier: TierName) -> int:
        """Held there now, bytes."""
        return self._tiers[tier].bytes

    @property
    def leases(self) -> int:
        """How many are open."""
        with self._lock:
            self._expire()
            return len(self._leases)

    def use(self, key: str) -> Entry | None:
        """The entry of a content, pinned until `release`; None: it must be encoded."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._pin(entry)
            self._promote(entry)
            return entry

    def release(self, entry: Entry) -> None:
        """Unpin what `use` or `redeem` gave, once for each time."""
        with self._lock:
            self._unpin(entry)

    def put(self, key: str, item: Item, embeddings: torch.Tensor, seconds: float) -> Entry | None:
        """Keep a copy of what was encoded.

        Args:
            key: `triptych.encode.keys.content_key` of what it was made of, computed by the caller
                and taken from nobody.
            item: What it was made of.
            embeddings: (tokens, width).
            seconds: What that took.

        Returns:
            The entry, pinned until `release`; None: it is too large, or too much is pinned.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._pin(entry)
                return entry
            if not self._make_room("device", embeddings.nbytes):
                self.counters.refused += self.enabled
                return None
            # A batch's results are views of one storage, which a single one would keep alive.
            copy = torch.empty_like(embeddings, device=self._device).copy_(embeddings)
            if self._device.type == "cuda":
                torch.cuda.current_stream(
                    self._device
                ).synchronize()  # others read on other streams
            entry = self._entries[key] = Entry(key, item, copy, seconds, pins=1)
            self._tiers["device"].add(entry)
            return entry

    def could_keep(self, nbytes: int) -> bool:
        """Whether so much would be kept if it came now: what is pinned leaves room for it."""
        with self._lock:
            self._expire()
            tier = self._tiers["device"]
            idle = sum(entry.nbytes for entry in tier.idle.values())
            return tier.bytes - idle + nbytes <= tier.limit

    def claim(self, claim: str, key: str, note: str) -> None:
        """Learn what preprocess calls a content, and what it wants to be told about it.

        The content need not be here yet.
        """
        with self._lock:
            self._claims[claim] = (key, note)
            self._claims.move_to_end(claim)
            if len(self._claims) > MAX_CLAIMS:
                self._claims.popitem(last=False)

    def lease(self, claim: str) -> Leased | None:
        """Pin the content of a claim for whoever will `redeem` the token; None: it is not here."""
        with self._lock:
            self._expire()
            known = self._claims.get(claim)
            entry = self._entries.get(known[0]) if known else None
            token = self._grant(entry) if entry else None
            if known is None or token is None:
                return None
            self._claims.move_to_end(claim)
            self._count_hits(1, entry)
            return Leased(token, known[1])

    def count_hits(self, number: int, entry: Entry) -> None:
        """Note that so many items need not be encoded."""
        with self._lock:
            self._count_hits(number, entry)

    def count_misses(self, number: int) -> None:
        """Note that so many items were encoded."""
        with self._lock:
            self.counters.misses += number

    def lease_entry(self, entry: Entry) -> str | None:
        """A lease on what the caller has pinned; None: there are too many."""
        with self._lock:
            self._expire()
            return self._grant(entry)

    def promise(self, key: str, token: str = "") -> str:
        """A token for a content that may be asked for again and need not be here then.

        Args:
            key: Of the content.
            token: Of a lease that was redeemed, to be the promise's as well.
        """
        with self._lock:
            token = token or self._token()
            self._promises[token] = key
            if len(self._promises) > MAX_PROMISES:
                self._promises.popitem(last=False)
            return token

    def redeem(self, token: str) -> Entry | None:
        """The entry of a lease or promise, which ends; pinned until `release`. None: no such."""
        with self._lock:
            self._expire()
            if lease := self._leases.pop(token, None):
                entry = lease.entry
            elif promised := self._entries.get(self._promises.pop(token, "")):
                entry = promised
                self._pin(entry)
            else:
                return None
            self._promote(entry)
            return entry

    def _count_hits(self, number: int, entry: Entry | None) -> None:
        if entry:
            self.counters.hits += number
            self.counters.seconds_saved += number * entry.seconds

    def _grant(self, entry: Entry) -> str | None:
        if len(self._leases) >= MAX_LEASES:
            return None
        self._pin(entry)
        token = self._token()
        self._leases[token] = _Lease(entry, self._clock() + self._lease_s)
        return token

    def _token(self) -> str:
        return f"{self.name}/{secrets.token_hex(16)}"

    def _expire(self) -> None:
        """All leases last equally long, so the oldest are first."""
        now = self._clock()
        while self._leases:
            token, lease = next(iter(self._leases.items()))
            if lease.ends > now:
                return
            del self._leases[token]
            self._unpin(lease.entry)

    def _pin(self, entry: Entry) -> None:
        entry.pins += 1
        self._tiers[entry.tier].idle.pop(entry.key, None)

    def _unpin(self, entry: Entry) -> None:
        entry.pins -= 1
        if not entry.pins:
            self._tiers[entry.tier].idle[entry.key] = entry

    def _make_room(self, name: TierName, nbytes: int) -> bool:
        tier = self._tiers[name]
        if nbytes > tier.limit:
            return False
        self._expire()
        while not tier.fits(nbytes):
            if not tier.idle:
                return False
            self._evict(next(iter(tier.idle.values())))
        return True

    def _evict(self, entry: Entry) -> None:
        self._tiers[entry.tier].remove(entry)
        self.counters.evictions[entry.tier] += 1
        if entry.tier == "device" and self._make_room("host", entry.nbytes):
            entry.embeddings = entry.embeddings.to("cpu")
            self._tiers["host"].add(entry)
        else:
            del self._entries[entry.key]

    def _promote(self, entry: Entry) -> None:
        """From host memory to the device, if there is room; else it is used from where it is."""
        if entry.tier == "device" or not self._make_room("device", entry.nbytes):
            return
        self._tiers["host"].remove(entry)
        entry.embeddings = entry.embeddings.to(self._device)
        self._tiers["device"].add(entry)
