"""Become another program, which then gets SIGTERM when the parent of this one dies.

    python launch.py PARENT_PID PROGRAM [ARGUMENT...]

A server started by Triptych must not outlive it, not even a ``kill -9``. This runs in the child
because after a fork of a process with threads, Python code between fork and exec may deadlock.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h; survives exec."""


def main(parent: int, command: list[str]) -> None:
    """Replace this process by ``command``."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
