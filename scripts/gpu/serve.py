"""Triptych and vLLM's own server on a GPU: a picture, four, and conversations that keep pictures.

Qwen2.5-VL-7B with weights drawn at random, the same version of vLLM, all servers on one GPU and all
but one idle. Prints one JSON object: for each load and server the time to first token and what was
answered a second, medians over the rounds, and the ratios to vLLM's own.

``--small`` serves the tiny model, to see that it runs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from benches._checkpoint import TINY, endless
from benches._drive import Measured, closed
from benches._loads import Loads
from benches._peers import OpenAIPeer, Peer, TritonPeer, start_triptych, start_vllm, warm
from checkpoints import write

CONTEXT = 16384
ROUNDS = 5
USERS, TURNS, SHOWN = 30, 8, 5
"""Each turn shows the pictures of the last and one more, at most five."""
SHARE = 0.4
"""Of the GPU's memory, for each engine."""


def main() -> None:
    """Serve and measure."""
    small = "--small" in sys.argv[1:]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model = endless(folder / "checkpoint", CONTEXT) if small else _large(folder / "checkpoint")
        load = {} if small else {"load_format": "dummy", "gpu_memory_utilization": SHARE}
        started = _start(model, folder, load, stack)
        print(json.dumps(asyncio.run(_measure(model, started, small))))


def _large(folder: Path) -> Path:
    """Real sizes, save for the words: those of the tokenizer that is here."""
    write("Qwen2.5-VL-7B", folder)
    config = json.loads((folder / "config.json").read_text())
    tiny = json.loads((TINY / "config.json").read_text())
    words = tiny.get("text_config", tiny)["vocab_size"]
    config["text_config"]["vocab_size"] = config["vocab_size"] = words
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _start(model: Path, folder: Path, load: dict[str, Any], stack: ExitStack) -> dict[str, Any]:
    engine = folder / "engine.json"
    engine.write_text(json.dumps({"max_num_batched_tokens": CONTEXT, **load}))
    flags = [f"--engine-args={engine}", "--max-num-seqs=64", f"--max-model-len={CONTEXT}"]
    theirs = [
        *("--max-num-seqs=64", f"--max-model-len={CONTEXT}"),
        *(f"--max-num-batched-tokens={CONTEXT}", "--limit-mm-per-prompt", '{"image": 5}'),
        *(f"--{name.replace('_', '-')}={value}" for name, value in load.items()),
    ]
    started = {}
    for name, start, arguments in (
        ("triptych", start_triptych, flags),
        ("vLLM", start_vllm, theirs),
    ):
        server = started[name] = start(model, folder, arguments)  # type: ignore[operator]
        stack.callback(server["processes"].stop)
        server["processes"].wait(server["ready"])
    return started


async def _measure(model: Path, started: dict[str, Any], small: bool) -> dict[str, Any]:
    ours, theirs = started["triptych"], started["vLLM"]
    peers: list[Peer] = [
        TritonPeer("triptych gRPC", ours["processes"], ours["grpc"], "chat_vllm"),
        OpenAIPeer("triptych gateway", ours["processes"], ours["url"]),
        OpenAIPeer("vLLM", theirs["processes"], theirs["url"]),
    ]
    loads = Loads(str(model))
    found: dict[str, dict[str, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    try:
        for peer in peers:
            await warm(peer, loads.take("unique image", 2))
        for number in range(1 if small else ROUNDS):
            for turn in range(len(peers)):
                peer = peers[(turn + number) % len(peers)]
                for kind, bodies, streams in _kinds(loads, small):
                    found[kind][peer.name].append(await closed(peer, bodies, streams))
    finally:
        for peer in peers:
            await peer.close()
    return {kind: _told(measured) for kind, measured in found.items()}


def _kinds(loads: Loads, small: bool) -> Iterator[tuple[str, list[bytes], int]]:
    """Name, requests and streams of each load, none of whose pictures came before."""
    yield "one image", loads.take("unique image", 4 if small else 32), 1
    users, turns = (3, 2) if small else (USERS, TURNS)
    sizes = 512 if small else 1024
    yield "four images", [loads.asking(4, sizes) for _ in range(2 if small else 16)], 1
    talks = [loads.talk(turns, SHOWN, sizes) for _ in range(users)]
    # A turn of everybody, then the next: nobody asks on before an answer.
    order = random.Random(0)
    rounds = [order.sample(turn, len(turn)) for turn in zip(*talks, strict=True)]
    yield "conversations", list(itertools.chain(*rounds)), users


def _told(measured: dict[str, list[Measured]]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, rounds in measured.items():
        middle = len(rounds) // 2
        told[name] = {
            "ttft_ms": sorted(one.ttft for one in rounds)[middle] * 1e3,
            "ttft_p99_ms": sorted(one.ttft_p99 for one in rounds)[middle] * 1e3,
            "requests_per_s": sorted(one.requests_per_s for one in rounds)[middle],
            "cpu_s": sorted(one.cpu_per_request for one in rounds)[middle],
            "errors": sum(one.errors for one in rounds),
        }
    for figures in told.values():
        figures["ttft ÷ vLLM's"] = figures["ttft_ms"] / told["vLLM"]["ttft_ms"]
    return told


if __name__ == "__main__":
    main()
