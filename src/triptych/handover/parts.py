"""What a ticket asks a reader to do, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from triptych.contract import TICKET, NixlSpan, Ticket, TicketItem
from triptych.errors import InvalidValue, LeaseLost, Unavailable
from triptych.handover import seal
from triptych.handover.tensor import shaped


class Spot(NamedTuple):
    """One item of a part."""

    place: int
    """In the ticket."""
    item: TicketItem
    span: NixlSpan


@dataclass(eq=False)
class Part:
    """What a ticket has under one lease: one read."""

    spots: list[Spot]
    offset: int | None = None
    """In the reader's arena."""
    met: bool = False
    """Whether its owner is known and was not lost."""
    handle: Any = None
    done: bool = False

    @cached_property
    def first(self) -> NixlSpan:
        """Any of the spans: they differ in address and checksum alone."""
        return self.spots[0].span

    @cached_property
    def nbytes(self) -> int:
        """From the header to the last item's end."""
        return max(spot.span.address + spot.item.nbytes for spot in self.spots) - self.first.header


def parts(ticket: Ticket) -> list[Part]:
    """The ticket's items, gathered by lease.

    Raises:
        InvalidValue: An item is not on this road, or its span is none that an encoder writes.
    """
    found: dict[tuple[str, int, int], Part] = {}
    for index, item in enumerate(ticket.items):
        span, where = item.nixl, f"{TICKET}.items[{index}]"
        if item.where != "nixl" or span is None:
            raise InvalidValue(f"embeddings by {item.where} among those by nixl", where=where)
        if span.agent not in ticket.agents:
            raise InvalidValue(f"there is no agent {span.agent!r}", where=f"{where}.nixl.agent")
        start = span.address - span.header - seal.HEADER_BYTES
        if min(item.shape) < 1 or start < 0 or start % seal.HEADER_BYTES or span.header < 1:
            raise InvalidValue(
                f"no embeddings of shape {item.shape} can lie at {span.address} after a header "
                f"at {span.header}",
                where=f"{where}.nixl",
            )
        key = (span.agent, span.generation, span.header)
        found.setdefault(key, Part([])).spots.append(Spot(index, item, span))
    return list(found.values())


def verified(part: Part, data: torch.Tensor) -> Iterable[tuple[int, torch.Tensor]]:
    """Each item's place in the ticket, and its embeddings.

    Args:
        part: What was read.
        data: All of it, uint8, shape (part.nbytes,), the header first.

    Raises:
        LeaseLost: Something else lies there by now.
        Unavailable: The bytes were damaged on the way.
    """
    starts = [span.address - span.header for _, _, span in part.spots]
    pieces = [
        data[start : start + item.nbytes]
        for start, (_, item, _) in zip(starts, part.spots, strict=True)
    ]
    expected = [span.checksum for _, _, span in part.spots]
    generation, sound = seal.examine(data[: seal.HEADER_BYTES], pieces, expected)
    for (place, item, span), embeddings, whole in zip(part.spots, pieces, sound, strict=True):
        where = f"{TICKET}.items[{place}]"
        if generation != span.generation:
            raise LeaseLost(
                "the encoder no longer holds this item's embeddings; send the request again",
                where=where,
            )
        if not whole:
            raise Unavailable(
                "this item's embeddings arrived damaged; send the request again", where=where
            )
        yield place, shaped(embeddings, item)
