"""A reply that remembers, for tests of the sender thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from triptych.stages.outbox import Parcel


class Recorded:
    """A reply that keeps what it is sent; while `gate` is clear, sending blocks."""

    def __init__(self, log: list[tuple[str, Parcel]] | None = None, name: str = "") -> None:
        self.parcels: list[Parcel] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.cancelled = False
        self.polls = 0
        self.fails = False
        self.closes = 0
        self._log = [] if log is None else log
        self._name = name

    def send(self, parcel: Parcel) -> None:
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.gate.wait(5)
        self.parcels.append(parcel)
        self._log.append((self._name, parcel))
        if self.fails:
            raise RuntimeError("broken")

    def close(self) -> None:
        self.closes += 1

    def is_cancelled(self) -> bool:
        self.threads.add(threading.get_ident())
        self.polls += 1
        return self.cancelled

    @property
    def done(self) -> bool:
        return bool(self.parcels) and self.parcels[-1].last


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 5 s"
        time.sleep(0.001)
