"""What a server does with four times the load that saturates it.

The engine is ``echo``, whose speed is its slots' and not the processor's, as a GPU's is not: what a
refusal costs is then not mixed up with what the callers of this bench cost. Seven requests of eight
are texts, one asks about a picture.

A round, by gRPC and by the gateway: requests at a half, once, twice and four times the rate that
keeps every slot of the engine busy. Goodput is what was answered whole within `IN_TIME` times the
time of an answer that is alone, a second, from when the server is full until the last request;
answers that are under way at either end count by their share. Caches are small and one round is
forgotten, so that memory which grows is none that is meant to.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benches import Row
from benches._checkpoint import endless
from benches._drive import Measured, Sample, closed, opened
from benches._loads import Loads
from benches._peers import OpenAIPeer, Peer, TritonPeer, start_triptych, warm
from benches._tell import tell
from faults.repository import with_echo

SLOTS = 16
IN_HAND = 2 * SLOTS
"""Requests that the server has in hand at most; the rest it refuses."""
TOKEN_DELAY_S = 0.05
TOKENS = 24
"""Of an answer."""
CONTEXT = 4096
IN_TIME = 4.0
SHARES = (0.5, 1.0, 2.0, 4.0)
"""Of the load that saturates."""
QUICK_SHARES = (1.0, 4.0)
REFUSAL_S = 0.005
"""What a refusal may take, 99th percentile."""
MIX = ("text",) * 7 + ("small image",)
TEXTS = 2
"""Callers with texts beside clips."""

Rounds = dict[str, dict[float, list[Measured]]]
"""By peer and by share of the load that saturates."""


class Beside(msgspec.Struct):
    """Texts alone, and while four times as many clips come as the server can take."""

    alone: Measured
    beside: Measured
    clips: Measured


def run(quick: bool) -> list[Row]:
    """Measure; a row a goal."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = endless(folder / "checkpoint", CONTEXT)
        ours = start_triptych(
            model,
            folder,
            [
                *("--engine=echo", f"--model-repository={with_echo(folder / 'repository')}"),
                *(f"--echo-token-delay-s={TOKEN_DELAY_S}", f"--max-num-seqs={SLOTS}"),
                *(f"--max-inflight-requests={IN_HAND}", "--log-requests=false"),
                *("--media-cache-mb=8", "--encoder-cache-mb=32"),
            ],
        )
        try:
            ours["processes"].wait(ours["ready"])
            shares, seconds = (QUICK_SHARES, 6.0) if quick else (SHARES, 12.0)
            bench = Bench(str(model), ours, shares, seconds)
            asyncio.run(bench.run(2 if quick else 5))
        finally:
            ours["processes"].stop()
    bench.report()
    if folder_name := os.environ.get("BENCH_OUT"):
        out = Path(folder_name)
        out.mkdir(parents=True, exist_ok=True)
        whole = {"rounds": bench.rounds, "beside": bench.texts, "hopeless": bench.hopeless}
        (out / "overload.json").write_bytes(msgspec.json.encode(whole))
    return list(bench.rows())


