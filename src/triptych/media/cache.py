"""What has been loaded before: decoded media by content, URLs by their validators (RFC 9111).

A URL leads to the hash of what it gave, and the hash to the decoded medium; nothing is ever found
by a name that a caller could give to something else. One preprocess instance has one cache and one
event loop, so there is no lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Generic, TypeVar

from triptych.media.base import Loaded

K = TypeVar("K")
T = TypeVar("T")

_NEVER_STORED = frozenset({"no-store", "private"})
"""Private, because this cache serves more than one caller (RFC 9111 section 3)."""
MAX_FRESH_S = 86_400.0
"""Seconds that an origin's word is taken for, at most."""


@dataclass
class Counters:
    """What the cache did since its process started."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    joined: int = 0
    """Loads that waited for one already under way."""
    revalidated: int = 0
    """Fetches that the origin answered with 304."""
    fetched_bytes: int = 0
    bytes: int = 0
    """Held now."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of a URL since it was last fetched."""

    hash: str
    """Of the content it gave."""
    fresh_until: float
    """Monotonic seconds."""
    etag: str = ""
    last_modified: str = ""

    @property
    def validators(self) -> dict[str, str]:
        """Headers that ask whether the content is still the same; empty: cannot be asked."""
        pairs = {"if-none-match": self.etag, "if-modified-since": self.last_modified}
        return {name: value for name, value in pairs.items() if value}

    def renewed(self, headers: Mapping[str, str]) -> Origin | None:
        """After a 304: the same content, with what its headers say anew (RFC 9111 4.3.4)."""
        kept = {"etag": self.etag, "last-modified": self.last_modified}
        return Origin.read(self.hash, {**kept, **headers})

    @staticmethod
    def read(content_hash: str, headers: Mapping[str, str]) -> Origin | None:
        """What the headers of an answer allow to be kept; None: nothing."""
        control = _directives(headers.get("cache-control", ""))
        if _NEVER_STORED & control.keys() or headers.get("vary", "").strip() == "*":
            return None
        return Origin(
            content_hash,
            time.monotonic() + _lifetime(control, headers),
            headers.get("etag", ""),
            headers.get("last-modified", ""),
        )


class MediaCache:
    """Decoded media, the least recently used evicted first, bounded by their bytes.

    Args:
        max_bytes: Of arrays held; 0 keeps nothing.
        max_urls: Remembered URLs.
    """

    def __init__(self, max_bytes: int, max_urls: int) -> None:
        self.counters = Counters()
        self._max_bytes = max_bytes
        self._max_urls = max_urls
        self._media: OrderedDict[str, Loaded] = OrderedDict()
        self._origins: OrderedDict[str, Origin] = OrderedDict()
        self._named: OrderedDict[tuple[str, str], str] = OrderedDict()

    def get(self, key: str) -> Loaded | None:
        """The medium decoded before under ``key``."""
        found = self._media.get(key)
        if found is not None:
            self._media.move_to_end(key)
        return found

    def put(self, key: str, loaded: Loaded) -> None:
        """Keep ``loaded``, if it fits."""
        if key in self._media or loaded.nbytes > self._max_bytes:
            return
        self._media[key] = loaded
        self.counters.bytes += loaded.nbytes
        while self.counters.bytes > self._max_bytes:
            _, evicted = self._media.popitem(last=False)
            self.counters.bytes -= evicted.nbytes
            self.counters.evictions += 1

    def origin(self, url: str) -> Origin | None:
        """What is known of ``url``, case and all."""
        return self._origins.get(url)

    def remember(self, url: str, origin: Origin | None) -> None:
        """Note what ``url`` gave, or forget it."""
        if origin is None:
            self._origins.pop(url, None)
        else:
            _bounded(self._origins, url, origin, self._max_urls)

    def name(self, uuid: str, url: str) -> None:
        """Note that a caller calls by ``uuid`` what ``url`` gives now."""
        if uuid and (origin := self._origins.get(url)):
            _bounded(self._named, (uuid, url), origin.hash, self._max_urls)

    def named(self, uuid: str, url: str) -> str | None:
        """The content hash that ``url`` gave when a caller last called it ``uuid``.

        The name alone finds nothing: two callers may choose the same one for different contents.
        """
        return self._named.get((uuid, url)) if uuid else None


@dataclass
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    waiting: int = 0


@dataclass
class Flights(Generic[T]):
    """Work in progress by key: who asks for the same waits for the same.

    The work is cancelled when the last who waits for it is.
    """

    on_join: Callable[[], None]
    _flights: dict[str, _Flight[T]] = field(default_factory=dict)

    async def run(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """The result of ``work``, done once for all who ask for ``key`` meanwhile."""
        flight = self._flights.get(key)
        if flight is None:
            flight = _Flight(asyncio.ensure_future(_coroutine(work)))
            self._flights[key] = flight
            flight.task.add_done_callback(lambda _: self._land(key, flight))
        else:
            self.on_join()
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if flight.waiting == 1 and not flight.task.done():
                self._land(key, flight)
                flight.task.cancel()
            raise
        finally:
            flight.waiting -= 1

    def _land(self, key: str, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if flight.task.done() and not flight.task.cancelled():
            flight.task.exception()  # whoever still waits has it; nobody else need be told


async def _coroutine(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


def _bounded(table: OrderedDict[K, T], key: K, value: T, limit: int) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > limit:
        table.popitem(last=False)


def _directives(text: str) -> dict[str, str]:
    parts = (part.strip().partition("=") for part in text.lower().split(","))
    return {name: value.strip('"') for name, _, value in parts if name}


def _lifetime(control: Mapping[str, str], headers: Mapping[str, str]) -> float:
    """Seconds that the answer is fresh for (RFC 9111 section 4.2); without a word, none."""
    if "no-cache" in control:
        return 0.0
    for name in ("s-maxage", "max-age"):
        if control.get(name, "").isdecimal():
            age = headers.get("age", "0")
            spent = int(age[:9]) if age.isdecimal() else 0
            return min(MAX_FRESH_S, max(0.0, int(control[name][:9]) - spent))
    try:
        expires = parsedate_to_datetime(headers["expires"]).timestamp()
        stated = parsedate_to_datetime(headers["date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return 0.0
    return min(MAX_FRESH_S, max(0.0, expires - stated))
