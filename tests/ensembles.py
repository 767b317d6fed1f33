"""README's edits of ensembles, made on a copy of the model repository."""

from __future__ import annotations

import shutil
from pathlib import Path


def by_nixl(repository: Path, ensemble: str) -> str:
    """A copy without the two lines that map EMBEDDINGS; its name."""
    config, name = _copy(repository, ensemble, "by_nixl")
    lines = config.read_text().splitlines()
    kept = [line for line in lines if '"EMBEDDINGS"' not in line]
    assert len(lines) - len(kept) == 2
    config.write_text("\n".join(kept))
    return name


def by_remote_encoder(repository: Path, ensemble: str) -> str:
    """A copy in which ``remote_encoder`` stands where ``encoder`` stood; its name."""
    config, name = _copy(repository, ensemble, "remote")
    text = config.read_text()
    assert text.count('model_name: "encoder"') == 1
    config.write_text(text.replace('model_name: "encoder"', 'model_name: "remote_encoder"'))
    return name


def _copy(repository: Path, ensemble: str, suffix: str) -> tuple[Path, str]:
    name = f"{ensemble}_{suffix}"
    shutil.copytree(repository / ensemble, repository / name)
    config = repository / name / "config.pbtxt"
    config.write_text(config.read_text().replace(f'name: "{ensemble}"', f'name: "{name}"'))
    return config, name
