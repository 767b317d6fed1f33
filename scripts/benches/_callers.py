"""Callers of a server of `benches._embed`, all at once or one after another, and their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median, quantiles

from benches._embed import Caller, ready, serve
from triptych.server import Server


@contextmanager
def running(
    checkpoint: Path,
    folder: Path,
    instances: dict[str, int] | None = None,
    extra: tuple[str, ...] = (),
    **settings: object,
) -> Iterator[tuple[Server, Caller]]:
    """A server, as `benches._embed.serve` has it, and who calls it; ``folder`` is made."""
    folder.mkdir()
    server = serve(checkpoint, folder, instances=instances, extra=extra, **settings)
    try:
        ready(server.start())
        with closing(Caller(server)) as caller:
            yield server, caller
    finally:
        server.stop()


def all_at_once(
    caller: Caller, bodies: Sequence[bytes], model: str, outputs: tuple[str, ...], callers: int
) -> float:
    """Seconds until ``callers`` threads have had all of ``bodies`` answered."""
    with ThreadPoolExecutor(callers) as threads:
        list(threads.map(lambda _: None, range(callers)))  # so that the threads are there
        return seconds(
            lambda: list(threads.map(lambda body: caller.ask(model, body, outputs), bodies))
        )


def first_tokens(caller: Caller, text: bytes, probes: int) -> list[float]:
    """Seconds to the first response of ``chat_echo``, again and again, 5 ms apart."""
    found = []
    for _ in range(probes):
        found.append(caller.first("chat_echo", text))
        time.sleep(0.005)
    return found


def seconds(work: Callable[[], object]) -> float:
    """What it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def p99(times: list[float]) -> float:
    """The 99th percentile."""
    return quantiles(times, n=100)[-1]


def ms(times: list[float]) -> str:
    """The median, for people."""
    return f"{median(times) * 1e3:.1f} ms"
