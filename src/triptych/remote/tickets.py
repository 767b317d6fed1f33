"""One request's outputs, of its items' answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from triptych.contract import Ticket, TicketItem, aligned
from triptych.remote.call import Answer


def merge(answers: Sequence[Answer]) -> Ticket:
    """One ticket for embeddings that stay at their servers."""
    agents = {name: agent for answer in answers for name, agent in answer.agents.items()}
    return Ticket([answer.item for answer in answers], agents)


def join(answers: Sequence[Answer]) -> tuple[npt.NDArray[np.uint8], Ticket]:
    """EMBEDDINGS, uint8 of shape (1, bytes), with all that came back, and the ticket for it."""
    items: list[TicketItem] = []
    offset = end = 0
    for answer in answers:
        items.append(replace(answer.item, offset=offset))
        end = offset + answer.item.nbytes
        offset = aligned(end)
    whole = np.zeros((1, end), np.uint8)
    for answer, item in zip(answers, items, strict=True):
        if answer.embeddings is not None:
            whole[0, item.offset : item.offset + item.nbytes] = answer.embeddings
    return whole, Ticket(items)
