"""Where bytes lie: which memory an address is in, the same in every process that maps it.

The models of `watch` note the places of one request's embeddings, a line each, on their way from
the tower to the engine.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

TRITON = "Triton's shared memory"
GPU = "a GPU's memory"
_MODEL = """\
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})

import places
from {module} import {stage}

places.{role}(Path({notes!r}))


class TritonPythonModel({stage}):
    {body}
"""


def watch(repository: Path, notes: Path) -> None:
    """Have ``encoder`` and ``decode_echo`` of a repository note places."""
    tests = str(Path(__file__).parent)
    for model, role, module, stage, body in (
        ("encoder", "watch_encoder", "triptych.stages.encoder", "EncoderModel", "pass"),
        (
            "decode_echo",
            "watch_decode",
            "triptych.stages.decode",
            "DecodeModel",
            "engine_type = places.EchoEngine",
        ),
    ):
        code = _MODEL.format(
            tests=tests, notes=str(notes), role=role, module=module, stage=stage, body=body
        )
        (repository / model / "1" / "model.py").write_text(code)


def watch_encoder(notes: Path) -> None:
    """Note where the tower has left the embeddings, and where they are handed over."""
    from triptych.encode import encoder
    from triptych.handover.owner import NixlPublisher
    from triptych.handover.tensor import TensorPublisher

    join = encoder._join

    def joined(parts: Any, entries: Any, whole: Any) -> None:
        for part in parts:
            _note(notes, "tower", part)
        join(parts, entries, whole)

    encoder._join = joined
    for publisher in (TensorPublisher, NixlPublisher):
        _watch_publisher(publisher, notes)


def _watch_publisher(publisher: Any, notes: Path) -> None:
    publish = publisher.publish

    def published(self: Any, embeddings: Any, ticket: Any) -> Any:
        if ticket.items:
            _note(notes, "encoder", embeddings)
        return publish(self, embeddings, ticket)

    publisher.publish = published


def watch_decode(notes: Path) -> None:
    """Note where decode finds them, and where the engine does."""
    global EchoEngine
    from triptych.engines.echo import EchoEngine as Echo
    from triptych.stages import decode

    read = decode.read_embeddings

    def found(request: Any) -> Any:
        embeddings = read(request)
        if embeddings is not None:
            _note(notes, "decode", embeddings)
        return embeddings

    decode.read_embeddings = found

    class EchoEngine(Echo):  # type: ignore[no-redef]
        def generate(self, prompt: Any, media: Any) -> Any:
            for _, tensor in media:
                _note(notes, "engine", tensor)
            return super().generate(prompt, media)


def _note(notes: Path, what: str, tensor: Any) -> None:
    found = GPU if tensor.is_cuda else place(tensor.data_ptr())
    with notes.open("a") as file:
        file.write(json.dumps([what, found]) + "\n")


def place(address: int) -> str:
    """The memory at an address: a file's, by its inode and offset, or a process's own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        mapped, _, offset, device, inode, *name = line.split(maxsplit=5)
        start, end = (int(bound, 16) for bound in mapped.split("-"))
        if start <= address < end:
            if inode != "0":
                at = int(offset, 16) + address - start
                known = TRITON if name and "/dev/shm/triptych" in name[0] else device
                return f"{known} {inode} {at}"
            return f"process {os.getpid()} {address}"
    raise ValueError(f"nothing is mapped at {address:#x}")
