"""How soon a server has nothing of a request any more whose caller has left.

The engine is ``echo`` with one slot. A request is asked that lasts in one stage; once it is there
its caller leaves, and until no stage has it in hand counts, which is what admission goes by
(`triptych.stages.tally`): the engine's slot, and what was loading.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import msgspec

from benches import Row
from benches._checkpoint import endless
from benches._leaving import (
    Abort,
    Deadline,
    Gateway,
    Library,
    Requests,
    Stage,
    StageCancel,
    Way,
    silence,
)
from benches._peers import start_triptych
from benches._tell import tell
from faults.repository import with_echo
from triptych.stages.tally import SUFFIX, Tallies
from triptych_client.conversation import Server
from triptych_client.grpc_transport import AsyncGrpcTransport
from triptych_client.http_transport import AsyncHttpTransport
from triptych_client.transport import parse_address

GOAL_S = 0.05
TOKEN_DELAY_S = 0.25
CONTEXT = 16384
REACHED_S: dict[Stage, float] = {
    "queued": 0.05,
    "fetching": 0.05,
    "decoding": 0.05,
    "encoding": 0.15,
    "prefill": 0.05,
    "generating": 0.4,
}
"""After it is in hand, a request is in the stage so much later."""
LOOK_S = 0.0005
QUIET = 0.3
"""CPU seconds a second below which the server rests from the request before."""
LIMIT_S = 20.0

Times = dict[str, dict[Stage, list[float]]]
"""Seconds, by way and by stage."""


def run(quick: bool) -> list[Row]:
    """Measure; a row a way."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        ours = start_triptych(
            endless(folder / "checkpoint", CONTEXT),
            folder,
            [
                *("--engine=echo", f"--model-repository={with_echo(folder / 'repository')}"),
                *(f"--echo-token-delay-s={TOKEN_DELAY_S}", "--max-num-seqs=1"),
                *("--allow-private-media-hosts=127.0.0.1", "--log-requests=false"),
                "--media-cache-mb=0",
            ],
            {"TMPDIR": str(folder / "tmp")},
        )
        try:
            ours["processes"].wait(ours["ready"])
            [tally] = {path.parent for path in (folder / "tmp").glob(f"*/*/*{SUFFIX}")}
            times = asyncio.run(Bench(ours, Tallies(tally)).run(4 if quick else 40))
        finally:
            ours["processes"].stop()
    _report(times)
    if folder_name := os.environ.get("BENCH_OUT"):
        Path(folder_name).mkdir(parents=True, exist_ok=True)
        (Path(folder_name) / "cancel.json").write_bytes(msgspec.json.encode(times))
    return list(_rows(times))


class Bench:
    """Leaves one server in every way.

    Args:
        server: Of `start_triptych`.
        tallies: What it has in hand.
    """

    def __init__(self, server: dict[str, Any], tallies: Tallies) -> None:
        self._server = server
        self._tallies = tallies

    async def run(self, rounds: int) -> Times:
        """Leave so often in each way and stage."""
        grpc = AsyncGrpcTransport(parse_address(self._server["grpc"]))
        http = AsyncHttpTransport(parse_address(f"http://{self._server['http']}"))
        servers = [Server(grpc), Server(http)]
        ways: list[Way] = [
            Library("client library, gRPC", servers[0]),
            Library("client library, HTTP", servers[1]),
            Gateway("gateway, connection cut", self._server["url"]),
            Abort("abort channel", grpc),
            Deadline("deadline", grpc),
            StageCancel("gRPC cancel of the stage itself", grpc),
        ]
        times: Times = {way.name: {stage: [] for stage in way.stages} for way in ways}
        try:
            async with silence() as url:
                requests = Requests(url)
                for number in range(rounds):
                    for way in ways:
                        for stage in way.stages:
                            spent = await self._leave(way, stage, requests)
                            times[way.name][stage] += spent
                    tell(f"round {number + 1} of {rounds}")
        finally:
            for server in servers:
                await server.close()
        return times

    async def _leave(self, way: Way, stage: Stage, requests: Requests) -> list[float]:
        """Seconds; none if the request was not in its stage when it was to be left."""
        await self._rest()
        if stage != "queued":
            return await self._measure(way, stage, requests.of(stage), 0)
        holder = Library("", Server(AsyncGrpcTransport(parse_address(self._server["grpc"]))))
        holding = await holder.ask(requests.of("generating"), "generating")
        await self._until(1)
        try:
            return await self._measure(way, stage, requests.of(stage), 1)
        finally:
            await holding.leave()
            await holder.server.close()
            await self._until(0)

    async def _measure(self, way: Way, stage: Stage, body: bytes, others: int) -> list[float]:
        left = await way.ask(body, stage)
        await self._until(others + 1)
        await asyncio.sleep(REACHED_S[stage])
        await left.due()
        was_there = self._in_hand() == others + 1
        began = perf_counter()
        leaving = asyncio.create_task(left.leave())
        await self._until(others)
        spent = perf_counter() - began
        await leaving
        await self._until(others)
        return [spent] if was_there else []

    async def _rest(self) -> None:
        """Wait for what has begun and runs to its end though nobody wants it any more."""
        spent, now = self._server["processes"].cpu_seconds(), perf_counter()
        while True:
            await asyncio.sleep(0.1)
            before, began = spent, now
            spent, now = self._server["processes"].cpu_seconds(), perf_counter()
            if spent - before < QUIET * (now - began):
                return

    def _in_hand(self) -> int:
        return self._tallies.total().requests

    async def _until(self, count: int) -> None:
        deadline = perf_counter() + LIMIT_S
        while self._in_hand() != count:
            if perf_counter() > deadline:
                raise RuntimeError(f"{self._in_hand()} requests in hand, not {count}")
            await asyncio.sleep(LOOK_S)


def _rows(times: Times) -> Iterator[Row]:
    for way, stages in times.items():
        worst = [_p95(spent) / GOAL_S for spent in stages.values() if spent]
        yield Row(
            f"{way}: worst stage, p95 ÷ {GOAL_S * 1e3:.0f} ms",
            round(max(worst), 4),
            1.0,
            "lower",
            round(max(worst) - min(worst), 4),
        )


def _report(times: Times) -> None:
    rows = [
        (way, stage, f"{median(spent) * 1e3:.1f}", f"{_p95(spent) * 1e3:.1f}", str(len(spent)))
        for way, stages in times.items()
        for stage, spent in stages.items()
        if spent
    ]
    tell(("left by", "in the stage", "ms until nothing is in hand, p50", "p95", "times"), rows)


def _p95(values: list[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
