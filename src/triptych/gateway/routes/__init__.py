"""The routes, one file a subject.

Each file has a ``router``. Those of `GUARDED` stand under ``/v1`` and behind the API keys, if there
are any; those of `OPEN` are for everybody who can reach the gateway; `PLAYGROUND` can be left out.
"""

from triptych.gateway.routes import chat, docs, health, models, playground

GUARDED = (chat.router, models.router)
OPEN = (health.router, docs.router)
PLAYGROUND = playground.router

__all__ = ["GUARDED", "OPEN", "PLAYGROUND"]
