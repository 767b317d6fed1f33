"""Signs of life through a real pipe, and the end of a process whose parent has gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from replies import until
from triptych import processes, pulse
from triptych.pulse import VARIABLE, Beat, Pulse, Pulses


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT_S", 0.01)


@pytest.fixture
def pulses() -> Iterator[Pulses]:
    pulses = Pulses()
    yield pulses
    pulses.close()


@pytest.fixture
def beating(pulses: Pulses) -> Iterator[Pulse]:
    beating = Pulse("encoder_0_0", {VARIABLE: str(pulses.writer)})
    yield beating
    beating.stop()


def heard(pulses: Pulses) -> Beat:
    beats: list[Beat] = []
    until(lambda: beats.extend(pulses.read()) or beats)
    return beats[-1]


def silent(pulses: Pulses) -> bool:
    """Whether several beats' time passes without one; what was sent before does not count."""
    pulses.read()
    time.sleep(0.1)
    return not pulses.read()


def test_it_beats_until_it_is_stopped(pulses: Pulses, beating: Pulse) -> None:
    assert heard(pulses) == Beat(os.getpid(), "encoder_0_0")
    assert not silent(pulses)
    beating.stop()
    assert silent(pulses)


def test_an_outage_is_told_until_it_is_over(pulses: Pulses, beating: Pulse) -> None:
    beating.tell("the engine died " * 1000)
    until(lambda: heard(pulses).outage.startswith("the engine died"))
    beating.tell("")
    until(lambda: heard(pulses).outage == "")


def test_it_is_silent_while_a_loop_stands_still(pulses: Pulses, beating: Pulse) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    beating.follow(loop)
    assert not silent(pulses)
    go_on = threading.Event()
    loop.call_soon_threadsafe(go_on.wait)
    until(lambda: silent(pulses))
    go_on.set()
    until(lambda: pulses.read())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    until(lambda: silent(pulses))
    loop.close()
    until(lambda: pulses.read())


def test_nobody_reading_is_no_fault(pulses: Pulses, beating: Pulse) -> None:
    other = msgspec.json.encode(Beat(1, "preprocess_0_0")) + b"\n"
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pulses.writer, other)
    beating.tell("unheard at first")
    until(lambda: any(beat.outage for beat in pulses.read()))


def test_without_a_supervisor_nothing_is_written() -> None:
    beating = Pulse("encoder_0_0", {})
    beating.tell("nobody is told")
    beating.stop()


PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
child.wait()
"""
CHILD = """
import os, time
from triptych.pulse import Pulse
Pulse("encoder_0_0")
print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_a_process_ends_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not processes.is_gone(child)
        parent.kill()
    until(lambda: processes.is_gone(child))


STANDING_STILL = """
import ctypes, time
from triptych import pulse
pulse.STANDSTILL_S = 0.5
pulse.Pulse("encoder_0_0")
time.sleep(0.1)
ctypes.PyDLL(None).sleep(600)  # which, unlike CDLL, keeps the interpreter's lock
"""


def test_a_process_whose_interpreter_stands_still_says_where_and_ends() -> None:
    run = subprocess.run(
        [sys.executable, "-c", STANDING_STILL], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    assert 'File "<string>", line 7' in run.stderr
