"""The stage ``decode_*``: PROMPT, TICKET and EMBEDDINGS in, TEXT and CHUNK out, streamed.

    execute ──▶ engine thread: one task a generation ──deltas──▶ sender thread ──▶ responses

Also takes aborts: a request whose parameter ``abort`` holds a Triton request id ends that
generation with `Cancelled`, and is itself answered with empty outputs. An abort of a generation
that has ended, or that nobody knows, is answered the same way: whoever sends one cannot know
whether the answer was quicker.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar

from triptych import contract, families
from triptych.chat.chunks import ChunkWriter, TokenLogprob, TopLogprob
from triptych.contract import Prompt
from triptych.encode import lookup, recall
from triptych.engines import base
from triptych.engines.kept import KeptEngine
from triptych.errors import InvalidValue, TriptychError
from triptych.pulse import Pulse
from triptych.settings import DecodeSettings
from triptych.stages import again, backend
from triptych.stages.decode_inputs import read_embeddings, read_prompt, read_ticket
from triptych.stages.ended import Ended
from triptych.stages.generations import Generations
from triptych.stages.outbox import Outbox, Parcel, Sender
from triptych.stages.roads import Fetchers
from triptych.stages.tally import Hold, InHand, Tally
from triptych.stages.telemetry import Telemetry
from triptych.stages.times import Times

logger = logging.getLogger("triptych.stages.decode")

DEATH_DELAY_S = 1.0
"""Seconds in which the callers of an engine that died are told so."""
SEND_TIMEOUT_S = 5.0
"""Seconds that `finalize` gives to the answers that still wait."""


class DecodeModel:
    """What a ``decode_*`` model.py hands to Triton; it names the engine."""

    engine_type: ClassVar[type[base.Engine]]

    def initialize(self, args: Mapping[str, str]) -> None:
        """Start the engine.

        Raises:
            TriptychError: It does not start; Triton shows why, and does not start either.
        """
        backend.configure_logging()
        settings = backend.model_settings(DecodeSettings, args)
        backend.configure_logging(settings.log_level)
        self._pulse = Pulse(args["model_instance_name"])
        engine = KeptEngine(
            self.engine_type,
            settings,
            families.load(settings.model),
            on_outage=self._pulse.tell,
            on_end=_end_process,
        )
        self._tally = Tally(lookup.place(), args["model_instance_name"])
        self._telemetry = Telemetry("decode", settings, args, self._tally)
        self._fetchers = Fetchers(settings)
        self._sender = Sender()
        self._sender.start()
        self._generations = Generations(engine, self._sender, again.encode_again)
        try:
            self._generations.start()
        except BaseException:
            self._fetchers.close()
            self._sender.stop(SEND_TIMEOUT_S)
            self._telemetry.stop()
            self._tally.close()
            raise
        self._pulse.follow(self._generations.loop)
        logger.info("serving %s with %s", settings.model, self.engine_type.name)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take the requests over; each is answered by the sender thread."""
        for request in requests:
            reply = TritonReply(request, self._telemetry, self._tally)
            try:
                self._begin(request, reply)
            except Exception as error:
                self._sender.fail(Outbox(reply, stream=False), error)

    def finalize(self) -> None:
        """End every generation, the engine and the threads; a second call does nothing."""
        if hasattr(self, "_generations"):
            self._fetchers.close()
            self._generations.stop()
            self._sender.stop(SEND_TIMEOUT_S)
            self._telemetry.stop()
            self._tally.close()

    def _begin(self, request: Any, reply: TritonReply) -> None:
        parameters = json.loads(request.parameters() or "{}")
        if contract.ABORT in parameters:
            ended = str(parameters[contract.ABORT])
            self._generations.abort(ended)
            if ended:  # its media may still be loading
                recall.drop(lookup.place(), ended)
            self._sender.put(Outbox(reply, stream=False), base.Delta("", 0, finish_reason="stop"))
            return
        if contract.OUTPUTS in parameters:
            reply.narrow(str(parameters[contract.OUTPUTS]))
        prompt = read_prompt(request, parameters)
        ticket = read_ticket(request)
        embeddings = read_embeddings(request) if ticket.items else None
        reply.take(prompt)
        outbox = Outbox(reply, stream=prompt.stream, times=reply.times)
        request_id = request.request_id()
        if (claim := self._fetchers.claim(ticket)) is not None:
            reply.times.encoded = time.monotonic()
            self._generations.begin(request_id, prompt, claim, outbox)
            return
        began = time.monotonic()
        fetched = again.fetch(self._fetchers, ticket, embeddings)

        def begin(fetched: Future[again.Fetched]) -> None:
            try:
                read, tensors = fetched.result()
                reply.times.encoded = time.monotonic()
                if tensors:
                    self._telemetry.step("handover", reply.times.encoded - began)
                media = list(zip(read.items, tensors, strict=True))
                self._generations.begin(request_id, prompt, media, outbox)
            except Exception as error:
                self._sender.fail(outbox, error)

        fetched.add_done_callback(begin)


