"""The encoder's side of `triptych.encode.lookup`: a thread that answers from the cache."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import msgspec
import torch

from triptych.encode import lookup
from triptych.encode.cache import EmbeddingCache, Entry
from triptych.encode.lookup import Find, Found, Take, Taken, Tell, Unknown

logger = logging.getLogger("triptych.encode.lookup")

STOP_TIMEOUT_S = 5.0
ABANDONED_AFTER_S = 60.0
"""Age of a directory from which it may belong to a server that was killed."""


class LookupServer:
    """Answers who asks what an encoder instance holds, also while it encodes.

    Args:
        cache: Of the instance, whose name it has.
        revision: Of its tower; see `triptych.encode.keys.revision`.
        folder: Where the socket goes.

    Raises:
        OSError: The directory or the socket cannot be made.
        ValueError: The instance's name or the path does not do.
    """

    def __init__(self, cache: EmbeddingCache, revision: str, folder: Path) -> None:
        self._cache = cache
        self._revision = revision
        self._address = lookup.address(folder, cache.name)
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._listener = _listen(self._address)
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="triptych-lookup", daemon=True)
        self._thread.start()

    def arrived(self, key: str) -> None:
        """Wake those who wait for a content, which is here now or will not come; any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._wake, key)

    def stop(self) -> None:
        """End the thread and remove the socket; a second call does nothing."""
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except Exception:
            logger.exception("the look-up of %s ended", self._cache.name)
        finally:
            self._address.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other instances still use it
                self._address.parent.rmdir()
            self._loop.close()

    async def _serve(self) -> None:
        connections: set[asyncio.Task[object]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            if task is not None:
                connections.add(task)
                task.add_done_callback(connections.discard)
            # Streams would report a task that was cancelled as if it had failed.
            with contextlib.closing(writer), contextlib.suppress(asyncio.CancelledError):
                await self._connection(reader, writer)

        server = await asyncio.start_unix_server(
            connected, sock=self._listener, limit=lookup.MAX_LINE_BYTES
        )
        await self._stopping.wait()
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waits: set[asyncio.Task[None]] = set()
        try:
            while line := await reader.readline():
                message = lookup.read_request(line)
                if isinstance(message, Tell):
                    self._cache.claim(message.claim, message.content, message.note)
                elif isinstance(message, Take):
                    self._hand_over(message, writer)
                elif not self._answer(message, writer):
                    task = asyncio.create_task(self._wait(message, writer))
                    waits.add(task)
                    task.add_done_callback(waits.discard)
                await writer.drain()
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            logger.warning("a connection to %s ended: %s", self._cache.name, error)
        finally:
            for task in waits:
                task.cancel()

    def _answer(self, find: Find, writer: asyncio.StreamWriter, *, last: bool = False) -> bool:
        """Answer if the content is here, or if waiting for it is of no use."""
        if leased := self._cache.lease(find.claim):
            writer.write(lookup.line(Found(find.id, leased.token, leased.note)))
            return True
        if last or not find.wait_s or self._cache.claimed(find.claim) is None:
            writer.write(lookup.line(Unknown(find.id)))
            return True
        return False

    async def _wait(self, find: Find, writer: asyncio.StreamWriter) -> None:
        key, event = self._cache.claimed(find.claim) or "", asyncio.Event()
        waiting = self._waiting.setdefault(key, set())
        waiting.add(event)
        try:
            # What arrived before there was an event has woken nobody.
            if not self._answer(find, writer):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), find.wait_s)
                self._answer(find, writer, last=True)
        finally:
            waiting.discard(event)
            if not waiting and self._waiting.get(key) is waiting:
                del self._waiting[key]
        with contextlib.suppress(OSError):
            await writer.drain()

    def _wake(self, key: str) -> None:
        for event in self._waiting.pop(key, ()):
            event.set()

    def _hand_over(self, take: Take, writer: asyncio.StreamWriter) -> None:
        entry = self._cache.redeem(take.lease) if take.revision == self._revision else None
        if entry is None:
            writer.write(lookup.line(Unknown(take.id)))
            return
        try:
            header, data = _packed(take.id, entry)
        finally:
            self._cache.release(entry)
        writer.write(lookup.line(header))
        writer.write(data)


def _packed(id: int, entry: Entry) -> tuple[Taken, memoryview]:
    host = entry.embeddings.detach().cpu().contiguous()
    data = memoryview(host.view(torch.uint8).numpy()).cast("B")
    header = Taken(
        id=id,
        item=msgspec.Raw(msgspec.json.encode(entry.item)),
        key=entry.key,
        dtype=str(host.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        shape=(host.shape[0], host.shape[1]),
        seconds=entry.seconds,
        nbytes=data.nbytes,
    )
    return header, data


def _listen(address: Path) -> socket.socket:
    """A listening socket in a directory that is this user's alone.

    Raises:
        OSError: It cannot be made, or is somebody else's.
    """
    folder = address.parent
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)
    if not lookup.private(folder):
        raise PermissionError(f"{folder} is not this user's alone")
    _sweep(folder.parent)
    address.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()
    listener.setblocking(False)
    return listener


def _sweep(root: Path) -> None:
    """Remove what servers that were killed have left."""
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < ABANDONED_AFTER_S:
                continue
            if not any(_listened_to(address) for address in folder.glob(f"*{lookup.SUFFIX}")):
                shutil.rmtree(folder)


def _listened_to(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(os.fspath(address)) == 0
