"""Inputs of a stage. Triton's module is a stand-in: it exists only within a running stub."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from triptych.errors import InvalidValue


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    stand_in = SimpleNamespace(get_input_tensor_by_name=lambda request, name: request.get(name))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    spec = importlib.util.find_spec("triptych.stages.backend")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class DeviceTensor:
    """An input that says that it lies on a device; Triton's memory is ours to change."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory

    def is_cpu(self) -> bool:
        return False

    def to_dlpack(self) -> object:
        return torch.utils.dlpack.to_dlpack(self.memory)


def test_device_memory_that_triton_has_back_is_read_no_more(backend: ModuleType) -> None:
    tensor = DeviceTensor(torch.arange(64, dtype=torch.uint8)[None])
    row = backend.read_row({"EMBEDDINGS": tensor}, "EMBEDDINGS")
    tensor.memory.zero_()
    assert row.tolist() == list(range(64))


def test_an_input_that_is_not_there_is_none(backend: ModuleType) -> None:
    assert backend.read_row({}, "EMBEDDINGS") is None


@pytest.mark.parametrize("wrong", [torch.zeros(1, 8), torch.zeros(2, 8, dtype=torch.uint8)])
def test_what_is_no_row_of_bytes_is_refused(backend: ModuleType, wrong: torch.Tensor) -> None:
    with pytest.raises(InvalidValue, match="must be UINT8 of shape"):
        backend.read_row({"EMBEDDINGS": DeviceTensor(wrong)}, "EMBEDDINGS")