class Bench:
    """All that is measured of one server.

    Args:
        model: The name in the requests.
        server: Of `start_triptych`.
        shares: Of the load that saturates.
        seconds: Of one load at one rate.
    """

    def __init__(
        self, model: str, server: dict[str, Any], shares: Sequence[float], seconds: float
    ) -> None:
        self._loads = Loads(model, TOKENS)
        self._server = server
        self._shares = shares
        self._seconds = seconds
        self.saturates: dict[str, float] = {}
        """Requests a second, by peer."""
        self.alone_s: dict[str, float] = {}
        """An answer, by peer."""
        self.rounds: Rounds = defaultdict(lambda: defaultdict(list))
        self.texts: list[Beside] = []
        self.hopeless: dict[str, list[Measured]] = defaultdict(list)

    async def run(self, rounds: int) -> None:
        """Measure so many rounds, after one that does not count."""
        processes = self._server["processes"]
        peers: list[Peer] = [
            TritonPeer("gRPC", processes, self._server["grpc"], "chat_echo"),
            OpenAIPeer("gateway", processes, self._server["url"]),
        ]
        try:
            for peer in peers:
                await warm(peer, [body for kind in (*MIX, "clip") for body in self._take(1, kind)])
                alone = await closed(peer, self._take(3, "text"), 1)
                self.alone_s[peer.name] = median(one.last - one.sent for one in alone.good)
                self.saturates[peer.name] = SLOTS / self.alone_s[peer.name]
            for number in range(rounds + 1):
                for peer in peers:
                    await self._overload(peer)
                    impossible = self._loads.hopeless(24)
                    self.hopeless[peer.name].append(await closed(peer, impossible, 1))
                self.texts.append(await self._beside_clips(peers[0]))
                if number == 0:
                    for measured in (self.rounds, self.texts, self.hopeless):
                        measured.clear()
                tell(f"round {number} of {rounds}")
        finally:
            for peer in peers:
                await peer.close()

    async def _overload(self, peer: Peer) -> None:
        for share in self._shares:
            rate = share * self.saturates[peer.name]
            bodies = self._take(int(rate * self._seconds))
            self.rounds[peer.name][share].append(await opened(peer, bodies, rate))

    async def _beside_clips(self, peer: Peer) -> Beside:
        alone = await closed(peer, self._take(8 * TEXTS, "text"), TEXTS)
        few = await closed(peer, self._take(8, "clip"), 4)
        rate = 4 * few.requests_per_s
        clips = self._take(int(rate * self._seconds), "clip")
        flood = asyncio.create_task(opened(peer, clips, rate))
        await asyncio.sleep(self._seconds / 4)
        beside = await closed(peer, self._take(8 * TEXTS, "text"), TEXTS)
        return Beside(alone, beside, await flood)

    def _take(self, count: int, *kinds: str) -> list[bytes]:
        mix = itertools.cycle(kinds or MIX)
        return [self._loads.kinds[next(mix)]() for _ in range(count)]

    def goodput(self, name: str, measured: Measured) -> float:
        """Answers in time a second, once the server is full."""
        sent = [sample.sent for sample in measured.samples]
        begin, end = min(sent) + 1.5 * self.alone_s[name], max(sent)
        shares = [
            max(0.0, min(one.last, end) - max(one.first, begin)) / (one.last - one.first)
            for one in measured.good
            if one.last - one.sent <= IN_TIME * self.alone_s[name]
        ]
        return sum(shares) / (end - begin)

    def rows(self) -> Iterator[Row]:
        """A row a goal."""
        for name, shares in self.rounds.items():
            good = {
                share: [self.goodput(name, one) for one in rounds]
                for share, rounds in shares.items()
            }
            peaks = zip(good[4.0], *good.values(), strict=True)
            ratios = [four / max(all_of) for four, *all_of in peaks]
            yield Row.of(f"{name}: goodput at 4 × saturation ÷ its peak", ratios, 0.95, "higher")
            refusals = [_p99(_refused(one)) / REFUSAL_S for one in shares[4.0]]
            yield Row.of(f"{name}: a refusal at 4 × saturation, p99 ÷ 5 ms", refusals, 1.0)
            spent = [
                _p99([sample for sample in one.samples if sample.error]) / REFUSAL_S
                for one in self.hopeless[name]
            ]
            yield Row.of(f"{name}: a request that can never fit, p99 ÷ 5 ms", spent, 1.0)
            lost = [float(one.errors - len(_refused(one))) for one in shares[4.0]]
            yield Row.of(f"{name}: neither answered nor refused at 4 ×", lost, 0.0)
            memory = [float(one.memory) for one in shares[4.0]]
            half = (len(memory) + 1) // 2
            growth = [late / median(memory[:half]) for late in memory[-half:]]
            spread = round(max(growth) - min(growth), 4)
            label = f"{name}: memory of the later rounds ÷ of the first"
            yield Row(label, round(median(growth), 4), 1.05, "lower", spread)
        answered = [len(one.beside.good) / len(one.beside.samples) for one in self.texts]
        yield Row.of("texts answered beside 4 × clips", answered, 1.0, "higher")
        slower = [one.beside.ttft / one.alone.ttft for one in self.texts]
        yield Row.of("time to first token of texts beside 4 × clips ÷ alone", slower, 2.0)

    def report(self) -> None:
        """The whole of it, for people."""
        lines = []
        for name, shares in self.rounds.items():
            for share, rounds in shares.items():
                samples = [sample for one in rounds for sample in one.samples]
                refused = [sample for one in rounds for sample in _refused(one)]
                lines.append(
                    (
                        f"{name}, {share:g} × {self.saturates[name]:.1f}/s",
                        f"{median(self.goodput(name, one) for one in rounds):.1f}",
                        f"{median(one.ttft for one in rounds) * 1e3:.0f}",
                        f"{median(one.ttft_p99 for one in rounds) * 1e3:.0f}",
                        f"{len(refused) / len(samples):.0%}",
                        _ms(refused),
                        f"{sum(one.errors for one in rounds) - len(refused)}",
                        f"{rounds[-1].memory >> 20}",
                    )
                )
        head = ("goodput/s", "TTFT ms", "p99", "refused", "in ms, p50 p99", "failed", "MiB")
        tell(("load", *head), lines)
        beside = self.texts[-1]
        tell(
            f"texts: first token after {beside.alone.ttft * 1e3:.0f} ms alone and "
            f"{beside.beside.ttft * 1e3:.0f} ms beside clips, of which "
            f"{len(beside.clips.good)} of {len(beside.clips.samples)} were answered"
        )


def _refused(measured: Measured) -> list[Sample]:
    return [sample for sample in measured.samples if sample.refused]


def _ms(samples: list[Sample]) -> str:
    if not samples:
        return "–"
    return f"{median(one.last - one.sent for one in samples) * 1e3:.1f} {_p99(samples) * 1e3:.1f}"


def _p99(samples: list[Sample]) -> float:
    """Seconds until the error, 99th percentile; of none, none."""
    spent = sorted(sample.last - sample.sent for sample in samples)
    return spent[min(len(spent) - 1, int(len(spent) * 0.99))] if spent else 0.0
