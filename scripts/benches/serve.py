"""Triptych by gRPC and by its gateway against vLLM's own OpenAI server, and NVIDIA Dynamo.

The same vLLM, though Dynamo's is the version that it names, with the same settings, and the same
checkpoint: the tiny Qwen2.5-VL with the hub's picture sizes, greedy, in float32, whose answers have
as many tokens as were asked for. All servers run at the same time and all but one are idle; a round
is every load on every server, one after the other, in an order that changes. Requests are made
before they are sent and no two are the same, except where the picture shall be.

Every engine has one OpenMP thread, as ours gives it on two cores. Our encoder, which is another
process and yields to all else, has all cores, as it comes. So that nobody is compared with a server
that was held back, pictures go to a second one of vLLM's too, which has all cores.

Texts come with 64 tokens of answer, media with 16. Pictures and clips are ``data:`` URIs.

``BENCH_ONLY='text,same image 8'`` measures these loads alone, without the open loops.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from benches import Row, _plot
from benches._checkpoint import endless
from benches._drive import Measured, closed, opened
from benches._dynamo import installed, start_dynamo
from benches._loads import Loads
from benches._peers import OpenAIPeer, Peer, TritonPeer, start_triptych, start_vllm, warm
from benches._tell import tell

CONTEXT = 4096
MAX_NUM_SEQS = 32
OURS = ("triptych gRPC", "triptych gateway")
THEIRS = "vLLM"
WIDE = "vLLM, all cores"
"""Asked about pictures alone."""
DYNAMO = "Dynamo"
"""Measured where ``scripts/dynamo`` has made its environment."""

Key = tuple[str, int]
"""A load, and how many streams."""

CLOSED: dict[Key, int] = {
    ("text", 1): 12,
    ("text", 8): 48,
    ("text", 32): 96,
    ("unique image", 1): 8,
    ("unique image", 8): 24,
    ("unique image", 32): 48,
    ("same image", 1): 12,
    ("same image", 8): 48,
    ("same image", 32): 96,
    ("four images", 8): 16,
    ("clip", 8): 16,
}
"""Requests of one round."""
RATES = (0.25, 0.5, 0.75, 1.0, 1.25)
"""Of what vLLM's server answered in a second to 8 streams, for the open loops."""
OPENED = {"text": 80, "unique image": 32}
"""Requests at each rate."""

Results = dict[Key, dict[str, list[Measured]]]
Curves = dict[str, dict[str, list[tuple[float, Measured]]]]


def run(quick: bool) -> list[Row]:
    """Measure; a row a goal."""
    with tempfile.TemporaryDirectory() as folder, _servers(Path(folder)) as (model, started):
        results, curves = asyncio.run(_measure(model, started, quick))
        starts = {name: server["processes"].ready_s for name, server in started.items()}
    _report(results, curves)
    tell("start to ready: " + ", ".join(f"{name} {spent:.1f} s" for name, spent in starts.items()))
    if folder_name := os.environ.get("BENCH_OUT"):
        _write(Path(folder_name), results, curves)
    return list(_rows(results))


