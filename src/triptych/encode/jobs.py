"""What there is to encode in a batch of requests: every medium once, however often it is sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from triptych.contract import ITEM_ALIGNMENT, Item
from triptych.errors import InvalidValue, TriptychError
from triptych.families import Family


@dataclass(eq=False)
class Job:
    """One medium to encode, for every place in the batch where it stands."""

    item: Item
    media: torch.Tensor
    """`Item.shape` and `Item.dtype`, a view of MEDIA."""
    result: torch.Tensor | TriptychError | None = None
    """Embeddings (tokens, width), or why there are none; None: not encoded yet."""


class Jobs:
    """The jobs of one batch.

    Two items are one job if their hashes and their bytes are equal. The hash alone would let a
    caller who speaks to the encoder directly pass pixels off as somebody else's.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._by_content: dict[object, list[Job]] = {}

    def __iter__(self) -> Iterator[Job]:
        for same_hash in self._by_content.values():
            yield from same_hash

    def of(self, items: Sequence[Item], media: torch.Tensor) -> list[Job]:
        """The jobs of one request, in the order of its items.

        Args:
            items: The request's ITEMS.
            media: Its MEDIA, uint8, shape (bytes,).

        Raises:
            TriptychError: An item is not what the family takes, or lies outside of ``media``;
                then none of the request's items is among the jobs.
        """
        views = []
        for index, item in enumerate(items):
            try:
                self._family.check_item(item)
                views.append(view(item, media))
            except TriptychError as error:
                raise error.at(f"items[{index}]") from None
        return [self._job(item, pixels) for item, pixels in zip(items, views, strict=True)]

    def _job(self, item: Item, media: torch.Tensor) -> Job:
        key = (item.hash, item.modality, item.dtype, item.shape, item.grid_thw, item.precomputed)
        same_hash = self._by_content.setdefault(key, [])
        for job in same_hash:
            if torch.equal(job.media, media):
                return job
        job = Job(item, media, result=media if item.precomputed else None)
        same_hash.append(job)
        return job


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
    """The jobs still to be done, in order, in batches of ``max_tokens`` embeddings at most.

    A job that is larger than that has a batch to itself.
    """
    batch: list[Job] = []
    tokens = 0
    for job in jobs:
        if job.result is not None:
            continue
        if batch and tokens + job.item.tokens > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(job)
        tokens += job.item.tokens
    if batch:
        yield batch
