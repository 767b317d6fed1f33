"""The few fields of a request that the gateway reads; the rest goes to Triton as it came.

Pictures and clips make up nearly all of a chat's body, so it is not decoded and written anew: what
has to change is appended as a field that stands twice, and the last one counts
(`triptych.chat.request`). `triptych.gateway.prompts` reads what has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from triptych.chat.fields import wrong
from triptych.chat.request import INT64_MAX, INT64_MIN, parse
from triptych.errors import InvalidRequest, InvalidValue, UnknownField

MAX_CHOICES = 16
"""``n`` at most: each answer is a generation of its own."""

OURS = "usage_with_finish"
"""Of the stages' ``stream_options``: spares a response, and is the gateway's to ask for."""


class Envelope(msgspec.Struct, frozen=True):
    """What the gateway reads; the types are checked here only where it acts on a field."""

    model: Any = None
    stream: Any = None
    n: Any = None
    seed: Any = None
    stream_options: Any = None


_ENVELOPE = msgspec.json.Decoder(Envelope)


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One request for one or more answers."""

    model: str
    """As the caller calls it."""
    stream: bool
    include_usage: bool
    """Whether a stream ends with its usage: only where the caller asks, as OpenAI has it."""
    n: int
    """Answers to the same question."""
    bodies: list[bytes]
    """The JSON for each answer, as Triton gets it."""

    def __repr__(self) -> str:
        sizes = ", ".join(str(len(body)) for body in self.bodies)
        return f"{type(self).__name__}({self.model!r}, stream={self.stream}, bytes: {sizes})"


def read(body: bytes) -> Asked:
    """What a chat's body asks for.

    Raises:
        InvalidRequest: It is no JSON; the position is in the text.
        InvalidValue: ``model`` is missing, or ``n`` is out of its range.
        UnknownField: A field that is the gateway's own.
    """
    envelope = _open(body)
    common, include_usage = stream_options(envelope.stream, envelope.stream_options)
    draws = choices(envelope.n, envelope.seed)
    return Asked(
        model=model(envelope.model),
        stream=envelope.stream is True,
        include_usage=include_usage,
        n=len(draws),
        bodies=[override(body, {**common, **draw}) for draw in draws],
    )


def model(value: object) -> str:
    """The ``model`` of a request.

    Raises:
        InvalidValue: It is missing or no name.
    """
    if value is None:
        raise InvalidValue("is required; GET /v1/models lists them", where="model")
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise wrong("model", "must be a string of 1 to 256 characters", value)
    return value


def stream_options(stream: object, options: object) -> tuple[dict[str, object], bool]:
    """What must change so that a stream tells its usage as the gateway wants it; and the caller.

    The usage is counted for the gateway's numbers in any case. What is of the wrong type stays for
    the stages to refuse.

    Raises:
        UnknownField: A field that is the gateway's own.
    """
    if isinstance(options, dict) and OURS in options:
        raise UnknownField(f'unknown field "{OURS}"', where=f"stream_options.{OURS}")
    if stream is not True or not (options is None or isinstance(options, dict)):
        return {}, False
    given = options or {}
    wanted = given.get("include_usage")
    told = {} if wanted is None or isinstance(wanted, bool) else {"include_usage": wanted}
    rest = {name: value for name, value in given.items() if name != "include_usage"}
    return {"stream_options": {**rest, **told, OURS: True}}, wanted is True


def choices(n: object, seed: object) -> list[dict[str, object]]:
    """What distinguishes the requests for ``n`` answers.

    Raises:
        InvalidValue: ``n`` is out of its range.
    """
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
