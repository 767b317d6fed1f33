"""Bounded worker processes for decoding: a crash or a hang costs one request and one process.

A worker that ends by its own fault failed on the medium that it had. One that somebody else has
ended or stopped, such as a kernel without memory, says nothing about the medium, which then goes to
another worker.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from triptych import processes
from triptych.errors import (
    ConfigurationError,
    InternalError,
    MediaTimeout,
    MediaUnreadable,
    Overloaded,
    TriptychError,
    Unavailable,
)
from triptych.media.base import PRIORITY, Array
from triptych.media.slots import Slots
from triptych.media.worker import KEPT_BYTES, MESSAGE_BYTES, Answer, Job, Ready, Start, read, write

logger = logging.getLogger("triptych.media")

START_TIMEOUT_S = 60.0
"""Until a worker waits for its first job."""
CANCEL_GRACE_S = 0.5
"""A worker whose caller went away may finish within this, which is cheaper than a new one."""
RECYCLE_AFTER = 2000
"""Jobs after which a worker makes room for a fresh one: what a C library leaks ends there."""
STOPPED_LOOK_S = 0.5
"""Between two looks whether a worker that has a job was stopped."""
THREAD_BYTES = 4 << 20
"""From this size on a copy is made in a thread, because it would hold up the event loop."""

R = TypeVar("R")

_ANSWERS = msgspec.msgpack.Decoder(Answer)
_READY = msgspec.msgpack.Decoder(Ready)
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
}
"""glibc keeps what a picture took for the next one, where it would give it back and have the
kernel clear fresh pages; that is a third of the time of a picture."""
_ENCODER = msgspec.msgpack.Encoder()


def python() -> str:
    """The interpreter of this environment; in an embedded one `sys.executable` is another program.

    Raises:
        ConfigurationError: There is none.
    """
    names = (f"python{sys.version_info.major}.{sys.version_info.minor}", "python3", "python")
    places = [os.environ.get("VIRTUAL_ENV", ""), sys.prefix, sys.exec_prefix, sys.base_prefix]
    candidates = [str(Path(place, "bin", name)) for place in places if place for name in names]
    candidates += [str(Path(sysconfig.get_path("scripts"), name)) for name in names]
    if Path(sys.executable or "").name.startswith("python"):
        candidates.insert(0, sys.executable)
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise ConfigurationError(f"no Python interpreter found under {sys.prefix}")


class _Taken(Exception):
    """A worker was ended from outside."""


class Worker:
    """One process, one job at a time.

    Created by `spawn`, ended by `stop`, which may be called again.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], channel: socket.socket, inbox: int, outbox: int
    ) -> None:
        self._process = process
        self._channel = channel
        self._inbox = inbox
        self._outbox = outbox
        self.jobs = 0
        self.confined = False
        self._ended = False

    @classmethod
    async def spawn(cls, start: Start) -> Worker:
        """Start a process and wait until it is ready.

        Raises:
            InternalError: It did not get ready; its own words are on stderr.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            process = subprocess.Popen(  # noqa: ASYNC220 - vfork: returns within milliseconds
                _command(theirs.fileno()),
                env=_environment(),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                cwd="/",
            )
        inbox = os.memfd_create("triptych-inbox", os.MFD_CLOEXEC)
        outbox = os.memfd_create("triptych-outbox", os.MFD_CLOEXEC)
        worker = cls(process, ours, inbox, outbox)
        try:
            pickled = pickle.dumps(start)
            write(inbox, pickled)
            socket.send_fds(ours, [str(len(pickled)).encode()], [inbox, outbox])
            async with asyncio.timeout(START_TIMEOUT_S):
                message = await worker._receive()
            worker.confined = _READY.decode(message).confined
        except BaseException as error:
            await worker.stop()
            if isinstance(error, (TimeoutError, OSError, msgspec.DecodeError)):
                logger.exception("%s did not start", python())
                raise InternalError("a media worker did not start") from error
            raise
        return worker

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    async def call(self, job: Job, data: bytes) -> tuple[Array, Answer]:
        """Have one medium decoded.

        Raises:
            MediaUnreadable: The process died of it.
            TriptychError: What the decoder said.
            _Taken: The process was ended from outside.
        """
        self.jobs += 1
        try:
            return await self._call(job, data)
        finally:
            for handle in (self._inbox, self._outbox):
                if os.fstat(handle).st_size > KEPT_BYTES:
                    os.ftruncate(handle, KEPT_BYTES)

    def kill(self) -> None:
        """End the process now; a call in progress fails."""
        self._ended = True
        self._process.kill()

    def take(self) -> None:
        """End the process as one whose end is not the fault of what it decodes."""
        self._process.kill()

    async def stop(self) -> None:
        """End the process, which has no call in progress, and wait for its end."""
        self._process.kill()
        await asyncio.to_thread(self._process.wait)
        if self._channel.fileno() >= 0:
            self._channel.close()
            os.close(self._inbox)
            os.close(self._outbox)

    async def _call(self, job: Job, data: bytes) -> tuple[Array, Answer]:
        try:
            await _moved(len(data), write, self._inbox, data)
            self._channel.send(_ENCODER.encode(job))
            message = await self._receive()
        except OSError:
            message = b""
        if not message:
            code = await self._end()
            if code == -signal.SIGKILL and not self._ended:
                raise _Taken
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise MediaUnreadable(f"the decoder crashed on it ({how})")
        answer = _ANSWERS.decode(message)
        if answer.fault:
            logger.error("decoding %s failed:\n%s", job.kind, answer.fault)
            raise InternalError(f"decoding the {job.kind} failed")
        if answer.error:
            raise TriptychError.parse(answer.error)
        return await self._array(answer), answer

    async def _receive(self) -> bytes:
        loop = asyncio.get_running_loop()
        readable = loop.create_future()
        handle = self._channel.fileno()
        loop.add_reader(handle, _resolve, readable)
        try:
            await readable
        finally:
            loop.remove_reader(handle)
        return self._channel.recv(MESSAGE_BYTES)

    async def _array(self, answer: Answer) -> Array:
        """The array in the outbox, copied and then checked against the worker's word."""
        dtype = np.dtype(np.uint16 if answer.dtype == "bfloat16" else answer.dtype)
        size = dtype.itemsize * math.prod(answer.shape)
        data = await _moved(size, read, self._outbox, size)
        if len(data) != size:
            raise MediaUnreadable("the decoder broke on it")
        return np.frombuffer(data, dtype).reshape(answer.shape)

    async def _end(self) -> int:
        """How the process ended, as `subprocess.Popen.returncode`."""
        self._process.kill()  # it hung up; if it has not ended it must
        return await asyncio.to_thread(self._process.wait)


