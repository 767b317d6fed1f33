"""Keeps a tritonserver running."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NoReturn

import msgspec

from triptych.errors import TriptychError, Unavailable
from triptych.restarts import Restarts, doubling
from triptych.server.log import StartLog
from triptych.server.options import ServerOptions
from triptych.server.tritonserver import Server

logger = logging.getLogger("triptych.server")

LONGEST_PAUSE_S = 30.0
"""Between two starts in a row."""


class Supervisor:
    """Starts a tritonserver, and another one on the same ports whenever one is of no use any more.

    The whole server, whichever of its processes died: the requests that a dead stub held are
    answered only when their connections break, and Triton never unloads its model. An engine that
    dies is replaced within its stub (`triptych.engines.kept`), and does not get this far.

    Args:
        options: What to serve and where.
        on_line: Called for each line of a server's log, from another thread.
        on_change: Called, likewise, whenever a model begins to load or has loaded.
        say: Told what has happened, for a person.
    """

    def __init__(
        self,
        options: ServerOptions,
        *,
        on_line: Callable[[str], None] | None = None,
        on_change: Callable[[StartLog], None] | None = None,
        say: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._options = options
        self._on_line = on_line
        self._on_change = on_change
        self._say = say
        self._restarts = Restarts(doubling(options.max_restarts, LONGEST_PAUSE_S))
        self.server = self._make()
        """The one of now."""

    def start(self) -> None:
        """Start the first server and wait until it is ready.

        Raises:
            TriptychError: It does not start; it is not tried again.
        """
        self.server.start().wait_ready()
        # Whoever found it there is to find the next one there too.
        self._options = msgspec.structs.replace(
            self._options, **{f"{name}_port": port for name, port in self.server.ports.items()}
        )

    def run(self) -> NoReturn:
        """Watch the server, and replace it, until that is of no use.

        Raises:
            Unavailable: It has failed too often in a row, and what was wrong last.
        """
        while True:
            self._restarts.serves()
            fault: TriptychError | None = self._fault()
            while fault is not None:
                self._end(fault)
                fault = self._begin()

    def stop(self) -> bool:
        """End the server; as `Server.stop`."""
        return self.server.stop()

    def kill(self) -> None:
        """End every process of it at once; as `Server.kill`."""
        self.server.kill()

    def _make(self) -> Server:
        return Server(self._options, on_line=self._on_line, on_change=self._on_change)

    def _fault(self) -> TriptychError:
        try:
            self.server.watch()
        except TriptychError as error:
            return error

    def _end(self, fault: TriptychError) -> None:
        """End what is left, so that who waits for an answer waits no more; then pause."""
        pause = self._restarts.failed()
        limit = self._restarts.limit
        if pause is not None:
            when = f" in {pause:g} s" if pause else ""
            why = fault.what.partition("; last lines:")[0]  # they have been shown
            self._say(f"{why}; starting again{when} ({self._restarts.count} of {limit})")
        self.server.kill()
        self.server.stop()
        if pause is None:
            raise Unavailable(f"given up after {limit} restarts in a row; the last: {fault.what}")
        time.sleep(pause)

    def _begin(self) -> TriptychError | None:
        """Start the next server; why it does not start."""
        begun = time.monotonic()
        self.server = self._make()
        try:
            self.server.start().wait_ready()
        except TriptychError as error:
            return error
        self._say(f"ready again after {time.monotonic() - begun:.1f} s")
        return None
