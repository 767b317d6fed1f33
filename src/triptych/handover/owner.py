"""The encoder's end of the road NIXL: one registered arena, and leases on parts of it."""

from __future__ import annotations

import logging
import threading
import time

import msgspec
import torch

from triptych.contract import NixlAgent, NixlSpan, Ticket
from triptych.errors import InternalError, InvalidRequest, Overloaded
from triptych.handover import seal
from triptych.handover.agent import Agent
from triptych.handover.arena import Arena
from triptych.handover.leases import Lease, Leases
from triptych.handover.trust import prove

logger = logging.getLogger("triptych.handover")

POLL_S = 0.001
"""Between two looks for notifications while leases are open. Reads over TCP advance only then."""
LATE_POLL_S = 0.02
"""The same after leases have expired: a late reader must get an answer to learn that."""
LATE_S = 60.0
"""How long that goes on."""
ROOM_WAIT_S = 1.0
"""How long `NixlPublisher.room` waits for readers to be done, in seconds."""


class Release(msgspec.Struct, frozen=True):
    """A reader's message: it has read these leases, and the memory may be used again."""

    release: list[int]
    """Generations."""


_RELEASE = msgspec.json.Decoder(Release)


class NixlPublisher:
    """Embeddings in registered memory, where readers fetch them on their own.

    A thread asks for notifications every millisecond while leases are open, now and then for a
    minute after some have expired, and sleeps otherwise.

    Args:
        capacity: Bytes of the arena.
        device: The encoder's; on a GPU the arena is in its memory.
        key: `triptych.handover.trust.load_key`.
        lease_s: How long embeddings wait for their reader, in seconds.

    Raises:
        ConfigurationError: NIXL is not there or does not start.
    """

    def __init__(
        self, capacity: int, device: torch.device, key: bytes, lease_s: float = 60.0
    ) -> None:
        begun = time.monotonic()
        self._arena = Arena(capacity, device)
        self._agent = Agent("encoder")
        self._agent.register(self._arena)
        metadata = self._agent.metadata
        self._agents = {self._agent.name: NixlAgent(metadata, prove(key, metadata))}
        self._leases = Leases(lease_s)
        self._by_address: dict[int, Lease] = {}
        self._changed = threading.Condition()
        self._late_until = 0.0
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="triptych-handover", daemon=True)
        self._thread.start()
        logger.info(
            "%s owns %d MiB of %s memory for embeddings, after %.1f s",
            self._agent.name,
            capacity >> 20,
            self._arena.memory,
            time.monotonic() - begun,
        )

    @property
    def name(self) -> str:
        """The agent's, in tickets."""
        return self._agent.name

    @property
    def leases(self) -> int:
        """How many are open."""
        with self._changed:
            return len(self._leases)

    @property
    def used(self) -> int:
        """Bytes of the arena that are lent."""
        return self._arena.used

    def room(self, nbytes: int) -> torch.Tensor:
        """A part of the arena, leased from now on; see `triptych.handover.Publisher`."""
        if not nbytes:
            return self._arena.view(0, 0)
        size = seal.HEADER_BYTES + nbytes
        if size > self._arena.capacity:
            raise InvalidRequest(
                f"the request's embeddings have {nbytes} bytes, at most "
                f"{self._arena.capacity} can be handed over (handover_arena_mb)"
            )
        with self._changed:
            lease = self._leases.open(self._take(size))
            address = self._arena.address + lease.offset + seal.HEADER_BYTES
            self._by_address[address] = lease
            self._changed.notify_all()
        return self._arena.view(lease.offset + seal.HEADER_BYTES, nbytes)

    def publish(self, embeddings: torch.Tensor, ticket: Ticket) -> Ticket:
        """Seal the embeddings; see `triptych.handover.Publisher`."""
        if not embeddings.numel():
            return ticket
        with self._changed:
            lease = self._by_address.get(embeddings.data_ptr())
        if lease is None:
            raise InternalError("the embeddings lie in no room, or its lease has ended")
        header = self._arena.view(lease.offset, seal.HEADER_BYTES)
        seal.write_header(header, lease.generation)
        pieces = [embeddings[item.offset : item.offset + item.nbytes] for item in ticket.items]
        items = []
        for item, checksum in zip(ticket.items, seal.checksums(pieces), strict=True):
            span = NixlSpan(
                agent=self._agent.name,
                memory=self._arena.memory,
                device=self._arena.device_id,
                header=header.data_ptr(),
                address=embeddings.data_ptr() + item.offset,
                generation=lease.generation,
                checksum=checksum,
            )
            items.append(msgspec.structs.replace(item, where="nixl", nixl=span))
        # On a GPU the checksums were waited for, and with them all that came before.
        return Ticket(items, self._agents)

    def close(self, drain_s: float = 0.0) -> None:
        """End all leases and the thread; readers that come late get errors.

        Args:
            drain_s: How long to wait for the readers that are on their way, in seconds.
        """
        with self._changed:
            if self._closing:
                return
            self._changed.wait_for(lambda: not self._leases, drain_s)
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._end(self._leases.all())
        self._agent.close()

    def _take(self, size: int) -> int:
        """An offset in the arena, maybe after a wait for readers; called with the lock held."""
        deadline = time.monotonic() + ROOM_WAIT_S
        while True:
            self._end(self._leases.expired())
            if (offset := self._arena.take(size)) is not None:
                return offset
            left = deadline - time.monotonic()
            if left <= 0 or self._closing:
                raise Overloaded(
                    f"no room for {size} bytes of embeddings: {self._arena.used} of "
                    f"{self._arena.capacity} wait for their readers in {len(self._leases)} leases"
                )
            self._changed.wait(left)

    def _end(self, leases: list[Lease]) -> None:
        for lease in leases:
            seal.wipe_header(self._arena.view(lease.offset, seal.HEADER_BYTES))
            first = self._arena.address + lease.offset + seal.HEADER_BYTES
            self._by_address.pop(first, None)
            self._arena.give(lease.offset)

    def _serve(self) -> None:
        while True:
            with self._changed:
                if not self._leases:
                    late = time.monotonic() < self._late_until
                    self._changed.wait_for(
                        lambda: self._leases or self._closing, LATE_POLL_S if late else None
                    )
                if self._closing:
                    return
            try:
                messages = self._agent.notifications()
            except Exception:
                logger.exception("%s cannot ask for notifications", self._agent.name)
                messages = []
            self._settle(messages)
            time.sleep(POLL_S)

    def _settle(self, messages: list[bytes]) -> None:
        """End the leases that were read or have expired."""
        with self._changed:
            ended = [lease for message in messages for lease in self._read(message)]
            expired = self._leases.expired()
            self._end(ended + expired)
            if ended or expired:
                self._changed.notify_all()
            if expired:
                self._late_until = time.monotonic() + LATE_S
        if expired:
            self._agent.reaches()  # for UCX's complaints
            logger.warning(
                "%d leases ended without their reader: it was aborted, is slow, or died",
                len(expired),
            )

    def _read(self, message: bytes) -> list[Lease]:
        """The leases that a reader gives back; whoever sends anything else is not listened to."""
        try:
            generations = _RELEASE.decode(message).release
        except msgspec.MsgspecError:
            logger.warning("a message that no reader sends: %.100r", message)
            return []
        return [lease for one in generations if (lease := self._leases.close(one))]
