"""The servers together: who encodes what, and who takes over when one fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence

from triptych.errors import (
    ConfigurationError,
    InvalidRequest,
    Overloaded,
    TriptychError,
    Unavailable,
)
from triptych.remote.balance import choose
from triptych.remote.call import Answer, Call
from triptych.remote.server import RemoteServer

logger = logging.getLogger("triptych.remote")

TRIES = 3
"""Servers that an item is given to, at most: one that ends encoders shall not end them all."""


class Pool:
    """Servers that run ``encoder``. Belongs to one event loop.

    Args:
        addresses: Where they are; see `triptych.remote.server.RemoteServer`.
        timeout_s: For one request, in seconds.
        interval_s: Between two looks at a server, in seconds.
        health_timeout_s: For an answer then, in seconds.

    Raises:
        ConfigurationError: There are no addresses, or one is there twice.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        timeout_s: float = 60.0,
        interval_s: float = 1.0,
        health_timeout_s: float = 3.0,
    ) -> None:
        if not addresses or len({*addresses}) < len(addresses):
            raise ConfigurationError(
                "the setting encoder_addresses must name each server of the pool once, "
                f"got {', '.join(addresses) or 'none'}"
            )
        self._timeout_s = timeout_s
        self._interval_s = interval_s
        self.servers = [RemoteServer(address, health_timeout_s) for address in addresses]
        self._watching: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Look at every server once, and from then on now and again."""
        await asyncio.gather(*(server.check() for server in self.servers))
        self._watching = [asyncio.create_task(self._watch(server)) for server in self.servers]

    async def close(self) -> None:
        """Hang up on all; what is under way fails."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self.servers))

    async def encode(self, calls: Sequence[Call], avoid: Collection[str] = ()) -> list[Answer]:
        """Encode the items of one request, wherever there is room.

        Args:
            calls: The items.
            avoid: Addresses of servers to turn to only if there are no others.

        Returns:
            One answer an item, in order.

        Raises:
            InvalidRequest: The encoder does not take an item.
            Unavailable: No server is left that could encode one.
            TriptychError: What else the last server said that was tried.
        """
        deadline = time.monotonic() + self._timeout_s
        tasks = [
            asyncio.ensure_future(self._encode(index, call, avoid, deadline))
            for index, call in enumerate(calls)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _encode(
        self, index: int, call: Call, avoid: Collection[str], deadline: float
    ) -> Answer:
        where = f"items[{index}]"
        tried: dict[str, TriptychError] = {}
        while len(tried) < TRIES and (left := deadline - time.monotonic()) > 0:
            able = [
                server
                for server in self.servers
                if server.state == "ready" and server.address not in tried
            ]
            if not able:
                break
            wanted = [server for server in able if server.address not in avoid]
            server = choose(wanted or able, call.item.hash, call.item.tokens)
            try:
                return await server.encode(call, left)
            except InvalidRequest as error:
                raise type(error)(error.what, where=where) from None
            except TriptychError as error:
                logger.info("encoder %s did not encode %s: %s", server.address, where, error)
                tried[server.address] = error
        raise self._given_up(where, tried)

    def _given_up(self, where: str, tried: dict[str, TriptychError]) -> TriptychError:
        kind: type[TriptychError] = Unavailable
        if tried and all(isinstance(error, Overloaded) for error in tried.values()):
            kind = Overloaded
        told = [
            f"{server.address}: {tried[server.address].what}"
            if server.address in tried
            else f"{server.address} is {server.state}: {server.reason}"
            for server in self.servers
            if server.address in tried or server.state != "ready"
        ]
        return kind(f"no encoder is left for this item ({'; '.join(told)})", where=where)

    async def _watch(self, server: RemoteServer) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await server.check()
            except Exception:
                logger.exception("encoder %s cannot be looked at", server.address)
