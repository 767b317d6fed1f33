"""Embeddings for decode, which are encoded once more if they cannot be read.

An encoder whose process died, was started again or cannot be reached any more takes what it made
with it. The caller of an ensemble can do nothing about that. So a ticket says whom to ask once
more (`triptych.contract.Again`), and decode does, by a call from model to model (BLS): ``encoder``
makes the same embeddings readable anew if its cache has them, and ``remote_encoder`` gives the
pixels to another server.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from triptych import contract
from triptych.contract import Again, Items, Ticket
from triptych.errors import InternalError, Overloaded, TriptychError, Unavailable
from triptych.stages import backend
from triptych.stages.roads import Fetchers

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("triptych.stages.decode")

Fetched = tuple[Ticket, "list[torch.Tensor]"]
"""The ticket that was read, and its items' embeddings."""


def fetch(
    fetchers: Fetchers, ticket: Ticket, embeddings: torch.Tensor | None = None
) -> Future[Fetched]:
    """Get a ticket's embeddings; if its owner cannot give them, those of another, once.

    Args:
        fetchers: Decode's ends of the roads.
        ticket: From the encoder.
        embeddings: The tensor EMBEDDINGS, where the road has one.

    Returns:
        Fails as `triptych.handover.Fetcher.fetch` says, with what was met last.
    """
    answer: Future[Fetched] = Future()
    read = fetchers.choose(ticket).fetch(ticket, embeddings)

    def first(read: Future[list[torch.Tensor]]) -> None:
        error = read.exception()
        if error is None:
            answer.set_result((ticket, read.result()))
        elif isinstance(error, Unavailable) and ticket.again and not fetchers.closed:
            # A thread each, since they wait and are rare; nobody waits for them at the end.
            threading.Thread(
                target=_second, args=(fetchers, ticket.again, error, answer), daemon=True
            ).start()
        else:
            answer.set_exception(error)

    read.add_done_callback(first)
    return answer


def encode_again(again: Again) -> Ticket:
    """A new ticket for the same media; blocks.

    Raises:
        TriptychError: What the encoder says.
    """
    request = pb_utils.InferenceRequest(
        model_name=again.model,
        requested_output_names=[contract.TICKET],
        inputs=[
            backend.uint8_tensor(contract.MEDIA, np.empty((1, 0), np.uint8)),
            backend.text_tensor(contract.ITEMS, contract.encode(Items(again.items)), (1, 1)),
        ],
    )
    response = request.exec()
    if response.has_error():
        raise TriptychError.parse(response.error().message())
    data = pb_utils.get_output_tensor_by_name(response, contract.TICKET).as_numpy().item()
    try:
        return contract.decode(data, Ticket)
    except msgspec.MsgspecError as error:
        raise InternalError(f"{again.model} made no ticket: {error}") from error


def _second(fetchers: Fetchers, again: Again, lost: Unavailable, answer: Future[Fetched]) -> None:
    try:
        ticket = encode_again(again)
        answer.set_result((ticket, fetchers.choose(ticket).fetch(ticket).result()))
    except Exception as error:
        logger.warning("%s; encoding again failed: %s", lost, error)
        answer.set_exception(error if isinstance(error, Unavailable | Overloaded) else lost)
    else:
        logger.warning("%s; encoded again", lost)
