"""The interface of a road: `Publisher` at the encoder, `Fetcher` at decode."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from triptych.contract import Ticket

if TYPE_CHECKING:
    import torch


class Publisher(Protocol):
    """The encoder's end: ask for room, write the embeddings there, publish them."""

    def room(self, nbytes: int) -> torch.Tensor:
        """Memory for the embeddings of one request.

        Returns:
            uint8, shape (nbytes,), contiguous, on the encoder's device; its bytes are arbitrary.

        Raises:
            Overloaded: There is no room now.
            InvalidRequest: There never will be so much.
        """

    def publish(self, embeddings: torch.Tensor, ticket: Ticket) -> Ticket:
        """Make what was written findable.

        Args:
            embeddings: What `room` gave, written and from now on not written any more.
            ticket: Its items' offsets are in ``embeddings``.

        Returns:
            The ticket to send: it says where the bytes are.
        """

    def close(self) -> None:
        """Give back all memory; a second call does nothing."""


class Fetcher(Protocol):
    """Decode's end."""

    def fetch(
        self, ticket: Ticket, embeddings: torch.Tensor | None = None
    ) -> Future[list[torch.Tensor]]:
        """Get the embeddings of a ticket, and tell their owner that it may have its memory back.

        Args:
            ticket: As `Publisher.publish` made it.
            embeddings: The tensor EMBEDDINGS, uint8, shape (bytes,), where the road has one.

        Returns:
            One tensor (tokens, width) an item, in order. Memory is given back with the last
            reference to them. The future is done at once wherever that is possible, and in any
            case within the road's timeout; if it fails, then with

            - `InvalidValue`: the ticket is not one of ours;
            - `LeaseLost`: the embeddings are no longer there; sent again, the request works;
            - `Unavailable`: their owner is dead, or the way to it is cut;
            - `Overloaded`: there is no room to fetch into.
        """

    def close(self) -> None:
        """Fail what is under way, and give back all memory; a second call does nothing."""
