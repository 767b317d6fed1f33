"""Fixtures of the engines' tests: a model that answers at length, and Hugging Face's of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from babbler import make_babbler
from reference import HuggingFaceReference
from triptych import families
from triptych.families import Family


@pytest.fixture(scope="module")
def family(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A Qwen2.5-VL that babbles."""
    return families.load(make_babbler(checkpoint, tmp_path_factory.mktemp("babbler") / "model"))


@pytest.fixture(scope="module")
def reference(family: Family) -> HuggingFaceReference:
    """What its greedy tokens must be equal to."""
    return HuggingFaceReference(family.checkpoint.path)
