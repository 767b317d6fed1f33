"""The process that vLLM runs in: what must be set before ``import vllm``, all in one place.

Nothing here overrules what the user has set.
"""

from __future__ import annotations

import ctypes
import os

from triptych.engines import environment, torchvision_ops
from triptych.engines.vllm_plugin import tie_forks

_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Of its spans, as of ours.
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
}

_CPU_DEFAULTS = {
    # The worker runs inside the engine's process instead of one more.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Binding needs libnuma and a machine of our own.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

_CUDA_ERROR_NOT_INITIALIZED = 3
"""From <cuda.h>."""


def prepare(*, eager: bool) -> bool:
    """Set up this process for vLLM.

    Args:
        eager: Whether the model will run uncompiled where it runs on the CPU.

    Returns:
        Whether vLLM will run on the CPU.
    """
    environment.prepare(_DEFAULTS)
    torchvision_ops.define_missing()
    # To ask whether there is a GPU would begin to use it otherwise, which no fork can go on with.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        for name, value in _CPU_DEFAULTS.items():
            os.environ.setdefault(name, value)
        if eager:
            # vLLM compiles its counting of ranks even then: the first request that asks for
            # logprobs would wait 14 s for a C++ compiler.
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        # One core is left to the server; on two, that one is worth more than a second thread.
        cores = len(os.sched_getaffinity(0))
        threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores - 1)))
        # OpenMP has read its environment when torch was imported, which others may have done.
        torch.set_num_threads(int(threads.partition(",")[0]))
    elif _cuda_is_in_use():
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    tie_forks()
    return on_cpu


def _cuda_is_in_use() -> bool:
    """Whether anybody in this process has begun with CUDA, so that no fork of it can use it.

    vLLM asks PyTorch, which does not know of NIXL and of Triton. A fork, where it can be, halves
    the start: what is spawned imports everything again.
    """
    try:
        count = ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int()))
    except OSError:
        return False
    return bool(count != _CUDA_ERROR_NOT_INITIALIZED)


def fork_on_cpu(start_method: str | None) -> None:
    """Let the engine's process be a fork of this one, which halves the start on a CPU.

    vLLM's CPU platform asks for ``spawn``, so that thread binding can be set in the new
    process's environment; nothing is bound here, and a spawned process imports everything again.

    Args:
        start_method: What ``VLLM_WORKER_MULTIPROC_METHOD`` was before vLLM set it.
    """
    if os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind":
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = start_method or "fork"
