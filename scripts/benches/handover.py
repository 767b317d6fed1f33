"""From the encoder's output to the engine's input, by each road, against a copy of the same bytes.

NIXL alone: two processes, one that publishes and one that fetches. Counted is what both do, from
the embeddings in the arena to tensors of ours: sealing with checksums, reading, verifying. The way
of the ticket between them is not: that is Triton's. A copy is numpy's, between memory that both
sides have touched before.

Into the engine: an ensemble for each road, of a model that only hands over and of decode with
vLLM, whose language model is thin, so that 100 MiB of embeddings are few tokens. Counted is from
before `Publisher.publish` in the one to where the language model reads its input, in the engine's
process. *inline*: decode has the embeddings and sends them on; *connector*: the engine fetches.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import queue
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import tritonclient.grpc as triton

from benches import Row, _wide
from benches._tell import tell
from triptych import contract
from triptych.contract import Ticket, TicketItem
from triptych.handover import Publisher
from triptych.handover.owner import NixlPublisher
from triptych.handover.reader import NixlFetcher
from triptych.server import Server, ServerOptions

MIB = 1 << 20
SIZES = (1, 10, 16, 100)
"""MiB."""
ARENA = 256 * MIB
KEY = bytes(32)
ROADS = ("tensor", "nixl", "connector")
"""The first two are inline."""


def run(quick: bool) -> list[Row]:
    """Measure; a row a goal."""
    torch.set_num_threads(1)
    rounds = 15 if quick else 60
    rows = _alone(rounds)
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as server:
        for size in (1, 10, 100):
            times = _into_the_engine(server, Path(folder), size, max(6, rounds // size))
            _tell_engine(size, times)
            for road in ("tensor", "nixl"):
                pairs = zip(times["connector"], times[road], strict=True)
                name = f"into the engine, {size} MiB: connector ÷ inline by {road}"
                rows.append(
                    Row.of(name, [ours.input / theirs.input for ours, theirs in pairs], 1.0)
                )
            if size > 1:
                pairs = zip(times["nixl"], times["tensor"], strict=True)
                name = f"into the engine, {size} MiB: inline by NIXL ÷ by tensor"
                rows.append(
                    Row.of(name, [nixl.input / tensor.input for nixl, tensor in pairs], 1.0)
                )
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
    tell(f"{what}: {shown}")


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


def produce(
    publisher: Publisher, nbytes: int, width: int = 1024, name: str = "bench"
) -> tuple[torch.Tensor, Ticket]:
    """What an encoder has before it publishes: one item of float32."""
    embeddings = publisher.room(nbytes)
    embeddings.fill_(1)
    tokens = nbytes // (4 * width)
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    grid = (1, 2 * rows, 2 * tokens // rows)
    return embeddings, Ticket(
        [TicketItem("image", name, "float32", (tokens, width), 0, grid_thw=grid)]
    )


class Times(NamedTuple):
    """Of one request, in seconds."""

    copy: float
    """The same bytes by numpy."""
    input: float
    """From the encoder's output to the engine's input."""
    first: float
    """From there to the first token, at the caller's."""


def _into_the_engine(
    server: Server, folder: Path, size: int, rounds: int
) -> dict[str, list[Times]]:
    times: dict[str, list[Times]] = {road: [] for road in ROADS}
    nbytes = triton.InferInput("NBYTES", [1], "INT64")
    nbytes.set_data_from_numpy(np.array([size * MIB]))
    source, target = (np.ones(size * MIB, dtype=np.uint8) for _ in range(2))
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for _ in range(rounds + 3):
            for road, spent in times.items():
                client.async_stream_infer(f"by_{road}", [nbytes])
                _, error = answers.get(timeout=120)
                arrived = time.monotonic()
                if error:
                    raise error
                ready, taken = (_last(folder / name) for name in ("ready", "taken"))
                copy = _seconds(np.copyto, target, source)
                spent.append(Times(copy, taken - ready, arrived - taken))
        client.stop_stream()
    return {road: spent[3:] for road, spent in times.items()}


def _last(notes: Path) -> float:
    return float(notes.read_text().splitlines()[-1])


