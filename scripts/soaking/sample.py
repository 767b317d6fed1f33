"""What a server at rest holds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from faults.served import Served
from soaking.callers import Callers
from soaking.kinds import Kind
from triptych.stages.tally import SUFFIX, Tallies

ROLES = ("serve", "tritonserver", "preprocess", "worker", "encoder", "decode", "engine")
"""As `Served.pids` has them; ``serve`` has the gateway in it."""
MIB = 1 << 20
REST_S = 60.0
"""The most that is waited for what is in hand to end, and for leases to run out."""
LOOK_S = 0.1
TRIES = 5
"""A machine with much to do may keep answers from being written at the same time."""
_HELD = {
    "leases of the cache": ("triptych_encoder_leases", {"of": "cache"}),
    "leases of the arena": ("triptych_encoder_leases", {"of": "arena"}),
    "gateway's requests": ("triptych_gateway_active_requests", {}),
}

Sample = dict[str, float]
"""By series."""


async def at_rest(served: Served, callers: Callers, slots: int) -> Sample:
    """A sample of a server that is asked nothing, when it has nothing in hand, or never will.

    Args:
        served: The server.
        callers: Who asks for what brings its numbers up to date.
        slots: What the engine serves at a time.
    """
    free = 0
    for _ in range(TRIES):
        free = max(free, await callers.first_tokens(slots))
        if free == slots:
            break
    found: Sample = {"slots taken": slots - free}
    deadline = time.monotonic() + REST_S
    while True:
        # The encoder's numbers are of its last batch, which may be one of nothing.
        await callers.ask("grpc", True, Kind("text", list))
        await asyncio.sleep(LOOK_S)
        held = _in_hand(served) | _metrics(served)
        if not any(held.values()) or time.monotonic() > deadline:
            break
    return found | held | _processes(served) | _files(served)


def _in_hand(served: Served) -> Sample:
    """What the stages have counted as theirs."""
    folders = {path.parent for path in served.room.disk.rglob(f"*{SUFFIX}")}
    totals = [Tallies(folder).total() for folder in folders]
    return {
        "requests in hand": sum(one.requests for one in totals),
        "tokens in hand": sum(one.tokens for one in totals),
        "bytes of media in hand": sum(one.media_bytes for one in totals),
    }


def _metrics(served: Served) -> Sample:
    """What Triton and the gateway tell; the gateway's page has both."""
    url = f"{served.at.openai.removesuffix('/v1')}/metrics"
    page = httpx.get(url, trust_env=False).raise_for_status().text
    found = dict.fromkeys(_HELD, 0.0) | {"Triton's requests": 0.0}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == "nv_inference_pending_request_count":
                found["Triton's requests"] += sample.value
            for name, (metric, labels) in _HELD.items():
                if sample.name == metric and labels.items() <= sample.labels.items():
                    found[name] += sample.value
    found["gateway's requests"] -= 1  # for this page
    return found


def _processes(served: Served) -> Sample:
    """Memory of each role, what all have open, and how many there are.

    RSS and PSS are of all processes of a role; ``memory``, which is no file's, of one, on average.
    """
    found: Sample = dict.fromkeys(("descriptors", "threads", "processes"), 0.0)
    for role in ROLES:
        running = list(_of(served, role))
        for process in running:
            # Gone meanwhile.
            with contextlib.suppress(psutil.NoSuchProcess, OSError), process.oneshot():
                memory = process.memory_full_info()
                private = _anonymous(process.pid) / len(running)
                sizes = {"RSS": memory.rss, "PSS": memory.pss, "memory": private}
                for name, nbytes in sizes.items():
                    series = f"{name} of {role}, MiB"
                    found[series] = found.get(series, 0.0) + nbytes / MIB
                found["descriptors"] += process.num_fds()
                found["threads"] += process.num_threads()
                found["processes"] += 1
    return found


def _anonymous(pid: int) -> int:
    """Bytes that are no file's: what others on the machine map does not change them."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def _of(served: Served, role: str) -> Iterator[psutil.Process]:
    for pid in served.pids(role):
        with contextlib.suppress(psutil.NoSuchProcess):
            yield psutil.Process(pid)


def _files(served: Served) -> Sample:
    room = served.room
    # Where the kernel gives no /dev/shm of one's own, others have regions there too.
    regions = [each for each in room.shm.iterdir() if room.is_own or "triptych" in each.name]
    return {
        "/dev/shm, files": len(regions),
        "/dev/shm, MiB": sum(_taken(each) for each in regions) / MIB,
        "temporary files": sum(1 for _ in room.disk.rglob("*")),
        "temporary files, MiB": sum(_taken(each) for each in room.disk.rglob("*")) / MIB,
    }


def _taken(path: Path) -> int:
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
