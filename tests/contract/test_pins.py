"""What is installed to serve is bounded, and one version of it is meant wherever it is named."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PARTS = {"library": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
NOT_PIP = {"browser.txt"}
ENGINES_OWN = {"sglang-cpu-needs.txt"}
"""In place of an engine's own list, which bounds hardly anything either: the engine's version does,
since what it was tried with is what was newest then."""
BOUNDS = {"==", "<", "<=", "~="}
ENVIRONMENTS = {
    f"{engine}-{build}": [
        file
        for name in (f"{engine}-{build}", f"{engine}-{build}-needs", f"nixl-{build}")
        if (file := REQUIREMENTS / f"{name}.txt").is_file()
    ]
    + [REQUIREMENTS / "tritonserver.txt"]
    for engine, build in (
        path.stem.split("-")
        for path in REQUIREMENTS.glob("*-[cg]pu.txt")
        if "nixl" not in path.stem
    )
}
"""As scripts/setup makes them: the files of each."""


def read(file: Path) -> Iterator[Requirement]:
    for line in file.read_text().splitlines():
        if wanted := line.partition("#")[0].strip():
            yield Requirement(wanted)


FILES = sorted(file for file in REQUIREMENTS.glob("*.txt") if file.name not in NOT_PIP)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_names_versions(file: Path) -> None:
    found = list(read(file))
    assert found
    if file.name not in ENGINES_OWN:
        loose = [str(one) for one in found if {each.operator for each in one.specifier} != {"=="}]
        assert loose == []


@pytest.mark.parametrize("part", PARTS)
def test_a_part_has_upper_bounds(part: str) -> None:
    for line in PARTS[part]:
        assert {each.operator for each in Requirement(line).specifier} & BOUNDS, line


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_environment_is_of_one_mind(name: str) -> None:
    """Every version that is named exactly is the only one, and within all other bounds."""
    wanted: dict[str, list[Requirement]] = defaultdict(list)
    for one in (need for file in ENVIRONMENTS[name] for need in read(file)):
        wanted[canonicalize_name(one.name)].append(one)
    for one in (Requirement(line) for part in PARTS.values() for line in part):
        wanted[canonicalize_name(one.name)].append(one)
    exact = {
        package: {each.version for one in found for each in one.specifier if each.operator == "=="}
        for package, found in wanted.items()
    }
    for package, versions in exact.items():
        assert len(versions) <= 1, (package, versions)
        for version in versions:
            assert all(one.specifier.contains(version) for one in wanted[package]), package


def test_what_is_installed_is_within_the_bounds() -> None:
    for line in (line for part in PARTS.values() for line in part):
        need = Requirement(line)
        assert need.specifier.contains(metadata.version(need.name)), line
