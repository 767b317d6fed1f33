"""What several processes have in hand, added up by one of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from replies import until
from triptych.stages import tally
from triptych.stages.tally import Tallies, Tally

OTHER = """
import sys
from pathlib import Path
from triptych.stages.tally import Tally
one = Tally(Path(sys.argv[1]), "decode_x_0_0")
one.add(3, 700, 2)
one.add(-1, -200, -1)
print("there", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tally, "LOOK_S", 0.0)
    tmp_path.chmod(0o700)
    (tmp_path / "ours").mkdir(mode=0o700)
    return tmp_path / "ours" / "server"


def seen(tallies: Tallies, wanted: tuple[int, int]) -> Callable[[], bool]:
    return lambda: tallies.total() == wanted


def test_all_processes_count_and_a_killed_one_no_more(folder: Path) -> None:
    own, tallies = Tally(folder, "preprocess_0_0"), Tallies(folder)
    own.add(1, 0, 1)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert tallies.total() == (3, 500)
        assert tallies.with_media() == 2
        other.kill()
    until(seen(tallies, (1, 0)))
    assert tallies.with_media() == 1
    own.close()
    assert tallies.total() == (0, 0)


def test_without_a_directory_nothing_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    own = Tally(tmp_path / "file" / "server", "preprocess_0_0")
    own.add(1, 1)
    own.close()
    assert "is not counted" in caplog.text
