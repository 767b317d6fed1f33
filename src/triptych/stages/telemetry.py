"""What a stage tells of its requests: Triton's ``/metrics``, one line of the log each, traces.

Stages note what happened and go on; a thread of its own does the telling, because each number
costs a round trip to tritonserver.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import triton_python_backend_utils as pb_utils

from triptych.settings import Settings
from triptych.stages import spans
from triptych.stages.ended import Ended
from triptych.stages.tally import InHand, Tally

logger = logging.getLogger("triptych.stages")
requests = logging.getLogger("triptych.requests")

STOP_TIMEOUT_S = 5.0
LOOK_S = 0.5
"""Seconds between two looks at what is in hand."""
BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
"""Upper bounds of every histogram of seconds."""

_HISTOGRAMS = {
    "triptych_stage_seconds": "What a request took in a stage, its waiting there included",
    "triptych_step_seconds": "What a part of a stage took: one medium's fetching or decoding, "
    "one request's hand-over of embeddings",
    "triptych_time_to_first_token_seconds": "From a request's arrival to its first token",
    "triptych_inter_token_seconds": "Between two tokens of an answer, its mean",
}
_COUNTERS = {
    "triptych_requests_total": "Requests by the stage that ended them and by their outcome",
    "triptych_tokens_total": "Tokens by kind; those of media are among the prompt's",
}
_GAUGES = {
    "triptych_requests_in_hand": "Requests that a stage has begun and not ended",
    "triptych_tokens_in_hand": "Their tokens, those of the answers at most",
    "triptych_media_bytes_in_hand": "Bytes of media that a stage is loading, as they came",
}


class Telemetry:
    """The telling of one stage's instance.

    Args:
        stage: Its name in the metrics: ``preprocess``, ``encoder`` or ``decode``.
        settings: What may be told.
        args: What Triton gives to ``initialize``.
        tally: What the instance has in hand; None: it does not count.

    Raises:
        ConfigurationError: Traces are wanted and OpenTelemetry is not installed.
    """

    def __init__(
        self, stage: str, settings: Settings, args: Mapping[str, str], tally: Tally | None = None
    ) -> None:
        self._stage = stage
        self._settings = settings
        self._labels = {"model": args["model_name"], "instance": args["model_instance_name"]}
        self._tracer = spans.tracer(settings.otlp_endpoint)
        kinds = pb_utils.MetricFamily
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=text, kind=kind)
            for kind, wanted in (
                (kinds.HISTOGRAM, _HISTOGRAMS),
                (kinds.COUNTER, _COUNTERS),
                (kinds.GAUGE, _GAUGES),
            )
            for name, text in wanted.items()
        }
        self._metrics: dict[tuple[str, ...], Any] = {}
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tally = tally
        self._shown: InHand | None = None
        self._next_look = 0.0
        self._thread = threading.Thread(target=self._run, name="triptych-telemetry", daemon=True)
        self._thread.start()

    def step(self, name: str, seconds: float) -> None:
        """Note what a part of the stage took, from any thread."""
        self._work.put(lambda: self._observe("triptych_step_seconds", seconds, step=name))

    def ended(self, ended: Ended) -> None:
        """Note a request's end, from any thread."""
        self._work.put(lambda: self._tell(ended))

    def stop(self) -> None:
        """Tell what was noted, and end the thread; a second call does nothing."""
        if self._thread.is_alive():
            self._work.put(None)
            self._thread.join(STOP_TIMEOUT_S)
            # Left to the stub's end they would write to memory that it no longer shares.
            self._metrics.clear()
            self._families.clear()
            if self._tracer is not None:
                self._tracer.close()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                work()
            except Exception:
                logger.exception("a number could not be told")

    def _next(self) -> Callable[[], None] | None:
        """What is to be told next; None: no more."""
        if self._tally is None:
            return self._work.get()
        wait = self._next_look - time.monotonic()
        with contextlib.suppress(queue.Empty):
            if wait > 0:
                return self._work.get(timeout=wait)
        self._next_look = time.monotonic() + LOOK_S
        return self._look

    def _look(self) -> None:
        """Tell what is in hand, if that has changed."""
        assert self._tally is not None
        if (held := self._tally.held) != self._shown:
            self._shown = held
            shown = (held.requests, held.tokens, held.media_bytes)
            for name, value in zip(_GAUGES, shown, strict=True):
                self._metric(name, {"stage": self._stage}).set(value)

    def _tell(self, ended: Ended) -> None:
        self._count("triptych_requests_total", 1, stage=self._stage, outcome=ended.outcome)
        for kind, count in ended.tokens.items():
            self._count("triptych_tokens_total", count, kind=kind)
        if ended.stages is not None and ended.usage is not None:
            for name in spans.STAGES:
                took = getattr(ended.stages, f"{name}_ms") / 1000
                self._observe("triptych_stage_seconds", took, stage=name)
        for name, seconds in (
            ("triptych_time_to_first_token_seconds", ended.ttft_s),
            ("triptych_inter_token_seconds", ended.itl_s),
        ):
            if seconds is not None:
                self._observe(name, seconds)
        if self._settings.log_requests:
            line = {"stage": self._stage, **ended.line(content=self._settings.log_content)}
            requests.info("%s", msgspec.json.encode(line).decode())
        if self._tracer is not None:
            self._tracer.request(self._stage, ended)

    def _observe(self, name: str, seconds: float, **labels: str) -> None:
        self._metric(name, labels, buckets=BUCKETS).observe(seconds)

    def _count(self, name: str, count: int, **labels: str) -> None:
        if count:
            self._metric(name, labels).increment(count)

    def _metric(self, name: str, labels: dict[str, str], **how: Any) -> Any:
        key = (name, *labels.values())
        if key not in self._metrics:
            family = self._families[name]
            self._metrics[key] = family.Metric(labels={**self._labels, **labels}, **how)
        return self._metrics[key]
