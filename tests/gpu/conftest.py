"""GPU tests: skipped where there is no NVIDIA GPU, failing where torch cannot use the one there."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cuda():
    """The first GPU."""
    import torch

    if not Path("/dev/nvidiactl").exists():
        pytest.skip("no NVIDIA GPU here: /dev/nvidiactl does not exist")
    assert torch.cuda.is_available(), f"there is a GPU, but torch {torch.__version__} has no CUDA"
    return torch.device("cuda:0")
