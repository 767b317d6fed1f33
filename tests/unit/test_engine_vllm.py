"""What of the engine vLLM can be tested without starting it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from triptych import families
from triptych.engines.vllm import VllmEngine
from triptych.settings import DecodeSettings


def test_only_embeddings_take_the_engines_dtype(checkpoint: Path) -> None:
    """A clip's 0.27 s a step would be 0.2695 s in bfloat16, and its steps elsewhere."""
    engine = VllmEngine(DecodeSettings(model=str(checkpoint)), families.load(checkpoint))
    engine._dtype = torch.bfloat16
    given = {
        "video_embeds": torch.rand(4, 8),
        "video_grid_thw": torch.tensor([[1, 4, 4]]),
        "second_per_grid_ts": torch.tensor([0.27]),
    }
    handed = engine._handed_over(given, {"timestamps": [[0.25]]})
    assert isinstance(handed, dict)
    assert handed["video_embeds"].dtype == torch.bfloat16
    assert handed["video_grid_thw"] is given["video_grid_thw"]
    assert torch.equal(handed["second_per_grid_ts"], given["second_per_grid_ts"])
    assert handed["timestamps"] == [[0.25]]


def test_models_with_deepstack_are_adapted_as_they_are_imported(tmp_path: Path) -> None:
    """On a package that looks like vLLM's; tests/engines run the real one."""
    package = tmp_path / "vllm" / "model_executor" / "models"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "utils.py").write_text("class StageMissingLayer: pass\n")
    for name in ("qwen3_vl", "qwen2_vl"):
        (package / f"{name}.py").write_text("from .utils import StageMissingLayer\n")
    code = """
import sys
from triptych.engines import vllm_deepstack
vllm_deepstack.keep()
before = len(sys.meta_path)
vllm_deepstack.keep()
assert len(sys.meta_path) == before
from vllm.model_executor.models import qwen2_vl, qwen3_vl, utils
missing = utils.StageMissingLayer()
assert isinstance(missing, qwen2_vl.StageMissingLayer)
assert not isinstance(missing, qwen3_vl.StageMissingLayer)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
