"""The linter and the type checker, as tests, so that pytest's last line is the whole verdict."""

from __future__ import annotations

import subprocess
import sys

import pytest


def check(root, *command):
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(repository_root, command):
    check(repository_root, "ruff", *command)


def test_mypy(repository_root):
    check(repository_root, "mypy")


def test_shell_scripts_parse(repository_root):
    scripts = [*repository_root.glob("scripts/*"), repository_root / ".ci" / "run"]
    shell = [path for path in scripts if path.is_file() and b"bash" in path.read_bytes()[:40]]
    assert len(shell) >= 3
    for path in shell:
        assert subprocess.run(["bash", "-n", path], check=False).returncode == 0, path
