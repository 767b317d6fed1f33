"""When a request passed from stage to stage, and what each of them took.

    REQUEST ──preprocess──▶ last medium decoded ──encode──▶ embeddings at hand ──prefill──▶
    first token ──decode──▶ last token

Media are encoded ahead of their request, while preprocess still waits for them, so it is the end
of decoding that parts the two, and not the end of preprocess. Waiting counts with the stage that
is waited for.
"""

from __future__ import annotations

import time

from triptych.chat.chunks import Stages
from triptych.contract import Prompt


class Times:
    """What the decode stage sees of one request; the rest comes in PROMPT."""

    __slots__ = ("encoded", "first")

    def __init__(self) -> None:
        self.encoded = 0.0
        """When its embeddings were at hand, `time.monotonic` seconds."""
        self.first = 0.0
        """When its first token came; 0: it has not."""

    def token(self) -> None:
        """A token has come."""
        self.first = self.first or time.monotonic()

    def stages(self, prompt: Prompt) -> Stages:
        """What the stages of ``prompt``, whose answer ends now, have taken."""
        now = time.monotonic()
        # A prompt that was not made by preprocess knows no times of its own.
        encoded = self.encoded or now
        decoded = prompt.decoded or encoded
        first = self.first or now
        return Stages(
            preprocess_ms=_ms(prompt.arrived or decoded, decoded),
            encode_ms=_ms(decoded, encoded),
            prefill_ms=_ms(encoded, first),
            decode_ms=_ms(first, now),
            media=len(prompt.items),
            media_cached=sum(item.cached for item in prompt.items),
        )


def _ms(began: float, ended: float) -> float:
    return round(max(0.0, ended - began) * 1000, 2)
