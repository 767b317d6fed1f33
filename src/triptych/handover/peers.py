"""The owners of memory that a reader knows."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

from triptych.contract import NixlAgent
from triptych.errors import InvalidValue, Unavailable
from triptych.handover.agent import Agent
from triptych.handover.trust import proven

logger = logging.getLogger("triptych.handover")

MAX_PEERS = 64
"""Known at a time; the one that was not used for longest is forgotten."""


class Peers:
    """Other agents by name, each added once. Not for several threads at a time.

    Args:
        agents: Ours; each gets to know every peer.
        key: Who knows it is trusted; see `triptych.handover.trust`.
    """

    def __init__(self, agents: Sequence[Agent], key: bytes) -> None:
        self._agents = agents
        self._key = key
        self._metadata: OrderedDict[str, bytes] = OrderedDict()
        self._reads: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._metadata)

    def use(self, name: str, told: NixlAgent) -> bool:
        """Have the peer added; then `begin` and `end` each read from it.

        Returns:
            Whether it is a new one.

        Raises:
            InvalidValue: The metadata are not from an encoder of ours, or of another name.
            Unavailable: NIXL cannot use them.
        """
        if self._metadata.get(name) == told.metadata:
            self._metadata.move_to_end(name)
            return False
        if not proven(self._key, told.metadata, told.proof):
            raise InvalidValue(
                f"the metadata of {name!r} are not proven: the ticket is forged, or its encoder "
                "has another handover_key",
                where="TICKET.agents",
            )
        self.drop(name)
        self._make_room()
        try:
            added = {agent.add(told.metadata) for agent in self._agents}.pop()
        except Exception as error:
            raise Unavailable(
                f"the encoder {name}, which has the embeddings, cannot be reached ({error}); "
                "send the request again"
            ) from error
        self._metadata[added] = told.metadata
        if added != name:
            raise InvalidValue(
                f"the metadata of {name!r} are those of {added!r}", where="TICKET.agents"
            )
        return True

    def begin(self, name: str) -> None:
        """A read from the peer begins: it is not forgotten meanwhile."""
        self._reads[name] = self._reads.get(name, 0) + 1

    def end(self, name: str) -> None:
        """It has ended."""
        self._reads[name] -= 1
        if not self._reads[name]:
            del self._reads[name]

    def drop(self, name: str) -> None:
        """Forget the peer; the next ticket that names it adds it anew."""
        if self._metadata.pop(name, None) is not None:
            for agent in self._agents:
                with suppress(Exception):  # a dead peer may have been forgotten by NIXL itself
                    agent.remove(name)

    def _make_room(self) -> None:
        idle = [name for name in self._metadata if name not in self._reads]
        for name in idle[: max(len(self._metadata) + 1 - MAX_PEERS, 0)]:
            self.drop(name)
