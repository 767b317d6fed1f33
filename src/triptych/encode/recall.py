"""What preprocess is told after it has answered, over a socket of its own. Imports no torch.

    encoder ──Again(lease)──▶ preprocess     a request has come whose embeddings are gone
            ◀──Found(lease)─                  of the same medium, which was loaded once more
    decode  ──Drop(request)─▶ preprocess     nobody waits for that request any more

A lease is lost when its encoder is loaded anew or a request lies about for longer than leases
last. The caller of an ensemble can do nothing about that, and preprocess has answered; but it
still knows what the lease was of. And an ensemble tells its steps nothing of a caller who has gone
(`triptych.contract.ABORT`), so decode hands on what it is told.

The sockets lie beside those of `triptych.encode.lookup`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec

from triptych.encode import lookup, sockets
from triptych.encode.lookup import Found, Unknown

logger = logging.getLogger("triptych.encode.recall")

AGAIN_TIMEOUT_S = 30.0
"""For a medium to be loaded and encoded once more; others wait in the encoder meanwhile."""
TELL_TIMEOUT_S = 1.0
"""For a connection, and for what goes out on it."""


class Again(msgspec.Struct, frozen=True, tag=True):
    """Load the medium that this lease was given for once more."""

    id: int
    lease: str


class Drop(msgspec.Struct, frozen=True, tag=True):
    """End what is being done for a request; there is no answer."""

    request: str
    """Triton's id of it."""


_PATTERN = f"preprocess*{lookup.SEPARATOR}*{lookup.SUFFIX}"
_read = msgspec.json.Decoder(Again | Drop).decode
_encode = msgspec.json.Encoder().encode


class Recall:
    """Preprocess's end, on its event loop.

    Args:
        address: Where to listen: `triptych.encode.lookup.address` of the instance.
        again: Gives another lease for one that was lost; None: it cannot.
        drop: Ends a request.
    """

    def __init__(
        self,
        address: Path,
        again: Callable[[str], Awaitable[str | None]],
        drop: Callable[[str], None],
    ) -> None:
        self._address = address
        self._again = again
        self._drop = drop
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: The directory or the socket cannot be made.
        """
        self._server = await asyncio.start_unix_server(
            self._connected, sock=sockets.listen(self._address), limit=lookup.MAX_LINE_BYTES
        )

    async def close(self) -> None:
        """Hang up and remove the socket; a second call does nothing."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        sockets.remove(self._address)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            try:
                while line := await reader.readline():
                    message = _read(line)
                    if isinstance(message, Drop):
                        self._drop(message.request)
                        continue
                    lease = await self._again(message.lease)
                    reply = Found(message.id, lease) if lease else Unknown(message.id)
                    writer.write(lookup.line(reply))
                    await writer.drain()
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                logger.warning("a connection to %s ended: %s", self._address.name, error)


def again(folder: Path, lost: str) -> str | None:
    """Another lease for one that is lost; blocks.

    Args:
        folder: Where the sockets are.
        lost: The lease.

    Returns:
        None: no instance knows what it was of, or the one that does cannot do it again.
    """
    for connection in _instances(folder):
        try:
            connection.sendall(_encode(Again(0, lost)) + b"\n")
            connection.settimeout(AGAIN_TIMEOUT_S)
            with connection.makefile("rb") as stream:
                reply = lookup.read_reply(stream.readline(lookup.MAX_LINE_BYTES))
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            logger.warning("preprocess could not be asked about a lost lease: %s", error)
            continue
        if isinstance(reply, Found):
            return reply.lease
    return None


def drop(folder: Path, request: str) -> None:
    """Tell every instance that nobody waits for a request any more."""
    for connection in _instances(folder):
        with contextlib.suppress(OSError):
            connection.sendall(_encode(Drop(request)) + b"\n")


def _instances(folder: Path) -> Iterator[socket.socket]:
    """A connection to each, one after another."""
    if not lookup.private(folder):
        return
    for address in sorted(folder.glob(_PATTERN)):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TELL_TIMEOUT_S)
            try:
                connection.connect(str(address))
            except OSError:  # it is on its way up or down
                continue
            yield connection
