"""The short form of ``scripts/soak``: what a server holds after requests and aborts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from soaking.__main__ import Report

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
REQUESTS, ABORTS = 160, 160


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("soak")
    counts = [f"--requests={REQUESTS}", f"--aborts={ABORTS}", "--rounds=4", f"--output={folder}"]
    done = subprocess.run(
        [sys.executable, "-m", "soaking", "--json", *counts],
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return msgspec.json.decode(done.stdout, type=Report), folder


def test_nothing_grows_and_nothing_is_left(soaked: tuple[Report, Path]) -> None:
    report, _ = soaked
    assert report.faults == []
    assert [row.series for row in report.rows if not row.ended] == []
    last = {row.series: row.last for row in report.rows}
    held = ("slots taken", "requests in hand", "tokens in hand", "leases of the cache")
    assert [last[series] for series in held] == [0, 0, 0, 0]
    assert last["memory of decode, MiB"] > 0
    assert last["/dev/shm, files"] == 4, "one for each stub"


def test_every_kind_goes_over_every_road(soaked: tuple[Report, Path]) -> None:
    report, _ = soaked
    roads = {name.rpartition(", ")[0] for name in report.ended}
    assert roads == {
        f"{road}, {form}" for road in ("grpc", "http", "openai") for form in ("streamed", "whole")
    }
    kinds = {name.rpartition(": ")[0].rpartition(", ")[2] for name in report.ended}
    assert kinds >= {"text", "image", "images", "video", "image by URL", "embeddings"}
    outcomes = {name.rpartition(": ")[2] for name in report.ended}
    assert outcomes >= {"answered", "left", "media_unreadable", "context_too_long"}
    assert sum(report.ended.values()) > REQUESTS + ABORTS


def test_the_curves_are_drawn(soaked: tuple[Report, Path]) -> None:
    report, folder = soaked
    assert len(report.asked) == len(report.samples) == 5
    assert (folder / "soak.png").read_bytes().startswith(b"\x89PNG")
    svg = (folder / "soak.svg").read_text()
    assert "</svg>" in svg
    assert msgspec.json.decode((folder / "soak.json").read_bytes(), type=Report) == report
