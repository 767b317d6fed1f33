"""Chats through the gateway and a real tritonserver, by the official SDK and by plain HTTP."""

from __future__ import annotations

import asyncio
import base64
import json

import httpx
import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

from gateways import HELLO, LONG, MODEL, before, events, picture, problem, text
from pictures import encoded, noise
from triptych.gateway import Gateway
from triptych.server import Server
from triptych_client import Client

pytestmark = pytest.mark.server

TOOL = {"type": "function", "function": {"name": "paint"}}

# What the official SDK sees.


def test_the_sdk_gets_one_answer_whole_and_streamed(sdk: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": "Say it back. ünï 你好 🙂 \u2028"},
        {"role": "user", "content": [picture(), text("first"), picture("jpeg", seed=1)]},
    ]
    whole = sdk.chat.completions.create(model=MODEL, messages=messages)
    assert whole.object == "chat.completion"
    assert whole.model == MODEL
    assert len(whole.choices) == 1
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "stop"
    answer = whole.choices[0].message.content
    assert answer is not None
    assert "image 1" in answer
    assert "ünï 你好 🙂 \u2028" in answer
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details.image_tokens > 0

    stream = sdk.chat.completions.create(model=MODEL, messages=messages, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_asynchronous_sdk_says_the_same(gateway: Gateway, sdk: openai.OpenAI) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        whole = await client.chat.completions.create(model=MODEL, messages=HELLO)
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        many = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": f"number {number}"}]
                )
                for number in range(32)
            )
        )
    assert "".join(pieces) == whole.choices[0].message.content
    texts = [answer.choices[0].message.content or "" for answer in many]
    assert all(f"number {number}" in answer for number, answer in enumerate(texts))


def test_usage_comes_in_a_stream_only_where_it_is_asked_for(sdk: openai.OpenAI) -> None:
    def stream(**options) -> list:
        return list(
            sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=True, **options)
        )

    for options in ({}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}):
        chunks = stream(**options)
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    *rest, last = stream(stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in rest)
    assert last.choices == []
    whole = sdk.chat.completions.create(model=MODEL, messages=HELLO)
    assert last.usage == whole.usage


def test_logprobs_and_sampling_reach_the_engine(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2, max_completion_tokens=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 3
    assert len(logprobs.content[0].top_logprobs) >= 1
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(sdk: openai.OpenAI, stream: bool) -> None:
    one = sdk.chat.completions.create(model=MODEL, messages=HELLO, seed=7)
    options = {"model": MODEL, "messages": HELLO, "n": 3, "seed": (1 << 63) - 2}
    expected = one.choices[0].message.content
    if not stream:
        answer = sdk.chat.completions.create(**options)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.message.content for choice in answer.choices] == [expected] * 3
        usage = answer.usage
    else:
        chunks = list(
            sdk.chat.completions.create(
                stream=True, stream_options={"include_usage": True}, **options
            )
        )
        assert len({chunk.id for chunk in chunks}) == 1
        assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        for index in range(3):
            own = [choice for choice in choices if choice.index == index]
            assert "".join(choice.delta.content or "" for choice in own) == expected
            assert own[-1].finish_reason == "stop"
        usage = chunks[-1].usage
    assert usage.prompt_tokens == one.usage.prompt_tokens
    assert usage.completion_tokens == 3 * one.usage.completion_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_models_and_their_aliases(sdk: openai.OpenAI, gateway: Gateway) -> None:
    assert {(model.id, model.root) for model in sdk.models.list()} == {
        (MODEL, MODEL),
        ("tiny", MODEL),
        ("org/other", MODEL),
    }
    assert sdk.models.retrieve("org/other").id == "org/other"
    for name in ("tiny", "org/other"):
        answer = sdk.chat.completions.create(model=name, messages=HELLO)
        assert answer.model == name
    for name in ("lost", "decode_echo", "preprocess", "gpt-4", "no such"):
        with pytest.raises(openai.NotFoundError) as error:
            sdk.models.retrieve(name)
        assert error.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            sdk.chat.completions.create(model=name, messages=HELLO)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "kind", "code", "param"),
    [
        ({"temperature": 9}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"n": 17}, openai.BadRequestError, "invalid_value", "n"),
        ({"n": "2"}, openai.BadRequestError, "invalid_value", "n"),
        ({"n": 2, "seed": "x"}, openai.BadRequestError, "invalid_value", "seed"),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "invalid_value", "stop"),
        (
            {"response_format": {"type": "json_object"}},
            openai.BadRequestError,
            "unknown_field",
            "response_format",
        ),
        (
            {"tools": [TOOL], "tool_choice": "required"},
            openai.BadRequestError,
            "unknown_field",
            "tool_choice",
        ),
        ({"functions": []}, openai.BadRequestError, "unknown_field", "functions"),
        (
            {"extra_body": {"tempreature": 1}},
            openai.BadRequestError,
            "unknown_field",
            "tempreature",
        ),
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
        (
            {"messages": [{"role": "user", "content": LONG * 50}]},
            openai.BadRequestError,
            "context_too_long",
            "messages",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mistakes_are_the_sdks_exceptions(
    sdk: openai.OpenAI, stream: bool, options: dict, kind: type, code: str, param: str
) -> None:
    with pytest.raises(kind) as error:
        sdk.chat.completions.create(
            **{"model": MODEL, "messages": HELLO, "stream": stream, **options}
        )
    assert error.value.code == code
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("data:image/png;base64,AAAA", 415, "media_type"),
        ("http://127.0.0.1:1/a.png", 403, "media_forbidden"),
        ("file:///etc/passwd", 403, "media_forbidden"),
        ("data:image/png;base64,iVBORw0KGgo=", 422, "media_unreadable"),
    ],
)
def test_media_at_fault_have_a_status_before_the_first_byte(
    sdk: openai.OpenAI, stream: bool, url: str, status: int, code: str
) -> None:
    content = [text("a"), {"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.APIStatusError) as error:
        sdk.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}], stream=stream
        )
    assert (error.value.status_code, error.value.code) == (status, code)
    assert error.value.param.startswith("messages[0].content[1]")


