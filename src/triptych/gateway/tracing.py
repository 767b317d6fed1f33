"""The gateway's place in a trace: a span for each request, which the stages' are part of.

Without a collector of its own the gateway hands the caller's ``traceparent``
(https://www.w3.org/TR/trace-context/) on as it came.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from triptych.errors import ConfigurationError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

TRACEPARENT = "traceparent"
EXPORT_TIMEOUT_S = 5

_FORM = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def read(header: str) -> str:
    """The caller's place in a trace; empty where the header has another form."""
    return header if _FORM.fullmatch(header) else ""


class Tracer:
    """Sends spans to a collector.

    Args:
        endpoint: Its URL for OTLP over HTTP.

    Raises:
        ConfigurationError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str) -> None:
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
        resource = Resource.create({"service.name": "triptych-gateway"})
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("triptych.gateway")

    def start(self, traceparent: str) -> Span:
        """A span for a request that begins now."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({TRACEPARENT: traceparent})
        return self._tracer.start_span("gateway", parent, kind=SpanKind.SERVER)

    def end(self, span: Span, route: str, status: int, request_id: str) -> None:
        """The request is over; names: https://opentelemetry.io/docs/specs/semconv/http/."""
        from opentelemetry.trace import Status, StatusCode

        span.update_name(route)
        span.set_attributes(
            {
                "http.route": route,
                "http.response.status_code": status,
                "triptych.request_id": request_id,
            }
        )
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()


def inside(span: Span) -> str:
    """The ``traceparent`` of what happens in a span."""
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier[TRACEPARENT]
