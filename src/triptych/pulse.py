"""Signs of life, from each model's process to whoever has started its tritonserver.

    stub ──Beat──▶ pipe ──▶ `triptych serve`

tritonserver neither restarts nor reports a model's process that has died or hangs, and calls itself
ready all the same; so does it while an engine is being replaced within its process. The pipe is
inherited by way of tritonserver, and an environment variable has its number; without one, nobody
is told.

A message is one line of JSON, and shorter than what a pipe keeps in one piece.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

VARIABLE = "_TRIPTYCH_PULSE"
"""Environment variable with the descriptor of the pipe's writing end."""
BEAT_S = 0.3
"""Seconds between two beats."""
STANDSTILL_S = 300.0
"""Seconds for which one thread may hold the interpreter's lock."""
_MAX_OUTAGE = 500
"""Characters of `Beat.outage`; pipe(7) keeps 4096 bytes in one piece."""
_PARENT_GONE = 1


class Beat(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sign of life."""

    pid: int
    instance: str
    """Triton's name of it, such as ``preprocess_0_1``."""
    outage: str = ""
    """Why it cannot serve now; empty: it can."""


_ENCODE = msgspec.json.Encoder().encode
_DECODE = msgspec.json.Decoder(Beat).decode


class Pulse:
    """A model's process: it beats while its threads move, and ends when its tritonserver has.

    tritonserver's own stub sees to that end too, but may wait for a lock for ever that its server
    held when it was killed. A process whose interpreter stands still can neither beat nor see its
    server's end: it is ended after `STANDSTILL_S`, and says on stderr where it stood.

    Args:
        instance: Triton's name of the model's instance.
        environ: Says where to write to.
        on_orphaned: What to do when the parent has gone: end at once.
    """

    def __init__(
        self,
        instance: str,
        environ: Mapping[str, str] = os.environ,
        on_orphaned: Callable[[], None] = lambda: os._exit(_PARENT_GONE),
    ) -> None:
        self._beat = Beat(os.getpid(), instance)
        self._pipe = int(environ[VARIABLE]) if VARIABLE in environ else None
        self._parent = os.getppid()
        self._on_orphaned = on_orphaned
        self._loops: list[_Loop] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="triptych-pulse", daemon=True)
        self._thread.start()

    def follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """Beat only while ``loop`` comes round; one that is closed counts no more."""
        self._loops.append(_Loop(loop))

    def tell(self, outage: str) -> None:
        """Say at once, and from now on, why requests are refused; empty: they are not."""
        self._beat = msgspec.structs.replace(self._beat, outage=outage[:_MAX_OUTAGE])
        self._send()

    def stop(self) -> None:
        """Beat no more."""
        self._stopping.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        armed = 0.0
        while True:
            if time.monotonic() - armed > STANDSTILL_S / 10:
                armed = time.monotonic()
                faulthandler.dump_traceback_later(STANDSTILL_S, exit=True, file=2)
            if all(loop.moves() for loop in self._loops):
                self._send()
            if self._stopping.wait(BEAT_S):
                return
            if os.getppid() != self._parent:
                self._on_orphaned()
                return

    def _send(self) -> None:
        if self._pipe is not None:
            with suppress(OSError):  # nobody reads: the next one says the same
                os.write(self._pipe, _ENCODE(self._beat) + b"\n")


class _Loop:
    """Whether an event loop has come round since it was last asked."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._round = threading.Event()
        self._round.set()

    def moves(self) -> bool:
        if not self._round.is_set():
            return self._loop.is_closed()
        self._round.clear()
        with suppress(RuntimeError):  # it has been closed
            self._loop.call_soon_threadsafe(self._round.set)
        return True


class Pulses:
    """The reading end."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        self._rest = b""
        for end in (self._reader, self.writer):
            os.set_blocking(end, False)

    def read(self) -> list[Beat]:
        """The beats that have come since the last call."""
        with suppress(BlockingIOError):
            while data := os.read(self._reader, 1 << 16):
                self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        return [_DECODE(line) for line in lines]

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self._reader)
        os.close(self.writer)
