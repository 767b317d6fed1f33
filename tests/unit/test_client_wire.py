from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych_client import errors, http_wire
from triptych_client.answers import Chunk, read_chunk, whole
from triptych_client.requests import build_call
from triptych_client.transport import parse_address


@given(
    texts=st.lists(st.text(), min_size=1, max_size=5),
    cuts=st.lists(st.integers(min_value=0, max_value=400), max_size=12),
)
def test_events_survive_every_cut(texts, cuts):
    body = b"".join(b"data: " + msgspec.json.encode({"CHUNK": text}) + b"\n\n" for text in texts)
    places = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    reader = http_wire.EventReader()
    events = [
        event for begin, end in itertools.pairwise(places) for event in reader.feed(body[begin:end])
    ]
    assert [http_wire.chunk_of(event) for event in events] == [text.encode() for text in texts]


@pytest.mark.parametrize(
    ("event", "kind", "what"),
    [
        (b'{"error":"in ensemble \'a\', [overloaded] 9 wait"}', errors.Overloaded, "9 wait"),
        (b'{"error":"something broke"}', errors.InternalError, "something broke"),
        (b'{"OTHER":"x"}', errors.InvalidRequest, "no chat"),
        (b"<html>", errors.InternalError, "unreadable"),
    ],
)
def test_an_event_may_be_an_error(event, kind, what):
    with pytest.raises(kind, match=what):
        http_wire.chunk_of(event)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'data: {"error":"[invalid_value] a: b"}\n\n', errors.InvalidValue),
        (404, b'{"error":"Request for unknown model: \'x\' is not found"}', errors.NotFound),
        (404, b'{"error":"unknown model: \'x\' has no available versions"}', errors.Unavailable),
        (400, b'{"error":"failed to parse"}', errors.InvalidRequest),
        (503, b"", errors.Unavailable),
        (502, b"<html>Bad Gateway</html>", errors.InternalError),
    ],
)
def test_a_refusal(status, body, kind):
    error = http_wire.refusal(status, body)
    assert type(error) is kind
    assert str(error)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Request for unknown model: 'x' is not found", errors.NotFound),
        ("Stub process 'decode_vllm_0_0' is not healthy.", errors.Unavailable),
        ("Request for unknown model: 'x' has no available versions", errors.Unavailable),
        ("[no_such_code] a: b", errors.InternalError),
        ("", errors.InternalError),
    ],
)
def test_what_triton_says_itself(text, kind):
    assert type(errors.from_text(text)) is kind


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("localhost:8001", "localhost:8001"),
        ("grpc://h:1", "h:1"),
        ("grpcs://h:1", "grpcs://h:1"),
        ("http://h:1", "http://h:1"),
        ("http://h", "http://h:80"),
        ("https://h/base/", "https://h:443/base"),
        ("[::1]:8001", "[::1]:8001"),
    ],
)
def test_addresses(text, shown):
    assert str(parse_address(text)) == shown


@pytest.mark.parametrize(
    "text", ["", "localhost", "grpc://h", "ftp://h:1", "h:1/x", "h:port", "h h:1", "http://", ":1"]
)
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match="address"):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "local"),
    [("localhost:1", True), ("127.0.0.1:1", True), ("http://[::1]:1", True), ("h:1", False)],
)
def test_no_proxy_leads_to_this_machine(text, local):
    assert parse_address(text).is_local is local


def call(messages="a", timeout=1.0, **sampling):
    return build_call(messages, model="m", stream=True, timeout=timeout, sampling=sampling)


def test_a_request():
    made = call("Hi", temperature=0, stop=["x"])
    assert msgspec.json.decode(made.body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "temperature": 0,
        "stop": ["x"],
    }
    assert call().id != call().id
    assert "Hi" not in repr(made)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_is_positive(timeout):
    with pytest.raises(errors.InvalidValue, match="timeout: must be positive"):
        call(timeout=timeout)


@pytest.mark.parametrize("value", [object(), {1: {2: object()}}, "\ud800"])
def test_what_is_no_json(value):
    with pytest.raises(errors.InvalidValue, match="JSON"):
        call([{"role": "user", "content": value}])


HEAD = b'{"id":"i","object":"chat.completion.chunk","created":1,"model":"m",'


def test_chunks_add_up():
    sent = [
        b'"choices":[{"index":0,"delta":{"role":"assistant","content":"a"},"finish_reason":null}]}',
        b'"choices":[{"index":0,"delta":{"content":"b"},"logprobs":{"content":[{"token":"b",'
        b'"logprob":-1.5,"bytes":[98],"top_logprobs":[]}]}}],"usage":null}',
        b'"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}',
        b'"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}',
    ]
    chunks = [read_chunk(HEAD + tail) for tail in sent]
    assert [chunk.text for chunk in chunks] == ["a", "b", "", ""]
    assert chunks[0].json == HEAD + sent[0]
    answer = whole(chunks)
    assert answer.text == "ab"
    assert answer.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5
    assert answer.logprobs is not None
    assert [entry.logprob for entry in answer.logprobs] == [-1.5]


def test_nothing_adds_up_to_an_empty_answer():
    assert whole([]).text == ""
    assert whole([Chunk(id="i", model="m", created=1, text="a")]).logprobs is None


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[1]", HEAD + b'"choices":[{"delta":{"content":1}}]}']
)
def test_a_chunk_that_cannot_be_read(data):
    with pytest.raises(errors.InternalError, match="CHUNK"):
        read_chunk(data)
