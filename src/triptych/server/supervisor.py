"""One tritonserver from start to stop."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import IO

import httpx
import msgspec

from triptych import contract
from triptych.errors import ConfigurationError, TriptychError, Unavailable
from triptych.server import command, installation
from triptych.server.log import StartLog
from triptych.server.options import ServerOptions
from triptych.server.process import ServerProcess

POLL_S = 0.05
"""Between two looks at a server that loads."""
WATCH_S = 0.5
"""Between two looks at a server that runs."""
KILL_AFTER_S = 10.0
"""Past tritonserver's own timeout, before it is killed."""
GREETING = msgspec.json.encode(
    {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 1,
        "temperature": 0,
        # An engine may refuse what the checkpoint's generation_config.json asks for.
        "min_p": 0,
        "repetition_penalty": 1,
    }
)
"""The chat that a ready server answers."""


class Server:
    """A tritonserver with one ensemble, on ports of its own.

    ::

        with Server(ServerOptions(model="models/tiny-qwen2.5-vl")) as server:
            server.wait_ready()
            ...

    Whatever happens, after `stop` no process and no shared memory region of it is left; if this
    process is killed, tritonserver ends too.

    Args:
        options: What to serve and where.
        on_line: Called for each line of the server's log, from another thread.
        on_change: Called, likewise, whenever a model begins to load or has loaded.
    """

    def __init__(
        self,
        options: ServerOptions,
        *,
        on_line: Callable[[str], None] | None = None,
        on_change: Callable[[StartLog], None] | None = None,
    ) -> None:
        self.options = options
        self.ports: dict[str, int] = {}
        """``http``, ``grpc`` and ``metrics``, once started."""
        self.log = StartLog(on_change or (lambda _: None))
        self._on_line = on_line
        self._log_file: IO[str] | None = None
        self._process: ServerProcess | None = None
        self._stubs: dict[int, str] = {}
        self._stop_lock = threading.Lock()
        self._clean: bool | None = None
        self._shm_prefix = f"triptych_{uuid.uuid4().hex[:12]}_"

    @property
    def http_port(self) -> int:
        """Where HTTP is served."""
        return self.ports["http"]

    @property
    def grpc_port(self) -> int:
        """Where gRPC is served."""
        return self.ports["grpc"]

    @property
    def metrics_port(self) -> int:
        """Where Prometheus finds the metrics."""
        return self.ports["metrics"]

    @property
    def pid(self) -> int | None:
        """Process id of tritonserver; None: not started."""
        return self._process.pid if self._process else None

    @property
    def shm_prefix(self) -> str:
        """How the names of its shared memory regions begin."""
        return self._shm_prefix

    def start(self) -> Server:
        """Start tritonserver and return at once.

        Raises:
            ConfigurationError: Something in the options is wrong, a port is taken, or there is
                no tritonserver.
        """
        if self._process is not None:
            raise RuntimeError("a Server starts once")
        options = self.options
        options.check()
        binary = installation.find()
        self.ports = _claim(
            options.host,
            {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port},
        )
        if options.log_file:
            self._log_file = open(options.log_file, "w", buffering=1)  # noqa: SIM115  closed by stop
        self._process = ServerProcess(
            command.arguments(binary, options, self.ports, self._shm_prefix),
            command.environ(binary, options, os.environ),
            self._shm_prefix,
            self._feed,
        )
        self._process.start()
        return self

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the ensemble has answered a chat.

        Args:
            timeout: Seconds; `ServerOptions.ready_timeout_s` unless given.

        Raises:
            TriptychError: The server will not get ready, and why: mostly a `ConfigurationError`
                from a stage, with the model's name in front.
        """
        process = self._running()
        limit = self.options.ready_timeout_s if timeout is None else timeout
        deadline = time.monotonic() + limit
        while not self._answers():
            if self.log.failure is not None:
                raise self.log.failure
            if process.poll() is not None:
                raise self._died()
            if time.monotonic() > deadline:
                loading = ", ".join(self.log.loading) or "none"
                raise Unavailable(f"not ready after {limit:g} s; still loading: {loading}")
            time.sleep(POLL_S)
        self._stubs = process.stubs()

    def check(self) -> None:
        """Look whether the server that was ready still can answer.

        Triton neither restarts nor reports a model process that died, so we look.

        Raises:
            Unavailable: tritonserver or one of its model processes has ended.
        """
        process = self._running()
        if process.poll() is not None:
            raise self._died()
        if lost := self._stubs.keys() - process.stubs().keys():
            time.sleep(POLL_S)  # they also end with tritonserver, whose own end is the news then
            if process.poll() is not None:
                raise self._died()
            names = ", ".join(sorted(self._stubs[pid] for pid in lost))
            raise Unavailable(f"the process of {names} died; last lines:\n{self.log.tail(8)}")

    def watch(self) -> None:
        """Block until something ends the server; `check` says what.

        Raises:
            Unavailable: tritonserver or one of its model processes has ended.
        """
        while True:
            self.check()
            time.sleep(WATCH_S)

    def stop(self) -> bool:
        """End the server, with what is under way finished first; a second call does nothing.

        Returns:
            Whether it ended by itself; if not, it was killed.
        """
        with self._stop_lock:
            if self._clean is None:
                grace_s = self.options.exit_timeout_s + KILL_AFTER_S
                self._clean = self._process is None or self._process.stop(grace_s)
                if self._log_file is not None:
                    self._log_file.close()
            return self._clean

    def kill(self) -> None:
        """End every process at once; `stop` then cleans up."""
        if self._process is not None:
            self._process.kill()

    def __enter__(self) -> Server:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _running(self) -> ServerProcess:
        if self._process is None:
            raise RuntimeError("the Server has not been started")
        return self._process

    def _feed(self, line: str) -> None:
        if self._log_file is not None:
            with contextlib.suppress(ValueError):  # closed while the last lines come
                self._log_file.write(line + "\n")
        self.log.feed(line)
        if self._on_line is not None:
            self._on_line(line)

    def _answers(self) -> bool:
        """Whether a chat of one token comes back; a refusal is raised, silence is not."""
        host = "127.0.0.1" if self.options.host == "0.0.0.0" else self.options.host
        url = f"http://{host}:{self.http_port}/v2/models/{self.options.chat_model}/generate"
        if self.options.chat_model not in self.log.loaded:
            return False
        try:
            answer = httpx.post(
                url,
                json={contract.REQUEST: GREETING.decode()},
                timeout=self.options.ready_timeout_s,
                trust_env=False,
            )
        except httpx.TransportError:
            return False
        if answer.status_code == httpx.codes.OK and contract.CHUNK in answer.json():
            return True
        raise TriptychError.parse(answer.text)

    def _died(self) -> TriptychError:
        process = self._running()
        process.join_log(2.0)
        if self.log.failure is not None:
            return self.log.failure
        reasons = "\n".join(self.log.errors()[-3:]) or self.log.tail(8)
        return Unavailable(f"tritonserver {_ending(process.poll())}; last lines:\n{reasons}")


def _ending(code: int | None) -> str:
    if code is None:
        return "does not answer"
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _claim(host: str, wanted: dict[str, int]) -> dict[str, int]:
    """The ports to use: those wanted, if they are free, and free ones where 0 is wanted.

    Raises:
        ConfigurationError: A port is taken, is wanted twice, or the address is not ours.
    """
    with contextlib.ExitStack() as stack:
        ports = {}
        for name, port in wanted.items():
            probe = stack.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen()  # a socket that is only bound would not keep the next one off
            except OSError as error:
                raise ConfigurationError(
                    f"the {name} port {port} on {host} cannot be used: {error.strerror}"
                ) from None
            ports[name] = probe.getsockname()[1]
        return ports
