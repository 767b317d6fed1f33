"""What an engine that fetches embeddings itself knows of its requests' embeddings.

    nothing ──ready──▶ under way ──ready──▶ here ──take──▶ the engine's ──used──▶
        └──────────── not needed ───────────▶ given back            └──▶ lost

A request begins its read when the engine wants to begin with it, and waits for it without being in
the engine's way: what fails, fails before the language model has seen anything of that request.
Knows nothing of an engine's library.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import msgspec
import torch

from triptych import contract
from triptych.contract import Order
from triptych.errors import InternalError, InvalidValue, LeaseLost, TriptychError
from triptych.handover.reader import NixlFetcher

logger = logging.getLogger("triptych.handover")

REASONS = 1024
"""Requests whose error is remembered until somebody asks for it."""


@dataclass(eq=False)
class _Request:
    order: Order
    spent: bool = False
    """Whether the lease is used up: read, or given back."""
    read: Future[list[torch.Tensor]] | None = None
    """The read that is under way."""
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)
    """By the item's place, in the fetcher's memory."""


class Intake:
    """The requests of one engine. Not for several threads at a time.

    Items have names, which are the same where the embeddings are. What a request has is kept until
    it ends, since the engine may begin with it anew; but once half of the fetcher's memory is in
    use, the engine gets copies, and what it has taken is let go of.

    Args:
        fetcher: Closed with the intake.
        dtype: Of the embeddings that the engine wants.
    """

    def __init__(self, fetcher: NixlFetcher, dtype: torch.dtype) -> None:
        self._fetcher = fetcher
        self._dtype = dtype
        self._requests: dict[str, _Request] = {}
        self._known: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()
        self._lost: set[str] = set()
        self._reasons: OrderedDict[str, str] = OrderedDict()

    def ready(
        self, request: str, order: bytes, names: Sequence[str], needed: Sequence[int]
    ) -> bool:
        """Whether all that a request needs can be taken; sets it going if not.

        Args:
            request: The engine's name for it.
            order: An `Order` as JSON.
            names: Of all its items, in the ticket's order.
            needed: Places of the items that the engine has not computed yet.
        """
        if request in self._lost:
            return False
        try:
            if request not in self._requests:
                self._requests[request] = _Request(_read(order))
            return self._ready(self._requests[request], names, needed)
        except TriptychError as error:
            self._lose(request, error)
        except Exception:
            logger.exception("embeddings of %s cannot be fetched", request)
            self._lose(request, InternalError("the engine cannot fetch this request's embeddings"))
        return False

    def has(self, name: str) -> bool:
        """Whether some request has the item."""
        return name in self._known

    def take(self, request: str, place: int, name: str) -> torch.Tensor | None:
        """An item's embeddings, (tokens, width), in the engine's dtype; None: nobody has them."""
        taker = self._requests.get(request)
        tensor = taker.tensors.get(place) if taker else None
        if tensor is None:
            tensor = self._known.get(name)
        if tensor is None:
            return None
        given = tensor.to(self._dtype, copy=self._crowded)
        self._known[name] = given
        self.used(request, place)
        return given

    def used(self, request: str, place: int) -> None:
        """The engine has computed the item, and needs it again only if it begins anew."""
        if self._crowded and (user := self._requests.get(request)):
            user.tensors.pop(place, None)

    def end(self, request: str, order: bytes | None = None) -> None:
        """The request has ended, in whatever way; its lease ends too, if it has not.

        Args:
            request: The engine's name for it.
            order: In case that it was never asked for with `ready`.
        """
        self._lost.discard(request)
        if ended := self._requests.pop(request, None):
            self._give_back(ended)
        elif order is not None:
            self.give_back(order)

    def give_back(self, order: bytes) -> None:
        """End the lease of an order that reached no engine."""
        try:
            self._fetcher.release(_read(order).ticket)
        except TriptychError as error:
            logger.warning("an order that nobody writes: %s", error)

    def take_lost(self) -> set[str]:
        """Requests whose embeddings cannot be had; each is named until it ends."""
        return set(self._lost)

    def why(self, order: str) -> str:
        """The error of a lost request, by `Order.id`, in its wire form; empty: there is none."""
        return self._reasons.pop(order, "")

    def close(self) -> None:
        """Fail what is under way, and give all memory back; a second call does nothing."""
        self._requests.clear()
        self._fetcher.close()

    @property
    def _crowded(self) -> bool:
        return 2 * self._fetcher.used > self._fetcher.capacity

    def _ready(self, request: _Request, names: Sequence[str], needed: Sequence[int]) -> bool:
        if len(names) != (count := len(request.order.ticket.items)):
            raise InvalidValue(f"{count} embeddings for {len(names)} items of the prompt")
        for place in needed:
            if (
                place not in request.tensors
                and (known := self._known.get(names[place])) is not None
            ):
                request.tensors[place] = known
        if request.read is None and all(place in request.tensors for place in needed):
            self._give_back(request)
            return True
        if request.read is None:
            if request.spent:
                raise LeaseLost(
                    "the engine began anew with this request and no longer has its embeddings "
                    "(handover_buffer_mb); send the request again"
                )
            request.spent = True
            request.read = self._fetcher.fetch(request.order.ticket)
        if not request.read.done():
            return False
        tensors = request.read.result()
        request.read = None
        with self._fetcher.aside():
            _check(tensors)
        request.tensors = dict(enumerate(tensors))
        self._known.update(zip(names, tensors, strict=True))
        return True

    def _give_back(self, request: _Request) -> None:
        if not request.spent:
            request.spent = True
            self._fetcher.release(request.order.ticket)

    def _lose(self, request: str, error: TriptychError) -> None:
        self._lost.add(request)
        if lost := self._requests.get(request):
            lost.tensors.clear()
            self._reasons[lost.order.id] = str(error)
            if len(self._reasons) > REASONS:
                self._reasons.popitem(last=False)


def _read(order: bytes) -> Order:
    try:
        return msgspec.json.decode(order, type=Order)
    except msgspec.MsgspecError as error:
        raise InvalidValue(f"no order for embeddings: {error}") from None


def _check(tensors: Sequence[torch.Tensor]) -> None:
    """What can only be seen in the values; shapes and dtypes were held against the model before."""
    for place, tensor in enumerate(tensors):
        if not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):
            raise InvalidValue(
                "embeddings hold values that are not finite",
                where=f"{contract.TICKET}.items[{place}]",
            )
