"""The Dockerfile cannot be built by the tests, so what it names is checked."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINES = [
    line.split()
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]
HOME = "/opt/triptych"


def arguments(word):
    return [line[1:] for line in LINES if line[0] == word]


def test_what_it_copies_is_in_the_repository():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    copies = [[arg for arg in line if not arg.startswith("--")] for line in arguments("COPY")]
    assert copies
    for *sources, _ in copies:
        for source in sources:
            folder = source.rstrip("/") + "/"
            assert any(file == source or file.startswith(folder) for file in listed), source


def test_paths_it_runs_are_among_those_it_copies():
    copied = {arg.rstrip("/") for line in arguments("COPY") for arg in line[:-1] if arg[:2] != "--"}
    text = " ".join(
        " ".join(line) for line in LINES if line[0] in {"RUN", "ENTRYPOINT", "CMD", "ENV"}
    )
    named = set(re.findall(rf"{HOME}/([\w./-]+)", text)) | set(re.findall(r"\b(scripts/\w+)", text))
    assert named
    for path in named:
        made = path.startswith((".venvs/", ".cache"))  # by scripts/setup
        assert made or any(path == own or path.startswith(own + "/") for own in copied), path


def test_it_does_not_end_as_root():
    assert arguments("USER")[-1] != ["root"]
