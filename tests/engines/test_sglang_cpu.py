"""What makes SGLang run on a CPU, in SGLang's own environment, a process for each test."""

from __future__ import annotations

import pytest

from sglang_engine import run

pytestmark = pytest.mark.engine


def test_a_gpu_never_loads_it() -> None:
    """Up to where SGLang itself is imported, which is made to fail before it looks for kernels."""
    loaded = run(
        """
import json, sys, torch
sys.modules["sglang"] = None
torch.cuda.is_available = lambda: {gpu}
from triptych.engines import sglang_process
try:
    sglang_process._import()
except Exception as error:
    assert "scripts/setup --engine sglang" in str(error), error
print(json.dumps([name in sys.modules for name in ("triptych.engines.sglang_cpu", "sgl_kernel")]))
""".replace("{gpu}", "True")
    )
    assert loaded == [False, False]


PREPARED = """
import importlib.util, json, os, sys, torch
from triptych.engines import sglang_cpu
sglang_cpu.prepare()
before = dict(sys.modules)
sglang_cpu.prepare()
assert {name: sys.modules[name] for name in before} == before
"""


def test_kernels_can_be_named_and_not_called() -> None:
    told = run(
        PREPARED
        + """
from sgl_kernel import assign_req_to_token_pool_cpu, whatever
try:
    whatever(1, of=2)
except NotImplementedError as error:
    said = str(error)
try:
    import sgl_kernel.scalar_type
except ImportError:
    said += "; no submodules"
print(json.dumps(said))
"""
    )
    assert told == "sgl_kernel.whatever does not exist on this CPU; no submodules"


def test_no_operator_keeps_sglang_from_native_pytorch() -> None:
    told = run(
        PREPARED
        + """
from sglang.srt.utils import cpu_has_amx_support, is_cpu, is_cuda
from sglang.srt.layers.layernorm import RMSNorm
layer = RMSNorm(8)
print(json.dumps([
    hasattr(torch.ops.sgl_kernel, sglang_cpu.NATIVE),
    bool(cpu_has_amx_support()), is_cpu(), is_cuda(),
    layer._forward_method.__name__,
    all(hasattr(torch.ops.sgl_kernel, name) for name in sglang_cpu._OPERATORS),
]))
"""
    )
    assert told == [False, False, True, False, "forward_native", True]


def test_what_is_installed_is_not_replaced() -> None:
    told = run(
        """
import json, sys, types
from importlib.machinery import ModuleSpec
from triptych.engines import sglang_cpu
own = types.ModuleType("sgl_kernel")
own.__spec__ = ModuleSpec("sgl_kernel", None)
sys.modules["sgl_kernel"] = own
sglang_cpu.prepare()
print(json.dumps(sys.modules["sgl_kernel"] is own))
"""
    )
    assert told is True


def test_what_the_user_has_set_stays() -> None:
    told = run(
        PREPARED
        + 'print(json.dumps([os.environ[n] for n in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")]))',
        OMP_NUM_THREADS="3",
        HF_HUB_OFFLINE="0",
    )
    assert told == ["3", "0"]


def test_the_environment_has_no_cuda() -> None:
    names = run(
        """
import importlib.metadata, json
print(json.dumps([each.name.lower() for each in importlib.metadata.distributions()]))
"""
    )
    gpu = ("nvidia-c", "nvidia-n", "cuda", "triton", "flashinfer", "sgl-kernel", "sglang-kernel")
    assert [name for name in names if name.startswith(gpu)] == ["tritonclient"]
