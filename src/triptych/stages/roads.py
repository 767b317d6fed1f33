"""Which road a request's embeddings take; the road NIXL is made when it is first needed.

An ensemble asks a step only for the outputs that it maps. So the encoder hands over by NIXL if it
is asked for no EMBEDDINGS, and decode fetches by NIXL if the ticket says so.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from triptych import contract
from triptych.contract import Item, Ticket
from triptych.engines.claim import Claim
from triptych.errors import ConfigurationError, Unavailable
from triptych.handover import Fetcher, Publisher, TensorFetcher, TensorPublisher, trust
from triptych.settings import DecodeSettings, EncoderSettings

if TYPE_CHECKING:
    import torch

    from triptych.handover.owner import NixlPublisher
    from triptych.handover.reader import NixlFetcher

DRAIN_S = 2.0
"""Seconds that an encoder which stops gives to readers that have their tickets by then."""
_MIB = 1 << 20


class Publishers:
    """The encoder's ends of both roads.

    Raises:
        ConfigurationError: ``handover_at_start`` is set, and NIXL does not start.
    """

    def __init__(self, settings: EncoderSettings, device: torch.device) -> None:
        self._settings = settings
        self._device = device
        self._tensor = TensorPublisher(device)
        self._nixl: NixlPublisher | None = None
        if settings.handover_at_start:
            self._start()

    def choose(self, outputs: Sequence[str], items: Sequence[Item]) -> Publisher:
        """The road of a request that brings ``items`` and asks for ``outputs``.

        Raises:
            ConfigurationError: NIXL is needed and does not start.
        """
        if not items or contract.EMBEDDINGS in outputs or contract.TICKET not in outputs:
            return self._tensor
        return self._nixl or self._start()

    @property
    def leases(self) -> int:
        """How many parts of the arena are lent now."""
        return self._nixl.leases if self._nixl else 0

    def close(self) -> None:
        """End all leases, soon; a second call does nothing."""
        if self._nixl:
            self._nixl.close(DRAIN_S)

    def _start(self) -> NixlPublisher:
        from triptych.handover.owner import NixlPublisher

        settings = self._settings
        self._nixl = NixlPublisher(
            settings.handover_arena_mb * _MIB,
            self._device,
            trust.load_key(settings.handover_key),
            settings.handover_lease_s,
        )
        return self._nixl


class Fetchers:
    """Decode's ends of both roads. Any thread may call.

    Raises:
        ConfigurationError: ``handover_at_start`` is set, and NIXL does not start.
    """

    def __init__(self, settings: DecodeSettings) -> None:
        self._settings = settings
        self._tensor = TensorFetcher()
        self._nixl: NixlFetcher | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._engine_fetches = settings.embedding_ingest == "connector"
        # The engine's process is a fork of this one, and NIXL must not be.
        if settings.handover_at_start and not self._engine_fetches:
            self._start()

    @property
    def closed(self) -> bool:
        """Whether nothing is fetched any more."""
        return self._closed

    def claim(self, ticket: Ticket) -> Claim | None:
        """What the engine fetches itself; None: it does not, or there is nothing to fetch.

        Raises:
            ConfigurationError: It should, but the embeddings are in EMBEDDINGS.
            InvalidValue: The ticket is none that an encoder writes.
        """
        if not self._engine_fetches or not ticket.items:
            return None
        from triptych.handover.parts import parts

        if any(item.where == "tensor" for item in ticket.items):
            raise ConfigurationError(
                "embedding_ingest is 'connector', but the ensemble maps EMBEDDINGS: take it out "
                "of the ensemble, as in chat_vllm_nixl, or set embedding_ingest to 'inline'"
            )
        parts(ticket)
        return Claim(ticket)

    def choose(self, ticket: Ticket) -> Fetcher:
        """The road that a ticket names.

        Raises:
            ConfigurationError: NIXL is needed and does not start.
        """
        if not any(item.where == "nixl" for item in ticket.items):
            return self._tensor
        return self._nixl or self._start()

    def close(self) -> None:
        """Fail what is under way; a second call does nothing."""
        with self._lock:
            self._closed = True
        if self._nixl:
            self._nixl.close()

    def _start(self) -> NixlFetcher:
        from triptych.handover.reader import NixlFetcher

        with self._lock:
            if self._closed:
                raise Unavailable("the stage is stopping")
            if self._nixl is None:
                settings = self._settings
                self._nixl = NixlFetcher(
                    settings.handover_buffer_mb * _MIB,
                    trust.load_key(settings.handover_key),
                    settings.handover_timeout_s,
                )
            return self._nixl
