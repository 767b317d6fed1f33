"""Reads the inputs of ``decode_*`` and refuses what preprocess and encoder would not write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import triton_python_backend_utils as pb_utils

from triptych import contract
from triptych.contract import Prompt, TicketItem
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


def read_ticket(request: Any) -> list[TicketItem]:
    """The items of the request's TICKET.

    Raises:
        InvalidValue: It is missing, not what the encoder writes, or names a road not served.
    """
    data = backend.read_bytes(request, contract.TICKET)
    items = _decode(data, contract.Ticket, contract.TICKET).items
    for index, item in enumerate(items):
        if item.where != "tensor":
            raise InvalidValue(
                f"embeddings by {item.where} are not served yet; map EMBEDDINGS in the ensemble",
                where=f"{contract.TICKET}.items[{index}].where",
            )
    return items


def read_embeddings(request: Any, items: Sequence[TicketItem]) -> list[torch.Tensor]:
    """Each item's embeddings in EMBEDDINGS, (tokens, width), on the device they came on.

    Raises:
        InvalidValue: EMBEDDINGS is missing, of another type, or shorter than the ticket says.
    """
    if not items:
        return []
    import torch

    tensor = pb_utils.get_input_tensor_by_name(request, contract.EMBEDDINGS)
    if tensor is None:
        raise InvalidValue("this input is missing, and the ticket has items", where="EMBEDDINGS")
    # as_numpy() is a copy that numpy owns, made when the request came in; a view of Triton's
    # memory would not outlive this execute. DLPack's capsule keeps its tensor.
    data = (
        torch.from_numpy(tensor.as_numpy())
        if tensor.is_cpu()
        else torch.from_dlpack(tensor.to_dlpack())
    )
    if data.dtype != torch.uint8 or data.ndim != 2 or data.shape[0] != 1:
        raise InvalidValue(
            f"must be UINT8 of shape (1, bytes), got {data.dtype} of shape {tuple(data.shape)}",
            where=contract.EMBEDDINGS,
        )
    return [_view(data[0], index, item) for index, item in enumerate(items)]


def _view(data: torch.Tensor, index: int, item: TicketItem) -> torch.Tensor:
    import torch

    where = f"{contract.TICKET}.items[{index}]"
    end = item.offset + item.nbytes
    if min(item.shape) < 1 or item.offset < 0 or end > data.numel():
        raise InvalidValue(
            f"bytes {item.offset} to {end} of {data.numel()}, for shape {item.shape}", where=where
        )
    if item.offset % contract.ITEM_ALIGNMENT:
        raise InvalidValue(
            f"offset {item.offset} is no multiple of {contract.ITEM_ALIGNMENT}", where=where
        )
    dtype = getattr(torch, item.dtype)
    return data[item.offset : end].view(dtype).view(item.shape)


def _decode(data: bytes, kind: type[contract.Payload], name: str) -> contract.Payload:
    try:
        return contract.decode(data, kind)
    except msgspec.MsgspecError as error:
        raise InvalidValue(str(error), where=name) from None
