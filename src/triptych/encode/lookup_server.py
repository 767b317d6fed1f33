"""The encoder's side of `triptych.encode.lookup`: a thread that answers while others encode."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from triptych.encode import lookup, sockets
from triptych.encode.ahead import EncodeAhead
from triptych.encode.cache import Entry
from triptych.encode.encoder import Encoder
from triptych.encode.lookup import Bring, Found, Leave, Take, Taken, Unknown
from triptych.errors import Overloaded, TriptychError

Waiting = dict[int, Callable[[], None]]
"""By a message's id, how to withdraw what it waits for."""

logger = logging.getLogger("triptych.encode.lookup")

STOP_TIMEOUT_S = 5.0


class LookupServer:
    """Answers who asks what an encoder instance holds, also while it encodes.

    Args:
        encoder: Of the instance, whose cache has its name.
        ahead: Encodes what is brought.
        folder: Where the socket goes.

    Raises:
        OSError: The directory or the socket cannot be made.
        ValueError: The instance's name or the path does not do.
    """

    def __init__(self, encoder: Encoder, ahead: EncodeAhead, folder: Path) -> None:
        self._encoder = encoder
        self._cache = encoder.cache
        self._ahead = ahead
        self._address = lookup.address(folder, self._cache.name)
        self._listener = sockets.listen(self._address)
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="triptych-lookup", daemon=True)
        self._thread.start()

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
            sockets.remove(self._address)
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
        waiting: Waiting = {}
        try:
            while line := await reader.readline():
                self._answer(lookup.read_request(line), writer, waiting)
                await writer.drain()
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            logger.warning("a connection to %s ended: %s", self._cache.name, error)
        finally:
            for withdraw in waiting.values():
                withdraw()

    def _answer(
        self, message: lookup.Request, writer: asyncio.StreamWriter, waiting: Waiting
    ) -> None:
        if isinstance(message, Bring):
            self._take_in(message, writer, waiting)
        elif isinstance(message, Leave):
            if withdraw := waiting.pop(message.id, None):
                withdraw()
        elif isinstance(message, Take):
            self._hand_over(message, writer)
        elif leased := self._cache.lease(message.claim):
            writer.write(lookup.line(Found(message.id, leased.token, leased.note)))
        else:
            writer.write(lookup.line(Unknown(message.id)))

    def _take_in(self, bring: Bring, writer: asyncio.StreamWriter, waiting: Waiting) -> None:
        """Put pixels into the queue; the answer comes from there."""
        self._cache.claim(bring.claim, bring.content, bring.note)
        try:
            self._encoder.family.check_item(bring.item)
            if not self._encoder.room_for(bring.item):
                raise Overloaded("the cache has no room for it")
            media = _read(bring)
        except (OSError, TriptychError) as error:
            logger.debug("pixels were not taken in: %s", error)
            writer.write(lookup.line(Unknown(bring.id)))
            return

        def answer(reply: lookup.Reply) -> None:
            waiting.pop(bring.id, None)
            writer.write(lookup.line(reply))

        def done(entry: Entry | None) -> None:
            token = self._cache.lease_entry(entry) if entry else None
            reply = Found(bring.id, token) if token else Unknown(bring.id)
            with contextlib.suppress(RuntimeError):  # the loop is closed, and so is the connection
                self._loop.call_soon_threadsafe(answer, reply)

        waiting[bring.id] = self._ahead.submit(
            bring.content, bring.item, media, done, bring.priority
        )

    def _hand_over(self, take: Take, writer: asyncio.StreamWriter) -> None:
        entry = self._cache.redeem(take.lease) if take.revision == self._encoder.revision else None
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
        item=entry.item,
        key=entry.key,
        dtype=str(host.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        shape=(host.shape[0], host.shape[1]),
        seconds=entry.seconds,
        nbytes=data.nbytes,
    )
    return header, data


def _read(bring: Bring) -> torch.Tensor:
    """The pixels, as the item says.

    Raises:
        OSError: The sender is gone, or its file holds less than the item.
    """
    data = bytearray(bring.item.nbytes)
    with open(bring.file, "rb", buffering=0) as file:
        if file.readinto(data) != len(data):
            raise OSError(f"{bring.file} holds less than {len(data)} bytes")
    media = torch.frombuffer(data, dtype=getattr(torch, bring.item.dtype))
    return media.view(bring.item.shape)
