"""One tritonserver from start to stop."""

from __future__ import annotations

import compileall
import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn

from triptych.errors import TriptychError, Unavailable
from triptych.pulse import VARIABLE, Pulses
from triptych.server import command, installation, remains
from triptych.server.api import Api
from triptych.server.log import StartLog
from triptych.server.options import ServerOptions
from triptych.server.ports import Claim
from triptych.server.process import ServerProcess
from triptych.server.vitals import Vitals

logger = logging.getLogger("triptych.server")

POLL_S = 0.05
"""Between two looks at a server that loads."""
WATCH_S = 0.25
"""Between two looks at a server that runs."""
KILL_AFTER_S = 10.0
"""Past tritonserver's own timeout, before it is killed."""
REASON_S = 2.0
"""For the log to say why a model does not load."""
LAST_WORDS_S = 0.5
"""For the log of a tritonserver that has ended; its stubs keep the pipe open a while longer."""


class Server:
    """A tritonserver with one ensemble, on ports of its own.

    ::

        with Server(ServerOptions(model="models/tiny-qwen2.5-vl")) as server:
            server.wait_ready()
            ...

    Whatever happens, after `stop` no process and no shared memory region of it is left; if this
    process is killed, tritonserver ends too. Of a server that hangs or has lost a process, `check`
    tells; `Supervisor` starts another one in its place.

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
        self.log = StartLog(on_change or (lambda _: None))
        self._on_line = on_line
        self._log_file: IO[str] | None = None
        self._claim: Claim | None = None
        self._process: ServerProcess | None = None
        self._pulses: Pulses | None = None
        self._api: Api | None = None
        self._vitals: Vitals | None = None
        self._greeting: Future[bool] | None = None
        self._outage = ""
        self._stop_lock = threading.Lock()
        self._clean: bool | None = None
        self._shm_prefix = remains.region_prefix()
        self._key = secrets.token_hex(16)

    @property
    def ports(self) -> dict[str, int]:
        """``http``, ``grpc`` and ``metrics``, once started."""
        return self._claim.ports if self._claim is not None else {}

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
        self._claim = Claim(
            options.host,
            {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port},
        )
        for region in remains.sweep():
            logger.warning("removed what a dead server has left: %s", region)
        _compile(options.repository)
        if options.log_file:
            self._log_file = open(options.log_file, "a", buffering=1)  # noqa: SIM115  closed by stop
        self._pulses = Pulses()
        self._process = ServerProcess(
            command.arguments(binary, options, self.ports, self._shm_prefix, self._key),
            {
                **command.environ(binary, options, os.environ),
                VARIABLE: str(self._pulses.writer),
            },
            self._shm_prefix,
            options.exit_timeout_s + KILL_AFTER_S,
            self._feed,
            inherited=[self._pulses.writer],
        )
        self._process.start()
        self._api = Api(options.host, self.http_port, {command.KEY_HEADER: self._key})
        self._vitals = Vitals(self._process.pid, self._pulses, self._api)
        return self

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the ensemble has answered a chat.

        Args:
            timeout: Seconds; `ServerOptions.ready_timeout_s` unless given.

        Raises:
            TriptychError: The server will not get ready, and why: mostly a `ConfigurationError`
                from a stage, with the model's name in front.
        """
        process, vitals = self._running()
        limit = self.options.ready_timeout_s if timeout is None else timeout
        deadline = time.monotonic() + limit
        while not self._answers(limit):
            if self.log.failure is not None:
                raise self.log.failure
            self._check(vitals.check_alive, REASON_S)
            if time.monotonic() > deadline:
                loading = ", ".join(self.log.loading) or "none"
                raise Unavailable(f"not ready after {limit:g} s; still loading: {loading}")
            time.sleep(POLL_S)
        vitals.expect(process.stubs())

    def check(self) -> None:
        """Look whether the server that was ready still can answer.

        Triton neither restarts nor reports a model process that died or hangs, so we look.

        Raises:
            Unavailable: tritonserver or one of its model processes has ended or hangs.
        """
        _, vitals = self._running()
        self._check(vitals.check)

    def watch(self) -> NoReturn:
        """Block until the server is of no use any more; `check` says why.

        While a stage says that it cannot serve, such as one whose engine is being replaced, the
        ensemble is out of service, so that Triton says so too: it refuses, and is not ready.

        Raises:
            Unavailable: tritonserver or one of its model processes has ended or hangs.
        """
        _, vitals = self._running()
        while True:
            self.check()
            self._follow(vitals.outage)
            time.sleep(WATCH_S)

    def stop(self) -> bool:
        """End the server, with what is under way finished first; a second call does nothing.

        Returns:
            Whether it ended by itself; if not, it was killed.
        """
        with self._stop_lock:
            if self._clean is None:
                if self._api is not None:
                    self._api.close()  # tritonserver would wait for the end of its connection
                self._clean = self._process is None or self._process.stop()
                for resource in (self._log_file, self._pulses):
                    if resource is not None:
                        resource.close()
                if self._claim is not None:
                    self._claim.release()
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

    def _running(self) -> tuple[ServerProcess, Vitals]:
        if self._process is None or self._vitals is None:
            raise RuntimeError("the Server has not been started")
        return self._process, self._vitals

    def _feed(self, line: str) -> None:
        self.log.feed(line)
        if self._log_file is not None:
            # It is closed while the last lines come, or its disk is full.
            with contextlib.suppress(ValueError, OSError):
                self._log_file.write(line + "\n")
        if self._on_line is not None:
            self._on_line(line)

    def _answers(self, timeout_s: float) -> bool:
        """Whether a chat has come back, which is waited for elsewhere; a refusal is raised."""
        assert self._api is not None
        if self.options.chat_model not in self.log.loaded:
            return False
        if self._greeting is None:
            api, ensemble = self._api, self.options.chat_model
            if not api.serves(ensemble):
                return False  # the log says so a moment before it is true
            self._greeting = _in_thread(lambda: api.greet(ensemble, timeout_s))
        if not self._greeting.done():
            return False
        greeting, self._greeting = self._greeting, None
        return greeting.result()

    def _follow(self, outage: str) -> None:
        """Take the ensemble out of service, or into it again."""
        assert self._api is not None
        if bool(outage) == bool(self._outage):
            return
        self._outage = outage
        if outage:
            logger.error("%s is out of service: %s", self.options.chat_model, outage)
            self._api.unload(self.options.chat_model)
        else:
            self._api.load(self.options.chat_model)
            logger.info("%s is in service again", self.options.chat_model)

    def _check(self, look: Callable[[], None], patience_s: float = 2 * POLL_S) -> None:
        """`look`; what it finds may follow from something that is told in a moment."""
        process, _ = self._running()
        if process.poll() is not None:
            raise self._died()
        try:
            look()
        except Unavailable:
            # A stub ends with tritonserver too, and one that cannot load says why in the log.
            deadline = time.monotonic() + patience_s
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    raise self._died() from None
                if self.log.failure is not None:
                    raise self.log.failure from None
                time.sleep(POLL_S)
            raise

    def _died(self) -> TriptychError:
        process, _ = self._running()
        process.join_log(LAST_WORDS_S)
        if self.log.failure is not None:
            return self.log.failure
        reasons = "\n".join(self.log.errors()[-3:]) or self.log.tail(8)
        return Unavailable(f"tritonserver {_ending(process.poll())}; last lines:\n{reasons}")


def _ending(code: int | None) -> str:
    if code is None:
        return "does not answer"
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _compile(repository: Path) -> None:
    """Compile what the stubs will run.

    When a stub did so, its model's directory would have changed, and Triton would load it anew with
    the ensemble that is taken into service again.
    """
    for source in repository.glob("*/*/*.py"):
        compileall.compile_file(source, quiet=2)


def _in_thread(work: Callable[[], bool]) -> Future[bool]:
    """The result of ``work``, which nobody waits for at the end of the program."""
    result: Future[bool] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="tritonserver-greeting", daemon=True).start()
    return result
