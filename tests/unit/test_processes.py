"""What is read of a process from /proc, against processes that do just that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from replies import until
from triptych import processes

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
SPIN = "print('up', flush=True)\nwhile True: pass"
SPIN_IN_A_THREAD = (
    "import threading, time\n"
    "def spin():\n    print('up', flush=True)\n    while True: pass\n"
    "threading.Thread(target=spin, daemon=True).start()\n"
    "time.sleep(600)"
)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    found: list[subprocess.Popen[str]] = []
    yield found
    for process in found:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def run(code: str, started: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_one_that_waits_is_idle(started: list[subprocess.Popen[str]]) -> None:
    pid = run(SLEEP, started).pid
    until(lambda: processes.doing(pid) == "idle")
    assert not processes.is_gone(pid)
    assert not processes.is_stopped(pid)


@pytest.mark.parametrize("code", [SPIN, SPIN_IN_A_THREAD])
def test_one_with_a_thread_that_runs_is_busy(
    started: list[subprocess.Popen[str]], code: str
) -> None:
    assert processes.doing(run(code, started).pid) == "busy"


@pytest.mark.parametrize("code", [SLEEP, SPIN_IN_A_THREAD])
def test_one_that_was_stopped_is_not_taken_for_busy_or_idle(
    started: list[subprocess.Popen[str]], code: str
) -> None:
    process = run(code, started)
    process.send_signal(signal.SIGSTOP)
    until(lambda: processes.doing(process.pid) == "stopped")
    assert processes.is_stopped(process.pid)
    process.send_signal(signal.SIGCONT)
    until(lambda: not processes.is_stopped(process.pid))


def test_one_that_ended_is_gone_before_its_parent_has_noticed(
    started: list[subprocess.Popen[str]],
) -> None:
    killed = run(SLEEP, started)
    assert processes.ending(killed.pid) == ""
    killed.kill()
    until(lambda: processes.is_gone(killed.pid))
    assert processes.doing(killed.pid) == "gone"
    assert processes.ending(killed.pid) == "by SIGKILL"
    left = run("print('up', flush=True); raise SystemExit(3)", started)
    until(lambda: processes.is_gone(left.pid))
    assert processes.ending(left.pid) == "with exit status 3"
    killed.wait()
    assert processes.doing(killed.pid) == "gone"
    assert processes.ending(killed.pid) == ""


def test_a_process_is_known_by_when_it_began(started: list[subprocess.Popen[str]]) -> None:
    other = run(SLEEP, started)
    assert processes.started(os.getpid()) == processes.started(os.getpid())
    assert processes.started(other.pid) > processes.started(os.getpid())
    other.kill()
    other.wait()
    with pytest.raises(ProcessLookupError):
        processes.started(other.pid)


def test_kills_for_want_of_memory_are_counted() -> None:
    assert processes.killed_for_memory() >= 0