class WorkerPool:
    """At most ``size`` workers, started when first needed.

    Args:
        start: What each worker is given.
        size: Processes.
        max_queued: Jobs that may wait for one.
        timeout_s: For one job.
        recycle_after: Jobs after which a worker is replaced.
        must_confine: Serve nothing where the kernel cannot shut a worker in.
    """

    def __init__(
        self,
        start: Start,
        *,
        size: int,
        max_queued: int,
        timeout_s: float,
        recycle_after: int = RECYCLE_AFTER,
        must_confine: bool = False,
    ) -> None:
        self._start = start
        self._timeout_s = timeout_s
        self._recycle_after = recycle_after
        self._must_confine = must_confine
        self._max_queued = max_queued
        self._queued = 0
        self._slots = Slots(size)
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Process ids of all workers."""
        return [worker.pid for worker in (*self._idle, *self._busy)]

    async def warm(self) -> None:
        """Start one worker ahead of the first job.

        Raises:
            InternalError: It does not start.
        """
        await asyncio.shield(self._keep(self._warm()))

    async def run(self, job: Job, data: bytes) -> tuple[Array, Answer]:
        """Decode one medium in the next free worker, which the lowest `PRIORITY` has first.

        A cancelled call gives its worker back: at once if the worker gets done soon, else as a
        new one.

        Raises:
            Overloaded: Too many wait already.
            MediaTimeout: It took longer than the limit; the worker was ended.
            MediaUnreadable: The worker died of it.
            Unavailable: Its worker was ended from outside, and so was the next one.
            TriptychError: What the decoder said.
        """
        try:
            return await self._run(job, data)
        except _Taken:
            logger.warning("a media worker was ended or stopped from outside; another takes over")
        try:
            return await self._run(job, data)
        except _Taken:
            raise Unavailable("the decoding was ended from outside, twice") from None

    async def close(self) -> None:
        """End every worker; a second call does nothing."""
        self._closed = True
        for worker in (*self._idle, *self._busy):
            worker.kill()
        while self._tasks:
            await asyncio.wait(self._tasks)
        idle, self._idle = self._idle, []
        await asyncio.gather(*(worker.stop() for worker in idle))

    async def _run(self, job: Job, data: bytes) -> tuple[Array, Answer]:
        if self._queued >= self._max_queued:
            raise Overloaded(f"{self._queued} media wait to be decoded, the limit")
        self._queued += 1
        try:
            await self._slots.acquire(PRIORITY.get())
        finally:
            self._queued -= 1
        try:
            worker = await self._take()
        except BaseException:
            self._slots.release()
            raise
        call = self._keep(self._call(worker, job, data))
        try:
            async with asyncio.timeout(self._timeout_s):
                while not (await asyncio.wait([call], timeout=STOPPED_LOOK_S))[0]:
                    if processes.is_stopped(worker.pid):
                        worker.take()
                return call.result()
        except TimeoutError:
            worker.kill()
            raise MediaTimeout(f"decoding took longer than {self._timeout_s:g} s") from None
        except asyncio.CancelledError:
            grace = asyncio.get_running_loop().call_later(CANCEL_GRACE_S, worker.kill)
            call.add_done_callback(lambda _: grace.cancel())
            raise

    async def _warm(self) -> None:
        await self._slots.acquire()
        try:
            worker = await self._take()
            self._busy.discard(worker)
            if self._closed:
                await worker.stop()
            else:
                self._idle.append(worker)
        finally:
            self._slots.release()

    async def _take(self) -> Worker:
        worker = self._idle.pop() if self._idle else None
        if worker is None or not worker.alive:
            if worker is not None:
                await worker.stop()
            worker = await Worker.spawn(self._start)
            if not worker.confined and self._must_confine:
                await worker.stop()
                raise ConfigurationError("this kernel has no seccomp, which this medium needs")
            if not worker.confined:
                logger.warning("media workers run without seccomp: the kernel does not have it")
        self._busy.add(worker)
        return worker

    async def _call(self, worker: Worker, job: Job, data: bytes) -> tuple[Array, Answer]:
        """One call to its end, whether somebody still waits for it or not."""
        try:
            return await worker.call(job, data)
        finally:
            self._busy.discard(worker)
            if worker.alive and worker.jobs < self._recycle_after and not self._closed:
                self._idle.append(worker)
            else:
                self._keep(worker.stop())
            self._slots.release()

    def _keep(self, work: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        """Run ``work`` as a task that lives until it is done."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._drop)
        return task

    def _drop(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have gone away


async def _moved(size: int, move: Callable[..., R], *arguments: object) -> R:
    """``move`` so many bytes, in a thread if they are many."""
    if size < THREAD_BYTES:
        return move(*arguments)
    return await asyncio.to_thread(move, *arguments)


def _resolve(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


def _command(descriptor: int) -> list[str]:
    return [python(), "-P", "-m", "triptych.media.worker", str(descriptor), str(os.getpid())]


def _environment() -> dict[str, str]:
    """Ours, with the same import path and without threads that nobody asked for."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return os.environ | threads | _ALLOCATOR | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
