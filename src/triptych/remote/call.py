"""One item as a request to the model ``encoder``, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from tritonclient.grpc import InferInput, InferRequestedOutput

from triptych import contract
from triptych.contract import Item, Items, NixlAgent, Ticket, TicketItem
from triptych.errors import Unavailable

MODEL = "encoder"
"""Its name on every server of a pool."""


@dataclass(frozen=True)
class Answer:
    """An item's embeddings, or where they are."""

    item: TicketItem
    agents: dict[str, NixlAgent] = field(repr=False)
    server: str
    """Address of the server that made them."""
    embeddings: memoryview | None = field(default=None, repr=False)
    """Their bytes; None: decode reads them from the server."""


@dataclass(frozen=True)
class Call:
    """What one item asks of a server."""

    item: Item
    pixels: memoryview = field(repr=False)
    """The item's bytes alone."""
    inline: bool
    """Whether the embeddings are to come with the answer."""

    def inputs(self) -> list[Any]:
        """MEDIA and ITEMS."""
        return inputs([replace(self.item, offset=0, lease="")], self.pixels)

    def outputs(self) -> list[Any]:
        """The outputs to ask for, which choose the road of the embeddings."""
        names = [contract.TICKET, *([contract.EMBEDDINGS] if self.inline else [])]
        return [InferRequestedOutput(name) for name in names]

    def read(self, result: Any, server: str) -> Answer:
        """The answer in Triton's ``result``.

        Raises:
            Unavailable: It is no answer to this call: the server runs something else.
        """
        try:
            ticket = contract.decode(result.as_numpy(contract.TICKET).item(), Ticket)
        except (AttributeError, ValueError, msgspec.MsgspecError) as error:
            raise Unavailable(f"no ticket came back: {error}") from error
        if len(ticket.items) != 1 or ticket.items[0].shape[0] != self.item.tokens:
            raise Unavailable(
                f"a ticket for {[item.shape for item in ticket.items]} came back, "
                f"asked for {self.item.tokens} embeddings"
            )
        [item] = ticket.items
        if not self.inline:
            return Answer(item, ticket.agents, server)
        octets = result.as_numpy(contract.EMBEDDINGS)
        data = np.empty(0, np.uint8) if octets is None else np.ascontiguousarray(octets).reshape(-1)
        if len(data) < item.offset + item.nbytes:
            raise Unavailable(f"{len(data)} bytes of embeddings came back for {item.shape}")
        return Answer(item, {}, server, data[item.offset : item.offset + item.nbytes].data)


def inputs(items: list[Item], pixels: memoryview) -> list[Any]:
    """MEDIA and ITEMS of a request, in the form of Triton's client."""
    media = InferInput(contract.MEDIA, [1, pixels.nbytes], "UINT8")
    media.set_data_from_numpy(np.frombuffer(pixels, np.uint8)[None])
    listing = InferInput(contract.ITEMS, [1, 1], "BYTES")
    listing.set_data_from_numpy(np.array([[contract.encode(Items(items))]], dtype=np.object_))
    return [media, listing]
