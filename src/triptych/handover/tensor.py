"""The road inside one server: the tensor EMBEDDINGS itself, carried by Triton."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from triptych.contract import ITEM_ALIGNMENT, TICKET, Ticket, TicketItem
from triptych.errors import InvalidValue, TriptychError

if TYPE_CHECKING:
    import torch


class TensorPublisher:
    """The encoder's end. The memory is torch's, and Triton copies or maps it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def room(self, nbytes: int) -> torch.Tensor:
        """A tensor of its own for each request."""
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def publish(self, embeddings: torch.Tensor, ticket: Ticket) -> Ticket:
        """Nothing is to be said: the ticket's offsets are enough."""
        return ticket

    def close(self) -> None:
        """Nothing is kept."""


class TensorFetcher:
    """Decode's end: views, without a copy."""

    def fetch(
        self, ticket: Ticket, embeddings: torch.Tensor | None = None
    ) -> Future[list[torch.Tensor]]:
        """Each item's part of ``embeddings``, which lives as long as one of them."""
        future: Future[list[torch.Tensor]] = Future()
        try:
            if ticket.items and embeddings is None:
                raise InvalidValue(
                    "this input is missing, and the ticket has items", where="EMBEDDINGS"
                )
            future.set_result(
                [view(embeddings, index, item) for index, item in enumerate(ticket.items)]
                if embeddings is not None
                else []
            )
        except TriptychError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing is kept."""


def view(data: torch.Tensor, index: int, item: TicketItem) -> torch.Tensor:
    """One item's embeddings, (tokens, width), in ``data``, uint8 of shape (bytes,).

    Raises:
        InvalidValue: They do not lie there, or not where a view can be made.
    """
    where = f"{TICKET}.items[{index}]"
    if item.where != "tensor":
        raise InvalidValue(
            f"embeddings by {item.where} among those in EMBEDDINGS", where=f"{where}.where"
        )
    end = item.offset + item.nbytes
    if min(item.shape) < 1 or item.offset < 0 or end > data.numel():
        raise InvalidValue(
            f"bytes {item.offset} to {end} of {data.numel()}, for shape {item.shape}", where=where
        )
    if item.offset % ITEM_ALIGNMENT:
        raise InvalidValue(f"offset {item.offset} is no multiple of {ITEM_ALIGNMENT}", where=where)
    return shaped(data[item.offset : end], item)


def shaped(data: torch.Tensor, item: TicketItem) -> torch.Tensor:
    """The item's bytes as its embeddings, without a copy."""
    import torch

    return data.view(getattr(torch, item.dtype)).view(item.shape)
