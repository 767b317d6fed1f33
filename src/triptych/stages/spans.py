"""Traces of requests, by OpenTelemetry: one span a request, and one in it for each stage.

They are made when the request has ended, from the times that were noted on its way, and belong to
the caller's trace where a ``traceparent`` (https://www.w3.org/TR/trace-context/) came with it.
Names of attributes: https://opentelemetry.io/docs/specs/semconv/gen-ai/.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from triptych.errors import ConfigurationError
from triptych.stages.ended import Ended

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

STAGES = ("preprocess", "encode", "prefill", "decode")
"""In the order in which they follow each other."""
EXPORT_TIMEOUT_S = 5


def tracer(endpoint: str) -> Tracer | None:
    """Whatever sends traces to ``endpoint``; None if that is empty.

    Raises:
        ConfigurationError: OpenTelemetry is not installed.
    """
    if not endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigurationError(
            f"otlp_endpoint is set, and OpenTelemetry is not installed ({error.name}): "
            "pip install 'triptych[otel]'"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "triptych"}))
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracer(provider)


class Tracer:
    """Writes the spans of requests that have ended.

    Args:
        provider: Who sends them; `close` shuts it down.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("triptych")

    def request(self, stage: str, ended: Ended) -> None:
        """Write the spans of one request.

        Args:
            stage: The one that ended it.
            ended: What is known of it.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        prompt = ended.prompt
        parent = {"traceparent": prompt.traceparent} if prompt and prompt.traceparent else {}
        began = prompt.arrived if prompt and prompt.arrived else ended.at
        span = self._tracer.start_span(
            f"chat {prompt.model}" if prompt else "chat",
            context=TraceContextTextMapPropagator().extract(parent),
            kind=SpanKind.SERVER,
            start_time=_wall_ns(began),
            attributes=_attributes(stage, ended),
        )
        if ended.usage is None:
            span.set_status(Status(StatusCode.ERROR, ended.outcome))
        if ended.stages is not None:
            inside = set_span_in_context(span)
            for name in STAGES:
                took = getattr(ended.stages, f"{name}_ms") / 1000
                child = self._tracer.start_span(name, inside, start_time=_wall_ns(began))
                began += took
                child.end(_wall_ns(began))
        span.end(_wall_ns(ended.at))

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()


def _attributes(stage: str, ended: Ended) -> dict[str, str | int]:
    tokens = ended.tokens
    found: dict[str, str | int] = {
        "triptych.stage": stage,
        "triptych.outcome": ended.outcome,
        "triptych.request_id": ended.request_id,
    }
    if ended.prompt is not None:
        found |= {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": ended.prompt.model,
            "gen_ai.response.id": ended.prompt.id,
            "triptych.media": len(ended.prompt.items),
        }
    if ended.usage is not None:
        found |= {
            "gen_ai.usage.input_tokens": tokens["prompt"],
            "gen_ai.usage.output_tokens": tokens["completion"],
        }
    return found


def _wall_ns(monotonic_s: float) -> int:
    """A time of `time.monotonic` as nanoseconds since the epoch."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)
