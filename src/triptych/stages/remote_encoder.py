"""The model ``remote_encoder``: what ``encoder`` does, done by a pool of other servers.

    execute ──requests──▶ loop thread ──items──▶ servers that run encoder
                          │     ▲                  │
                response ◀┘     └─────answers──────┘

Not decoupled, like ``encoder``, yet ``execute`` waits for nothing: each request has its response
sender, which the loop's thread alone uses, once. The wiring chooses the road here as well: who
asks for EMBEDDINGS gets them back over the network, and who does not gets a ticket with which
decode reads them from the servers.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from msgspec.structs import replace

from triptych import contract
from triptych.contract import Again, Item, Ticket
from triptych.encode import lookup
from triptych.errors import ConfigurationError, InvalidValue, LeaseLost, TriptychError
from triptych.pulse import Pulse
from triptych.remote import Kept, Pool
from triptych.remote.call import Answer, Call
from triptych.remote.kept import Sent
from triptych.remote.tickets import join, merge
from triptych.settings import RemoteEncoderSettings
from triptych.stages import backend
from triptych.stages.encoder_inputs import read_items, read_pixels
from triptych.stages.ended import Ended
from triptych.stages.remote_encoder_metrics import Metrics
from triptych.stages.telemetry import Telemetry

logger = logging.getLogger("triptych.stages.remote_encoder")

DRAIN_S = 10.0
"""Seconds that `finalize` gives to what is under way."""
TICK_S = 1.0
"""Between two looks for pixels that nobody can need any more, and for news for the metrics."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Work:
    """One request."""

    calls: list[Call]
    inline: bool
    """Whether it asks for EMBEDDINGS."""
    avoid: frozenset[str]
    """Addresses of the servers whose embeddings could not be read; empty: this is no second try."""


class RemoteEncoderModel:
    """What the remote encoder's model.py hands to Triton."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Look at every server once; those that are not there may come later.

        Raises:
            ConfigurationError: A setting is wrong; Triton does not start.
        """
        backend.configure_logging()
        settings = backend.model_settings(RemoteEncoderSettings, args)
        backend.configure_logging(settings.log_level)
        self._pulse = Pulse(args["model_instance_name"])
        self._name = args["model_name"]
        self._kept = Kept(settings.encode_again_mb << 20)
        self._answering: set[Future[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="triptych-remote", daemon=True
        )
        self._thread.start()
        self._pulse.follow(self._loop)
        self._telemetry = Telemetry("encoder", settings, args)
        try:
            self._pool = self._call(self._start(settings))
        except BaseException:
            self._end()
            raise

    def execute(self, requests: Sequence[Any]) -> None:
        """Take the requests over; each is answered by the loop's thread."""
        for request in requests:
            sender, request_id = request.get_response_sender(), request.request_id()
            try:
                inline = contract.EMBEDDINGS in request.requested_output_names()
                work: Work | Exception = self._read(request, inline)
            except Exception as error:
                work = error
            answer = self._answer(sender, request_id, work)
            answering = asyncio.run_coroutine_threadsafe(answer, self._loop)
            self._answering.add(answering)
            answering.add_done_callback(self._answering.discard)

    def finalize(self) -> None:
        """Finish what is under way, and hang up; a second call does nothing."""
        if hasattr(self, "_pool") and not self._loop.is_closed():
            wait([*self._answering], DRAIN_S)
            self._call(self._stop())
            self._end()

    def _read(self, request: Any, inline: bool) -> Work:
        """The request's items, each with its pixels, which it brings or has brought before.

        Raises:
            InvalidValue: An item is not what preprocess writes.
            LeaseLost: What it has brought before is not kept any more.
        """
        calls, servers = [], set()
        media = read_pixels(request)
        for index, item in enumerate(read_items(request)):
            try:
                if item.lease:
                    sent = self._recall(item)
                    servers.add(sent.server)
                    calls.append(Call(sent.item, sent.pixels, inline))
                else:
                    calls.append(Call(item, pixels(item, media), inline))
            except TriptychError as error:
                raise error.at(f"items[{index}]") from None
        return Work(calls, inline, frozenset(servers))

    def _recall(self, item: Item) -> Sent:
        sent = self._kept.take(item.lease)
        if lookup.SEPARATOR in item.lease:
            raise ConfigurationError(
                "preprocess has given the pixels to an encoder of this server; where an ensemble "
                "has remote_encoder, set encoder_model to nothing (TRIPTYCH_ENCODER_MODEL=)"
            )
        if sent is None:
            raise LeaseLost("this item's pixels are no longer kept; send the request again")
        return sent

    async def _answer(self, sender: Any, request_id: str, work: Work | Exception) -> None:
        try:
            if isinstance(work, Exception):
                raise work
            response = self._response(work, await self._pool.encode(work.calls, work.avoid))
        except Exception as error:
            self._telemetry.ended(Ended.by(error, request_id))
            response = backend.error_response(error, request_id)
        try:
            sender.send(response, flags=backend.FINAL)
        except Exception:
            # The caller is gone, or Triton is stopping: there is nobody left to tell.
            logger.exception("request %s could not be answered", request_id or "without id")

    def _response(self, work: Work, answers: Sequence[Answer]) -> Any:
        if not work.inline:
            ticket = replace(merge(answers), again=self._promise(work, answers))
            return backend.response(_ticket(ticket))
        whole, ticket = join(answers)
        return backend.response(_ticket(ticket), backend.uint8_tensor(contract.EMBEDDINGS, whole))

    def _promise(self, work: Work, answers: Sequence[Answer]) -> Again | None:
        """Keep the pixels until the embeddings must have been read."""
        if work.avoid or not all(call.item.keep for call in work.calls):
            return None
        items = []
        for call, answer in zip(work.calls, answers, strict=True):
            token = self._kept.put(Sent(call.item, call.pixels, answer.server))
            if token is None:
                return None
            items.append(replace(call.item, offset=0, lease=token))
        return Again(self._name, items) if items else None

    async def _start(self, settings: RemoteEncoderSettings) -> Pool:
        pool = Pool(
            settings.encoder_addresses,
            timeout_s=settings.encoder_timeout_s,
            interval_s=settings.encoder_health_interval_s,
            health_timeout_s=settings.encoder_health_timeout_s,
        )
        await pool.start()
        metrics = Metrics(self._name, pool.servers)
        self._ticking = asyncio.create_task(self._tick(metrics))
        return pool

    async def _stop(self) -> None:
        self._ticking.cancel()
        await self._pool.close()

    async def _tick(self, metrics: Metrics) -> None:
        while True:
            metrics.show()
            self._kept.expire()
            await asyncio.sleep(TICK_S)

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._telemetry.stop()


def pixels(item: Item, media: memoryview) -> memoryview:
    """The item's bytes in MEDIA. What else can be wrong with them the encoder sees.

    Raises:
        InvalidValue: They do not lie there, or become nothing.
    """
    end = item.offset + item.nbytes
    if min(item.shape, default=0) < 1 or item.offset < 0 or end > len(media):
        raise InvalidValue(
            f"bytes {item.offset} to {end}, for shape {item.shape}, do not lie in MEDIA, "
            f"which has {len(media)}"
        )
    if item.tokens < 1:
        raise InvalidValue(f"must become at least one embedding, got {item.tokens}")
    return media[item.offset : end]


def _ticket(ticket: Ticket) -> Any:
    return backend.text_tensor(contract.TICKET, contract.encode(ticket), (1, 1))