def _end_process(error: TriptychError) -> None:
    """End this stub, since no engine starts any more: a process that is gone is seen from outside.

    Triton would go on calling the model ready.
    """
    logger.critical("%s; this process ends", error)
    threading.Timer(DEATH_DELAY_S, os._exit, (1,)).start()


class TritonReply:
    """One request's response sender; after construction only the sender thread uses it."""

    prompt: Prompt | None = None
    """Without one the answer is empty: an abort's."""

    def __init__(self, request: Any, telemetry: Telemetry, tally: Tally) -> None:
        self._telemetry = telemetry
        self._tally = tally
        self._hold: Hold | None = None
        self._sender = request.get_response_sender()
        self._request_id: str = request.request_id()
        self._wanted = frozenset(request.requested_output_names())
        self._writer: ChunkWriter | None = None
        self.times = Times()

    def narrow(self, names: str) -> None:
        """Send no outputs but these, by commas.

        Raises:
            InvalidValue: None of them is one that can be sent.
        """
        wanted = self._wanted & frozenset(names.split(","))
        if not wanted:
            have = ", ".join(sorted(self._wanted))
            raise InvalidValue(f"names none of {have}: {names[:100]!r}", where=contract.OUTPUTS)
        self._wanted = wanted

    def take(self, prompt: Prompt) -> None:
        """What is to be answered; from now until the last response it is in hand."""
        self.prompt = prompt
        tokens = prompt.length + prompt.sampling.max_tokens
        self._hold = self._tally.hold(InHand(1, tokens, bool(prompt.items)))

    def send(self, parcel: Parcel) -> None:
        """Send the outputs that were asked for; a stream with usage ends with one response more."""
        if parcel.last:
            self._give_back()
        if parcel.error is not None:
            self._telemetry.ended(Ended.by(parcel.error, self._request_id, prompt=self.prompt))
            self._respond(backend.error_response(parcel.error, self._request_id), final=True)
            return
        *chunks, last = self._chunks(parcel)
        for chunk in chunks:
            self._respond(self._outputs(parcel.text, chunk))
        self._respond(self._outputs("" if chunks else parcel.text, last), final=parcel.last)

    def close(self) -> None:
        """Send the final flag alone."""
        self._give_back()
        self._sender.send(flags=backend.FINAL)

    def is_cancelled(self) -> bool:
        """Whether Triton knows that the caller has gone; within an ensemble it never does."""
        return bool(self._sender.is_cancelled())

    def _give_back(self) -> None:
        if self._hold is not None:
            self._hold.close()

    def _respond(self, response: Any, *, final: bool = False) -> None:
        if final:
            self._sender.send(response, flags=backend.FINAL)
        else:
            self._sender.send(response)

    def _outputs(self, text: str, chunk: bytes) -> Any:
        tensors = []
        if contract.TEXT in self._wanted:
            tensors.append(backend.text_tensor(contract.TEXT, text))
        if contract.CHUNK in self._wanted:
            tensors.append(backend.text_tensor(contract.CHUNK, chunk))
        return backend.response(*tensors)

    def _chunks(self, parcel: Parcel) -> list[bytes]:
        """The parcel as OpenAI's chunks: one, and one more where a stream ends with its usage."""
        prompt = self.prompt
        if prompt is None or contract.CHUNK not in self._wanted:
            return [b""]
        writer = self._writer = self._writer or ChunkWriter(prompt)
        logprobs = [_as_chunk(entry) for entry in parcel.logprobs] if parcel.logprobs else None
        if parcel.finish_reason is None:
            return [writer.delta(parcel.text, logprobs)]
        taken = parcel.usage or base.Usage(prompt.length, 0)
        stages = self.times.stages(prompt)
        self._telemetry.ended(
            Ended(
                self._request_id,
                parcel.finish_reason,
                prompt=prompt,
                stages=stages,
                usage=taken,
                first=self.times.first,
            )
        )
        usage = writer.count(taken.completion_tokens, cached_tokens=taken.cached_tokens)
        return writer.end(
            parcel.finish_reason,
            usage,
            text=parcel.text,
            logprobs=logprobs,
            stages=stages,
            kv_transfer=parcel.kv_transfer,
        )


def _as_chunk(entry: base.TokenLogprob) -> TokenLogprob:
    top = [TopLogprob.of(other.token, other.logprob, other.raw) for other in entry.top]
    return TokenLogprob.of(entry.token, entry.logprob, top, entry.raw)
