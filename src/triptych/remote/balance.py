"""Which server gets an item: rendezvous hashing with bounded load.

The same content goes to the same server, whose cache then has it, as long as that server has not
much more to do than the others. A server that comes or goes moves its own share of the contents
and no other.

Rendezvous hashing: Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
1998. Bounded load: Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads",
2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import blake3

SLACK = 1.25
"""A server may have so many times the mean load and still get what is its own. 1 balances evenly
and forgets where things are; the bound's authors show that 1.25 moves few."""


class Loaded(Protocol):
    """What a choice needs to know of a server."""

    @property
    def address(self) -> str:
        """Its name."""

    @property
    def outstanding(self) -> int:
        """Embeddings it has been asked for and not given yet."""


Server = TypeVar("Server", bound=Loaded)


def choose(servers: Sequence[Server], content: str, tokens: int) -> Server:
    """The server for an item.

    Args:
        servers: At least one.
        content: What the item is known by.
        tokens: How many embeddings it becomes, at least 1.
    """
    load = sum(server.outstanding for server in servers) + tokens
    bound = SLACK * load / len(servers)  # the least loaded is always below
    able = [server for server in servers if server.outstanding < bound]
    return max(able, key=lambda server: _rank(server.address, content))


def _rank(address: str, content: str) -> bytes:
    return blake3.blake3(f"{address} {content}".encode()).digest(8)
