"""``triptych top``: what a running server does now, from the metrics that it tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import httpx
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from triptych.cli.output import print_json
from triptych.cli.scrape import Change, NoMetrics, Page, metrics_url

STAGES = ("preprocess", "encode", "prefill", "decode")
ANSWERED = ("stop", "length", "tool_calls")
"""Outcomes of requests that were answered; others are codes of errors."""
PAUSE_S = 0.2
"""Between the two looks at the least."""


class Times(msgspec.Struct, frozen=True):
    """Seconds."""

    p50: float
    p95: float


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """What a server did between two looks. None: it does not tell."""

    seconds: float
    requests_per_s: float
    """All that have ended, however they did."""
    running: float | None
    """Requests in the hands of a stage."""
    queued: float | None
    """In Triton's queues, before any stage."""
    gateway_active: float | None
    times: dict[str, Times]
    """By stage, and ``first token`` and ``between tokens``; of those that ended meanwhile."""
    tokens_per_s: dict[str, float]
    """``prompt``, ``completion``, and of the prompts' those of each medium."""
    cache_hits: float | None
    """Share of the media that came which the encoder still had."""
    outcomes: dict[str, float]
    """Requests by how they ended; a name that is none of `ANSWERED` is an error's code."""
    memory: dict[str, float]
    """Bytes in use."""


def top(
    addresses: Sequence[str],
    complain: Callable[[str], None],
    *,
    interval: float,
    once: bool,
    as_json: bool,
) -> int:
    """Show it until Ctrl-C.

    Args:
        addresses: Where metrics are: Triton's, a gateway's or both.
        complain: Prints one line on stderr.
        interval: Seconds between two looks.
        once: One moment, and the end.
        as_json: Print one JSON object a moment.

    Returns:
        The exit code: 0 after Ctrl-C; 1 where there are no metrics, at first or for JSON.

    Raises:
        ValueError: An address is none.
    """
    urls = [metrics_url(address) for address in addresses]
    try:
        with httpx.Client(trust_env=False) as client:
            looks = Looks(client, urls, interval)
            if as_json:
                print_json(looks.next())
                while not once:
                    print_json(looks.next())
            elif once:
                Console().print(view(looks.next(), urls))
            else:
                _watch(looks, urls)
    except NoMetrics as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        pass
    return 0


class Looks:
    """Looks at a server's numbers, at an interval.

    Args:
        client: Who asks.
        urls: Where they are.
        interval: Seconds.

    Raises:
        NoMetrics: There are none.
    """

    def __init__(self, client: httpx.Client, urls: Sequence[str], interval: float) -> None:
        self._client = client
        self._urls = urls
        self._interval = interval
        self._next = time.monotonic() + interval
        self._before = Page.read(client, urls)

    def next(self) -> Moment:
        """Wait, and look.

        Raises:
            NoMetrics: There are none any more; there may be, the next time.
        """
        time.sleep(max(PAUSE_S, self._next - time.monotonic()))
        self._next = time.monotonic() + self._interval
        after = Page.read(self._client, self._urls)
        change, self._before = Change(self._before, after), after
        return moment_of(change)


def moment_of(change: Change) -> Moment:
    """What happened between two pages."""
    after = change.after
    histograms = {name: ("triptych_stage_seconds", {"stage": name}) for name in STAGES} | {
        "first token": ("triptych_time_to_first_token_seconds", {}),
        "between tokens": ("triptych_inter_token_seconds", {}),
    }
    hits, misses = (
        change.increase(f"triptych_encoder_cache_{what}_total") for what in ("hits", "misses")
    )
    outcomes = {
        name: change.increase("triptych_requests_total", outcome=name)
        for name in change.values("triptych_requests_total", "outcome")
    }
    return Moment(
        seconds=round(change.seconds, 3),
        requests_per_s=sum(outcomes.values()) / change.seconds,
        running=after.total("triptych_requests_in_hand"),
        queued=after.total("nv_inference_pending_request_count"),
        gateway_active=after.total("triptych_gateway_active_requests"),
        times={
            name: times
            for name, (histogram, labels) in histograms.items()
            if (times := _times(change, histogram, labels)) is not None
        },
        tokens_per_s={
            kind: change.rate("triptych_tokens_total", kind=kind)
            for kind in change.values("triptych_tokens_total", "kind")
        },
        cache_hits=hits / (hits + misses) if hits + misses else None,
        outcomes={name: count for name, count in outcomes.items() if count},
        memory={
            what: used
            for what, name in (
                ("host", "nv_cpu_memory_used_bytes"),
                ("gpu", "nv_gpu_memory_used_bytes"),
                ("embeddings", "triptych_encoder_cache_bytes"),
            )
            if (used := after.total(name)) is not None
        },
    )


def view(moment: Moment, urls: Sequence[str]) -> RenderableType:
    """It on a terminal."""
    return Group(_numbers(moment, urls), _stages(moment), _outcomes(moment))


def _times(change: Change, histogram: str, labels: dict[str, str]) -> Times | None:
    p50, p95 = (change.quantile(part, histogram, **labels) for part in (0.5, 0.95))
    return None if p50 is None or p95 is None else Times(p50, p95)


def _watch(looks: Looks, urls: Sequence[str]) -> NoReturn:
    console = Console()
    waiting = f"looking at {', '.join(urls)}"
    # Another screen where there is one, so that what stood on the terminal stands there again.
    with Live(waiting, console=console, screen=console.is_terminal, auto_refresh=False) as live:
        live.refresh()
        while True:
            try:
                live.update(view(looks.next(), urls), refresh=True)
            except NoMetrics as error:  # it may be starting again
                live.update(Text(str(error), "red"), refresh=True)


def _numbers(moment: Moment, urls: Sequence[str]) -> Table:
    table = Table.grid(padding=(0, 3))
    table.title = f"{', '.join(urls)}, the last {moment.seconds:.1f} s; Ctrl-C ends"
    table.title_justify = "left"
    facts = {
        "requests": f"{moment.requests_per_s:.1f} /s",
        "running": _count(moment.running),
        "queued": _count(moment.queued),
        "gateway": f"{_count(moment.gateway_active)} under way",
        "tokens": ", ".join(f"{k} {v:.0f} /s" for k, v in moment.tokens_per_s.items()) or "–",
        "cache hits": "–" if moment.cache_hits is None else f"{moment.cache_hits:.0%}",
        "memory": ", ".join(f"{k} {v / 2**20:,.0f} MiB" for k, v in moment.memory.items()) or "–",
    }
    for name, fact in facts.items():
        table.add_row(f"[bold]{name}", fact)
    return table


def _stages(moment: Moment) -> Table:
    table = Table("stage", "p50", "p95", title="milliseconds", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in (*STAGES, "first token", "between tokens"):
        times = moment.times.get(name)
        shown = ("–", "–") if times is None else (_ms(times.p50), _ms(times.p95))
        table.add_row(name, *shown)
    return table


def _outcomes(moment: Moment) -> Table:
    table = Table("ended", "requests", title_justify="left")
    table.columns[1].justify = "right"
    for name, count in sorted(moment.outcomes.items(), key=lambda pair: -pair[1]):
        table.add_row(name if name in ANSWERED else f"[red]{name}", f"{count:.0f}")
    return table


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f}"
