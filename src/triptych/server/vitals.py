"""Whether the processes of a tritonserver live, and whether they move."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from triptych import processes
from triptych.errors import Unavailable
from triptych.pulse import Beat

HANG_S = 0.9
"""Seconds of silence after which a process that does nothing hangs; it owes a beat each 0.3."""
SURE = 3
"""Looks in a row that must find it idle: one that others starve is so only for a moment."""
BUSY_S = 30.0
"""Seconds of silence after which it hangs though it does something: a machine may be overloaded,
and a process starved by others, but not for so long."""
AWAY_S = 1.0
"""Seconds between two looks after which it was we who were not there."""

_STATES = {"stopped": "is stopped", "idle": "hangs", "busy": "is stuck"}


class Pulses(Protocol):
    """Where the beats come from, `triptych.pulse.Pulses`."""

    def read(self) -> list[Beat]:
        """Those that have come since the last call."""
        ...


class Api(Protocol):
    """tritonserver's HTTP, `triptych.server.api.Api`."""

    def lives(self) -> bool:
        """Whether it answers."""
        ...

    def serves(self, model: str) -> bool:
        """Whether the model is loaded, as far as Triton knows."""
        ...


@dataclass
class _Stub:
    instance: str
    outage: str = ""
    heard: float | None = None
    """When it beat last; None: never, and so none is due."""


class Vitals:
    """The signs of life of one tritonserver and its stubs.

    Args:
        pid: tritonserver's.
        pulses: What its stubs say.
        api: What it says itself.
        clock: `time.monotonic`, but for tests.
    """

    def __init__(
        self, pid: int, pulses: Pulses, api: Api, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pid = pid
        self._pulses = pulses
        self._api = api
        self._clock = clock
        self._stubs: dict[int, _Stub] = {}
        self._idle: dict[int, int] = {}
        """By process: looks in a row that found it silent and idle."""
        self._answered = self._looked = clock()
        self._killed = processes.killed_for_memory()

    @property
    def outage(self) -> str:
        """Why a living stub says that it cannot serve; empty: none does."""
        return next((stub.outage for stub in self._stubs.values() if stub.outage), "")

    def expect(self, stubs: dict[int, str]) -> None:
        """From now on miss ``stubs`` too, process id → instance, should they never have beaten."""
        for pid, instance in stubs.items():
            self._stubs.setdefault(pid, _Stub(instance))

    def check_alive(self) -> None:
        """Look for deaths alone, as long as models load: who loads may be silent for long.

        Raises:
            Unavailable: A stub has ended.
        """
        self._listen()
        for pid, stub in list(self._stubs.items()):
            if processes.is_gone(pid):
                self._bury(pid, stub)

    def check(self) -> None:
        """Look for whatever has ended or hangs.

        Raises:
            Unavailable: Which, and how.
        """
        self.check_alive()
        now = self._clock()
        for pid, stub in self._stubs.items():
            if stub.heard is not None:
                self._judge(pid, f"the process of {stub.instance}", now - stub.heard)
        if self._api.lives():
            self._answered = self._clock()
        else:
            self._judge(self._pid, "tritonserver", self._clock() - self._answered)

    def _listen(self) -> None:
        now = self._clock()
        if now - self._looked > AWAY_S:
            self._answered = now
            for stub in self._stubs.values():
                if stub.heard is not None:
                    stub.heard = now
        self._looked = now
        for beat in self._pulses.read():
            stub = self._stubs.setdefault(beat.pid, _Stub(beat.instance))
            stub.heard, stub.outage = now, beat.outage

    def _bury(self, pid: int, stub: _Stub) -> None:
        """Forget a stub that has ended as it should; raise if not."""
        how = processes.ending(pid)
        if not how and self._was_unloaded(stub):
            del self._stubs[pid]
            return
        if processes.killed_for_memory() > self._killed:
            how += ", and the kernel has killed for want of memory"
        raise Unavailable(f"the process of {stub.instance} was ended {how}".rstrip())

    def _was_unloaded(self, stub: _Stub) -> bool:
        """Whether Triton has ended it: at somebody's wish, or for a new one in its place."""
        model = stub.instance.rsplit("_", 2)[0]
        if sum(other.instance == stub.instance for other in self._stubs.values()) > 1:
            return True
        return not self._api.serves(model)

    def _judge(self, pid: int, name: str, silent_s: float) -> None:
        state = processes.doing(pid) if silent_s > HANG_S else "gone"
        self._idle[pid] = self._idle.get(pid, 0) + 1 if state == "idle" else 0
        if state == "gone" or (state == "busy" and silent_s <= BUSY_S):
            return
        if state == "idle" and self._idle[pid] < SURE:
            return
        raise Unavailable(f"{name} {_STATES[state]}: no sign of life for {silent_s:.1f} s")
