"""Makes SGLang run on a CPU, by the native PyTorch that it falls back to. A GPU never loads this.

SGLang's CPU support needs ``sgl_kernel`` built for CPUs with AMX, which no package registry has.
Without its operators SGLang's layers fall back to native PyTorch by themselves; what is missing
are names that it imports on the way there:

- the package ``sgl_kernel``: a stand-in, whose names can be imported and raise when called
- ``torch.ops.sgl_kernel.*``: schemas without an implementation, for those that are only looked up.
  ``convert_weight_packed`` must not be among them: that there is none chooses native PyTorch
- ``triton``, a GB of compiler for GPUs: SGLang's own stand-in, which it has for Macs
- torchvision's operators: see `triptych.engines.torchvision_ops`

Nothing that is installed is replaced. SGLang's processes are forks of the one that was prepared
so, which also spares each of them an import of 5 s.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from triptych.engines import environment, torchvision_ops

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine

KERNELS = "sgl_kernel"
NATIVE = "convert_weight_packed"
"""The operator whose absence chooses native PyTorch."""
_OPERATORS = (
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
)
"""What some of SGLang's models look up as they are imported; one they cannot find takes others
with it, Qwen-VL's among them."""
_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # SGLang compiles a few functions whatever it is told, and the compiler would find the
    # stand-in for Triton.
    "TORCHDYNAMO_DISABLE": "1",
}

_library: Any = None
"""PyTorch forgets the schemas when this is collected."""


class KernelMissing(NotImplementedError):
    """SGLang has called a compiled kernel; the request needs what its native PyTorch has not."""


def prepare() -> None:
    """Set up this process before ``import sglang``; a second call does nothing."""
    environment.prepare(_ENVIRONMENT)
    # One core is left to the server; on two, that one is worth more than a second thread.
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores - 1)))
    torchvision_ops.define_missing()
    _stand_in_for_triton()
    if importlib.util.find_spec(KERNELS) is None:
        _stand_in_for_kernels()


def engine_type() -> type[Engine]:
    """SGLang's engine, with processes that are forks."""
    from sglang.srt.entrypoints.engine import Engine

    class ForkingEngine(Engine):  # type: ignore[misc]  # it has no types
        @classmethod
        def _launch_scheduler_processes(cls, *arguments: Any) -> Any:
            multiprocessing.set_start_method("fork", force=True)
            return super()._launch_scheduler_processes(*arguments)

    return ForkingEngine


def _stand_in_for_triton() -> None:
    found = importlib.util.find_spec("sglang")
    if importlib.util.find_spec("triton") is not None or found is None or found.origin is None:
        return
    # By its file: importing the package would import what needs it.
    path = Path(found.origin).with_name("_triton_stub.py")
    spec = importlib.util.spec_from_file_location("sglang_triton_stub", path)
    if spec is None or spec.loader is None:
        return
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    stand_in.install()


class _Kernels(ModuleType):
    """``sgl_kernel``, with every name that is asked for. It has no submodules."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> None:
            raise KernelMissing(f"sgl_kernel.{name} does not exist on this CPU")

        return missing


def _stand_in_for_kernels() -> None:
    global _library
    import torch

    kernels = _Kernels(KERNELS, __doc__)
    kernels.__spec__ = ModuleSpec(KERNELS, None, is_package=True)
    kernels.__path__ = []
    sys.modules[KERNELS] = kernels
    _library = torch.library.Library(KERNELS, "DEF")
    for name in _OPERATORS:
        _library.define(f"{name}(Tensor x) -> Tensor")
