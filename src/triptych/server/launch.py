"""Start a program and stay with it, so that nothing of it is left whoever is killed.

    python launch.py PARENT REPORT SHM_PREFIX GRACE_S PROGRAM [ARGUMENT...]

The program leads a process group of its own. When it ends, the rest of the group is killed and its
shared memory removed, and this process ends in the same way. When the parent ends, the program is
asked to end too, and killed if that takes too long. And when this process is killed, the kernel
asks the program to end.

The parent cannot do all this itself: it may be killed, and a stub of a tritonserver that was killed
may wait for it for ever, with Python's lock in its hand. Runs without site-packages.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from typing import NoReturn

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h; survives exec."""
LOOK_S = 0.2
"""Seconds between two looks whether the parent lives."""
_EXPECTED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}


def main(parent: int, report: int, shm_prefix: str, grace_s: float, command: list[str]) -> None:
    """Run ``command`` to its end.

    Args:
        parent: Process id of who has started this.
        report: Descriptor to which the program's process id is written.
        shm_prefix: How the names of its shared memory begin.
        grace_s: What it has to end in when it is asked to, in seconds.
        command: The program's path and its arguments.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _EXPECTED)
    child = os.fork()
    if child == 0:
        os.close(report)
        _become(command)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(child, child)  # the child does so too; who comes first does not matter
    os.write(report, f"{child}\n".encode())
    os.close(report)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    status = _stay_with(child, parent, grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    for name in os.listdir("/dev/shm"):
        if name.startswith(shm_prefix):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"/dev/shm/{name}")
    _end_like(status)


def _become(command: list[str]) -> NoReturn:
    guardian = os.getppid()
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _EXPECTED)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != guardian:  # it died before the line above
        os._exit(1)
    try:
        os.execv(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def _stay_with(child: int, parent: int, grace_s: float) -> int:
    """Wait for the child's end, and bring it about when the parent has gone; its wait status."""
    deadline: float | None = None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if deadline is None and os.getppid() != parent:
            deadline = time.monotonic() + grace_s
            os.kill(child, signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        arrived = signal.sigtimedwait(_EXPECTED, LOOK_S)
        if arrived and arrived.si_signo != signal.SIGCHLD:
            os.kill(child, arrived.si_signo)


def _end_like(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError):  # SIGKILL has no handler to be reset
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5:])
