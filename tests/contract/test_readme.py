"""README says what the code says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ensembles import by_remote_encoder
from triptych.cli import settings as listing


@pytest.fixture
def readme(repository_root: Path) -> str:
    return (repository_root / "README.md").read_text()


def section(readme: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", readme, re.DOTALL)
    assert found, f"README has no section {name}"
    return found[1]


def test_limits_are_those_of_the_settings(readme: str) -> None:
    assert section(readme, "limits") == listing.markdown(listing.media_names())


def test_the_edit_for_remote_encoders_is_done_by_its_commands(
    readme: str, repository_root: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "model_repository"
    shutil.copytree(repository_root / "model_repository", repository)
    found = re.search(r"^cp -r .*?config\.pbtxt$", readme, re.DOTALL | re.MULTILINE)
    assert found
    subprocess.run(found[0], shell=True, cwd=tmp_path, check=True)
    edited = (repository / "chat_vllm_remote" / "config.pbtxt").read_text()
    tested = repository / by_remote_encoder(repository, "chat_vllm_nixl") / "config.pbtxt"
    assert edited == tested.read_text().replace("chat_vllm_nixl_remote", "chat_vllm_remote")


def test_every_setting_says_what_it_means() -> None:
    silent = [setting.name for setting in listing.every() if not setting.meaning.endswith(".")]
    assert silent == []


def test_every_path_it_names_is_there(readme: str, repository_root: Path) -> None:
    named = re.findall(r"`((?:src|scripts|model_repository|models|tests|docs)/[\w./*-]*)`", readme)
    assert len(named) > 5
    missing = [path for path in named if not list(repository_root.glob(path.rstrip("/")))]
    assert missing == []
