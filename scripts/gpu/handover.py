"""Hand-over by NIXL between two processes, from device memory to device memory, against a copy.

Prints one JSON object: for each size the medians of publishing, of fetching, of both, and of the
same bytes copied within the device, and how many times a copy the hand-over takes. 9.8 MB are the
embeddings of a picture of 1024² in bfloat16 of a 7B model: 1369 × 3584.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benches.handover import produce
from triptych import contract
from triptych.contract import Ticket
from triptych.handover.owner import NixlPublisher
from triptych.handover.reader import NixlFetcher

MIB = 1 << 20
ARENA = 512 * MIB
KEY = bytes(32)
SIZES = {"1 MiB": MIB, "9.8 MB": 1369 * 3584 * 2 // 4096 * 4096, "100 MiB": 100 * MIB}
ROUNDS, WARM_UP = 100, 5


def main() -> None:
    """Measure each size."""
    device = _device()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    owner = context.Process(target=_publish, args=(theirs,))
    owner.start()
    fetcher = NixlFetcher(ARENA, KEY, device=device)
    found: dict[str, Any] = {"device": str(device), "sizes": {}}
    for name, nbytes in SIZES.items():
        source = torch.ones(nbytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copies, publishes, fetches = [], [], []
        for _ in range(ROUNDS + WARM_UP):
            copies.append(_seconds(lambda s=source, t=target: t.copy_(s)))
            ours.send(nbytes)
            spent, data = ours.recv()
            publishes.append(spent)
            ticket = contract.decode(data, Ticket)
            fetches.append(_seconds(lambda t=ticket: fetcher.fetch(t).result()))
        both = [one + other for one, other in zip(publishes, fetches, strict=True)][WARM_UP:]
        found["sizes"][name] = {
            "publish_us": median(publishes[WARM_UP:]) * 1e6,
            "fetch_us": median(fetches[WARM_UP:]) * 1e6,
            "both_us": median(both) * 1e6,
            "copy_us": median(copies[WARM_UP:]) * 1e6,
            "both ÷ copy": median(both) / median(copies[WARM_UP:]),
        }
    fetcher.close()
    ours.send(0)
    owner.join()
    print(json.dumps(found))


def _device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def _publish(pipe: Any) -> None:
    publisher = NixlPublisher(ARENA, _device(), KEY)
    while nbytes := pipe.recv():
        embeddings, ticket = produce(publisher, nbytes)
        _synchronize()
        start = time.perf_counter()
        ticket = publisher.publish(embeddings, ticket)
        pipe.send((time.perf_counter() - start, contract.encode(ticket)))
    publisher.close()


def _seconds(work: Any) -> float:
    _synchronize()
    start = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
