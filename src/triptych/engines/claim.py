"""Media whose embeddings an engine fetches itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triptych.contract import Ticket, TicketItem

if TYPE_CHECKING:
    import torch


class Claim(list["tuple[TicketItem, torch.Tensor]"]):
    """A request's media, as `triptych.engines.base.Media`, without their values.

    The tensors have a shape and a dtype (torch's device ``meta``), so that they are checked as any
    others.

    Args:
        ticket: Where the embeddings are; its shapes are positive.
    """

    def __init__(self, ticket: Ticket) -> None:
        super().__init__()
        self.renew(ticket)

    def renew(self, ticket: Ticket) -> None:
        """Refer to embeddings elsewhere."""
        import torch

        self[:] = [
            (item, torch.empty(item.shape, dtype=getattr(torch, item.dtype), device="meta"))
            for item in ticket.items
        ]
        self.ticket = ticket
        self.taken = False
        """Whether the engine sees to the leases of the embeddings; till then the caller must."""
