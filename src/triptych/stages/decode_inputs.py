"""Reads the inputs of ``decode_*`` and refuses what preprocess and encoder would not write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from triptych import contract
from triptych.contract import Prompt, Ticket
from triptych.errors import InvalidValue
from triptych.stages import backend

if TYPE_CHECKING:
    import torch


def read_prompt(request: Any, parameters: Mapping[str, Any]) -> Prompt:
    """The request's PROMPT, with what `contract.KV_TRANSFER` among its parameters says.

    Raises:
        InvalidValue: It is missing or not what preprocess writes.
    """
    prompt = _decode(backend.read_bytes(request, contract.PROMPT), Prompt, contract.PROMPT)
    if contract.KV_TRANSFER not in parameters:
        return prompt
    try:
        transfer = msgspec.json.decode(parameters[contract.KV_TRANSFER], type=dict[str, Any])
    except (msgspec.MsgspecError, TypeError) as error:
        raise InvalidValue(
            f"must be a JSON object in a string: {error}", where=contract.KV_TRANSFER
        ) from None
    return msgspec.structs.replace(prompt, kv_transfer=transfer)


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
