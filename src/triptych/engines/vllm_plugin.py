"""What happens in each process of vLLM before anything else: it is installed as a plugin of vLLM.

pyproject.toml names `prepare` in the entry-point group ``vllm.platform_plugins``, which vLLM asks
in every process it starts, and before it imports a model, while the group
``vllm.general_plugins`` comes too late for torchvision and not at all in a process that was
forked.
"""

from __future__ import annotations

import ctypes
import os
import signal

from triptych import logs
from triptych.engines import torchvision_ops, vllm_deepstack

STUB = "_TRIPTYCH_STUB_PID"
"""Environment variable with the process whose end ends the engine; vLLM run by others in the same
environment has none and is left alone."""

_PR_SET_PDEATHSIG = 1
"""From <sys/prctl.h>."""


def prepare() -> None:
    """Make torchvision importable, keep deepstack, tie an engine's process to its parent, and log.

    Returning nothing tells vLLM that there is no platform here.
    """
    torchvision_ops.define_missing()
    vllm_deepstack.keep()
    if os.environ.get(STUB, str(os.getpid())) != str(os.getpid()):
        _die_with(os.getppid())
        logs.configure()  # a forked one has its parent's


_forking: int = 0
"""The process that is about to fork."""


def tie_forks() -> None:
    """Tie every process that this one forks from now on; the first call alone does something.

    A forked process asks for no plugins again.
    """
    if os.environ.get(STUB) != str(os.getpid()):  # not another's, who started this process
        os.environ[STUB] = str(os.getpid())
        os.register_at_fork(before=_before_fork, after_in_child=lambda: _die_with(_forking))


def _before_fork() -> None:
    global _forking
    _forking = os.getpid()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends.

    A stub that crashes, or is killed, cannot stop its engine; left alone that would hold the
    device's memory for ever.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)
