"""What Prometheus sees of the pool of encoders, at Triton's ``/metrics``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

from triptych.remote.server import RemoteServer

_GAUGES = {
    "ready": "1: the server gets items; 0: it is lost, failing or draining",
    "outstanding_tokens": "Embeddings that the server has been asked for and not given yet",
}
_COUNTERS = {
    "items": "Items that the server has encoded",
    "failures": "Items that the server did not encode, and that went to another if there was one",
}


class Metrics:
    """The metrics of one ``remote_encoder``, labelled with each server's address.

    Args:
        model: Triton's name of the model.
        servers: The pool's.
    """

    def __init__(self, model: str, servers: Sequence[RemoteServer]) -> None:
        self._servers = servers
        self._shown = {server.address: dict.fromkeys(_COUNTERS, 0) for server in servers}
        kinds = pb_utils.MetricFamily
        gauges = self._families(_GAUGES, "", kinds.GAUGE)
        counters = self._families(_COUNTERS, "_total", kinds.COUNTER)
        self._metrics: dict[str, dict[str, Any]] = {
            server.address: {
                name: family.Metric(labels={"model": model, "server": server.address})
                for name, family in {**gauges, **counters}.items()
            }
            for server in servers
        }
        # A family must outlive its metrics, and attributes go in the order in which they came.
        self._kept = (gauges, counters)

    def show(self) -> None:
        """Bring all up to date."""
        for server in self._servers:
            metrics, shown = self._metrics[server.address], self._shown[server.address]
            metrics["ready"].set(float(server.state == "ready"))
            metrics["outstanding_tokens"].set(float(server.outstanding))
            for name, count in (("items", server.items), ("failures", server.failures)):
                metrics[name].increment(count - shown[name])
                shown[name] = count

    @staticmethod
    def _families(texts: dict[str, str], ending: str, kind: Any) -> dict[str, Any]:
        return {
            name: pb_utils.MetricFamily(
                name=f"triptych_remote_encoder_{name}{ending}", description=text, kind=kind
            )
            for name, text in texts.items()
        }
