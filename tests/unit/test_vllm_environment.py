"""How vLLM's process is made on a GPU. The driver here is a stand-in: this machine has none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """\
int cuDeviceGetCount(int *count) { if (!count) return 1; *count = 1; return %d; }
"""
ASK = "from triptych.engines import vllm_environment as v; print(v._cuda_is_in_use())"


def in_use(libraries: Path) -> str:
    """What a process with this driver says."""
    environ = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environ, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")
@pytest.mark.parametrize(("result", "said"), [(3, "False"), (0, "True"), (100, "True")])
def test_cuda_is_in_use_as_soon_as_the_driver_was_begun_with(
    tmp_path: Path, result: int, said: str
) -> None:
    source = tmp_path / "driver.c"
    source.write_text(DRIVER % result)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    assert in_use(tmp_path) == said


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a driver here")
def test_without_a_driver_cuda_is_not_in_use(tmp_path: Path) -> None:
    assert in_use(tmp_path) == "False"