# What goes over the wire.


def test_a_stream_is_events_and_done(http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": HELLO, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        found = events(response)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert found[-1] == "[DONE]"
    assert all(event["object"] == "chat.completion.chunk" for event in found[:-1])
    assert not any("usage" in event for event in found[:-1])


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_request", None),
        (b"{", "invalid_request", None),
        (b"[]", "invalid_value", None),
        (b"[" * 100_000, "invalid_request", None),
        (b'{"a":' * 100_000, "invalid_request", None),
        (b'{"model": "\xff"}', "invalid_request", None),
        (b'{"model": "a"} x', "invalid_request", None),
        (b"{}", "invalid_value", "model"),
        (b'{"model": 7}', "invalid_value", "model"),
        (b'{"model": ""}', "invalid_value", "model"),
        (b'{"model": "chat_echo"}', "invalid_value", "messages"),
        (b'{"model": "chat_echo", "stream": true}', "invalid_value", "messages"),
        (b'{"model": "chat_echo", "messages": [{"role": "user", "content": "a"}], "stream": 1}',
         "invalid_value", "stream"),
    ],
    ids=range(13),
)  # fmt: skip
def test_what_is_no_request_is_a_400(
    http: httpx.Client, body: bytes, code: str, param: str | None
) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    response = http.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    error = problem(response)
    assert (error["code"], error["param"]) == (code, param)


def test_whitespace_about_the_json_does_not_matter(http: httpx.Client) -> None:
    body = json.dumps({"stream": True, "model": MODEL, "messages": HELLO, "n": 2}, indent=2)
    response = http.post(
        "/v1/chat/completions",
        content=f"\n {body} \r\n\t",
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 200
    assert events(response)[-1] == "[DONE]"


def test_other_types_paths_and_methods_are_refused_in_the_same_form(http: httpx.Client) -> None:
    def refused(method: str, path: str, **request) -> tuple[int, str]:
        response = http.request(method, path, **request)
        return response.status_code, problem(response)["code"]

    chat = "/v1/chat/completions"
    assert refused("POST", chat, data={"a": "b"}) == (415, "unsupported_media_type")
    assert refused(
        "POST", chat, content=b"x", headers={"content-encoding": "gzip"}
    ) == (415, "unsupported_media_type")  # fmt: skip
    assert refused("GET", chat) == (405, "method_not_allowed")
    assert refused("GET", "/v1/nothing") == (404, "not_found")
    assert refused("GET", "/v1/models/gpt-4") == (404, "model_not_found")


def test_every_answer_has_a_request_id(http: httpx.Client) -> None:
    for path in ("/health/live", "/v1/nothing", "/v1/models"):
        assert len(http.get(path).headers["x-request-id"]) == 32
        named = http.get(path, headers={"x-request-id": "my-1.2_3"})
        assert named.headers["x-request-id"] == "my-1.2_3"
    forged = http.get("/health/live", headers={"x-request-id": "a b\tc"})
    assert len(forged.headers["x-request-id"]) == 32


def test_one_request_id_twice_is_no_trouble(sdk: openai.OpenAI) -> None:
    headers = {"x-request-id": "same"}
    streams = [
        sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=True, extra_headers=headers)
        for _ in range(3)
    ]
    streams[0].close()
    for stream in streams[1:]:
        assert list(stream)[-1].choices[0].finish_reason == "stop"


def test_large_data_uris_go_through(sdk: openai.OpenAI) -> None:
    # Noise does not compress: about 12 MB of PNG, 16 MB of JSON.
    data = base64.b64encode(encoded(noise(2000, 2000), "png")).decode()
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]
    messages = [{"role": "user", "content": content}]
    chunks = list(sdk.chat.completions.create(model=MODEL, messages=messages, stream=True))
    assert "image 0" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_langchain_asks_about_a_picture(gateway: Gateway) -> None:
    model = ChatOpenAI(base_url=f"{gateway.url}/v1", api_key="none", model=MODEL, max_retries=0)
    messages = [HumanMessage(content=[text("What is this?"), picture()])]
    answer = model.invoke(messages)
    assert "image 0" in answer.content
    assert answer.usage_metadata["input_tokens"] > 0
    pieces = list(model.stream(messages))
    assert "".join(piece.content for piece in pieces) == answer.content


@pytest.mark.engine
def test_vllm_answers_about_a_picture(vllm_server: Server) -> None:
    """Greedy: the first of several answers is the one, and the library says the same."""
    content = [picture(), text("What is in the picture?")]
    messages = [{"role": "user", "content": content}]
    options = {"model": "chat_vllm", "messages": messages, "max_tokens": 12, "temperature": 0}
    with (
        before(vllm_server) as gateway,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
        Client(f"localhost:{vllm_server.grpc_port}") as library,
    ):
        whole = client.chat.completions.create(**options, n=2, logprobs=True, top_logprobs=3)
        stream = list(client.chat.completions.create(**options, stream=True))
        expected = library.chat(messages, max_tokens=12, temperature=0, stream=False)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in stream)
    assert [choice.message.content for choice in whole.choices] == [expected.text] * 2
    assert streamed == expected.text
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.content) == whole.usage.completion_tokens // 2
    assert all(len(entry.top_logprobs) == 3 for entry in logprobs.content)
