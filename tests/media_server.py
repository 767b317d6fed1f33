"""An HTTP(S) server that misbehaves as asked: each path is one misbehaviour."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import trustme

Answer = Callable[["Request"], Awaitable[None]]


class Request:
    """One request, and the means to answer it badly."""

    def __init__(self, path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        self.path = path
        self.headers = headers
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self, body: bytes = b"", status: str = "200 OK", **headers: str) -> None:
        named = {"content_length": str(len(body)), "content_type": "image/jpeg", **headers}
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in named.items())
        await self.send(f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body)


class MediaServer:
    """Serves ``routes`` on a free port of 127.0.0.1; ``hits`` counts requests by path."""

    def __init__(self) -> None:
        self.routes: dict[str, Answer] = {}
        self.hits: Counter[str] = Counter()
        self.hosts: list[str] = []
        self.gone: Counter[str] = Counter()
        """Connections that the client closed while a path was being answered."""
        self.port = 0

    def route(self, path: str, body: bytes = b"", **answer: str) -> None:
        """Answer ``path`` with ``body``."""

        async def plain(request: Request) -> None:
            await request.answer(body, **answer)

        self.routes[path] = plain

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = ""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode("latin-1").split("\r\n")
                path = first.split(" ")[1]
                pairs = (line.partition(": ") for line in lines if line)
                headers = {name.lower(): value for name, _, value in pairs}
                self.hits[path] += 1
                self.hosts.append(headers.get("host", ""))
                request = Request(path, headers, writer)
                if path in self.routes:
                    await self.routes[path](request)
                else:
                    await request.answer(b"none", "404 Not Found")
        except asyncio.IncompleteReadError:
            pass
        except (ConnectionError, ssl.SSLError):
            self.gone[path] += 1
        finally:
            with suppress(OSError, ssl.SSLError):
                writer.close()


@asynccontextmanager
async def serving(context: ssl.SSLContext | None = None) -> AsyncIterator[MediaServer]:
    """A running `MediaServer`, with TLS if there is a context."""
    server = MediaServer()
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(server.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listener = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def certificates(name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server's, client's) contexts of an authority made for the test."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client
