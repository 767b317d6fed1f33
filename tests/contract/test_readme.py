"""README says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


def test_every_setting_says_what_it_means() -> None:
    silent = [setting.name for setting in listing.every() if not setting.meaning.endswith(".")]
    assert silent == []


def test_every_path_it_names_is_there(readme: str, repository_root: Path) -> None:
    named = re.findall(r"`((?:src|scripts|model_repository|models|tests|docs)/[\w./*-]*)`", readme)
    assert len(named) > 5
    missing = [path for path in named if not list(repository_root.glob(path.rstrip("/")))]
    assert missing == []
