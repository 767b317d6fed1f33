"""Preprocess's side of `triptych.encode.lookup`. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from pathlib import Path

import msgspec

from triptych.encode import lookup
from triptych.encode.lookup import Find, Found, Tell, Unknown

logger = logging.getLogger("triptych.encode.lookup")

ANSWER_TIMEOUT_S = 0.5
"""For an answer without waiting. An encoder that takes longer is passed over: the medium is decoded
as if it were new."""
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

    async def find(self, claim: str, *, wait_s: float = 0.0) -> Found | None:
        """A lease on a claim's embeddings, from the first instance that holds them.

        Args:
            claim: The caller's name for the medium.
            wait_s: How long to wait if its pixels are on their way, in seconds.
        """
        await self._scan()
        if wait_s and len(self._links) > 1:
            return await self._first(claim, wait_s)
        for link in [*self._links.values()]:
            if found := await self._ask(link, claim, wait_s):
                return found
        return None

    async def tell(self, claim: str, content: str, note: str) -> None:
        """Announce a content's pixels to all instances; which of them gets it is not known."""
        await self._scan()
        for link in [*self._links.values()]:
            try:
                link.send(Tell(claim, content, note))
            except OSError as error:
                self._drop(link, error)

    async def close(self) -> None:
        """Hang up; a second call does nothing."""
        for link in [*self._links.values()]:
            await link.close()
        self._links.clear()

    async def _first(self, claim: str, wait_s: float) -> Found | None:
        """From whichever instance comes to hold it first; the others' leases run out."""
        asking = [
            asyncio.ensure_future(self._ask(link, claim, wait_s)) for link in self._links.values()
        ]
        try:
            for answer in asyncio.as_completed(asking):
                if found := await answer:
                    return found
            return None
        finally:
            for each in asking:
                each.cancel()

    async def _ask(self, link: _Link, claim: str, wait_s: float) -> Found | None:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S + wait_s):
                return await link.find(claim, wait_s)
        except TimeoutError:
            logger.warning("%s did not answer in time", link.address.name)
        except OSError as error:
            self._drop(link, error)
        return None

    async def _scan(self) -> None:
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
        self._ids = itertools.count()
        self._asked: dict[int, asyncio.Future[Found | None]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, address: Path) -> _Link:
        reader, writer = await asyncio.open_unix_connection(
            str(address), limit=lookup.MAX_LINE_BYTES
        )
        return cls(address, reader, writer)

    def send(self, message: lookup.Request) -> None:
        """Without waiting: messages are short, and few are under way."""
        if self._reading.done():
            raise ConnectionResetError("it has hung up")
        self._writer.write(lookup.line(message))

    async def find(self, claim: str, wait_s: float) -> Found | None:
        number = next(self._ids)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self.send(Find(number, claim, wait_s))
            found: Found | None = await answer
            return found
        finally:
            self._asked.pop(number, None)

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
                answer = self._asked.get(reply.id)
                if answer is not None and not answer.done():
                    answer.set_result(None if isinstance(reply, Unknown) else _found(reply))
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            gone = ConnectionResetError(str(error))
        finally:
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(gone)


def _found(reply: lookup.Reply) -> Found:
    if not isinstance(reply, Found):
        raise ValueError(f"{type(reply).__name__} answers no question of preprocess")
    return reply
