"""What several processes have in hand, added up by one of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from replies import until
from triptych.stages import tally
from triptych.stages.tally import InHand, Tallies, Tally

OTHER = """
import sys
from pathlib import Path
from triptych.stages.tally import InHand, Tally
one = Tally(Path(sys.argv[1]), "decode_x_0_0")
one.hold(InHand(2, 500, 1))
one.hold(InHand(1, 200, 1)).close()
print("there", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tally, "LOOK_S", 0.0)
    tmp_path.chmod(0o700)
    (tmp_path / "ours").mkdir(mode=0o700)
    return tmp_path / "ours" / "server"


def seen(tallies: Tallies, wanted: InHand) -> Callable[[], bool]:
    return lambda: tallies.total() == wanted


def test_all_processes_count_and_a_killed_one_no_more(folder: Path) -> None:
    own, tallies = Tally(folder, "preprocess_0_0"), Tallies(folder)
    own.hold(InHand(1, 0, 1, 50))
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert tallies.total() == InHand(3, 500, 2, 50)
        other.kill()
    until(seen(tallies, InHand(1, 0, 1, 50)))
    own.close()
    assert tallies.total() == InHand()


def test_what_comes_for_a_request_counts_until_it_is_done(folder: Path) -> None:
    own = Tally(folder, "preprocess_0_0")
    hold, other = own.hold(InHand(1, 0, 1, 50)), own.hold(InHand(1, 0, 1, 7))
    hold.received(1000)
    hold.received(24)
    assert own.held == InHand(2, 0, 2, 1081)
    hold.close()
    hold.received(9)  # for whoever waits for the same medium
    hold.close()
    assert own.held == InHand(1, 0, 1, 7)
    other.close()
    assert own.held == InHand()
    own.close()


def test_without_a_directory_nothing_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    own = Tally(tmp_path / "file" / "server", "preprocess_0_0")
    own.hold(InHand(1, 1)).close()
    own.close()
    assert "is not counted" in caplog.text
