"""A decoding process: ``python -m triptych.media.worker FD PARENT``.

It is given the planner and the settings once, and two pieces of shared memory that stay: the
parent writes a file into the one, the worker an array into the other, and the parent copies it out
before it looks at it. What comes back is data, never a pickle: the parent does not trust a process
that has read strangers' files.

    parent ──▶ Job       file in the inbox       one SOCK_SEQPACKET message each way
    parent ◀── Answer    array in the outbox
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import pickle
import socket
import sys
import traceback
from typing import NamedTuple

import msgspec
import numpy as np

from triptych.contract import DType, GridTHW, Modality
from triptych.errors import TriptychError
from triptych.media import sandbox
from triptych.media.base import Array, MediaOptions, Pixels, Planner, Room, fresh
from triptych.settings import MediaSettings

logger = logging.getLogger("triptych.media")

MESSAGE_BYTES = 1 << 16
"""Of one Job or Answer; arrays and files travel beside them."""
NICENESS = 10
"""Decoding takes what texts and their tokens leave, as encoding on a CPU does."""
KEPT_BYTES = 32 << 20
"""Shared memory that a worker keeps from one job to the next: fresh pages cost time."""


class Start(NamedTuple):
    """What a worker is started with; pickled, by the parent only."""

    planner: Planner
    settings: MediaSettings
    memory_bytes: int
    preload: tuple[str, ...]
    """Modules to import before the door is shut."""


class Job(msgspec.Struct, frozen=True):
    """One medium to decode."""

    modality: Modality
    kind: str
    """Which decoder: ``image``, ``video``, ``audio``, ``embeddings`` or ``pickle``."""
    size: int
    """Bytes of the file, from the inbox's start."""
    options: MediaOptions


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of it."""

    shape: tuple[int, ...] = ()
    dtype: DType = "uint8"
    tokens: int = 0
    grid_thw: GridTHW | None = None
    second_per_grid: float | None = None
    timestamps: tuple[float, ...] = ()
    precomputed: bool = False
    stamp: str = ""
    """All that shaped the array apart from the content; it goes into the hash."""
    error: str = ""
    """Wire form of the error that the caller is told."""
    fault: str = ""
    """A traceback: this is a fault of ours, for the log."""


class Ready(msgspec.Struct, frozen=True):
    """The worker waits for its first job."""

    confined: bool


class Outbox:
    """Shared memory on the way to the parent; small pictures are decoded right into it.

    Args:
        handle: Of the memory.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        os.ftruncate(handle, KEPT_BYTES)
        self._kept: Pixels = np.frombuffer(mmap.mmap(handle, KEPT_BYTES), np.uint8)

    def room(self, shape: tuple[int, int, int]) -> Pixels:
        """A `triptych.media.base.Room`: at the outbox's start, if it fits."""
        size = math.prod(shape)
        return self._kept[:size].reshape(shape) if size <= KEPT_BYTES else fresh(shape)

    def put(self, array: Array) -> None:
        """Have ``array`` lie at the outbox's start."""
        if array.size and array.ctypes.data != self._kept.ctypes.data:
            write(self._handle, np.ascontiguousarray(array).data.cast("B"))


_ENCODER = msgspec.msgpack.Encoder()


def main(descriptor: int, parent: int) -> None:
    """Serve until the parent hangs up."""
    sandbox.die_with_parent(parent)
    channel = socket.socket(fileno=descriptor)
    message, (inbox, outbox), *_ = socket.recv_fds(channel, MESSAGE_BYTES, 2)
    start: Start = pickle.loads(read(inbox, int(message)))  # from the parent, which is us
    for name in start.preload:
        __import__(name)
    sandbox.limit_memory(start.memory_bytes)
    os.nice(NICENESS)
    channel.send(_ENCODER.encode(Ready(confined=sandbox.confine())))
    jobs, out = msgspec.msgpack.Decoder(Job), Outbox(outbox)
    while message := channel.recv(MESSAGE_BYTES):
        array, answer = _answer(jobs.decode(message), inbox, start, out.room)
        out.put(array)
        channel.send(_ENCODER.encode(answer))


def decode(
    job: Job, data: bytes, planner: Planner, settings: MediaSettings, room: Room = fresh
) -> tuple[Array, Answer]:
    """Run the decoder that ``job`` asks for; each is imported when first needed."""
    if job.kind == "image":
        from triptych.media import image

        pixels, picture = image.load(
            data,
            planner,
            max_pixels=settings.max_image_pixels,
            mode=settings.image_mode,
            options=job.options,
            room=room,
        )
        stamp = msgspec.json.encode((picture, settings.image_mode)).decode()
        return pixels, Answer(tokens=picture.tokens, grid_thw=picture.grid_thw, stamp=stamp)
    if job.kind == "video":
        from triptych.media import video

        clip = video.load(data, planner, settings, job.options)
        return clip.frames, Answer(
            tokens=clip.plan.tokens,
            grid_thw=clip.plan.grid_thw,
            second_per_grid=clip.plan.second_per_grid,
            timestamps=clip.timestamps,
            stamp=msgspec.json.encode((clip.plan, clip.timestamps)).decode(),
        )
    if job.kind == "audio":
        from triptych.media import audio

        samples, plan = audio.load(data, planner, settings, job.options)
        stamp = f"{planner.audio_rate} {job.options.sampling_rate}"
        return samples, Answer(dtype="float32", tokens=plan.tokens, stamp=stamp)
    from triptych.media import embeddings

    read = embeddings.load_pickle if job.kind == "pickle" else embeddings.load
    found = read(data, job.modality, planner, max_tokens=settings.max_embedding_tokens)
    return found.array, Answer(
        dtype=found.dtype,
        tokens=found.array.shape[0],
        grid_thw=found.grid_thw,
        second_per_grid=found.second_per_grid,
        precomputed=True,
    )


def _answer(job: Job, inbox: int, start: Start, room: Room) -> tuple[Array, Answer]:
    """The array and its description, or an empty one and what was wrong."""
    nothing = np.empty(0, np.uint8)
    try:
        array, answer = decode(job, read(inbox, job.size), start.planner, start.settings, room)
    except TriptychError as error:
        return nothing, Answer(error=str(error))
    except Exception:
        return nothing, Answer(fault=traceback.format_exc()[-MESSAGE_BYTES // 4 :])
    return array, msgspec.structs.replace(answer, shape=array.shape)


def write(handle: int, data: bytes | memoryview) -> None:
    """Write ``data`` to shared memory from its start."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], done)


def read(handle: int, size: int) -> bytes:
    """The first ``size`` bytes of shared memory, or fewer where it ends before."""
    data = os.pread(handle, size, 0)
    while len(data) < size and (part := os.pread(handle, size - len(data), len(data))):
        data += part
    return data


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
