"""What happens in each process of vLLM before anything else: it is installed as a plugin of vLLM.

pyproject.toml names `prepare` in the entry-point group ``vllm.platform_plugins``, which vLLM asks
in every process it starts, and before it imports a model, while the group
``vllm.general_plugins`` comes too late for torchvision and not at all in a process that was
forked.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

from triptych.engines import torchvision_ops

STUB = "_TRIPTYCH_STUB_PID"
"""Environment variable with the process whose end ends the engine; vLLM run by others in the same
environment has none and is left alone."""

_PR_SET_PDEATHSIG = 1
"""From <sys/prctl.h>."""


def prepare() -> None:
    """Make torchvision importable, and tie an engine's process to its parent.

    Returning nothing tells vLLM that there is no platform here.
    """
    torchvision_ops.define_missing()
    die_with_parent()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, if it is an engine's.

    A stub that crashes, or is killed, cannot stop its engine; left alone that would hold the
    device's memory for ever.
    """
    parent = multiprocessing.parent_process()
    if STUB not in os.environ or parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent.pid:  # it ended before the call
        os._exit(1)
