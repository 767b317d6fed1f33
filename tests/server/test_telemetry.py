"""What a real server tells of its requests: metrics, the log, and the dashboard that reads them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pexpect
import pytest
from prometheus_client.parser import text_string_to_metric_families

from collector import Collector
from conftest import ServerFactory
from pictures import encoded, noise
from triptych.gateway import Gateway, GatewayOptions
from triptych.server import Server
from triptych_client import Client, TriptychClientError, image, text, user

pytestmark = pytest.mark.server

MODEL = "chat_echo"
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "triptych.json"
BROKEN = b"\x89PNG\r\n\x1a\n" + bytes(64)
WAIT_S = 60.0
TOLD_S = 10.0
"""Numbers follow their request, and are not waited for by it."""

Samples = dict[str, list[tuple[dict[str, str], float]]]


def samples(*urls: str) -> Samples:
    """Every sample by its name, with its labels."""
    found: Samples = {}
    for url in urls:
        page = httpx.get(url, trust_env=False).raise_for_status().text
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                # The parser adds what Triton's own counters do without.
                name = sample.name if f"\n{sample.name}" in page else family.name
                found.setdefault(name, []).append((sample.labels, sample.value))
    return found


def total(found: Samples, name: str, **labels: str) -> float:
    """The sum of the samples that have ``labels``."""
    return sum(v for have, v in found.get(name, []) if labels.items() <= have.items())


@pytest.fixture(scope="module")
def asked(echo_server: Server) -> str:
    """Requests of several ends; the URL of the metrics."""
    picture = image(encoded(noise(300, 200, seed=4711), "png"))
    url = f"http://127.0.0.1:{echo_server.metrics_port}/metrics"
    before = total(samples(url), "triptych_requests_total", stage="decode", outcome="stop")
    with Client(f"localhost:{echo_server.grpc_port}") as client:
        client.chat([user("What?", picture)], model=MODEL, max_tokens=9, stream=False)
        client.chat("Hello", model=MODEL, max_tokens=2).collect()
        client.chat("Say it", model=MODEL).collect()
        with pytest.raises(TriptychClientError):
            client.chat([user("What?", image(BROKEN))], model=MODEL, stream=False)
    deadline = time.monotonic() + TOLD_S
    while total(samples(url), "triptych_requests_total", stage="decode") - before < 1:
        assert time.monotonic() < deadline, "no number came"
        time.sleep(0.1)
    time.sleep(0.5)
    return url


def test_every_end_is_counted_by_stage_and_outcome(asked: str) -> None:
    found = samples(asked)
    assert total(found, "triptych_requests_total", stage="decode", outcome="stop") >= 1
    assert total(found, "triptych_requests_total", stage="decode", outcome="length") >= 1
    refused = {
        labels["outcome"]
        for labels, _ in found["triptych_requests_total"]
        if labels["stage"] == "preprocess"
    }
    assert refused & {"media_unreadable", "media_type"}


def test_times_and_tokens_are_histograms_and_counters(asked: str) -> None:
    found = samples(asked)
    ended = sum(
        total(found, "triptych_requests_total", stage="decode", outcome=outcome)
        for outcome in ("stop", "length")
    )
    for stage in ("preprocess", "encode", "prefill", "decode"):
        assert total(found, "triptych_stage_seconds_count", stage=stage) == ended
    # Who asks decode itself, as other tests of this server do, has no arrival.
    assert 1 <= total(found, "triptych_time_to_first_token_seconds_count") <= ended
    assert total(found, "triptych_inter_token_seconds_count") >= 1
    assert total(found, "triptych_step_seconds_count", step="decode") >= 1
    for kind in ("prompt", "completion", "image"):
        assert total(found, "triptych_tokens_total", kind=kind) >= 1


def test_each_request_has_a_line_without_its_content(echo_server: Server, asked: str) -> None:
    lines = [
        json.loads(line[line.index("{") :])
        for line in echo_server.log.tail(400).splitlines()
        if " triptych.requests[" in line
    ]
    good = [line for line in lines if line["outcome"] in ("stop", "length")]
    bad = [line for line in lines if line["stage"] == "preprocess"]
    assert good
    assert {"request", "prompt_tokens", "completion_tokens", "prefill_ms"} <= good[-1].keys()
    assert bad
    assert "error" not in bad[-1]
    assert bad[-1]["where"].startswith("messages[")


def test_the_dashboard_asks_for_what_there_is(echo_server: Server, asked: str) -> None:
    """Every metric of its queries, and every label that it groups or selects by."""
    options = GatewayOptions(triton=f"127.0.0.1:{echo_server.grpc_port}", port=0)
    with Gateway(options) as gateway:
        body: dict[str, Any] = {"model": MODEL, "messages": [user(text("Hello"))]}
        url = f"{gateway.url}/v1/chat/completions"
        httpx.post(url, json=body, trust_env=False).raise_for_status()
        found = samples(asked, f"{gateway.url}/metrics")
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(queries) >= 12
    for query in queries:
        names = set(re.findall(r"\b(?:triptych|nv)_\w+", query))
        assert names
        for name in names:
            assert name in found, f"{name} in {query}"
            labels = set().union(*(have for have, _ in found[name]))
            for group in re.findall(r"by \(([^)]*)\)", query):
                assert set(group.split(", ")) <= labels, query
            for label, value in re.findall(r'(\w+)="([^"]*)"', query):
                assert total(found, name, **{label: value}) >= 0
                assert any(have.get(label) == value for have, _ in found[name]), query


def test_a_trace_goes_from_the_gateway_through_the_stages(start_server: ServerFactory) -> None:
    """The caller's trace, the gateway's span in it, and in that one the stages'."""
    trace, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    with Collector() as collector:
        server = start_server("echo", otlp_endpoint=collector.url)
        options = GatewayOptions(
            triton=f"127.0.0.1:{server.grpc_port}", port=0, otlp_endpoint=collector.url
        )
        with Gateway(options) as gateway:
            body: dict[str, Any] = {"model": MODEL, "messages": [user(text("Hello"))]}
            headers = {"traceparent": f"00-{trace}-{caller}-01"}
            url = f"{gateway.url}/v1/chat/completions"
            httpx.post(url, json=body, headers=headers, trust_env=False).raise_for_status()
        server.stop()  # whoever stops sends what waits
        found = collector.wait("/v1/chat/completions", f"chat {MODEL}", "prefill")
    outer, inner = found["/v1/chat/completions"], found[f"chat {MODEL}"]
    assert outer.parent_span_id.hex() == caller
    assert inner.parent_span_id == outer.span_id
    assert found["prefill"].parent_span_id == inner.span_id
    assert {span.trace_id.hex() for span in (outer, inner, found["prefill"])} == {trace}
    assert outer.start_time_unix_nano <= inner.start_time_unix_nano
    assert inner.end_time_unix_nano <= outer.end_time_unix_nano


