"""What is told of requests that have ended: the line of the log, and spans sent to a collector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from collector import Collector
from triptych.chat.chunks import Stages
from triptych.contract import Prompt, PromptItem, Sampling
from triptych.engines.base import Usage
from triptych.errors import MediaTooLarge
from triptych.stages import spans
from triptych.stages.ended import Ended
from triptych.stages.prepare import shortened

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STAGES = Stages(
    preprocess_ms=10.0, encode_ms=20.0, prefill_ms=30.0, decode_ms=40.0, media=1, media_cached=0
)


def prompt(**fields: Any) -> Prompt:
    item = PromptItem("image", position=1, tokens=6, hash="h")
    return Prompt("chatcmpl-1", 0, "chat_x", [1, 2, 3], [item], Sampling(5), **fields)


def finished(**fields: Any) -> Ended:
    asked = prompt(arrived=1000.0, **fields)
    return Ended(
        "r", "stop", prompt=asked, stages=STAGES, usage=Usage(8, 5, 2), first=1000.06, at=1000.1
    )


def test_a_line_has_times_and_tokens() -> None:
    assert finished().line(content=False) == {
        "request": "r",
        "outcome": "stop",
        "id": "chatcmpl-1",
        "model": "chat_x",
        "prompt_tokens": 8,
        "cached_tokens": 2,
        "completion_tokens": 5,
        "image_tokens": 6,
        "preprocess_ms": 10.0,
        "encode_ms": 20.0,
        "prefill_ms": 30.0,
        "decode_ms": 40.0,
        "media": 1,
        "media_cached": 0,
        "ttft_ms": 60.0,
    }
    assert finished().itl_s == pytest.approx(0.01)


def test_an_errors_words_are_content() -> None:
    ended = Ended.by(MediaTooLarge("a secret of 9 bytes", where="messages[0]"), "r")
    told = {"request": "r", "outcome": "media_too_large", "where": "messages[0]"}
    assert ended.line(content=False) == told
    assert ended.line(content=True) == {**told, "error": "a secret of 9 bytes"}


def test_a_fault_of_ours_is_called_internal() -> None:
    ended = Ended.by(KeyError("secret"), "r")
    assert ended.outcome == "internal"
    assert "secret" not in str(ended.line(content=True))


def test_media_are_cut_in_the_log() -> None:
    data = b'{"url": "data:image/png;base64,' + b"A" * 5000 + b'", "text": "How many?"}'
    text = shortened(data)
    assert len(text) < 200
    assert "How many?" in text


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def sent(collector: Collector, stage: str, ended: Ended) -> dict[str, Any]:
    tracer = spans.tracer(collector.url)
    assert tracer is not None
    tracer.request(stage, ended)
    tracer.close()
    return {span.name: span for span in collector.spans}


def test_a_request_is_a_span_with_its_stages_in_the_callers_trace(collector: Collector) -> None:
    ended = finished(traceparent=f"00-{TRACE}-{PARENT}-01")
    found = sent(collector, "decode", ended)
    whole = found.pop("chat chat_x")
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (TRACE, PARENT)
    assert list(found) == list(spans.STAGES)
    for span in found.values():
        assert span.parent_span_id == whole.span_id
    took = [round((s.end_time_unix_nano - s.start_time_unix_nano) / 1e6) for s in found.values()]
    assert took == [10, 20, 30, 40]
    assert whole.end_time_unix_nano - whole.start_time_unix_nano == pytest.approx(0.1e9, rel=0.05)


def test_a_request_that_failed_is_an_error_in_a_trace_of_its_own(collector: Collector) -> None:
    found = sent(collector, "preprocess", Ended.by(MediaTooLarge("x"), "r"))
    assert found["chat"].status.code == 2
    assert found["chat"].status.message == "media_too_large"
    assert not found["chat"].parent_span_id


def test_without_an_endpoint_there_are_no_traces() -> None:
    assert spans.tracer("") is None
