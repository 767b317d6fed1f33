"""A server whose ensemble ends before the language model: preprocess → encoder."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc

from triptych.contract import TENSORS
from triptych.errors import TriptychError
from triptych.server import Server, ServerOptions

ROOT = Path(__file__).parents[2]
READY_S = 180.0
ANSWER_S = 300.0

CONFIG = """
name: "embed"
platform: "ensemble"
max_batch_size: 0
input [ { name: "REQUEST" data_type: TYPE_STRING dims: [ 1 ] } ]
output [
  { name: "PROMPT"      data_type: TYPE_STRING  dims: [ 1 ] },
  { name: "TICKET"      data_type: TYPE_STRING  dims: [ 1, 1 ] },
  { name: "EMBEDDINGS"  data_type: TYPE_UINT8   dims: [ 1, -1 ] }
]
ensemble_scheduling {
  step [
    {
      model_name: "preprocess"
      model_version: -1
      input_map  { key: "REQUEST"  value: "REQUEST" }
      output_map { key: "PROMPT"   value: "PROMPT" }
      output_map { key: "MEDIA"    value: "MEDIA" }
      output_map { key: "ITEMS"    value: "ITEMS" }
    },
    {
      model_name: "encoder"
      model_version: -1
      input_map  { key: "MEDIA"       value: "MEDIA" }
      input_map  { key: "ITEMS"       value: "ITEMS" }
      output_map { key: "TICKET"      value: "TICKET" }
      output_map { key: "EMBEDDINGS"  value: "EMBEDDINGS" }
    }
  ]
}
"""


def write_repository(folder: Path, *, preprocess: int = 2, encoders: int = 1) -> Path:
    """The models of the repository, ``embed`` and ``chat_echo``, with so many instances."""
    repository = folder / "model_repository"
    shutil.copytree(ROOT / "model_repository", repository)
    (repository / "embed" / "1").mkdir(parents=True)
    (repository / "embed" / "config.pbtxt").write_text(CONFIG)
    for model in ("decode", "chat"):
        folder = shutil.copytree(repository / f"{model}_vllm", repository / f"{model}_echo")
        for file in (folder / "config.pbtxt", folder / "1" / "model.py"):
            if file.exists():
                file.write_text(file.read_text().replace("vllm", "echo").replace("Vllm", "Echo"))
    for model, old, count in (
        ("preprocess", "KIND_CPU  count: 2", preprocess),
        ("encoder", "KIND_AUTO  count: 1", encoders),
    ):
        config = repository / model / "config.pbtxt"
        text = config.read_text()
        if old not in text:
            raise ValueError(f"{config} has no {old!r}")
        config.write_text(text.replace(old, f"{old.rpartition(' ')[0]} {count}"))
    return repository


def serve(
    checkpoint: Path,
    folder: Path,
    *,
    instances: Mapping[str, int] | None = None,
    extra: Sequence[str] = (),
    **settings: Any,
) -> Server:
    """A server of ``embed`` that is yet to start; `ready` waits for it.

    Args:
        checkpoint: What it serves.
        folder: Where its models and log go.
        instances: See `write_repository`.
        extra: Further models to load.
        settings: Of the stages.
    """
    options = ServerOptions(
        model=str(checkpoint),
        ensemble="embed",
        model_repository=str(write_repository(folder, **(instances or {}))),
        settings=settings,
        log_file=str(folder / "tritonserver.log"),
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        allow_model_control=True,
        extra_args=tuple(f"--load-model={model}" for model in extra),
    )
    return Server(options)


class Caller:
    """A gRPC channel that many threads may call models by, decoupled or not.

    Args:
        server: One on this host, or an address.
    """

    def __init__(self, server: Server | str) -> None:
        self._channel = grpc.insecure_channel(
            server if isinstance(server, str) else f"127.0.0.1:{server.grpc_port}",
            [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
        )
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def infer(
        self, model: str, inputs: Mapping[str, Any], outputs: Sequence[str] = ()
    ) -> triton.InferResult:
        """The first response.

        Args:
            model: Its name.
            inputs: Arrays by the contract's names.
            outputs: What to send back; empty: all.

        Raises:
            TriptychError: As the model raised it.
        """
        first, *_ = self._call(model, inputs, outputs)  # to its end: the next finds them idle
        return _read(first)

    def first(self, model: str, body: bytes) -> float:
        """Seconds until the first response of a stream, which is then read to its end.

        Nothing is cancelled: tritonserver 2.51 dies of streams that are, one time in fifty.
        """
        start = time.perf_counter()
        call = self._call(model, {"REQUEST": np.array([body], np.object_)})
        responses = [next(call)]
        seconds = time.perf_counter() - start
        responses += call
        for response in responses:
            _read(response)
        return seconds

    def ask(self, model: str, body: bytes, outputs: Sequence[str] = ()) -> triton.InferResult:
        """The first response to a REQUEST."""
        return self.infer(model, {"REQUEST": np.array([body], np.object_)}, outputs)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _call(
        self, model: str, inputs: Mapping[str, Any], outputs: Sequence[str] = ()
    ) -> Iterator[Any]:
        request = service_pb2.ModelInferRequest(model_name=model)
        for name, array in inputs.items():
            tensor = triton.InferInput(name, list(array.shape), TENSORS[name].datatype)
            tensor.set_data_from_numpy(array)
            request.inputs.append(tensor._get_tensor())
            request.raw_input_contents.append(tensor._get_content())
        for name in outputs:
            request.outputs.add(name=name)
        call: Iterator[Any] = self._stub.ModelStreamInfer(iter([request]), timeout=ANSWER_S)
        return call


def _read(response: Any) -> triton.InferResult:
    if response.error_message:
        raise TriptychError.parse(response.error_message)
    return triton.InferResult(response.infer_response)


def ready(server: Server, model: str = "embed") -> None:
    """Wait for the ensemble or another model, and for the metrics' port, which opens last."""
    deadline = time.monotonic() + READY_S
    while model not in server.log.loaded or not _listening(server.metrics_port):
        if time.monotonic() > deadline:
            raise TimeoutError(server.log.tail())
        time.sleep(0.1)


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def chat(*urls: str, text: str = "What is this?", **fields: Any) -> bytes:
    """A request about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": text}]
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()


def metrics(server: Server, prefix: str = "triptych_encoder_") -> dict[str, float]:
    """Every metric of the encoder by its name, summed over instances."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as page:
        text = page.read().decode()
    found: dict[str, float] = {}
    for name, value in re.findall(rf"^{prefix}(\w+)(?:{{.*}})? (\S+)$", text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found