def test_top_tells_what_went_on_meanwhile(echo_server: Server, asked: str) -> None:
    """In JSON, from the command, until Ctrl-C."""
    command = [Path(sys.executable).with_name("triptych"), "top", asked, "--json", "--interval=0.5"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as top,
        Client(f"localhost:{echo_server.grpc_port}") as client,
    ):
        assert top.stdout is not None
        deadline = time.monotonic() + WAIT_S
        told: list[dict[str, Any]] = []
        while not any(each["times"] for each in told):
            assert time.monotonic() < deadline, told
            with client.chat("Hello " * 40, model=MODEL) as stream:
                for _ in stream:
                    pass
            told.append(json.loads(top.stdout.readline()))
        top.send_signal(signal.SIGINT)
        assert top.wait() == 0
        assert top.stderr is not None
        assert top.stderr.read() == ""
    last = next(each for each in reversed(told) if each["times"])
    assert last["outcomes"]["stop"] >= 1
    assert last["requests_per_s"] > 0
    assert last["tokens_per_s"]["completion"] > 0
    assert last["times"].keys() == {
        *("preprocess", "encode", "prefill", "decode", "first token", "between tokens")
    }
    assert all(0 <= each["p50"] <= each["p95"] for each in last["times"].values())
    assert last["memory"]["host"] > 0
    assert last["queued"] is not None
    assert last["running"] is not None


def test_top_on_a_terminal_ends_with_ctrl_c(asked: str) -> None:
    program = str(Path(sys.executable).with_name("triptych"))
    child = pexpect.spawn(program, ["top", asked, "--interval=0.2"], encoding="utf-8", timeout=60)
    child.expect("between tokens")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "Traceback" not in child.before
