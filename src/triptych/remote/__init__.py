"""A pool of Triton servers that run ``encoder``, in the place of an encoder of one's own.

    pool      the items of one request, each to a server, and back in their order
    balance   which server gets an item
    server    one server of the pool: what it has to do, and whether it is there
    call      one item as a request to Triton, and the answer
    tickets   the items' answers as the request's
    kept      pixels, until nobody can need them again

Belongs to one event loop. Only an item's pixels go over this road; its embeddings come back in
the answer, or stay at the server for decode to read (`triptych.handover`).
"""

from __future__ import annotations

from triptych.remote.kept import Kept
from triptych.remote.pool import Pool

__all__ = ["Kept", "Pool"]
