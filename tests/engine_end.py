"""The end of the road NIXL that is in an engine's process, asked as the one in decode is."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import Future

import msgspec
import torch

from triptych.contract import Order, Ticket
from triptych.errors import InternalError, TriptychError
from triptych.handover.intake import Intake
from triptych.handover.reader import NixlFetcher


class EngineEnd:
    """An `Intake` as a `Fetcher`: each fetch is a request that begins, is computed and ends.

    Names are never the same, so nothing is there already. Any thread may call.
    """

    def __init__(self, fetcher: NixlFetcher, timeout_s: float) -> None:
        self.fetcher = fetcher
        self._intakes: dict[str, Intake] = {}
        self._timeout_s = timeout_s
        self._names = map(str, itertools.count())
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        return self.fetcher.used

    def forget(self, name: str) -> None:
        self.fetcher.forget(name)

    def close(self) -> None:
        self.fetcher.close()

    def fetch(
        self, ticket: Ticket, embeddings: torch.Tensor | None = None
    ) -> Future[list[torch.Tensor]]:
        answer: Future[list[torch.Tensor]] = Future()
        try:
            answer.set_result(self._serve(ticket))
        except TriptychError as error:
            answer.set_exception(error)
        return answer

    def _serve(self, ticket: Ticket) -> list[torch.Tensor]:
        with self._lock:
            request = next(self._names)
        order = msgspec.json.encode(Order(request, ticket))
        names = [f"{request}/{place}" for place in range(len(ticket.items))]
        # An engine has one dtype; here each item gets its own.
        dtypes = {item.dtype for item in ticket.items}
        intake = self._intake("float32" if len(dtypes) != 1 else dtypes.pop())
        end = time.monotonic() + 2 * self._timeout_s
        while not self._ready(intake, request, order, names):
            with self._lock:
                if request in intake.take_lost():
                    why = intake.why(request)
                    intake.end(request, order)
                    raise TriptychError.parse(why)
            if time.monotonic() > end:
                raise InternalError("neither ready nor lost")
            time.sleep(0.0005)
        with self._lock:
            taken = [intake.take(request, place, name) for place, name in enumerate(names)]
            for place in range(len(names)):
                intake.used(request, place)
            intake.end(request, order)
        return [tensor for tensor in taken if tensor is not None]

    def _ready(self, intake: Intake, request: str, order: bytes, names: list[str]) -> bool:
        with self._lock:
            return intake.ready(request, order, names, range(len(names)))

    def _intake(self, dtype: str) -> Intake:
        with self._lock:
            if dtype not in self._intakes:
                self._intakes[dtype] = Intake(self.fetcher, getattr(torch, dtype))
            return self._intakes[dtype]