@contextmanager
def _servers(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The checkpoint, and all servers that are compared, one started after the other is ready."""
    model = endless(folder / "checkpoint", CONTEXT)
    engine = folder / "engine.json"
    engine.write_text(json.dumps({"dtype": "float32", "max_num_batched_tokens": CONTEXT}))
    started: dict[str, Any] = {}
    try:
        as_it_comes = {"OMP_NUM_THREADS": None}
        ours = start_triptych(
            model,
            folder,
            [f"--engine-args={engine}", f"--max-num-seqs={MAX_NUM_SEQS}"],
            as_it_comes,
        )
        started["triptych"] = ours
        ours["processes"].wait(ours["ready"])
        flags = [
            *("--dtype=float32", "--enforce-eager", f"--max-num-seqs={MAX_NUM_SEQS}"),
            *(f"--max-model-len={CONTEXT}", f"--max-num-batched-tokens={CONTEXT}"),
            *("--limit-mm-per-prompt", '{"image": 4, "video": 1}'),
        ]
        others: dict[str, Callable[..., dict[str, Any]]] = {
            THEIRS: start_vllm,
            WIDE: partial(start_vllm, environ=as_it_comes),
        }
        if installed():
            others[DYNAMO] = start_dynamo
        else:
            tell(f"{DYNAMO} is left out: scripts/dynamo has not made its environment")
        for name, start in others.items():
            server = started[name] = start(model, folder, flags)
            server["processes"].wait(server["ready"], server.get("saying", ""))
        yield model, started
    finally:
        for server in started.values():
            server["processes"].stop()


async def _measure(model: Path, started: dict[str, Any], quick: bool) -> tuple[Results, Curves]:
    loads = Loads(str(model))
    ours = started["triptych"]
    peers: list[Peer] = [
        TritonPeer(OURS[0], ours["processes"], ours["grpc"], "chat_vllm"),
        OpenAIPeer(OURS[1], ours["processes"], ours["url"]),
    ]
    for name in (THEIRS, WIDE, DYNAMO):
        if name in started:
            peers.append(OpenAIPeer(name, started[name]["processes"], started[name]["url"]))
    try:
        keys = _chosen()
        kinds = dict.fromkeys(kind for kind, _ in keys)
        for peer in peers:
            await warm(peer, [body for kind in kinds for body in loads.take(kind, 2)])
        for kind in kinds:
            await _compare(peers, loads, kind)
        results = await _closed_loops(peers, loads, keys, quick)
        if len(keys) < len(CLOSED):
            return results, {}
        return results, await _open_loops(peers, loads, results, quick)
    finally:
        for peer in peers:
            await peer.close()


def _chosen() -> list[Key]:
    """The loads to measure: all, unless ``BENCH_ONLY`` names some."""
    only = {name for name in os.environ.get("BENCH_ONLY", "").split(",") if name}
    return [key for key in CLOSED if not only or only & {key[0], f"{key[0]} {key[1]}"}]


async def _closed_loops(peers: list[Peer], loads: Loads, keys: list[Key], quick: bool) -> Results:
    results: Results = defaultdict(lambda: defaultdict(list))
    for number in range(3 if quick else 7):
        for key in keys:
            (kind, streams), count = key, CLOSED[key]
            count = max(count // 3, min(2 * streams, 32)) if quick else count
            bodies = loads.take(kind, count)
            for turn in range(len(peers)):
                peer = peers[(turn + number) % len(peers)]
                if peer.name == WIDE and "image" not in kind:
                    continue
                # Nobody may find in a cache what was asked of another way to the same server.
                own = bodies if peer.name == THEIRS else loads.take(kind, count)
                results[key][peer.name].append(await closed(peer, own, streams))
    return results


async def _compare(peers: list[Peer], loads: Loads, kind: str) -> None:
    """Say whether the servers give the same answers to the same requests."""
    bodies = loads.take(kind, 4)
    texts = {}
    for peer in peers:
        measured = await closed(peer, bodies, 1)
        texts[peer.name] = [sample.text for sample in measured.samples]
    for name in [name for name in texts if name != THEIRS]:
        same = sum(one == other for one, other in zip(texts[name], texts[THEIRS], strict=True))
        tell(f"{kind}: {same} of {len(bodies)} answers of {name} equal {THEIRS}'s")


async def _open_loops(peers: list[Peer], loads: Loads, results: Results, quick: bool) -> Curves:
    curves: Curves = defaultdict(lambda: defaultdict(list))
    for kind, count in OPENED.items():
        whole = _middle([one.requests_per_s for one in results[kind, 8][THEIRS]])
        for share in RATES[1::2] if quick else RATES:
            for peer in peers:
                if peer.name == WIDE:
                    continue
                measured = await opened(peer, loads.take(kind, count), share * whole)
                curves[kind][peer.name].append((share * whole, measured))
    return curves


def _rows(results: Results) -> Iterator[Row]:
    def row(
        key: Key,
        figure: str,
        goal: float,
        better: Literal["lower", "higher"] = "lower",
        other: str = THEIRS,
    ) -> Iterator[Row]:
        for name in OURS if key in results else ():
            pairs = zip(results[key][name], results[key][other], strict=True)
            ratios = [getattr(one, figure) / getattr(two, figure) for one, two in pairs]
            label = f"{key[0]}, {key[1]} streams: {figure}, {name} ÷ {other}"
            yield Row.of(label, ratios, goal, better)

    for streams in (1, 8, 32):
        yield from row(("text", streams), "ttft", 1.0)
        yield from row(("text", streams), "tokens_per_s", 1.0, "higher")
    for other in (THEIRS, WIDE):
        yield from row(("unique image", 8), "requests_per_s", 1.5, "higher", other)
        yield from row(("same image", 8), "requests_per_s", 3.0, "higher", other)
    for kind in ("unique image", "same image", "four images"):
        if DYNAMO in results.get((kind, 8), {}):
            yield from row((kind, 8), "requests_per_s", 1.3, "higher", DYNAMO)


def _report(results: Results, curves: Curves) -> None:
    head = ("TTFT ms", "p99", "ITL ms", "tokens/s", "requests/s", "CPU s/request", "MiB", "errors")
    rows = []
    for (kind, streams), peers in results.items():
        for name, rounds in peers.items():
            rows.append((f"{kind}, {streams}", name, *_figures(rounds)))
    tell(("load, streams", "server", *head), rows)
    rows = []
    for kind, lines in curves.items():
        for name, points in lines.items():
            for rate, measured in points:
                rows.append((f"{kind}, {rate:.1f}/s", name, *_figures([measured])))
    tell(("open loop", "server", *head), rows)


def _figures(rounds: list[Measured]) -> list[str]:
    return [
        f"{_middle([one.ttft for one in rounds]) * 1e3:.1f}",
        f"{_middle([one.ttft_p99 for one in rounds]) * 1e3:.1f}",
        f"{_middle([one.itl for one in rounds]) * 1e3:.2f}",
        f"{_middle([one.tokens_per_s for one in rounds]):.0f}",
        f"{_middle([one.requests_per_s for one in rounds]):.2f}",
        f"{_middle([one.cpu_per_request for one in rounds]):.3f}",
        f"{max(one.memory for one in rounds) >> 20}",
        f"{sum(one.errors for one in rounds)}",
    ]


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _write(folder: Path, results: Results, curves: Curves) -> None:
    """Every sample as JSON, and the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "closed": {f"{kind}, {streams}": peers for (kind, streams), peers in results.items()},
        "open": curves,
    }
    (folder / "serve.json").write_bytes(msgspec.json.encode(whole))
    _plot.serve(results, curves, folder / "serve.svg")
