"""Shared memory that nobody uses any more is found by its name, and nothing else is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.server import remains

MAKE = """
from triptych.server import remains
print(remains.region_prefix(), flush=True)
input()
"""


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("SHM", "TEMPORARY"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setattr(remains, name, folder)
    return tmp_path / "SHM"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_dead_supervisor_left_is_removed(shm: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MAKE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        theirs = owner.stdout.readline().strip() + "stub"
        (shm / theirs).touch()
        ours = remains.region_prefix() + "stub"
        (shm / ours).touch()
        folder = remains.TEMPORARY / theirs
        folder.mkdir()
        (folder / "file").touch()
        assert remains.sweep() == []
        owner.kill()
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
        assert remains.sweep() == [theirs, theirs], "its end is not taken note of"
    assert names(shm) == {ours}
    assert not names(remains.TEMPORARY)


def test_another_process_with_the_same_number_is_not_the_owner(shm: Path) -> None:
    prefix = remains.region_prefix()
    _, namespace, pid, started, rest = prefix.split("_", 4)
    (shm / f"triptych_{namespace}_{pid}_{int(started) - 1}_{rest}").touch()
    assert len(remains.sweep()) == 1


@pytest.mark.parametrize("name", ["triptych_1_2_3_4_x", "triptych_x", "other_1_2_3_4_5", "psm_1"])
def test_what_is_not_known_to_be_ours_stays(shm: Path, name: str) -> None:
    # The first is of another namespace of process ids: its process 2 is not ours.
    (shm / name).touch()
    assert remains.sweep() == []
    assert names(shm) == {name}


def test_two_servers_of_one_process_have_different_names(shm: Path) -> None:
    one, other = remains.region_prefix(), remains.region_prefix()
    (shm / f"{one}a").touch()
    (shm / f"{other}a").touch()
    remains.remove(one)
    assert names(shm) == {f"{other}a"}
    assert str(os.getpid()) in other
