"""NIXL over TCP, where both ends must do their part: late answers, deadlines, the warning."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import signal
import time
from typing import Any

import psutil
import pytest

from handover import KEY, MIB, Spec, owner, same
from triptych.errors import Unavailable
from triptych.handover.reader import NixlFetcher

TIMEOUT_S = 1.5


def run(pipe: Any) -> None:
    """In a process of its own: UCX reads its settings once."""
    os.environ["UCX_TLS"] = "tcp"
    log = io.StringIO()
    logging.basicConfig(stream=log)
    found: dict[str, Any] = {}
    spec = Spec(1, (4096, 256))
    with owner(64 * MIB, UCX_TLS="tcp") as far:
        fetcher = NixlFetcher(64 * MIB, KEY, TIMEOUT_S)
        found["first"] = same(fetcher.fetch(far.publish(spec)).result(10)[0], spec)
        far.leases(0)

        tickets = [far.publish(spec) for _ in range(3)]
        os.kill(far.process.pid, signal.SIGSTOP)
        while psutil.Process(far.process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        begun = time.monotonic()
        found["errors"] = [fetcher.fetch(ticket).exception(10) for ticket in tickets[:2]]
        found["seconds"] = time.monotonic() - begun
        found["quarantined"] = fetcher.used
        os.kill(far.process.pid, signal.SIGCONT)
        found["again"] = same(fetcher.fetch(tickets[2]).result(10)[0], spec)
        found["log"] = log.getvalue()
        fetcher.close()
    pipe.send(found)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(theirs,))
    process.start()
    try:
        assert ours.poll(60)
        result: dict[str, Any] = ours.recv()
        return result
    finally:
        process.join(20)
        process.kill()


def test_embeddings_arrive(found: dict[str, Any]) -> None:
    assert found["first"]


def test_tcp_on_one_host_is_a_warning(found: dict[str, Any]) -> None:
    assert "UCX chose TCP for an encoder on this host" in found["log"]


def test_an_owner_that_stands_still_is_an_error_at_the_deadline(found: dict[str, Any]) -> None:
    assert all(isinstance(error, Unavailable) for error in found["errors"])
    assert found["seconds"] < 2 * (TIMEOUT_S + 0.5)


def test_memory_that_may_still_be_written_to_is_not_used_again(found: dict[str, Any]) -> None:
    assert found["quarantined"] >= 2 * 4 * MIB


def test_when_it_moves_again_so_do_the_embeddings(found: dict[str, Any]) -> None:
    assert found["again"]
