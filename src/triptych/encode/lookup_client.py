"""Preprocess's side of `triptych.encode.lookup`. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from triptych.contract import Item
from triptych.encode import lookup
from triptych.encode.lookup import Bring, Find, Found, Leave, Unknown

logger = logging.getLogger("triptych.encode.lookup")

ANSWER_TIMEOUT_S = 0.5
"""For an answer without waiting. An encoder that takes longer is passed over: the medium is decoded
as if it were new."""
ENCODE_TIMEOUT_S = 60.0
"""For pixels to become embeddings, the queue before them included. What takes longer is sent as
MEDIA, which Triton's own queue keeps in order."""
SCAN_EVERY_S = 1.0
"""Between two looks for encoder instances that have come up."""


class LookupClient:
    """Asks every instance of one encoder model. Belongs to one event loop.

    No method raises: an encoder that cannot be asked holds nothing.

    Args:
        folder: Where the sockets are.
        model: Triton's name of the encoder.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self._folder = folder
        self._pattern = f"{model}{lookup.SEPARATOR}*{lookup.SUFFIX}"
        self._links: dict[Path, _Link] = {}
        self._next_scan = 0.0
        self._scanning = asyncio.Lock()
        self._ids = itertools.count()

    async def find(self, claim: str) -> Found | None:
        """A lease on a claim's embeddings, from the first instance that holds them."""
        await self._scan()
        for link in [*self._links.values()]:
            if found := await self._ask(link, Find(next(self._ids), claim), ANSWER_TIMEOUT_S):
                return found
        return None

    async def bring(
        self,
        claim: str,
        content: str,
        note: str,
        item: Item,
        data: memoryview,
        priority: int = 0,
    ) -> Found | None:
        """Have pixels encoded by the instance that has the least of ours to do.

        Args:
            claim: The caller's name for the medium.
            content: `triptych.encode.keys.content_key`.
            note: What to be told when the claim is found.
            item: What the pixels are.
            data: The pixels.
            priority: The lower goes first.

        Returns:
            A lease on the embeddings, when they are made; None: they could not be.
        """
        await self._scan()
        link = min(self._links.values(), key=lambda link: len(link.asked), default=None)
        if link is None:
            return None
        with _shared(data) as file:
            message = Bring(next(self._ids), claim, content, note, item, file, priority)
            return await self._ask(link, message, ENCODE_TIMEOUT_S)

    async def close(self) -> None:
        """Hang up; a second call does nothing."""
        for link in [*self._links.values()]:
            await link.close()
        self._links.clear()

    async def _ask(self, link: _Link, message: Find | Bring, timeout_s: float) -> Found | None:
        try:
            async with asyncio.timeout(timeout_s):
                return await link.ask(message)
        except TimeoutError:
            logger.warning("%s did not answer in time", link.address.name)
        except OSError as error:
            self._drop(link, error)
        return None

    async def _scan(self) -> None:
        """Connect to instances that have come up; who comes meanwhile waits for that."""
        async with self._scanning:
            now = time.monotonic()
            if now < self._next_scan:
                return
            self._next_scan = now + SCAN_EVERY_S
            if not lookup.private(self._folder):
                return
            for address in sorted(self._folder.glob(self._pattern)):
                if address not in self._links:
                    with contextlib.suppress(OSError):  # it is on its way up or down
                        self._links[address] = await _Link.open(address)

    def _drop(self, link: _Link, error: OSError) -> None:
        if self._links.get(link.address) is link:
            logger.info("%s is gone: %s", link.address.name, error)
            del self._links[link.address]
            link.hang_up()


class _Link:
    """A connection to one instance; questions are answered in any order."""

    def __init__(
        self, address: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.address = address
        self._reader = reader
        self._writer = writer
        self.asked: dict[int, asyncio.Future[Found | None]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, address: Path) -> _Link:
        reader, writer = await asyncio.open_unix_connection(
            str(address), limit=lookup.MAX_LINE_BYTES
        )
        return cls(address, reader, writer)

    async def ask(self, message: Find | Bring) -> Found | None:
        """The answer.

        Raises:
            OSError: The instance has hung up.
        """
        if self._reading.done():
            raise ConnectionResetError("it has hung up")
        answer = self.asked[message.id] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(lookup.line(message))
            found: Found | None = await answer
            return found
        except asyncio.CancelledError:  # also by a timeout
            if isinstance(message, Bring):
                self._writer.write(lookup.line(Leave(message.id)))
            raise
        finally:
            del self.asked[message.id]

    def hang_up(self) -> None:
        self._reading.cancel()
        self._writer.close()

    async def close(self) -> None:
        self.hang_up()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self) -> None:
        gone: OSError = ConnectionResetError("it has hung up")
        try:
            while line := await self._reader.readline():
                reply = lookup.read_reply(line)
                answer = self.asked.get(reply.id)
                if answer is not None and not answer.done():
                    answer.set_result(None if isinstance(reply, Unknown) else _found(reply))
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            gone = ConnectionResetError(str(error))
        finally:
            for answer in self.asked.values():
                if not answer.done():
                    answer.set_exception(gone)


@contextlib.contextmanager
def _shared(data: memoryview) -> Iterator[str]:
    """Memory that holds ``data`` as long as this lasts, and a path under which others open it."""
    handle = os.memfd_create("triptych-pixels", os.MFD_CLOEXEC)
    try:
        done = 0
        while done < data.nbytes:
            done += os.pwrite(handle, data[done:], done)
        yield f"/proc/{os.getpid()}/fd/{handle}"
    finally:
        os.close(handle)


def _found(reply: lookup.Reply) -> Found:
    if not isinstance(reply, Found):
        raise ValueError(f"{type(reply).__name__} answers no question of preprocess")
    return reply
