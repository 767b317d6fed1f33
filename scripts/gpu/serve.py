"""Triptych and vLLM's own server on a GPU: texts, pictures, and conversations that keep pictures.

Qwen2.5-VL-7B with weights drawn at random, the same version of vLLM, all servers on one GPU and all
but one idle. After each load a line of JSON: for each server the time to first token and what was
answered a second, medians over the rounds so far, and the ratios to vLLM's own.

``--small`` serves the tiny model, whose answers mean something: the line tells how many of each
server's are vLLM's own. ``--rounds 3`` measures less often, ``--only triptych`` one server alone.
"""

from __future__ import annotations

import argparse
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

import torch

from benches._checkpoint import TINY, endless, never_end
from benches._drive import Measured, closed
from benches._loads import Loads
from benches._peers import (
    VLLM_ENVIRON,
    OpenAIPeer,
    Peer,
    TritonPeer,
    start_triptych,
    start_vllm,
    warm,
)
from checkpoints import write

CONTEXT = 16384
ROUNDS = 5
USERS, TURNS, SHOWN = 30, 8, 5
"""Each turn shows the pictures of the last and one more, at most five."""
SHARE = 0.4
"""Of the GPU's memory, for each engine."""
COMPILATION = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
}
"""CUDA graphs, and no compiler, which a start would wait a minute for; the same for both."""
OF_A_GPU = dict.fromkeys(VLLM_ENVIRON.keys() - {"VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"})
"""Of what vLLM's server is told on a CPU, all that it is not told here."""


def main() -> None:
    """Serve and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", choices=("triptych", "vLLM"))
    arguments = parser.parse_args()
    small = arguments.small
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model = endless(folder / "checkpoint", CONTEXT) if small else _large(folder / "checkpoint")
        load = {} if small else {"load_format": "dummy"}
        if torch.cuda.is_available():
            load |= {"gpu_memory_utilization": SHARE, "compilation_config": COMPILATION}
            load["attention_backend"] = "FLASH_ATTN"  # others need what is not packed
        started = _start(model, folder, load, stack, arguments.only)
        starts = {name: round(one["processes"].ready_s, 1) for name, one in started.items()}
        if "triptych" in started:
            log = _log(folder).read_text().splitlines()
            print("\n".join(line for line in log if "started in" in line), file=sys.stderr)
        print(json.dumps({"start to ready, s": starts}), flush=True)
        asyncio.run(_measure(model, started, 1 if small else arguments.rounds, small))


def _large(folder: Path) -> Path:
    """Real sizes, save for the words: those of the tokenizer that is here."""
    write("Qwen2.5-VL-7B", folder)
    config = json.loads((folder / "config.json").read_text())
    tiny = json.loads((TINY / "config.json").read_text())
    words = tiny.get("text_config", tiny)["vocab_size"]
    config["text_config"]["vocab_size"] = config["vocab_size"] = words
    (folder / "config.json").write_text(json.dumps(config))
    never_end(folder, CONTEXT)
    return folder


def _start(
    model: Path, folder: Path, load: dict[str, Any], stack: ExitStack, only: str | None
) -> dict[str, Any]:
    engine = folder / "engine.json"
    engine.write_text(json.dumps({"max_num_batched_tokens": CONTEXT, **load}))
    log = _log(folder)
    flags = [f"--engine-args={engine}", "--max-num-seqs=64", f"--max-model-len={CONTEXT}"]
    flags.append(f"--log-file={log}")
    theirs = [
        *("--max-num-seqs=64", f"--max-model-len={CONTEXT}"),
        *(f"--max-num-batched-tokens={CONTEXT}", "--limit-mm-per-prompt", '{"image": 5}'),
        *(f"--{name.replace('_', '-')}={_flag(value)}" for name, value in load.items()),
    ]
    started = {}
    for name, start, arguments, environ in (
        ("triptych", start_triptych, flags, {}),
        ("vLLM", start_vllm, theirs, OF_A_GPU if torch.cuda.is_available() else {}),
    ):
        if only not in (None, name):
            continue
        server = started[name] = start(model, folder, arguments, environ)  # type: ignore[operator]
        stack.callback(server["processes"].stop)
        try:
            server["processes"].wait(server["ready"])
        except RuntimeError:
            if log.exists():
                print(log.read_text()[-8000:], file=sys.stderr)
            raise
    return started


def _log(folder: Path) -> Path:
    return folder / "triton.log"


def _flag(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


async def _measure(model: Path, started: dict[str, Any], rounds: int, small: bool) -> None:
    peers: list[Peer] = []
    if ours := started.get("triptych"):
        peers.append(TritonPeer("triptych gRPC", ours["processes"], ours["grpc"], "chat_vllm"))
        peers.append(OpenAIPeer("triptych gateway", ours["processes"], ours["url"]))
    if theirs := started.get("vLLM"):
        peers.append(OpenAIPeer("vLLM", theirs["processes"], theirs["url"]))
    loads = Loads(str(model))
    found: dict[str, dict[str, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    try:
        for peer in peers:
            # Workers start, and kernels are chosen and recorded, when they are needed first.
            await warm(peer, [loads.asking(4, 1024) for _ in range(4)])
            await closed(peer, loads.take("unique image", 24), 8)
            await closed(peer, loads.take("text", 32), 32)
        if small and len(peers) == 3:
            print(json.dumps({"equal to vLLM's": await _equal(peers, loads)}), flush=True)
        for number in range(rounds):
            for turn in range(len(peers)):
                peer = peers[(turn + number) % len(peers)]
                for kind, bodies, streams in _kinds(loads, small):
                    found[kind][peer.name].append(await closed(peer, bodies, streams))
                    print(json.dumps({kind: _told(found[kind])}), flush=True)
    finally:
        for peer in peers:
            await peer.close()


async def _equal(peers: list[Peer], loads: Loads) -> dict[str, str]:
    """How many answers of each server are those of vLLM's own, to the same requests."""
    bodies = [
        body for kind in ("text", "unique image", "small image") for body in loads.take(kind, 4)
    ]
    texts = {
        peer.name: [sample.text for sample in (await closed(peer, bodies, 1)).samples]
        for peer in peers
    }
    return {
        name: f"{sum(map(str.__eq__, said, texts['vLLM']))} of {len(bodies)}"
        for name, said in texts.items()
    }


