"""tritonserver's processes and shared memory, from the first until the last of them is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

import psutil

from triptych.server import launch, remains

STUB = "triton_python_backend_stub"
"""The program of a model's process; the last argument but one is the name of its instance."""


class ServerProcess:
    """One tritonserver, its stubs, and whatever they start.

    They are a process group of their own, so that a Ctrl-C at the terminal reaches us and not
    them. (Not a session: the scheduler's autogroups would then make them compete as one.)

    Between them and us is a small process that ends them all when tritonserver or we are killed
    (`triptych.server.launch`).

    Args:
        command: The binary's absolute path and its arguments.
        environ: The whole environment.
        shm_prefix: How the names of its shared memory regions begin.
        grace_s: Seconds that it has to end in when it is asked to.
        on_line: Called for each line of output, from the reading thread.
        inherited: Descriptors that the server and its stubs are to have.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        shm_prefix: str,
        grace_s: float,
        on_line: Callable[[str], None],
        inherited: Sequence[int] = (),
    ) -> None:
        self._command = list(command)
        self._environ = dict(environ)
        self._shm_prefix = shm_prefix
        self._grace_s = grace_s
        self._on_line = on_line
        self._inherited = tuple(inherited)
        self._guardian: subprocess.Popen[str] | None = None
        self._pid = 0
        self._thread = threading.Thread(target=self._read, name="tritonserver-log", daemon=True)

    def start(self) -> None:
        """Start the server.

        Raises:
            OSError: The process that starts it cannot be run.
        """
        report, writer = os.pipe()
        launcher = [sys.executable, "-I", "-S", str(launch.__file__), str(os.getpid())]
        told = [str(writer), self._shm_prefix, str(self._grace_s)]
        try:
            self._guardian = subprocess.Popen(
                [*launcher, *told, *self._command],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                process_group=0,
                pass_fds=(*self._inherited, writer),
            )
        finally:
            os.close(writer)
            with open(report) as lines:
                self._pid = int(lines.readline() or 0)
        if not self._pid:
            raise OSError(f"{self._command[0]} was not started")
        self._thread.start()

    @property
    def pid(self) -> int:
        """Process id of tritonserver, and id of the group."""
        assert self._pid, "not started"
        return self._pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._guardian.poll() if self._guardian else None

    def join_log(self, timeout: float) -> None:
        """Wait until the last line has been read."""
        self._thread.join(timeout)

    def stubs(self) -> dict[int, str]:
        """The living stubs: process id → instance, such as ``preprocess_0_1``."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    command = child.cmdline()  # a zombie's is empty
                    if len(command) > 1 and command[0].endswith(STUB):
                        found[child.pid] = command[-2]
        return found

    def stop(self) -> bool:
        """Ask the server to end, then end whatever is left; a second call does nothing.

        Returns:
            Whether everything ended by itself.
        """
        if self._guardian is None:
            return True
        family = self._family()
        clean = self._terminate()
        self.kill(family)
        self._thread.join(5.0)
        remains.remove(self._shm_prefix)
        remains.sweep()  # what its stubs had of their own
        return clean

    def kill(self, family: Sequence[psutil.Process] | None = None) -> None:
        """End every process at once, and wait until they are gone."""
        if self._guardian is None:
            return
        family = self._family() if family is None else family
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=5.0)
        self._guardian.wait()

    def _terminate(self) -> bool:
        assert self._guardian is not None
        if self._guardian.poll() is not None:
            return False
        self._guardian.send_signal(signal.SIGTERM)
        try:
            return self._guardian.wait(self._grace_s) == 0
        except subprocess.TimeoutExpired:
            return False

    def _family(self) -> list[psutil.Process]:
        """Everything in the group, also orphans, and everything below tritonserver."""
        family = [process for process in psutil.process_iter() if _group(process) == self.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.pid).children(recursive=True)
            family += [process for process in below if process not in family]
        return [process for process in family if process.pid != self.pid]

    def _read(self) -> None:
        assert self._guardian is not None
        assert self._guardian.stdout is not None
        with self._guardian.stdout as output:
            for line in output:
                self._on_line(line.rstrip("\n"))


def _group(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return -1
