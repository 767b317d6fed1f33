"""``triptych serve``: a server in the foreground, until a signal ends it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NamedTuple, TypeAlias

from rich.console import Console
from rich.status import Status

from triptych.errors import TriptychError
from triptych.server.log import StartLog
from triptych.server.options import ServerOptions
from triptych.server.supervisor import Supervisor
from triptych.server.tritonserver import Server

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Address(NamedTuple):
    """Where something listens."""

    name: str
    """In ``--json``."""
    url: str
    line: str
    """The same for a person."""


Beside: TypeAlias = Callable[[Server], contextlib.AbstractContextManager[Sequence[Address]]]
"""Something that runs while a server does: entered when that is ready, left before it stops; it
yields where it listens."""

Ready: TypeAlias = Callable[[Server, Sequence[Address]], None]
"""Told of a server that is ready, and of where what runs beside it listens."""


class _Stop(BaseException):
    """A signal asks for the end; no ``except Exception`` on its way may swallow it."""


def serve(
    options: ServerOptions,
    *,
    beside: Beside | None = None,
    console: Console | None = None,
    on_ready: Ready | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM; a second signal ends everything at once.

    A server that dies or hangs is replaced by another one, on the same ports.

    Args:
        options: What to serve and where.
        beside: What runs beside the server; nothing unless given.
        console: Where progress and the server's log go; stderr unless given.
        on_ready: Called when all of it is ready.

    Returns:
        The exit code: 0 after a clean stop, 1 when the server did not start or died too often,
        130 when it had to be killed.
    """
    progress = _Progress(console or Console(stderr=True, highlight=False))
    supervisor = Supervisor(
        options,
        on_line=progress.line,
        on_change=progress.change,
        say=lambda what: progress.say(_plain(what)),
    )
    code = 1
    with _signals(supervisor):
        try:
            with progress:
                supervisor.start()
            server = supervisor.server
            progress.ready(server)
            with beside(server) if beside else contextlib.nullcontext(()) as addresses:
                for address in addresses:
                    progress.say(address.line)
                if on_ready:
                    on_ready(server, addresses)
                supervisor.run()
        except _Stop:
            progress.say("stopping; once more to stop at once")
            code = 0
        except TriptychError as error:
            progress.say(f"[bold red]error:[/] {_plain(error.what)}")
        finally:
            if not supervisor.stop() and code == 0:
                code = 130
    progress.say("stopped")
    return code


@contextlib.contextmanager
def _signals(supervisor: Supervisor) -> Iterator[None]:
    """The first signal raises `_Stop` where the main thread is; the next one kills."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            supervisor.kill()
            return
        asked = True
        raise _Stop

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """What the person at the terminal sees: the models as they load, then the server's log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = Status("starting tritonserver", console=console)
        self._began = time.monotonic()
        self._loading: dict[str, float] = {}
        self._shown: set[str] = set()
        self._is_ready = threading.Event()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> None:
        if self._console.is_terminal:
            self._status.start()
            self._ticker.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._status.stop()

    def say(self, text: str) -> None:
        """One line for the person, if it can be written: its disk may be full."""
        with contextlib.suppress(OSError):
            self._console.print(text, soft_wrap=True)

    def line(self, line: str) -> None:
        """A line of the server's log; while it loads, `change` says what matters of it."""
        if self._is_ready.is_set():
            with contextlib.suppress(OSError):
                sys.stderr.write(line + "\n")

    def change(self, log: StartLog) -> None:
        """A model began to load, or has loaded."""
        self._loading = dict(log.loading)
        for model, took in list(log.loaded.items()):
            if model not in self._shown:
                self._shown.add(model)
                self.say(f"  {model} loaded in {took:.1f} s")

    def ready(self, server: Server) -> None:
        """The ensemble has answered."""
        host = server.options.host
        self._is_ready.set()
        self.say(
            f"[bold green]ready[/] after {time.monotonic() - self._began:.1f} s: "
            f"{server.options.chat_model} on http://{host}:{server.http_port}, "
            f"grpc {host}:{server.grpc_port}, metrics {host}:{server.metrics_port}"
        )

    def _tick(self) -> None:
        while not self._ended.wait(0.5):
            now = time.monotonic()
            loading = [f"{name} ({now - began:.0f} s)" for name, began in self._loading.items()]
            self._status.update("loading " + ", ".join(loading) if loading else "starting")


def _plain(text: str) -> str:
    """``text`` without what rich would take for its markup."""
    return text.replace("[", r"\[")
