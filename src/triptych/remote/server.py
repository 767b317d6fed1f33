"""One server of the pool, and the states that it can be in.

- ``new``: it has not been asked yet.
- ``ready``: it gets items.
- ``draining``: it says that it is not ready, because it stops or has unloaded its encoder. It gets
  no more items, and finishes what it has.
- ``failing``: it has failed on an item, though not by the item's fault. The same, until it has
  answered a request without items: a Triton whose encoder has died calls it ready for ever.
- ``lost``: it says nothing. What it has goes to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any, Literal

from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from triptych.errors import TriptychError, Unavailable
from triptych.remote.call import MODEL, Answer, Call, inputs

logger = logging.getLogger("triptych.remote")

State = Literal["new", "ready", "draining", "failing", "lost"]

TLS = "grpcs://"
_FAULTY = {"UNAVAILABLE", "INTERNAL", "UNKNOWN", "NOT_FOUND"}
"""What gRPC calls an answer that speaks against the server, if it is none of ours."""


class RemoteServer:
    """A Triton that runs ``encoder``.

    Args:
        address: ``host:port`` of its gRPC, or ``grpcs://host:port``.
        timeout_s: For it to say whether it is ready, in seconds.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self.state: State = "new"
        self.reason = "it has not answered yet"
        """Why it is not ready."""
        self.outstanding = 0
        """Embeddings it has been asked for and not given yet."""
        self.items = 0
        """How many it has encoded."""
        self.failures = 0
        """How many it has not, though it was asked."""
        self._timeout_s = timeout_s
        self._failed = False
        """Whether it must answer a request without items before it is ready again."""
        self._client = self._connect()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"RemoteServer({self.address}, {self.state}, {self.outstanding} tokens)"

    async def check(self) -> None:
        """Find out the server's state."""
        client, deadline = self._client, time.monotonic() + self._timeout_s
        try:
            ready = await client.is_model_ready(MODEL, client_timeout=self._timeout_s)
            if ready and self._failed:
                left = max(deadline - time.monotonic(), 0.001)
                await client.infer(MODEL, inputs([], memoryview(b"")), client_timeout=left)
        except InferenceServerException as error:
            self._lose(f"it does not say that it is ready: {_text(error)}")
            return
        if ready:
            self._failed = False
            self._become("ready")
        else:
            self._become("draining", f"it says that its model {MODEL} is not ready")

    async def encode(self, call: Call, timeout_s: float) -> Answer:
        """Have an item encoded.

        Args:
            call: The item.
            timeout_s: Seconds for it.

        Raises:
            TriptychError: What the encoder says.
            Unavailable: The server is lost, or said nothing in time.
        """
        self.outstanding += call.item.tokens
        try:
            answer = call.read(await self._ask(call, timeout_s), self.address)
            self.items += 1
        except TriptychError:
            self.failures += 1
            raise
        finally:
            self.outstanding -= call.item.tokens
        return answer

    async def close(self) -> None:
        """Hang up; what is under way fails."""
        self.reason = "the stage is stopping"
        self._lost.set_result(None)
        await asyncio.gather(_close(self._client), *self._closing)

    async def _ask(self, call: Call, timeout_s: float) -> Any:
        lost = self._lost
        asking = asyncio.ensure_future(
            self._client.infer(
                MODEL, call.inputs(), outputs=call.outputs(), client_timeout=timeout_s
            )
        )
        # Not cancelled when the server is lost: the connection is closed then anyway.
        asking.add_done_callback(_noted)
        await asyncio.wait({asking, lost}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise Unavailable(self.reason)
        try:
            return asking.result()
        except asyncio.CancelledError:  # by the connection's end
            raise Unavailable(self.reason) from None
        except InferenceServerException as error:
            told = TriptychError.parse(str(error.message()))
            if str(told) in str(error.message()):
                raise told from None
            if str(error.status()).removeprefix("StatusCode.") in _FAULTY:
                self._failed = True
                self._become("failing", _text(error))
            raise Unavailable(_text(error)) from None

    def _lose(self, reason: str) -> None:
        """Give up the connection, and all that waits for an answer on it.

        A new one is made at once: one that a cut link has stalled may stay so for minutes after
        the link is back.
        """
        self._become("lost", reason)
        self._lost.set_result(None)
        self._lost = asyncio.get_running_loop().create_future()
        closing = asyncio.ensure_future(_close(self._client))
        self._client = self._connect()
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _become(self, state: State, reason: str = "") -> None:
        if state != self.state:
            level = logging.INFO if state == "ready" else logging.WARNING
            logger.log(level, "encoder %s is %s%s", self.address, state, reason and f": {reason}")
        self.state, self.reason = state, reason

    def _connect(self) -> InferenceServerClient:
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            # A new connection must not inherit from the old one how long to wait.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        tls = self.address.startswith(TLS)
        return InferenceServerClient(self.address.removeprefix(TLS), ssl=tls, channel_args=options)


async def _close(client: InferenceServerClient) -> None:
    with contextlib.suppress(Exception):
        await client.close()


def _noted(asking: asyncio.Future[Any]) -> None:
    """Take the exception out of a question whose answer nobody waits for."""
    if not asking.cancelled():
        asking.exception()


def _text(error: InferenceServerException) -> str:
    status = str(error.status()).removeprefix("StatusCode.")
    return f"{status}, {error.message() or 'without a word'}"
