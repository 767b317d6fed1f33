"""Lets vLLM's Qwen3-VL take deepstack embeddings when its vision tower is left out.

In vLLM 0.32 the model's ``__init__`` sets ``use_deepstack`` only if ``self.visual`` is no
``StageMissingLayer``. Left out, the tower is one, though embeddings of its layers come from
outside; the model then takes rows of main and deepstack embeddings for main ones alone, which
ends the engine with a shape mismatch at the first picture. That test is the only use that these
modules have for the name, so there it is given to a class that nothing is an instance of.

It is done as each module is imported, since importing them beforehand would cost every other
model seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_MODELS = frozenset(f"vllm.model_executor.models.{name}" for name in ("qwen3_vl", "qwen3_vl_moe"))


def keep() -> None:
    """Adapt the models from now on; a second call does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _NothingIsMissing:
    """Stands where ``StageMissingLayer`` stood."""


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _MODELS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        vars(module)["StageMissingLayer"] = _NothingIsMissing
