"""An ensemble that ends before the language model: preprocess → encoder, REQUEST to TICKET."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
import tritonclient.grpc as triton

from triptych import contract
from triptych.contract import Prompt, Ticket
from triptych.server import Server, ServerOptions

ROOT = Path(__file__).parents[1]

TYPES = {name: spec.datatype for name, spec in contract.TENSORS.items()}

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
    """The models of the repository and ``embed``, with so many instances."""
    repository = folder / "model_repository"
    shutil.copytree(ROOT / "model_repository", repository)
    (repository / "embed" / "1").mkdir(parents=True)
    (repository / "embed" / "config.pbtxt").write_text(CONFIG)
    for model, old, count in (
        ("preprocess", "KIND_CPU  count: 2", preprocess),
        ("encoder", "KIND_AUTO  count: 1", encoders),
    ):
        config = repository / model / "config.pbtxt"
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, f"{old.rpartition(' ')[0]} {count}"))
    return repository


def serve(
    checkpoint: Path, folder: Path, *, instances: dict[str, int] | None = None, **settings: Any
) -> Server:
    """A server of ``embed``, started; `ready` waits for it."""
    options = ServerOptions(
        model=str(checkpoint),
        ensemble="embed",
        model_repository=str(write_repository(folder, **(instances or {}))),
        settings=settings,
        log_file=str(folder / "tritonserver.log"),
        http_port=0,
        grpc_port=0,
        metrics_port=0,
    )
    return Server(options)


def ready(server: Server) -> None:
    """Wait for the ensemble, and for the metrics' port, which opens last."""
    deadline = time.monotonic() + 120
    while "embed" not in server.log.loaded or not _listening(server.metrics_port):
        assert time.monotonic() < deadline, server.log.tail()
        time.sleep(0.1)


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Answer:
    """PROMPT (of the ensemble), TICKET and EMBEDDINGS of one request."""

    def __init__(self, result: triton.InferResult) -> None:
        prompt = result.as_numpy("PROMPT")
        self.prompt = None if prompt is None else contract.decode(prompt[0], Prompt)
        self.ticket = contract.decode(result.as_numpy("TICKET")[0, 0], Ticket)
        self.bytes = result.as_numpy("EMBEDDINGS")[0].tobytes()

    @property
    def embeddings(self) -> list[torch.Tensor]:
        """Of each item, float32."""
        whole = torch.frombuffer(bytearray(self.bytes), dtype=torch.uint8)
        return [
            whole[item.offset : item.offset + item.nbytes].view(torch.float32).view(item.shape)
            for item in self.ticket.items
        ]


def chat(*urls: str, text: str = "What is this?") -> bytes:
    """A request about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": text}]
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


def metrics(server: Server) -> dict[str, float]:
    """Every metric of the encoder by its name, summed over instances."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as page:
        text = page.read().decode()
    found: dict[str, float] = {}
    for name, value in re.findall(r"^triptych_encoder_(\w+)(?:{.*})? (\S+)$", text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found
