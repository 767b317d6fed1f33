"""The routes, one file a subject.

Each file has a ``router``. Those of `GUARDED` stand under ``/v1`` and behind the API keys, if there
are any; those of `OPEN` are for everybody who can reach the gateway.
"""

from triptych.gateway.routes import chat, health, models

GUARDED = (chat.router, models.router)
OPEN = (health.router,)

__all__ = ["GUARDED", "OPEN"]
