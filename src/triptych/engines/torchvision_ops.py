"""Makes ``import torchvision`` work where its compiled operators cannot load.

PyPI's torchvision is linked against CUDA. Beside a CPU build of PyTorch its shared object does not
load, and importing the package then fails, since it registers shape functions for two operators
that nobody has defined. vLLM and transformers import it on the way to things that need none of
its operators. Defining the two schemas is enough: the import succeeds, and calling one of them
still raises.

Where torchvision matches PyTorch, nothing here does anything.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""As torchvision/csrc/ops declares them."""

_library: Any = None
"""PyTorch forgets the schemas when this is collected."""


def define_missing() -> bool:
    """Define the operators that importing torchvision needs, if torchvision cannot itself.

    Returns:
        Whether they had to be defined, now or before.
    """
    global _library
    if _library is not None:
        return True
    spec = importlib.util.find_spec("torchvision")
    if "torchvision" in sys.modules or spec is None or spec.origin is None:
        return False
    import torch

    for compiled in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(compiled)
        except OSError:
            continue
        return False
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)
    return True