def _kinds(loads: Loads, small: bool) -> Iterator[tuple[str, list[bytes], int]]:
    """Name, requests and streams of each load, none of whose pictures came before."""
    for streams, count in ((1, 8), (8, 48), (32, 128)):
        yield f"text, {streams}", loads.take("text", 4 if small else count), streams
    yield "unique image, 8", loads.take("unique image", 8 if small else 48), 8
    yield "same image, 8", loads.take("same image", 8 if small else 64), 8
    yield "one image", loads.take("unique image", 4 if small else 16), 1
    users, turns = (3, 2) if small else (USERS, TURNS)
    sizes = 512 if small else 1024
    yield "four images", [loads.asking(4, sizes) for _ in range(2 if small else 8)], 1
    talks = [loads.talk(turns, SHOWN, sizes) for _ in range(users)]
    # A turn of everybody, then the next: nobody asks on before an answer.
    order = random.Random(0)
    rounds = [order.sample(turn, len(turn)) for turn in zip(*talks, strict=True)]
    yield "conversations", list(itertools.chain(*rounds)), users


def _told(measured: dict[str, list[Measured]]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, rounds in measured.items():
        if wrong := [sample.error for one in rounds for sample in one.samples if sample.error]:
            told[name] = {"errors": len(wrong), "first": wrong[0]}
            continue
        middle = len(rounds) // 2
        told[name] = {
            "ttft_ms": sorted(one.ttft for one in rounds)[middle] * 1e3,
            "ttft_p99_ms": sorted(one.ttft_p99 for one in rounds)[middle] * 1e3,
            "itl_ms": sorted(one.itl for one in rounds)[middle] * 1e3,
            "tokens_per_s": sorted(one.tokens_per_s for one in rounds)[middle],
            "requests_per_s": sorted(one.requests_per_s for one in rounds)[middle],
            "cpu_s": sorted(one.cpu_per_request for one in rounds)[middle],
            "errors": 0,
        }
    if not told.get("vLLM", {"errors": 1})["errors"]:
        for figures in (one for one in told.values() if not one["errors"]):
            for name in ("ttft_ms", "tokens_per_s", "requests_per_s"):
                figures[f"{name} ÷ vLLM's"] = figures[name] / told["vLLM"][name]
    return told


if __name__ == "__main__":
    main()
