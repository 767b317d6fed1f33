"""uvicorn around the application: in the foreground, or in a thread beside something else."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Self

import uvicorn
from fastapi import FastAPI

from triptych.errors import ConfigurationError
from triptych.gateway.app import create_app
from triptych.gateway.options import GatewayOptions

BACKLOG = 2048
KEEP_ALIVE_S = 75
"""For a connection that is idle, in seconds; proxies mostly keep theirs for 60."""
AFTER_DRAIN_S = 5
"""For the last events to leave, once the answers under way have been ended."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Gateway:
    """A gateway, which listens from `start` to `stop` and has its port from the beginning.

    ::

        with Gateway(GatewayOptions(triton="localhost:8001", port=0)) as gateway:
            httpx.get(f"{gateway.url}/v1/models")

    Args:
        options: Whom to ask, and the rest.
        listener: From `bind`; made here unless given.

    Raises:
        ConfigurationError: Something in the options is wrong, or the port cannot be used.
    """

    def __init__(self, options: GatewayOptions, listener: socket.socket | None = None) -> None:
        self.options = options
        self._app = create_app(options)
        self._socket = listener or bind(options.host, options.port)
        self._socket_name: tuple[str, int] = self._socket.getsockname()[:2]
        self._server = _Server(self._app, options)
        self._thread = threading.Thread(target=self._run, name="triptych-gateway", daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._socket_name
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def port(self) -> int:
        """The one that was free, where the options say 0."""
        return self._socket_name[1]

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serve in this thread, which is the main one, until SIGINT or SIGTERM."""
        self._server.on_started = on_ready
        self._run()

    def start(self) -> Self:
        """Serve in a thread; return when it listens."""
        listening = threading.Event()
        self._server.on_started = listening.set
        self._thread.start()
        while not listening.wait(0.05):
            if not self._thread.is_alive():
                raise RuntimeError("the gateway did not start; the log has the cause")
        return self

    def stop(self) -> None:
        """Take no more requests, let those under way end, and end; more than once is the same."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        self._server.run([self._socket])


class _Server(uvicorn.Server):
    """uvicorn, which ends long answers itself before it stops."""

    def __init__(self, app: FastAPI, options: GatewayOptions) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(options.drain_timeout_s) + AFTER_DRAIN_S,
            )
        )
        self.on_started: Callable[[], None] = lambda: None
        self._gateway = app.state
        self._drain_s = options.drain_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what is under way end, but not for ever."""
        limit = asyncio.get_running_loop().call_later(self._drain_s, self._end_answers)
        await super().shutdown(sockets)
        limit.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first signal stops, the second one ends what is under way; neither is raised anew."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_answers)
        self.should_exit = True

    def _end_answers(self) -> None:
        self._gateway.gateway.closing.set()


def serve(
    options: GatewayOptions,
    say: Callable[[str], None],
    on_ready: Callable[[Gateway], None] | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM; a second signal ends the answers that are under way.

    Args:
        options: Where to listen, and the rest.
        say: Prints one line for the person.
        on_ready: Called when it listens.

    Returns:
        The exit code.

    Raises:
        ConfigurationError: Something in the options is wrong, or the port is taken.
    """
    gateway = Gateway(options)

    def ready() -> None:
        say(f"gateway on {gateway.url}/v1, before Triton on {options.triton}")
        if options.playground:
            say(f"a page to try it on: {gateway.url}/playground/")
        if on_ready:
            on_ready(gateway)

    gateway.run(ready)
    say("stopped")
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the port and does not listen yet.

    Raises:
        ConfigurationError: The port is taken, or the address is not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigurationError(f"the gateway cannot listen on {host}: {error}") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit it: a piece of an answer is not to wait for the next one.
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise ConfigurationError(
            f"the gateway port {port} on {host} cannot be used: {error.strerror}"
        ) from None
    return found
