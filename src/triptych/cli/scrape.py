"""Prometheus' numbers as a server tells them, and what happened between two looks at them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 5.0

Labels = frozenset[tuple[str, str]]
Samples = Mapping[str, Mapping[Labels, float]]
"""By name and labels."""


class NoMetrics(Exception):
    """There is nothing to be read; its text says what and why."""


def metrics_url(address: str) -> str:
    """Where the numbers of ``address`` are: a URL, or a host and a port.

    Raises:
        ValueError: It is neither.
    """
    whole = address if "://" in address else f"http://{address}"
    parts = urlsplit(whole)
    # .port raises of its own accord where there is no number.
    if parts.scheme not in ("http", "https") or not parts.hostname or (parts.port or 1) < 1:
        raise ValueError(f"{address!r} is no address, such as localhost:8002")
    return whole if parts.path.strip("/") else f"{whole.rstrip('/')}/metrics"


class Page:
    """All numbers of a server at one time, from all the addresses where it tells them.

    Args:
        texts: In Prometheus' text format; what two of them tell counts once, since a gateway's
            page has Triton's numbers too.
        at: `time.monotonic` seconds.
    """

    def __init__(self, texts: Sequence[str], at: float) -> None:
        self.at = at
        found: dict[str, dict[Labels, float]] = {}
        for text in texts:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    labels = frozenset(sample.labels.items())
                    found.setdefault(sample.name, {})[labels] = sample.value
        self.samples: Samples = found

    @classmethod
    def read(cls, client: httpx.Client, urls: Sequence[str]) -> Page:
        """Ask for it.

        Raises:
            NoMetrics: Nobody answers, or with something else.
        """
        texts = []
        for url in urls:
            try:
                response = client.get(url, timeout=TIMEOUT_S)
            except httpx.HTTPError as error:
                raise NoMetrics(f"no metrics at {url}: {error or type(error).__name__}") from None
            if not response.is_success:
                raise NoMetrics(f"no metrics at {url}: HTTP status {response.status_code}")
            texts.append(response.text)
        try:
            page = cls(texts, time.monotonic())
        except ValueError as error:
            raise NoMetrics(f"what {', '.join(urls)} answers is not Prometheus': {error}") from None
        if not any(name.startswith(("triptych_", "nv_")) for name in page.samples):
            raise NoMetrics(f"{', '.join(urls)} tells of no Triton: is it the metrics' port?")
        return page

    def each(self, name: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        """The samples that have ``labels``."""
        for have, value in self.samples.get(name, {}).items():
            if labels.items() <= set(have):
                yield dict(have), value

    def total(self, name: str, **labels: str) -> float | None:
        """Their sum; None: there is none."""
        values = [value for _, value in self.each(name, **labels)]
        return sum(values) if values else None


class Change:
    """What happened between two pages."""

    def __init__(self, before: Page, after: Page) -> None:
        self.after = after
        self.seconds = after.at - before.at
        self._before = before

    def increase(self, name: str, **labels: str) -> float:
        """How much counters have grown; one that has fallen has begun anew at 0."""
        earlier = self._before.samples.get(name, {})
        return sum(
            value - was if (was := earlier.get(have, 0.0)) <= value else value
            for have, value in self.after.samples.get(name, {}).items()
            if labels.items() <= set(have)
        )

    def rate(self, name: str, **labels: str) -> float:
        """The same a second."""
        return self.increase(name, **labels) / self.seconds

    def values(self, name: str, label: str) -> list[str]:
        """Every value that a label has, sorted."""
        return sorted({have[label] for have, _ in self.after.each(name) if label in have})

    def quantile(self, part: float, histogram: str, **labels: str) -> float | None:
        """A quantile of what a histogram has seen meanwhile; None: nothing.

        Linear within a bucket, and the highest bound where it is beyond, as Prometheus'
        histogram_quantile (https://prometheus.io/docs/prometheus/latest/querying/functions/).

        Args:
            part: 0.5: the median.
            histogram: Its name, without ``_bucket``.
            **labels: Which of them; those that have these are taken together.
        """
        name = f"{histogram}_bucket"
        found = {float(have["le"]): have["le"] for have, _ in self.after.each(name)}
        bounds = sorted(found.items())
        counts = [(bound, self.increase(name, le=le, **labels)) for bound, le in bounds]
        if not counts or not counts[-1][1]:
            return None
        wanted, below, under = part * counts[-1][1], 0.0, 0.0
        for bound, count in counts:
            if count >= wanted and count > under:
                if math.isinf(bound):
                    return below
                return below + (bound - below) * (wanted - under) / (count - under)
            below, under = bound, count
        return below
