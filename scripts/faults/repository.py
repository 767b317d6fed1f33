"""The model repository with the engine ``echo`` in it."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]


def with_echo(target: Path) -> Path:
    """Copy the repository to ``target`` and add the engine, as a person would add one.

    Copy two folders, write the engine's name where vLLM's was: that this serves is the proof that
    an engine needs no more.
    """
    source = ROOT / "model_repository"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    for model in ("decode", "chat"):
        folder = target / f"{model}_echo"
        shutil.copytree(target / f"{model}_vllm", folder)
        for file in (folder / "config.pbtxt", folder / "1" / "model.py"):
            if file.exists():
                text = file.read_text().replace("vllm", "echo").replace("Vllm", "Echo")
                file.write_text(text)
    return target
