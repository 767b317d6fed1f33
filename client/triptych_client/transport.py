"""What gRPC and HTTP, blocking and asynchronous, have in common.

The client's logic is written once, as coroutines over `Transport`. Under `AsyncClient` they run on
an event loop. Under `Client` the transport blocks where the other one awaits, so its coroutines
never suspend, and `run` drives them to their end with a single step: no loop, no thread, no twin.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from triptych_client.background import Background
from triptych_client.requests import Call

CONTROL_TIMEOUT_S = 5.0
"""For everything but an answer: health, lists, aborts."""
PAUSE_S = 0.05
"""Seconds from an abort to a cut, where the end that it brings cannot be seen."""


class ModelInfo(msgspec.Struct, frozen=True):
    """A model that the server has loaded."""

    name: str
    version: str = ""


class Input(NamedTuple):
    """An input of a model."""

    name: str
    datatype: Literal["BYTES", "UINT8"]
    shape: tuple[int, ...]
    data: bytes
    """Of BYTES, the one element."""


class Exchange(Protocol):
    """One chat under way."""

    ended: bool
    """Nothing more can be received."""
    settled: bool
    """The server has nothing more to do for it: it has answered, or has never been reached."""

    async def receive(self) -> bytes | None:
        """The next CHUNK; None: the stream is over. After a server's error it still has an end.

        Raises:
            TriptychClientError: The server's error, a broken connection, the timeout.
        """
        ...

    async def close(self) -> None:
        """Cut it, unless it has ended; from any thread, and a `receive` that waits comes back."""
        ...


class Transport(Protocol):
    """A way to one server."""

    background: Background
    """What is still to be done for callers that have gone; `close` waits for it."""

    def open(self, call: Call) -> Exchange:
        """Begin a chat; what goes wrong on the way is raised by `Exchange.receive`.

        Raises:
            InvalidValue: It cannot carry the request.
        """
        ...

    async def ready(self, model: str) -> bool:
        """Whether the server and the model take requests; False also where there is no server."""
        ...

    async def models(self) -> list[ModelInfo]:
        """All models that the server has loaded."""
        ...

    async def outputs(self, ensemble: str) -> dict[str, str]:
        """Which step's model makes each tensor of an ensemble; empty for another kind of model."""
        ...

    async def infer(
        self, model: str, inputs: Sequence[Input], timeout_s: float | None
    ) -> dict[str, bytes]:
        """The outputs of a model that answers once; of BYTES, the one element.

        Raises:
            InvalidRequest: Tensors cannot go this way.
            TriptychClientError: The server's error, a broken connection, the timeout.
        """
        ...

    async def abort(self, model: str, request_id: str) -> None:
        """Tell the decode stage ``model`` to end the generation of ``request_id``."""
        ...

    async def close(self) -> None:
        """Let go of the connections."""
        ...


class Address(msgspec.Struct, frozen=True):
    """Where a server is and what is spoken there."""

    scheme: str
    """``grpc``, ``grpcs``, ``http`` or ``https``."""
    host: str
    """``host:port``."""
    path: str = ""

    def __str__(self) -> str:
        if self.scheme == "grpc":
            return self.host
        return f"{self.scheme}://{self.host}{self.path}"

    @property
    def is_local(self) -> bool:
        """Whether it is this machine, which no proxy leads to."""
        return re.match(r"(localhost|127\.[\d.]+|\[::1\]):", self.host) is not None

    @property
    def hint(self) -> str:
        """What to do where nobody answers."""
        return f"no server at {self}: start it with `triptych serve`"


def parse_address(text: str) -> Address:
    """Read ``localhost:8001`` or ``grpc://…`` (gRPC), ``grpcs://…``, ``http://…``, ``https://…``.

    Raises:
        ValueError: It is none of these.
    """
    match = re.fullmatch(
        r"(?:(grpcs?|https?)://)?((?:\[[\da-fA-F:.]+\]|[^/:\s\[\]]+)(?::\d{1,5})?)(/\S*)?", text
    )
    if match is None:
        raise ValueError(f"an address is host:port (gRPC) or http://host:port, got {text!r}")
    scheme, host, path = match[1] or "grpc", match[2], (match[3] or "").rstrip("/")
    if not re.search(r":\d+$", host):
        if scheme.startswith("grpc"):
            raise ValueError(f"an address for gRPC has a port, as in localhost:8001, got {text!r}")
        host += ":443" if scheme == "https" else ":80"
    if path and scheme.startswith("grpc"):
        raise ValueError(f"an address for gRPC has no path, got {text!r}")
    return Address(scheme, host, path)
