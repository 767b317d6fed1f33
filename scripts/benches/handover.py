"""From the encoder's output to the engine's input, by each road, against a copy of the same bytes.

NIXL alone: two processes, one that publishes and one that fetches. Counted is what both do, from
the embeddings in the arena to tensors of ours: sealing with checksums, reading, verifying. The way
of the ticket between them is not: that is Triton's. A copy is numpy's, between memory that both
sides have touched before.

Through Triton: an ensemble of two models for each road, which do what encoder and decode do with
embeddings and nothing else, from before `Publisher.publish` in the one to the tensors in the other.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tritonclient.grpc as triton

from benches import Row
from triptych import contract
from triptych.contract import Ticket, TicketItem
from triptych.handover.owner import NixlPublisher
from triptych.handover.reader import NixlFetcher
from triptych.server import Server, ServerOptions

MIB = 1 << 20
SIZES = (1, 10, 16, 100)
"""MiB."""
ARENA = 256 * MIB
KEY = bytes(32)
WIDTH = 1024
CHECKPOINT = Path(__file__).parents[2] / "models" / "tiny-qwen2.5-vl"


def run(quick: bool) -> list[Row]:
    """Measure; a row a goal."""
    torch.set_num_threads(1)
    rounds = 15 if quick else 60
    rows = _alone(rounds)
    with _server() as server:
        for size in SIZES:
            roads = _through_triton(server, size, rounds)
            _tell(f"{size} MiB through Triton", roads)
            if size >= 10:
                name = f"through Triton, {size} MiB: NIXL ÷ tensor"
                pairs = zip(roads["nixl"], roads["tensor"], strict=True)
                rows.append(Row.of(name, [nixl / tensor for nixl, tensor in pairs], 1.0))
    return rows


def _alone(rounds: int) -> list[Row]:
    rows = []
    source, target = (np.ones(max(SIZES) * MIB, dtype=np.uint8) for _ in range(2))
    with _owner() as ask:
        fetcher = NixlFetcher(ARENA, KEY)
        for size in SIZES:
            nbytes = size * MIB
            times: dict[str, list[float]] = {"copy": [], "seal": [], "fetch": []}
            for _ in range(rounds + 3):
                times["copy"].append(_seconds(np.copyto, target[:nbytes], source[:nbytes]))
                sealing, data = ask(nbytes)
                times["seal"].append(sealing)
                ticket = contract.decode(data, Ticket)
                times["fetch"].append(_seconds(lambda one: fetcher.fetch(one).result(), ticket))
            times = {name: spent[3:] for name, spent in times.items()}  # the first ones warm up
            _tell(f"{size} MiB by NIXL alone", times)
            pairs = zip(times["seal"], times["fetch"], strict=True)
            whole = [seal + fetch for seal, fetch in pairs]
            if size == 1:
                ratios = [one / 100e-6 for one in whole]
                rows.append(Row.of("NIXL alone, 1 MiB ÷ 100 µs", ratios, 1.0))
            if size == 16:
                ratios = [one / copy for one, copy in zip(whole, times["copy"], strict=True)]
                rows.append(Row.of("NIXL alone, 16 MiB ÷ copy", ratios, 1.3))
        fetcher.close()
    return rows


def _seconds(work: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def _tell(what: str, times: dict[str, list[float]]) -> None:
    shown = ", ".join(f"{name} {median(spent) * 1e6:.0f} µs" for name, spent in times.items())
    print(f"{what}: {shown}", file=sys.stderr)


@contextmanager
def _owner() -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_publish, args=(theirs,))
    process.start()

    def ask(nbytes: int) -> Any:
        ours.send(nbytes)
        return ours.recv()

    try:
        yield ask
    finally:
        ours.send(0)
        process.join()


def _publish(pipe: Any) -> None:
    torch.set_num_threads(1)
    publisher = NixlPublisher(ARENA, torch.device("cpu"), KEY)
    while nbytes := pipe.recv():
        embeddings, ticket = produce(publisher, nbytes)
        start = time.perf_counter()
        ticket = publisher.publish(embeddings, ticket)
        pipe.send((time.perf_counter() - start, contract.encode(ticket)))
    publisher.close()


def produce(publisher: Any, nbytes: int) -> tuple[torch.Tensor, Ticket]:
    """What an encoder has before it publishes: one item of float32."""
    embeddings = publisher.room(nbytes)
    embeddings.fill_(1)
    item = TicketItem("image", "bench", "float32", (nbytes // (4 * WIDTH), WIDTH), 0)
    return embeddings, Ticket([item])


MODEL = """\
import sys

