"""Questions about pictures of noise, asked of an ensemble or taken from stage to stage."""

from __future__ import annotations

import base64

from benches import _embed
from pictures import encoded, noise
from triptych import contract
from triptych.contract import Ticket


def url(seed: int) -> str:
    """A picture as a request names it."""
    data = encoded(noise(120, 90, seed), "PNG")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ask(caller: _embed.Caller, ensemble: str, *seeds: int) -> str:
    """What a plain client of Triton is told about pictures."""
    body = _embed.chat(*map(url, seeds), temperature=0, max_tokens=64)
    told: bytes = caller.ask(ensemble, body).as_numpy("TEXT")[0]
    return told.decode()


class Journey:
    """A request that the test hands from stage to stage, as an ensemble by NIXL does.

    Args:
        caller: Of the server.
        encoder: The model that encodes.
        seed: Of the picture.
    """

    def __init__(self, caller: _embed.Caller, encoder: str, seed: int) -> None:
        begun = caller.ask("preprocess", _embed.chat(url(seed), temperature=0, max_tokens=64))
        sent = {name: begun.as_numpy(name) for name in ("MEDIA", "ITEMS")}
        encoded = caller.infer(encoder, sent, ["TICKET"])
        self._sent = {"PROMPT": begun.as_numpy("PROMPT"), "TICKET": encoded.as_numpy("TICKET")}
        self._caller = caller

    @property
    def ticket(self) -> Ticket:
        """What the encoder gave."""
        return contract.decode(self._sent["TICKET"].item(), Ticket)

    def finish(self) -> str:
        """The answer."""
        told: bytes = self._caller.infer("decode_echo", self._sent, ["TEXT"]).as_numpy("TEXT")[0]
        return told.decode()
