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
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

from triptych.engines import torchvision_ops

STUB = "_TRIPTYCH_STUB_PID"
"""Environment variable with the process whose end ends the engine; vLLM run by others in the same
environment has none and is left alone."""

_PR_SET_PDEATHSIG = 1
"""From <sys/prctl.h>."""


_DEEPSTACK_MODELS = frozenset(
    f"vllm.model_executor.models.{name}" for name in ("qwen3_vl", "qwen3_vl_moe")
)
"""Modules whose model asks whether its vision tower is there, and means its deepstack layers."""


def prepare() -> None:
    """Make torchvision importable, keep deepstack, and tie an engine's process to its parent.

    Returning nothing tells vLLM that there is no platform here.
    """
    torchvision_ops.define_missing()
    keep_deepstack()
    parent = multiprocessing.parent_process()
    if STUB in os.environ and parent is not None and parent.pid is not None:
        _die_with(parent.pid)


def keep_deepstack() -> None:
    """Let Qwen3-VL take deepstack embeddings when its vision tower is left out.

    In vLLM 0.32 its ``__init__`` sets ``use_deepstack`` only if ``self.visual`` is no
    ``StageMissingLayer``. Left out, the tower is one, though embeddings of its layers come from
    outside; the model then takes rows of main and deepstack embeddings for main ones alone, which
    ends the engine with a shape mismatch at the first picture. That test is the only use that
    these modules have for the name, so there it is given to a class that nothing is an instance
    of. It is done as each module is imported, since importing them here would cost every other
    model seconds.
    """
    if not any(isinstance(finder, _DeepstackFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeepstackFinder())


class _NothingIsMissing:
    """Stands where ``StageMissingLayer`` stood."""


class _DeepstackFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _DEEPSTACK_MODELS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _DeepstackLoader(fullname, spec.origin)
        return spec


class _DeepstackLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        vars(module)["StageMissingLayer"] = _NothingIsMissing


_forking: int = 0
"""The process that is about to fork."""


def tie_forks() -> None:
    """Tie every process that this one forks from now on; the first call alone does something.

    A forked process is asked for no plugins again, and does not know its parent before it runs
    Python.
    """
    if STUB not in os.environ:
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
