"""The few fields of a request that the gateway reads; the rest goes to Triton as it came.

Pictures and clips make up nearly all of a body, so it is not decoded and written anew: what has to
change is appended as a field that stands twice, and the last one counts
(`triptych.chat.request`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from triptych.chat.fields import wrong
from triptych.chat.request import INT64_MAX, INT64_MIN, parse
from triptych.errors import InvalidRequest, InvalidValue

MAX_CHOICES = 16
"""``n`` at most: each answer is a generation of its own."""


class Envelope(msgspec.Struct, frozen=True):
    """What the gateway reads; the types are checked here only where it acts on a field."""

    model: Any = None
    stream: Any = None
    n: Any = None
    seed: Any = None
    stream_options: Any = None


_ENVELOPE = msgspec.json.Decoder(Envelope)


class Asked(msgspec.Struct, frozen=True):
    """One request for one or more answers."""

    model: str
    """As the caller calls it."""
    stream: bool
    include_usage: bool
    """Whether a stream ends with its usage: only where the caller asks, as OpenAI has it."""
    bodies: list[bytes]
    """The JSON for each answer, as Triton gets it."""

    def __repr__(self) -> str:
        sizes = ", ".join(str(len(body)) for body in self.bodies)
        return f"Asked({self.model!r}, stream={self.stream}, bytes: {sizes})"


def read(body: bytes) -> Asked:
    """What a body asks for.

    Raises:
        InvalidRequest: It is no JSON; the position is in the text.
        InvalidValue: ``model`` is missing, or ``n`` is out of its range.
    """
    envelope = _open(body)
    model = envelope.model
    if model is None:
        raise InvalidValue("is required; GET /v1/models lists them", where="model")
    if not isinstance(model, str) or not 0 < len(model) <= 256:
        raise wrong("model", "must be a string of 1 to 256 characters", model)
    changes: dict[str, object] = {}
    options = envelope.stream_options
    if envelope.stream is True and (options is None or isinstance(options, dict)):
        options = options or {}
        if options.get("include_usage") is None:  # the stages count unless told not to
            options = {**options, "include_usage": False}
            changes["stream_options"] = options
    return Asked(
        model=model,
        stream=envelope.stream is True,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        bodies=[
            override(body, {**changes, **change}) for change in _choices(envelope.n, envelope.seed)
        ],
    )


def override(body: bytes, changes: Mapping[str, object]) -> bytes:
    """A JSON object that has some field, with others set; it is copied once, and not read."""
    if not changes:
        return body
    end = body.rindex(b"}")
    return b"".join((memoryview(body)[:end], b",", msgspec.json.encode(changes)[1:]))


def _open(body: bytes) -> Envelope:
    try:
        return _ENVELOPE.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        parse(body)  # says where and what is wrong
        raise InvalidRequest(f"the JSON is broken: {error}") from None


def _choices(n: object, seed: object) -> list[dict[str, object]]:
    """What distinguishes the requests for ``n`` answers."""
    if n is None or n == 1:
        return [{}]
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_CHOICES:
        raise wrong("n", f"must be an integer from 1 to {MAX_CHOICES}", n)
    if not isinstance(seed, int) or isinstance(seed, bool):
        return [{"n": 1}] * n
    # The first answer is the one that n=1 gives.
    span = INT64_MAX - INT64_MIN + 1
    later = [(seed + index - INT64_MIN) % span + INT64_MIN for index in range(1, n)]
    return [{"n": 1, "seed": each} for each in (seed, *later)]