def _tell_engine(size: int, times: dict[str, list[Times]]) -> None:
    for road, spent in times.items():
        ratio = median(one.input / one.copy for one in spent)
        share = median(one.input / (one.input + one.first) for one in spent)
        tell(
            f"{size} MiB into the engine by {road}: {median(t.input for t in spent) * 1e3:.2f} ms, "
            f"{ratio:.2f} × a copy, {share:.0%} of the time to first token"
        )


MODEL = """\
import sys

sys.path.insert(0, {scripts!r})

from benches._handover_models import {kind} as TritonPythonModel
"""
CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 0
input [ {inputs} ]
output [ {outputs} ]
{more}
parameters {{ key: "NOTES" value {{ string_value: "{notes}" }} }}
"""
ENSEMBLE = """\
name: "by_{road}"
platform: "ensemble"
max_batch_size: 0
input [ {{ name: "NBYTES" data_type: TYPE_INT64 dims: [ 1 ] }} ]
output [ {{ name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }} ]
ensemble_scheduling {{ step [
  {{ model_name: "produce" model_version: -1
    input_map {{ key: "NBYTES" value: "NBYTES" }}
    {produced} }},
  {{ model_name: "decode_{ingest}" model_version: -1
    {consumed}
    output_map {{ key: "TEXT" value: "TEXT" }} }}
] }}
"""
HANDED = (
    '{ name: "PROMPT" data_type: TYPE_STRING dims: [ 1 ] }, '
    '{ name: "TICKET" data_type: TYPE_STRING dims: [ 1, 1 ] }, '
    '{ name: "EMBEDDINGS" data_type: TYPE_UINT8 dims: [ 1, -1 ]'
)


@contextmanager
def _server(folder: Path) -> Iterator[Server]:
    repository = folder / "models"
    _model(repository, "produce", "Produce", folder / "ready", "")
    for ingest in ("inline", "connector"):
        more = (
            "model_transaction_policy { decoupled: true }\n"
            "instance_group [ { kind: KIND_MODEL count: 1 } ]\n"
            f'parameters {{ key: "embedding_ingest" value {{ string_value: "{ingest}" }} }}'
        )
        _model(repository, f"decode_{ingest}", "Consume", folder / "taken", more)
    for road in ROADS:
        mapped = ["PROMPT", "TICKET", *(["EMBEDDINGS"] if road == "tensor" else [])]
        text = ENSEMBLE.format(
            road=road,
            ingest="connector" if road == "connector" else "inline",
            produced=" ".join(f'output_map {{ key: "{name}" value: "{name}" }}' for name in mapped),
            consumed=" ".join(f'input_map {{ key: "{name}" value: "{name}" }}' for name in mapped),
        )
        (repository / f"by_{road}" / "1").mkdir(parents=True)
        (repository / f"by_{road}" / "config.pbtxt").write_text(text)
    arguments = folder / "engine.json"
    # Every request is new: what others left in the caches would only have to be looked through.
    cacheless = {"enable_prefix_caching": False, "max_num_batched_tokens": _wide.TOKENS}
    arguments.write_text(json.dumps(cacheless))
    server = Server(
        ServerOptions(
            model=str(_wide.write(folder / "checkpoint")),
            ensemble="by_tensor",
            model_repository=str(repository),
            settings={"engine_args": str(arguments), "handover_at_start": True},
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            extra_args=("--load-model=by_nixl", "--load-model=by_connector"),
        )
    )
    try:
        server.start()
        while not {f"by_{road}" for road in ROADS} <= set(server.log.loaded):
            time.sleep(0.1)
        yield server
    finally:
        server.stop()


def _model(repository: Path, name: str, kind: str, notes: Path, more: str) -> None:
    inputs = '{ name: "NBYTES" data_type: TYPE_INT64 dims: [ 1 ] }'
    outputs = f"{HANDED} }}"
    if kind == "Consume":
        inputs = f"{HANDED} optional: true }}"
        outputs = '{ name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }'
    config = CONFIG.format(name=name, inputs=inputs, outputs=outputs, more=more, notes=notes)
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(config)
    code = MODEL.format(scripts=str(Path(__file__).parents[1]), kind=kind)
    (repository / name / "1" / "model.py").write_text(code)
