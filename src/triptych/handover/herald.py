"""Tells owners what was read, or never will be: their memory may be used again."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable

import msgspec

from triptych.handover.agent import Agent
from triptych.handover.owner import Release
from triptych.handover.parts import Part

logger = logging.getLogger("triptych.handover")

LINGER_S = 0.01
"""How long a message is driven on."""
GREET_S = 1.0
"""The same after meeting an owner: both must first find a way to one another."""
PAUSE_S = 0.005
"""Between two times meanwhile."""


class Herald:
    """Not for several threads at a time, but for `add`.

    An agent of its own: a read ends when all that was sent before it is acknowledged, for which
    the owner takes a millisecond.
    """

    def __init__(self) -> None:
        self.agent = Agent("herald")
        self._due: deque[Part] = deque()
        self._until = 0.0

    def add(self, read: Iterable[Part]) -> None:
        """Have `work` tell the owners of these; they know this agent, and it knows them."""
        self._due.extend(read)

    def greet(self) -> None:
        """An owner is new."""
        self._until = time.monotonic() + GREET_S

    def work(self) -> None:
        """Send what is due, and drive on what was sent."""
        generations: dict[str, list[int]] = {}
        while self._due:
            span = self._due.popleft().first
            generations.setdefault(span.agent, []).append(span.generation)
        for name, ended in generations.items():
            try:
                self.agent.notify(name, msgspec.json.encode(Release(ended)))
            except Exception as error:
                logger.warning("%s was not told that it was read: %s", name, error)
        if generations:
            self._until = max(self._until, time.monotonic() + LINGER_S)
        try:
            self.agent.notifications()
        except Exception:
            logger.exception("%s cannot be driven on", self.agent.name)

    @property
    def pause(self) -> float | None:
        """Seconds until there is `work`; None: when something is added."""
        if self._due:
            return 0.0
        return PAUSE_S if time.monotonic() < self._until else None
