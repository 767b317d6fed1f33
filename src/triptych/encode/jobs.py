"""What there is to encode in a batch of requests: every medium once, however often it is sent."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from triptych.contract import ITEM_ALIGNMENT, Item
from triptych.encode.cache import EmbeddingCache, Entry
from triptych.encode.keys import content_key
from triptych.encode.peers import Peers
from triptych.errors import InvalidValue, LeaseLost, TriptychError
from triptych.families import Family

logger = logging.getLogger("triptych.encode")

_NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass(eq=False)
class Job:
    """One medium to encode, for every place in the batch where it stands."""

    item: Item
    media: torch.Tensor
    """`Item.shape` and `Item.dtype`, a view of MEDIA."""
    key: str = ""
    """`content_key`."""
    repeats: int = 0
    """Places where it stands, other than the one that it is encoded for."""
    entry: Entry | None = None
    """Pinned as long as the job is used."""
    result: torch.Tensor | TriptychError | None = None
    """Embeddings (tokens, width), or why there are none; None: not encoded yet."""


class Jobs:
    """The jobs of one batch; a context that gives back, at its end, what it uses of the cache.

    Two items are one job if their bytes are equal, and read in the same way. Their hashes do not
    count: a caller who speaks to the encoder directly could pass pixels off as somebody else's.

    Args:
        family: Whose items.
        cache: Where embeddings may be already.
        peers: Other instances, from which a lease may come, and who can come by another.
    """

    def __init__(self, family: Family, cache: EmbeddingCache, peers: Peers | None = None) -> None:
        self._family = family
        self._cache = cache
        self._peers = peers
        self._by_key: dict[str, Job] = {}
        self._leases: list[Job] = []

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *exception: object) -> None:
        for job in (*self, *self._leases):
            if job.entry:
                self._cache.count_hits(job.repeats, job.entry)
                self._cache.release(job.entry)

    def __iter__(self) -> Iterator[Job]:
        yield from self._by_key.values()

    def of(self, items: Sequence[Item], media: torch.Tensor) -> list[Job]:
        """The jobs of one request, in the order of its items.

        Args:
            items: The request's ITEMS.
            media: Its MEDIA, uint8, shape (bytes,).

        Raises:
            TriptychError: An item is not what the family takes, lies outside of ``media``, or has
                a lease that is lost; then none of the request's items is among the jobs.
        """
        views = []
        for index, item in enumerate(items):
            try:
                self._family.check_item(item)
                if item.lease and item.precomputed:
                    raise InvalidValue("precomputed embeddings are never leased")
                views.append(media[:0] if item.lease else view(item, media))
            except TriptychError as error:
                raise error.at(f"items[{index}]") from None
        leased = {
            index: self._leased(index, item) for index, item in enumerate(items) if item.lease
        }
        return [
            leased.get(index) or self._of_pixels(item, pixels)
            for index, (item, pixels) in enumerate(zip(items, views, strict=True))
        ]

    def job(self, key: str, item: Item, media: torch.Tensor) -> Job:
        """The job of one item that has been checked, whose `content_key` is ``key``."""
        if not item.keep:
            key += " not kept"  # it shares a pass with its like, and nothing else
        if job := self._by_key.get(key):
            job.repeats += 1
            return job
        job = self._by_key[key] = Job(item, media, key)
        if item.keep and (entry := self._cache.use(key)):
            job.entry, job.result, job.repeats = entry, entry.embeddings, 1
        return job

    def _of_pixels(self, item: Item, media: torch.Tensor) -> Job:
        if item.precomputed:
            return Job(item, media, result=media)
        return self.job(content_key(item, octets(media)), item, media)

    def _leased(self, index: int, item: Item) -> Job:
        """The job of an item without pixels.

        Raises:
            LeaseLost: Nobody holds its embeddings any more.
            InvalidValue: The lease is of another item.
        """
        where = f"items[{index}]"
        job = Job(item, _NOTHING)
        self._leases.append(job)
        source = self._redeem(job, item.lease)
        if source is None and self._peers and (lease := self._peers.again(item.lease)):
            logger.info("a lease was lost, and its medium was loaded again")
            source = self._redeem(job, lease)
        if source is None:
            self._cache.counters.lost += 1
            raise LeaseLost(
                "the encoder no longer holds this item's embeddings; send the request again",
                where=where,
            )
        if _reading(item) != _reading(source):
            raise InvalidValue(
                f"the lease is of {_reading(source)}, the item is {_reading(item)}", where=where
            )
        return job

    def _redeem(self, job: Job, lease: str) -> Item | None:
        """Give the job what a lease is of.

        Returns:
            The item that it was made of; None: nobody has such a lease.
        """
        if entry := self._cache.redeem(lease):
            job.entry, job.result = entry, entry.embeddings
            return entry.item
        if self._peers and (fetched := self._peers.take(lease)):
            job.result = fetched.embeddings
            job.entry = self._cache.put(
                fetched.key, fetched.item, fetched.embeddings, fetched.seconds
            )
            return fetched.item
        return None


def _reading(item: Item) -> tuple[object, ...]:
    return item.modality, item.dtype, item.shape, item.tokens, item.grid_thw


def octets(media: torch.Tensor) -> memoryview:
    """The bytes of an array, on the host, without a copy if they are there."""
    return memoryview(media.cpu().reshape(-1).view(torch.uint8).numpy())


def view(item: Item, media: torch.Tensor) -> torch.Tensor:
    """The item's array in MEDIA, without a copy.

    Args:
        item: Where it is and what it is.
        media: uint8, shape (bytes,).

    Raises:
        InvalidValue: It does not lie in ``media``, or not where a view can be made.
    """
    if min(item.shape, default=0) < 1 or item.offset < 0 or item.offset % ITEM_ALIGNMENT:
        raise InvalidValue(
            f"extents must be positive and the offset a multiple of {ITEM_ALIGNMENT}, "
            f"got {item.shape = }, {item.offset = }"
        )
    end = item.offset + item.nbytes
    if end > media.numel():
        raise InvalidValue(
            f"bytes {item.offset} to {end} do not lie in MEDIA, which has {media.numel()}"
        )
    return media[item.offset : end].view(getattr(torch, item.dtype)).view(item.shape)


def batches(jobs: Iterable[Job], max_tokens: int) -> Iterator[list[Job]]:
    """The jobs still to be done, smallest first, in batches of ``max_tokens`` embeddings at most.

    A job that is larger than that has a batch to itself, after all others: if the device has no
    memory for it, they are done.
    """
    batch: list[Job] = []
    tokens = 0
    for job in sorted(jobs, key=lambda job: job.item.tokens):
        if job.result is not None:
            continue
        if batch and tokens + job.item.tokens > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(job)
        tokens += job.item.tokens
    if batch:
        yield batch
