"""What a second instance of preprocess brings, each with one process that decodes.

Two rows, since it depends on what else a medium costs. Client, tritonserver and preprocess's own
process take their part of the same cores: with ``d`` seconds of decoding and ``o`` of all else a
medium, on two cores one instance does at most ``1 / d`` a second and two do ``2 / (d + o)``. So the
CPU time of every process is counted too, and the bound that follows is told beside the ratio.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil

from benches import Row
from benches._callers import all_at_once, running
from benches._embed import Caller
from benches._media import Media
from benches._tell import tell

SETTINGS = {"media_workers": 1, "encoder_model": "", "media_cache_mb": 0}
"""Every medium is decoded, and nothing is encoded."""
EACH = 12
"""Media of one round."""
CALLERS = 6
WORKER = "triptych.media.worker"


def rows(checkpoint: Path, folder: Path, media: Media, rounds: int) -> list[Row]:
    """Media a second through preprocess alone: two instances against one, in turns."""
    with (
        running(checkpoint, folder / "a", {"preprocess": 1}, **SETTINGS) as (_, one),
        running(checkpoint, folder / "b", {"preprocess": 2}, **SETTINGS) as (_, two),
    ):
        callers = {1: one, 2: two}
        return [
            _row("720p clips", media.clip, callers, rounds),
            _row("4096² JPEGs", lambda: media.picture(4096), callers, rounds),
        ]


def _row(what: str, make: Callable[[], bytes], callers: dict[int, Caller], rounds: int) -> Row:
    speeds: dict[int, list[float]] = {1: [], 2: []}
    spent = {"decoding": 0.0, "all else": 0.0}
    for number in range(rounds + 1):
        for count, caller in callers.items():
            bodies = [make() for _ in range(EACH)]
            before = _cpu_seconds()
            took = all_at_once(caller, bodies, "preprocess", ("ITEMS",), CALLERS)
            if number:  # the first warms up
                speeds[count].append(EACH / took)
                after = _cpu_seconds()
                spent = {part: spent[part] + after[part] - before[part] for part in spent}
    decoding, other = (part / (2 * rounds * EACH) for part in spent.values())
    cores = len(os.sched_getaffinity(0))
    one, two = (min(count, cores * decoding / (decoding + other)) for count in (1, 2))
    tell(
        f"{what}: one instance {median(speeds[1]):.1f}/s, two {median(speeds[2]):.1f}/s; one takes "
        f"{decoding * 1e3:.1f} ms of decoding and {other * 1e3:.1f} ms of all else, with which "
        f"{cores} cores let two instances do {two / one:.2f} times as much"
    )
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    return Row.of(f"{what} a second: two preprocess instances ÷ one", ratios, 1.9, "higher")


def _cpu_seconds() -> dict[str, float]:
    """Of this process and all that it has started, by what they do."""
    spent = {"decoding": 0.0, "all else": time.process_time()}
    for process in psutil.Process().children(recursive=True):
        try:
            kind = "decoding" if WORKER in process.cmdline() else "all else"
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        spent[kind] += times.user + times.system
    return spent
