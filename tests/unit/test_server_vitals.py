"""What a supervisor makes of beats, of silence and of deaths; the processes are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from replies import until
from triptych import processes
from triptych.errors import Unavailable
from triptych.pulse import Beat
from triptych.server.vitals import AWAY_S, BUSY_S, HANG_S, SURE, Vitals

STEP_S = AWAY_S / 2


@dataclass
class World:
    """A clock, the pipe and the port, all in the test's hand; a tritonserver and one stub."""

    server: subprocess.Popen[str]
    stub: subprocess.Popen[str]
    now: float = 0.0
    beats: list[Beat] = field(default_factory=list)
    answers: bool = True
    loaded: bool = True

    def read(self) -> list[Beat]:
        beats, self.beats = self.beats, []
        return beats

    def lives(self) -> bool:
        return self.answers

    def serves(self, model: str) -> bool:
        assert model == "encoder"
        return self.loaded

    def beat(self, outage: str = "") -> None:
        self.beats.append(Beat(self.stub.pid, "encoder_0_0", outage))


@pytest.fixture(params=["import time; time.sleep(600)"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    expected = "idle" if "sleep" in request.param else "busy"
    found = [
        subprocess.Popen(
            [sys.executable, "-c", f"print('up', flush=True)\n{request.param}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in found:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        # It has told so a moment before it sleeps.
        until(lambda process=process: processes.doing(process.pid) == expected)
    yield World(*found)
    for process in found:
        process.kill()
        process.communicate()


@pytest.fixture
def vitals(world: World) -> Vitals:
    vitals = Vitals(world.server.pid, world, world, lambda: world.now)
    world.beat()
    vitals.check()
    return vitals


def look_for(world: World, vitals: Vitals, seconds: float, *, beats: bool = True) -> None:
    """Look again and again, as `Server.watch` does, for so long."""
    for _ in range(int(seconds / STEP_S) + 1):
        world.now += STEP_S
        if beats:
            world.beat()
        vitals.check()


busy = pytest.mark.parametrize("world", ["while True: pass"], indirect=True)


def test_a_server_that_beats_and_answers_is_well(world: World, vitals: Vitals) -> None:
    look_for(world, vitals, 2 * BUSY_S)
    assert vitals.outage == ""


def test_a_stub_that_was_killed_is_named_with_its_signal(world: World, vitals: Vitals) -> None:
    world.stub.kill()
    until(lambda: processes.is_gone(world.stub.pid))
    with pytest.raises(Unavailable, match="encoder_0_0 was ended by SIGKILL"):
        vitals.check()


def test_a_want_of_memory_is_named(
    world: World, vitals: Vitals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = processes.killed_for_memory()
    monkeypatch.setattr(processes, "killed_for_memory", lambda: before + 1)
    world.stub.kill()
    until(lambda: processes.is_gone(world.stub.pid))
    with pytest.raises(Unavailable, match="SIGKILL, and the kernel has killed for want of memory"):
        vitals.check()


def test_a_stub_that_has_never_beaten_is_missed_too(world: World) -> None:
    vitals = Vitals(world.server.pid, world, world, lambda: world.now)
    vitals.expect({world.stub.pid: "encoder_0_0"})
    look_for(world, vitals, 2 * BUSY_S, beats=False)
    world.stub.kill()
    world.stub.wait()
    with pytest.raises(Unavailable, match="encoder_0_0"):
        vitals.check()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGCONT])
def test_a_silent_stub_that_does_nothing_hangs(
    world: World, vitals: Vitals, number: signal.Signals
) -> None:
    world.stub.send_signal(number)
    expected = "stopped" if number == signal.SIGSTOP else "idle"
    until(lambda: processes.doing(world.stub.pid) == expected)
    look_for(world, vitals, HANG_S - 2 * STEP_S, beats=False)
    how = "is stopped" if number == signal.SIGSTOP else "hangs"
    with pytest.raises(Unavailable, match=f"encoder_0_0 {how}: no sign of life"):
        look_for(world, vitals, (1 + SURE) * STEP_S, beats=False)


def test_a_silent_stub_is_seen_idle_more_than_once(world: World, vitals: Vitals) -> None:
    """Who is starved, beats when its turn comes, and is idle in between."""
    for _ in range(10):
        look_for(world, vitals, (SURE - 1) * STEP_S, beats=False)
        world.beat()


@busy
def test_a_silent_stub_that_works_is_given_time(world: World, vitals: Vitals) -> None:
    look_for(world, vitals, BUSY_S - 2 * STEP_S, beats=False)
    with pytest.raises(Unavailable, match="is stuck"):
        look_for(world, vitals, 3 * STEP_S, beats=False)


def test_a_tritonserver_that_does_not_answer_hangs(world: World, vitals: Vitals) -> None:
    world.answers = False
    look_for(world, vitals, HANG_S - 2 * STEP_S)
    with pytest.raises(Unavailable, match="tritonserver hangs"):
        look_for(world, vitals, (1 + SURE) * STEP_S)


def test_no_verdict_is_given_on_a_time_when_nobody_looked(world: World, vitals: Vitals) -> None:
    world.answers = False
    world.now += 10 * BUSY_S
    vitals.check()
    world.now += HANG_S / 2
    vitals.check()


def test_silence_while_models_load_is_no_fault_but_death_is(world: World, vitals: Vitals) -> None:
    for _ in range(100):
        world.now += STEP_S
        vitals.check_alive()
    world.stub.kill()
    until(lambda: processes.is_gone(world.stub.pid))
    with pytest.raises(Unavailable, match="encoder_0_0"):
        vitals.check_alive()


def test_a_stub_that_triton_has_unloaded_is_forgotten(world: World, vitals: Vitals) -> None:
    world.loaded = False
    world.stub.kill()
    world.stub.wait()
    look_for(world, vitals, 2 * BUSY_S, beats=False)


def test_a_stub_that_triton_has_replaced_is_forgotten(world: World, vitals: Vitals) -> None:
    world.stub.kill()
    world.stub.wait()
    world.beats.append(Beat(os.getpid(), "encoder_0_0"))
    vitals.check()
    assert not world.beats


def test_an_outage_is_told_until_it_is_over(world: World, vitals: Vitals) -> None:
    world.beat("the engine died")
    vitals.check()
    assert vitals.outage == "the engine died"
    world.beat()
    vitals.check()
    assert vitals.outage == ""
