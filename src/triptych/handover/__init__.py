"""How embeddings get from the encoder to decode: two roads behind one interface.

    base       the interface: Publisher at the encoder, Fetcher at decode
    tensor     inside one Triton server, as the tensor EMBEDDINGS
    owner      NIXL, the encoder's end: one registered arena, leases, no thread that spins
    reader     NIXL, decode's end: reads by ticket, verifies, releases
    parts      what a ticket asks a reader to do, and what came of it
    peers      the owners that a reader knows
    agent      all that is called of NIXL itself
    arena      registered memory and who has which part of it
    leases     what waits for its reader, and until when
    seal       header and checksums, by which a reader knows what it got
    trust      by which a reader knows whose ticket it is

Ownership on the road NIXL: an arena belongs to its encoder process for ever. A lease lends a part
of it to one request, from `Publisher.room` until the reader says that it is done or the deadline
passes. The reader copies into an arena of its own, and a part of that is free again when the last
tensor on it is gone. Nobody writes into what is lent.
"""

from __future__ import annotations

from triptych.handover.base import Fetcher, Publisher
from triptych.handover.tensor import TensorFetcher, TensorPublisher

__all__ = ["Fetcher", "Publisher", "TensorFetcher", "TensorPublisher"]
