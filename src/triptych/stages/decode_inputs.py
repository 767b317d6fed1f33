"""Reads the inputs of ``decode_*`` and refuses what preprocess and encoder would not write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from triptych import contract
from triptych.contract import Prompt, Ticket
from triptych.errors import InvalidValue
from triptych.stages import backend

if TYPE_CHECKING:
    import torch


def read_prompt(request: Any) -> Prompt:
    """The request's PROMPT.

    Raises:
        InvalidValue: It is missing or not what preprocess writes.
    """
    return _decode(backend.read_bytes(request, contract.PROMPT), Prompt, contract.PROMPT)


def read_ticket(request: Any) -> Ticket:
    """The request's TICKET.

    Raises:
        InvalidValue: It is missing, or not what the encoder writes.
    """
    data = backend.read_bytes(request, contract.TICKET)
    return _decode(data, Ticket, contract.TICKET)


def read_embeddings(request: Any) -> torch.Tensor | None:
    """The request's EMBEDDINGS, uint8, shape (bytes,), on the device they came on; None: none came.

    Raises:
        InvalidValue: They are of another type or shape.
    """
    return backend.read_row(request, contract.EMBEDDINGS)


def _decode(data: bytes, kind: type[contract.Payload], name: str) -> contract.Payload:
    try:
        return contract.decode(data, kind)
    except msgspec.MsgspecError as error:
        raise InvalidValue(str(error), where=name) from None
