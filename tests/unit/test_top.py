"""The arithmetic of ``triptych top``: what happened between two pages of metrics."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import httpx
import msgspec
import pytest
from rich.console import Console

from triptych.cli import main
from triptych.cli.scrape import Change, NoMetrics, Page, metrics_url
from triptych.cli.top import Moment, Times, moment_of, view

BEFORE = """
# TYPE triptych_requests_total counter
triptych_requests_total{stage="decode",outcome="stop"} 10
triptych_requests_total{stage="preprocess",outcome="media_type"} 1
# TYPE triptych_tokens_total counter
triptych_tokens_total{kind="prompt"} 100
# TYPE triptych_stage_seconds histogram
triptych_stage_seconds_bucket{instance="0",stage="prefill",le="0.1"} 5
triptych_stage_seconds_bucket{instance="0",stage="prefill",le="0.5"} 5
triptych_stage_seconds_bucket{instance="0",stage="prefill",le="+Inf"} 5
"""
AFTER = """
# TYPE triptych_requests_total counter
triptych_requests_total{stage="decode",outcome="stop"} 18
triptych_requests_total{stage="decode",outcome="length"} 2
triptych_requests_total{stage="preprocess",outcome="media_type"} 1
triptych_requests_total{stage="preprocess",outcome="overloaded"} 3
# TYPE triptych_tokens_total counter
triptych_tokens_total{kind="prompt"} 40
# TYPE triptych_requests_in_hand gauge
triptych_requests_in_hand{stage="preprocess"} 2
triptych_requests_in_hand{stage="decode"} 3
# TYPE triptych_encoder_cache_hits_total counter
triptych_encoder_cache_hits_total 3
# TYPE triptych_encoder_cache_misses_total counter
triptych_encoder_cache_misses_total 1
# TYPE triptych_encoder_cache_bytes gauge
triptych_encoder_cache_bytes{memory="device"} 1048576
# TYPE triptych_stage_seconds histogram
triptych_stage_seconds_bucket{instance="0",stage="prefill",le="0.1"} 8
triptych_stage_seconds_bucket{instance="0",stage="prefill",le="0.5"} 9
triptych_stage_seconds_bucket{instance="0",stage="prefill",le="+Inf"} 9
triptych_stage_seconds_bucket{instance="1",stage="prefill",le="0.1"} 1
triptych_stage_seconds_bucket{instance="1",stage="prefill",le="0.5"} 3
triptych_stage_seconds_bucket{instance="1",stage="prefill",le="+Inf"} 4
"""


@pytest.fixture
def change() -> Change:
    return Change(Page([BEFORE], 100.0), Page([AFTER], 102.0))


def test_what_ended_is_told_by_outcome(change: Change) -> None:
    moment = moment_of(change)
    assert moment.seconds == 2.0
    assert moment.outcomes == {"stop": 8, "length": 2, "overloaded": 3}
    assert moment.requests_per_s == 6.5
    assert moment.running == 5


def test_a_counter_that_fell_has_begun_anew(change: Change) -> None:
    assert moment_of(change).tokens_per_s == {"prompt": 20.0}


def test_what_is_not_told_is_not_nothing(change: Change) -> None:
    moment = moment_of(change)
    assert moment.queued is None
    assert moment.gateway_active is None
    assert moment.memory == {"embeddings": 1 << 20}
    assert moment.cache_hits == 0.75
    assert moment_of(Change(change.after, Page([AFTER], 103.0))).cache_hits is None


def test_quantiles_are_those_of_the_interval(change: Change) -> None:
    """Of 8: 4 below 0.1 s, 3 below 0.5 s, 1 above; both instances together."""
    assert change.quantile(0.5, "triptych_stage_seconds", stage="prefill") == pytest.approx(0.1)
    assert change.quantile(0.25, "triptych_stage_seconds", stage="prefill") == pytest.approx(0.05)
    three_quarters = change.quantile(0.75, "triptych_stage_seconds", stage="prefill")
    assert three_quarters == pytest.approx(0.1 + 0.4 * 2 / 3)
    assert change.quantile(0.99, "triptych_stage_seconds", stage="prefill") == 0.5
    assert change.quantile(0.5, "triptych_stage_seconds", stage="decode") is None
    assert moment_of(change).times.keys() == {"prefill"}


def test_a_number_on_two_pages_counts_once() -> None:
    page = Page([AFTER, AFTER], 0.0)
    assert page.total("triptych_requests_in_hand") == 5


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("localhost:8002", "http://localhost:8002/metrics"),
        ("https://host/", "https://host/metrics"),
        ("http://host:1/other", "http://host:1/other"),
        ("[::1]:8002", "http://[::1]:8002/metrics"),
    ],
)
def test_an_address_is_a_url_or_a_host(address: str, url: str) -> None:
    assert metrics_url(address) == url


@pytest.mark.parametrize("address", ["", "ftp://host", "host:port", ":80"])
def test_what_is_no_address(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--", address]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """A server that tells nothing of ours; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if self.path == "/none" else 200)
            self.end_headers()
            self.wfile.write(b"{oops" if self.path == "/other" else b"up 1\n")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "said"),
    [("", "tells of no Triton"), ("/none", "status 404"), ("/other", "is not Prometheus'")],
)
def test_where_there_are_no_metrics_of_ours(
    elsewhere: str, path: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", elsewhere + path, "--once"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "localhost:1"]) == 1
    assert "no metrics at http://localhost:1/metrics" in capsys.readouterr().err
    with httpx.Client() as client, pytest.raises(NoMetrics):
        Page.read(client, ["http://localhost:1/metrics"])


def test_a_person_is_shown_all_of_it() -> None:
    moment = Moment(
        seconds=2.0,
        requests_per_s=3.25,
        running=7,
        queued=None,
        gateway_active=4,
        times={"prefill": Times(0.0123, 0.5)},
        tokens_per_s={"prompt": 1234.0},
        cache_hits=0.5,
        outcomes={"stop": 5.0, "overloaded": 2.0},
        memory={"host": 3 << 30},
    )
    console = Console(width=100, record=True, file=None, force_terminal=False)
    with console.capture() as shown:
        console.print(view(moment, ["http://h/metrics"]))
    for text in ("3.2 /s", "7", "prompt 1234 /s", "50%", "12.3", "500.0", "overloaded", "3,072"):
        assert text in shown.get()
    assert msgspec.json.decode(msgspec.json.encode(moment), type=Moment) == moment
