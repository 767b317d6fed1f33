"""``python -m soaking [--requests N] [--aborts N] [--engine NAME] [--model DIR] [--json]``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
from rich.console import Console
from rich.table import Table

from faults.repository import ROOT, with_echo
from faults.room import Room
from faults.served import Served
from soaking.callers import ROADS, Callers, Road, Tally, ways
from soaking.kinds import Kind, Kinds, media_server
from soaking.plot import draw
from soaking.sample import Sample, at_rest
from soaking.verdict import TOLERANCES, Row, judge
from triptych import families

CHECKPOINT = ROOT / "models" / "tiny-qwen2.5-vl"
SLOTS = 8
LEASE_S = 3
FILLINGS = 150
"""Preprocess remembers 32 MiB of the media that it sent last, each instance, for a second try."""
FLAGS = {
    # Full within the first third.
    "media-cache-mb": 4,
    "media-cache-urls": 100,
    "encoder-cache-mb": 4,
    "max-num-seqs": SLOTS,
    # A small cache of keys and values too, whose pages are taken as they are first used.
    "max-model-len": 2048,
    "encoder-lease-s": LEASE_S,
    "handover-lease-s": LEASE_S,
    "echo-token-delay-s": 0.004,
    "allow-private-media-hosts": "127.0.0.1",
}


Asking: TypeAlias = tuple[Road, bool, Kind]
"""Over which road, whether streamed, and what."""


class Soak(NamedTuple):
    """What was seen."""

    tally: Tally
    asked: list[int]
    """Requests and aborts before each sample."""
    samples: list[Sample]


class Report(msgspec.Struct, kw_only=True):
    """All of it, as JSON."""

    engine: str
    model: str
    requests: int
    aborts: int
    seconds: float
    ended: dict[str, int]
    faults: list[str]
    rows: list[Row]
    asked: list[int]
    samples: list[Sample]


def main() -> int:
    """Soak; exit status 1 when something has grown or an answer was wrong."""
    arguments = _arguments()
    out = Console(stderr=arguments.json)
    logging.getLogger("triptych_client").setLevel(logging.ERROR)  # it tells of each lost answer
    began = time.monotonic()
    with _server(arguments.engine, arguments.model) as served:
        soak = asyncio.run(_soak(served, arguments, out.print))
        if (code := served.stop()) != 0:
            soak.tally.faults.append(f"the server ended with {code}: {served.said()[-300:]}")
    report = Report(
        engine=arguments.engine,
        model=arguments.model.name,
        requests=arguments.requests,
        aborts=arguments.aborts,
        seconds=round(time.monotonic() - began, 1),
        ended=dict(sorted(soak.tally.ended.items())),
        faults=soak.tally.faults,
        rows=judge(soak.samples),
        asked=soak.asked,
        samples=soak.samples,
    )
    title = f"{arguments.requests} requests and {arguments.aborts} aborts, {arguments.engine}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    files = draw(f"{title}, {report.model}", soak.asked, soak.samples, arguments.output)
    encoded = msgspec.json.encode(report)
    (arguments.output / "soak.json").write_bytes(encoded)
    if arguments.json:
        sys.stdout.write(encoded.decode() + "\n")
    _show(title, report, out)
    out.print("curves:", *map(str, files), soft_wrap=True)
    return 1 if report.faults or not all(row.ended for row in report.rows) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="answered or refused")
    parser.add_argument("--aborts", type=int, default=10_000, help="left before they are")
    parser.add_argument("--rounds", type=int, default=24, help="after each a look at the server")
    parser.add_argument(
        "--engine", default="echo", choices=["echo", "echo_nixl", "vllm", "vllm_nixl"]
    )
    parser.add_argument("--roads", nargs="+", choices=ROADS, default=ROADS, help="all unless given")
    parser.add_argument("--kinds", nargs="+", help="all unless given")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="a checkpoint")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache" / "soak", help="a directory")
    parser.add_argument("--json", action="store_true", help="print only the report, as JSON")
    arguments = parser.parse_args()
    arguments.model = arguments.model.resolve()
    return arguments


@contextlib.contextmanager
def _server(engine: str, model: Path) -> Iterator[Served]:
    """One server, all the while; whoever has it stops it."""
    with tempfile.TemporaryDirectory(prefix="triptych-soak-") as name:
        folder = Path(name)
        (folder / "disk").mkdir()
        repository = with_echo(folder / "model_repository")
        _with_echo_nixl(repository)
        flags = {"engine": engine, "model": model, "model-repository": repository, **FLAGS}
        with Room(folder / "disk") as room:
            served = Served(room, *(f"--{name}={value}" for name, value in flags.items()))
            try:
                served.wait_ready()
                yield served
            except BaseException:
                log = Path(tempfile.gettempdir()) / "triptych-soak.log"
                log.write_text("\n".join(line for _, line in served.lines))
                sys.stderr.write(f"all that the server has said: {log}\n")
                raise
            finally:
                served.kill()


def _with_echo_nixl(repository: Path) -> None:
    """Add ``chat_echo_nixl``, as ``chat_vllm_nixl`` is of ``chat_vllm``."""
    target = repository / "chat_echo_nixl"
    shutil.copytree(repository / "chat_vllm_nixl", target)
    config = target / "config.pbtxt"
    config.write_text(config.read_text().replace("vllm", "echo"))


async def _soak(served: Served, arguments: argparse.Namespace, say: Callable[[str], None]) -> Soak:
    tally, asked, samples = Tally(), [], []
    modalities = families.load(str(arguments.model)).modalities
    with media_server() as url:
        kinds = Kinds(modalities, url, served.at.grpc, served.at.model)
        done = (0, 0)
        plan = [
            (*way, kind)
            for kind in kinds.all()
            for way in ways(arguments.roads)
            if arguments.kinds is None or kind.name in arguments.kinds
        ]
        async with Callers(served.at, tally) as callers:
            # So that all is there, and full, that ever will be.
            await _round(callers, plan, range(len(plan)), range(0))
            await _round(callers, [("grpc", True, kinds.filling())], range(FILLINGS), range(0))
        for number in range(arguments.rounds + 1):
            part = number / arguments.rounds
            upto = (round(arguments.requests * part), round(arguments.aborts * part))
            # Clients of this round alone, so that no connection of theirs is counted.
            async with Callers(served.at, tally) as callers:
                await _round(callers, plan, range(done[0], upto[0]), range(done[1], upto[1]))
            async with Callers(served.at, tally) as callers:
                samples.append(await at_rest(served, callers, SLOTS))
            done = upto
            asked.append(sum(done))
            say(_line(asked[-1], samples[-1], tally))
    return Soak(tally, asked, samples)


async def _round(callers: Callers, plan: list[Asking], requests: range, aborts: range) -> None:
    """Requests and aborts, mixed, each kind over each road in its turn."""
    asking = [callers.ask(*plan[number % len(plan)]) for number in requests]
    leaving = [callers.leave(number, *plan[number % len(plan)]) for number in aborts]
    mixed = sorted([*enumerate(asking), *enumerate(leaving)], key=lambda pair: pair[0])
    await asyncio.gather(*(work for _, work in mixed))


def _line(asked: int, sample: Sample, tally: Tally) -> str:
    memory = sum(value for name, value in sample.items() if name.startswith("PSS"))
    return (
        f"{asked:6} asked, {len(tally.faults)} faults: {memory:.0f} MiB, "
        f"{sample['descriptors']:.0f} descriptors, {sample['/dev/shm, MiB']:.0f} MiB of shared "
        f"memory, {sample['requests in hand']:.0f} requests in hand"
    )


def _show(title: str, report: Report, out: Console) -> None:
    table = Table("series", "first", "last", "most", "growth", "allowed", "", title=title)
    for row in report.rows:
        numbers = (row.first, row.last, row.most, row.growth)
        allowed = f"{row.tolerance or 0:,.1f}"
        verdict = "[green]as it was" if row.ended else "[red]has grown"
        if row.tolerance is None:
            allowed = verdict = ""
        table.add_row(row.series, *(f"{number:,.1f}" for number in numbers), allowed, verdict)
    out.print(table)
    for name, (limit, why) in TOLERANCES.items():
        allowed = "not judged" if limit is None else f"{limit:g} allowed"
        out.print(f"{name}: {allowed}: {why}", soft_wrap=True, highlight=False)
    outcomes: dict[str, int] = {}
    for name, count in report.ended.items():
        outcome = name.rpartition(": ")[2]
        outcomes[outcome] = outcomes.get(outcome, 0) + count
    told = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    out.print(f"{told}; {len(report.faults)} faults; {report.seconds:.0f} s", soft_wrap=True)
    for fault in report.faults[:20]:
        out.print(f"[red]{fault}[/]", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
