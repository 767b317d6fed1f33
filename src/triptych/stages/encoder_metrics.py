"""What Prometheus sees of the encoder, at Triton's ``/metrics``."""

from __future__ import annotations

from collections import deque
from typing import Any

import triton_python_backend_utils as pb_utils

from triptych.encode.cache import EmbeddingCache, TierName

BATCH_BUCKETS = [1, 2, 4, 8, 16, 32, 64]
"""Upper bounds of the histogram of items in a forward pass."""

_COUNTERS = {
    "triptych_encoder_tokens_total": "Embeddings made by the encoder",
    "triptych_encoder_cache_hits_total": "Items answered without being encoded",
    "triptych_encoder_cache_misses_total": "Items that were encoded",
    "triptych_encoder_cache_lost_leases_total": "Requests refused because a lease was lost",
    "triptych_encoder_cache_refused_total": "Embeddings not kept: too large, or all was pinned",
    "triptych_encoder_cache_saved_seconds_total": "Seconds that encoding the hits would have taken",
}
_TIERS: tuple[TierName, ...] = ("device", "host")


class Metrics:
    """The metrics of one encoder instance, labelled with its name.

    ``triptych_encoder_batch_items`` is a histogram of the items in a forward pass: its ``_count``
    is the number of passes and its ``_sum`` the number of items encoded. The cache's counts by
    kind of memory, ``triptych_encoder_cache_bytes`` and ``…_evictions_total``, have a label
    ``memory``; ``triptych_encoder_leases`` has a label ``of``: what is pinned in the ``cache`` for
    a request that comes, and what is lent of the ``arena`` to a reader. All are as of the end of
    the last batch.

    Args:
        model: Triton's name of the model.
        instance: Triton's name of the instance.
    """

    def __init__(self, model: str, instance: str) -> None:
        labels = {"model": model, "instance": instance}
        kinds = pb_utils.MetricFamily
        self._passes: deque[tuple[int, int]] = deque()
        self._shown: dict[str, float] = {}
        self._families: list[Any] = []
        self._items = self._family(
            "triptych_encoder_batch_items",
            "Media in one forward pass of the encoder",
            kinds.HISTOGRAM,
        ).Metric(labels=labels, buckets=BATCH_BUCKETS)
        self._counters = {
            name: self._family(name, text, kinds.COUNTER).Metric(labels=labels)
            for name, text in _COUNTERS.items()
        }
        held = self._family("triptych_encoder_cache_bytes", "Embeddings held", kinds.GAUGE)
        evictions = self._family(
            "triptych_encoder_cache_evictions_total",
            "Embeddings that had to leave a memory",
            kinds.COUNTER,
        )
        self._bytes = {tier: held.Metric(labels={**labels, "memory": tier}) for tier in _TIERS}
        self._evictions = {
            tier: evictions.Metric(labels={**labels, "memory": tier}) for tier in _TIERS
        }
        leases = self._family("triptych_encoder_leases", "Open leases", kinds.GAUGE)
        self._leases = {of: leases.Metric(labels={**labels, "of": of}) for of in ("cache", "arena")}
        # A family must outlive its metrics, and attributes go in the order in which they came.
        self._families = self.__dict__.pop("_families")

    def batch(self, items: int, tokens: int) -> None:
        """Note one forward pass, from any thread."""
        self._passes.append((items, tokens))

    def show(self, cache: EmbeddingCache, lent: int) -> None:
        """Bring all metrics up to date, from the thread that Triton calls.

        Args:
            cache: The encoder's.
            lent: Parts of the arena.
        """
        while self._passes:
            items, tokens = self._passes.popleft()
            self._items.observe(items)
            self._counters["triptych_encoder_tokens_total"].increment(tokens)
        self._set(self._leases["cache"], "leases cache", cache.leases)
        self._set(self._leases["arena"], "leases arena", lent)
        counts = cache.counters
        for name, count in (
            ("hits", counts.hits),
            ("misses", counts.misses),
            ("lost_leases", counts.lost),
            ("refused", counts.refused),
            ("saved_seconds", counts.seconds_saved),
        ):
            self._raise(self._counters[f"triptych_encoder_cache_{name}_total"], name, count)
        for tier in _TIERS:
            self._set(self._bytes[tier], f"bytes {tier}", cache.nbytes(tier))
            self._raise(self._evictions[tier], f"evictions {tier}", counts.evictions[tier])

    def _set(self, gauge: Any, name: str, value: float) -> None:
        """Tell a gauge, if it has changed: each costs a round trip to tritonserver."""
        if value != self._shown.get(name):
            gauge.set(value)
            self._shown[name] = value

    def _raise(self, counter: Any, name: str, total: float) -> None:
        """Add what came since the last time.

        A counter outlives its model: after a reload it stands where it stood, and the cache begins
        at 0.
        """
        if more := total - self._shown.get(name, 0.0):
            counter.increment(more)
            self._shown[name] = total

    def _family(self, name: str, description: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)
        return family
