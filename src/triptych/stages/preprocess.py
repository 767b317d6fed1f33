"""The stage ``preprocess``: decoupled, so that one slow medium holds up nobody.

    execute ──requests with media──▶ loop thread ──outcomes──▶ courier thread ──▶ response
       └──text──▶ response

Triton allows only one thread to touch a response sender. Reading and rendering are quick, so a text
is answered where it came, in Triton's own thread, and is handed to no other. Whatever waits for
media is the courier's: it watches the callers, and answers.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

from triptych import contract, families
from triptych.encode import lookup
from triptych.encode.lookup_client import LookupClient
from triptych.encode.recall import Recall
from triptych.errors import Cancelled, MediaTooLarge, Overloaded, Unavailable
from triptych.media.loader import MediaLoader
from triptych.pulse import Pulse
from triptych.settings import PreprocessSettings
from triptych.stages import backend
from triptych.stages.arrival import Arrival
from triptych.stages.ended import Ended
from triptych.stages.held import EncoderHoldings
from triptych.stages.prepare import MediaBytes, Prepared, Preparer
from triptych.stages.tally import Hold, InHand, Tallies, Tally
from triptych.stages.telemetry import Telemetry

logger = logging.getLogger("triptych.stages.preprocess")

CANCEL_POLL_S = 0.02
"""Seconds between two looks at whether the callers of loading requests are still there."""
STOP_TIMEOUT_S = 10.0
"""Seconds that `finalize` gives to what is still loading."""


@dataclass(eq=False, slots=True)
class _Job:
    """One request; `outcome` is set when it can be answered."""

    sender: Any
    request_id: str
    data: bytes = field(default=b"", repr=False)
    tensors: MediaBytes | None = field(default=None, repr=False)
    outcome: Prepared | BaseException | None = None
    loading: Future[Prepared] | None = None
    hold: Hold | None = None
    arrival: Arrival = field(default_factory=Arrival)


class PreprocessModel:
    """OpenAI chat JSON to PROMPT, MEDIA and ITEMS."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the checkpoint's template and tokenizer, and start the two threads."""
        backend.configure_logging()
        backend.take_turns()
        settings = backend.model_settings(PreprocessSettings, args)
        backend.configure_logging(settings.log_level)
        self._pulse = Pulse(args["model_instance_name"])
        family = families.load(settings.model)
        self._max_tensors = settings.max_request_mb << 20
        self._loop = asyncio.new_event_loop()
        self._admission = Admission(settings, args["model_instance_name"])
        self._telemetry = Telemetry("preprocess", settings, args, self._admission.tally)
        loader = MediaLoader(
            settings, family, holder=encoder_holdings(settings), on_step=self._telemetry.step
        )
        self._preparer = Preparer(settings, family, loader)
        self._courier = Courier(self._preparer, self._loop, self._telemetry, self._admission)
        self._loop_thread = threading.Thread(
            target=self._loop.run_forever, name="triptych-media", daemon=True
        )
        self._loop_thread.start()
        self._pulse.follow(self._loop)
        self._courier.start()
        # Meanwhile the model loads on: the first picture shall not wait for a worker to start.
        warming = asyncio.run_coroutine_threadsafe(self._preparer.start(), self._loop)
        warming.add_done_callback(_warmed)
        self._recall = self._open_recall(args) if settings.encoder_model else None
        logger.info("serving %s from %s", family.name, settings.model)

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer what is text alone, or wrong; the rest is answered by the courier, once each."""
        for request in requests:
            job = _Job(request.get_response_sender(), request.request_id())
            try:
                job.data = backend.read_bytes(request, contract.REQUEST)
                traceparent = backend.parameter(request, contract.TRACEPARENT)
                job.arrival = Arrival(job.arrival.at, request.timeout() / 1e6, traceparent)
                job.tensors = backend.read_octets(
                    request, contract.REQUEST_TENSORS, self._max_tensors
                )
            except Exception as error:
                job.outcome = error
            self._courier.take(job)

    def _open_recall(self, args: Mapping[str, str]) -> Recall | None:
        """Where the encoder and decode may come back; None: this machine does not let us listen."""
        try:
            name = lookup.instance(args["model_name"], args["model_instance_name"])
            address = lookup.address(lookup.place(), name)
            recall = Recall(address, self._preparer.again, self._courier.drop)
            asyncio.run_coroutine_threadsafe(recall.start(), self._loop).result(STOP_TIMEOUT_S)
        except (OSError, ValueError) as error:
            logger.warning("a lease that is lost cannot be made good: %s", error)
            return None
        return recall

    def finalize(self) -> None:
        """Answer what is left, and end the threads; a second call does nothing."""
        if not hasattr(self, "_courier"):
            return
        logger.debug("stopping")
        self._courier.stop()
        closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        try:
            closing.result(STOP_TIMEOUT_S)
        except Exception:
            logger.exception("closing the media loader failed")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop_thread.join(STOP_TIMEOUT_S)
        self._loop.close()
        self._admission.tally.close()
        self._telemetry.stop()
        del self._courier
        logger.debug("stopped")

    async def _close(self) -> None:
        if self._recall:
            await self._recall.close()
        await self._preparer.close()


def encoder_holdings(settings: PreprocessSettings) -> EncoderHoldings | None:
    """What the encoder can be asked for; None: all media go to it as pixels."""
    if not settings.encoder_model:
        return None
    try:
        return EncoderHoldings(LookupClient(lookup.place(), settings.encoder_model), settings)
    except OSError as error:
        logger.warning("the encoder cannot be asked which media it holds: %s", error)
        return None


class Admission:
    """Turns requests away while the server has enough in hand.

    Args:
        settings: The limits.
        instance: Triton's name of the instance.
    """

    def __init__(self, settings: PreprocessSettings, instance: str) -> None:
        folder = lookup.place()
        self.tally = Tally(folder, instance)
        """Requests whose media are loading here."""
        self._all = Tallies(folder)
        self._max_requests = settings.max_inflight_requests
        self._max_tokens = settings.max_inflight_tokens
        self._max_with_media = settings.max_inflight_media or self._max_requests * 3 // 4
        self._max_media_bytes = settings.max_inflight_media_mb << 20

    def check(self) -> None:
        """Whether another request may begin.

        Raises:
            Overloaded: Not now.
        """
        have = self._all.total()
        _compare(have.requests, self._max_requests, "requests")
        _compare(have.tokens, self._max_tokens, "tokens")

    def check_media(self, nbytes: int) -> None:
        """Whether one with media may, which leave room for text.

        Args:
            nbytes: Of the request and the tensors beside it.

        Raises:
            Overloaded: Not now.
            MediaTooLarge: It never can.
        """
        have, limit = self._all.total(), self._max_media_bytes
        _compare(have.with_media, self._max_with_media, "requests with media")
        if limit and nbytes > limit:
            raise MediaTooLarge(
                f"a request with {nbytes} bytes of media cannot be served, the limit is {limit} "
                "(max_inflight_media_mb)"
            )
        if limit and have.media_bytes + nbytes > limit:
            raise Overloaded(
                f"the server has {have.media_bytes} bytes of media in hand and this request "
                f"{nbytes}, the limit is {limit}; try again later"
            )


def _compare(have: int, limit: int, what: str) -> None:
    if limit and have >= limit:
        raise Overloaded(
            f"the server has {have} {what} in hand, the limit is {limit}; try again later"
        )


class Courier:
    """Begins requests, and has a thread that watches over those whose media load."""

    def __init__(
        self,
        preparer: Preparer,
        loop: asyncio.AbstractEventLoop,
        telemetry: Telemetry,
        admission: Admission,
    ) -> None:
        self._preparer = preparer
        self._admission = admission
        self._telemetry = telemetry
        self._loop = loop
        self._jobs: queue.SimpleQueue[_Job | str | None] = queue.SimpleQueue()
        """Beside jobs: ids of requests to end, and None at the end of all."""
        self._loading: set[_Job] = set()
        self._next_look = 0.0
        self._thread = threading.Thread(target=self._run, name="triptych-courier", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def take(self, job: _Job) -> None:
        """Answer a job, or begin to load its media; for one thread."""
        if job.outcome is None:
            self._begin(job)
        if job.outcome is not None:
            self._answer(job, job.outcome)
        elif job.loading is not None:
            self._jobs.put(job)  # its sender is the courier's from here on
            job.loading.add_done_callback(lambda _: self._jobs.put(job))

    def drop(self, request_id: str) -> None:
        """End the loading of every request of this id, from any thread."""
        self._jobs.put(request_id)

    def stop(self) -> None:
        """Answer what has loaded; what is still loading gets an error."""
        self._jobs.put(None)
        self._thread.join(STOP_TIMEOUT_S + 1)

    def _run(self) -> None:
        serving = True
        while serving:
            try:
                serving = self._turn()
            except Exception:
                # The thread must outlive whatever one request does to it.
                logger.exception("the courier failed")
        self._drain()

    def _turn(self) -> bool:
        """Wait for one job that has begun or loaded; False at the end of all jobs."""
        try:
            job = self._jobs.get(timeout=CANCEL_POLL_S if self._loading else None)
        except queue.Empty:
            self._look_for_cancelled()
            return True
        if job is None:
            return False
        if isinstance(job, str):
            self._cancel(job)
        else:
            self._advance(job)
        if self._loading:
            self._look_for_cancelled()
        return True

    def _cancel(self, request_id: str) -> None:
        for job in self._loading:
            if job.loading is not None and job.request_id == request_id:
                job.loading.cancel()

    def _advance(self, job: _Job) -> None:
        """Watch over a job that comes for the first time, answer one that comes again."""
        if job not in self._loading:
            self._loading.add(job)
        elif job.loading is not None and job.hold is not None:
            self._loading.discard(job)
            job.hold.close()
            self._answer(job, _outcome(job.loading))

    def _begin(self, job: _Job) -> None:
        try:
            self._admission.check()
            nbytes = len(job.data) + (0 if job.tensors is None else job.tensors.nbytes)
            begun = self._preparer.begin(
                job.data,
                job.tensors,
                job.arrival,
                on_media=lambda: self._admission.check_media(nbytes),
            )
            job.data, job.tensors = b"", None
            if not begun.media:
                job.outcome = self._preparer.without_media(begun)
                return
        except Exception as error:
            job.outcome = error
            return
        job.hold = hold = self._admission.tally.hold(InHand(1, 0, 1, nbytes))
        loading = self._preparer.load(begun, hold.received)
        job.loading = asyncio.run_coroutine_threadsafe(loading, self._loop)

    def _answer(self, job: _Job, outcome: Prepared | BaseException) -> None:
        try:
            if isinstance(outcome, Prepared):
                response = backend.response(
                    backend.text_tensor(contract.PROMPT, outcome.prompt),
                    backend.uint8_tensor(contract.MEDIA, outcome.media),
                    backend.text_tensor(contract.ITEMS, outcome.items, (1, 1)),
                )
            else:
                response = backend.error_response(outcome, job.request_id)
                self._telemetry.ended(Ended.by(outcome, job.request_id))
            job.sender.send(response, flags=backend.FINAL)
        except Exception:
            # The caller is gone, or Triton is stopping: there is nobody left to tell.
            logger.exception("request %s could not be answered", job.request_id or "without id")

    def _look_for_cancelled(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + CANCEL_POLL_S
        for job in self._loading:
            if job.loading is not None and job.sender.is_cancelled():
                logger.debug("request %s was cancelled", job.request_id or "without id")
                job.loading.cancel()

    def _drain(self) -> None:
        """After `stop`: whatever is still loading ends now, and is told so."""
        for job in self._loading:
            self._answer(job, Unavailable("the server is stopping"))
            if job.loading is not None:
                job.loading.cancel()
        self._loading.clear()


def _warmed(warming: Future[None]) -> None:
    """The loader has said on its own what is wrong; requests will be told as well."""
    if not warming.cancelled() and (error := warming.exception()):
        logger.error("no medium can be decoded: %s", error)


def _outcome(loading: Future[Prepared]) -> Prepared | BaseException:
    try:
        return loading.result()
    except CancelledError:
        return Cancelled("the caller went away while the media were loading")
    except Exception as error:
        return error
