"""Faults against ``triptych serve --openai`` under load: the short form of ``scripts/chaos``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from faults import referee
from faults.load import Load
from faults.plays import Play, copy_of, plays
from faults.referee import Row
from faults.room import Room
from faults.served import Served

pytestmark = pytest.mark.server

SURVIVED = ("kill-encoder", "stop-preprocess", "full-disk", "full-shm", "port-taken")
ENDS = ("kill-serve-and-tritonserver", "corrupt-for-good")

Start = Callable[..., tuple[Served, Load]]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    with Room(tmp_path_factory.mktemp("disk")) as room:
        yield room


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that may be damaged."""
    return copy_of(checkpoint, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def start(room: Room, model: Path, echo_repository: Path) -> Iterator[Start]:
    """Start a server, and begin to ask it."""
    with ExitStack() as stack:

        def start(engine: str, *flags: str) -> tuple[Served, Load]:
            served = Served(
                room,
                f"--engine={engine}",
                f"--model={model}",
                f"--model-repository={echo_repository}",
                f"--log-file={room.folder}/tritonserver.log",
                "--echo-token-delay-s=0.02",
                *flags,
            )
            stack.callback(served.kill)
            load = Load(served.wait_ready())
            stack.callback(load.stop)
            load.start()
            return served, load

        yield start


@pytest.fixture(scope="module")
def echo(start: Start) -> tuple[Served, Load]:
    return start("echo")


def named(name: str, model: Path) -> Play:
    [play] = [play for play in plays(model) if play.name == name]
    return play


def held(row: Row, *, noticed: bool) -> None:
    assert row.recovery_s is not None, row
    assert (row.detection_s is not None) == noticed
    assert (row.wrong, row.hangs, row.leftovers) == (0, 0, 0), row.why
    assert row.answered + row.refused > 0


@pytest.mark.parametrize("name", SURVIVED)
def test_a_server_survives(echo: tuple[Served, Load], model: Path, name: str) -> None:
    play = named(name, model)
    row = referee.mended(play, *echo)
    if not row.played:
        pytest.skip("the kernel grants no mount namespace, and others' disks are not to be filled")
    held(row, noticed=bool(play.notice))


def test_a_stop_leaves_nothing_after_all_that(echo: tuple[Served, Load]) -> None:
    served, load = echo
    load.stop()
    row = referee.stopped(served)
    assert row.wrong == 0, row.why
    assert not served.alive()
    assert served.left() == []


@pytest.mark.parametrize("name", ENDS)
def test_an_end_leaves_nothing(start: Start, model: Path, name: str) -> None:
    served, load = start("echo", "--max-restarts=1")
    row = referee.ended(named(name, model), served, load)
    referee.leave(row, served.left())
    held(row, noticed=False)


@pytest.mark.engine
def test_an_engine_is_replaced(start: Start, model: Path) -> None:
    served, load = start("vllm")
    stub = served.pids("decode")
    row = referee.mended(named("kill-engine", model), served, load)
    held(row, noticed=True)
    assert served.pids("decode") == stub