sys.path.insert(0, {scripts!r})

from benches._handover_models import {name} as TritonPythonModel
"""
CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 0
input [ {inputs} ]
output [ {outputs} ]
"""
ENSEMBLE = """\
name: "by_{road}"
platform: "ensemble"
max_batch_size: 0
input [ {{ name: "NBYTES" data_type: TYPE_INT64 dims: [ 1 ] }} ]
output [ {{ name: "SECONDS" data_type: TYPE_FP64 dims: [ 1 ] }} ]
ensemble_scheduling {{ step [
  {{ model_name: "produce" model_version: -1
    input_map {{ key: "NBYTES" value: "NBYTES" }}
    output_map {{ key: "TICKET" value: "TICKET" }}
    output_map {{ key: "READY" value: "READY" }} {produced} }},
  {{ model_name: "consume" model_version: -1
    input_map {{ key: "TICKET" value: "TICKET" }}
    input_map {{ key: "READY" value: "READY" }} {consumed}
    output_map {{ key: "SECONDS" value: "SECONDS" }} }}
] }}
"""
TENSORS = {
    "produce": (
        '{ name: "NBYTES" data_type: TYPE_INT64 dims: [ 1 ] }',
        '{ name: "TICKET" data_type: TYPE_STRING dims: [ 1, 1 ] }, '
        '{ name: "READY" data_type: TYPE_FP64 dims: [ 1 ] }, '
        '{ name: "EMBEDDINGS" data_type: TYPE_UINT8 dims: [ 1, -1 ] }',
    ),
    "consume": (
        '{ name: "TICKET" data_type: TYPE_STRING dims: [ 1, 1 ] }, '
        '{ name: "READY" data_type: TYPE_FP64 dims: [ 1 ] }, '
        '{ name: "EMBEDDINGS" data_type: TYPE_UINT8 dims: [ 1, -1 ] optional: true }',
        '{ name: "SECONDS" data_type: TYPE_FP64 dims: [ 1 ] }',
    ),
}


@contextmanager
def _server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        for name, (inputs, outputs) in TENSORS.items():
            (repository / name / "1").mkdir(parents=True)
            config = CONFIG.format(name=name, inputs=inputs, outputs=outputs)
            (repository / name / "config.pbtxt").write_text(config)
            code = MODEL.format(scripts=str(Path(__file__).parents[1]), name=name.title())
            (repository / name / "1" / "model.py").write_text(code)
        for road in ("tensor", "nixl"):
            (repository / f"by_{road}" / "1").mkdir(parents=True)
            mapped = 'key: "EMBEDDINGS" value: "EMBEDDINGS"' if road == "tensor" else ""
            text = ENSEMBLE.format(
                road=road,
                produced=f"output_map {{ {mapped} }}" if mapped else "",
                consumed=f"input_map {{ {mapped} }}" if mapped else "",
            )
            (repository / f"by_{road}" / "config.pbtxt").write_text(text)
        server = Server(
            ServerOptions(
                model=str(CHECKPOINT),
                ensemble="by_tensor",
                model_repository=folder,
                http_port=0,
                grpc_port=0,
                metrics_port=0,
                extra_args=("--load-model=by_nixl",),
            )
        )
        try:
            server.start()
            while not {"by_tensor", "by_nixl"} <= set(server.log.loaded):
                time.sleep(0.1)
            yield server
        finally:
            server.stop()


def _through_triton(server: Server, size: int, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"tensor": [], "nixl": []}
    nbytes = triton.InferInput("NBYTES", [1], "INT64")
    nbytes.set_data_from_numpy(np.array([size * MIB]))
    with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        for _ in range(rounds + 3):
            for road, spent in times.items():
                seconds = client.infer(f"by_{road}", [nbytes]).as_numpy("SECONDS")
                spent.append(float(seconds[0]))
    return {road: spent[3:] for road, spent in times.items()}
