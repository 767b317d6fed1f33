"""The gateway against a real tritonserver, by the official SDK and by plain HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import openapi_spec_validator
import psutil
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

from pictures import encoded, noise
from triptych.gateway import Gateway, GatewayOptions
from triptych.gateway.keys import ApiKeys
from triptych.server import Server
from triptych_client import Client

pytestmark = pytest.mark.server

MODEL = "chat_echo"
DELAY_S = 0.05
LONG = " ".join(f"word{number}" for number in range(300))
"""Takes the slow server about fifteen seconds to say back."""
KEY = "sk-test-1"
HELLO = [{"role": "user", "content": "Hello there"}]


def before(server: Server, **options) -> Gateway:
    options = {"triton": f"127.0.0.1:{server.grpc_port}", "port": 0, **options}
    return Gateway(GatewayOptions(**options))


@pytest.fixture(scope="module")
def gateway(echo_server: Server) -> Iterator[Gateway]:
    metrics = f"http://127.0.0.1:{echo_server.metrics_port}/metrics"
    names = ("tiny", f"org/other={MODEL}", "lost=chat_nothing")
    with before(echo_server, triton_metrics=metrics, served_model_name=names) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def guarded(echo_server: Server) -> Iterator[Gateway]:
    options = {"keys": ApiKeys([KEY, "sk-test-2"]), "cors_origins": ("https://page.example",)}
    with before(echo_server, max_body_mb=1, body_timeout_s=0.5, **options) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def slow_server(start_server: Callable[..., Server]) -> Iterator[Server]:
    """Says one word after the other, and serves four requests at a time."""
    server = start_server("echo", echo_token_delay_s=DELAY_S, max_num_seqs=4)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def slow(slow_server: Server) -> Iterator[Gateway]:
    with before(slow_server, drain_timeout_s=0.5) as gateway:
        yield gateway


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, trust_env=False, timeout=30) as client:
        yield client


def picture(kind: str = "png", seed: int = 0) -> dict:
    data = base64.b64encode(encoded(noise(64, 48, seed=seed), kind)).decode()
    url = f"data:image/{kind};base64,{data}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def events(response: httpx.Response) -> list:
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    bodies = [line.removeprefix("data: ") for line in lines]
    return [body if body == "[DONE]" else json.loads(body) for body in bodies]


def problem(response: httpx.Response) -> dict:
    """The error of a response, whose shape is OpenAI's."""
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


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
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            openai.BadRequestError,
            "unknown_field",
            "tools",
        ),
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
        ("data:image/png;base64,iVBORw0KGgo=", 400, "media_unreadable"),
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
    assert refused("POST", "/v1/completions", json={}) == (404, "model_not_found")
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


# Who may ask, and how much.


def test_keys(guarded: Gateway) -> None:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0) as client:
        assert client.chat.completions.create(model=MODEL, messages=HELLO).choices
        for wrong in ("sk-test-3", "-", KEY[:-1], "ключ"):
            headers = {"authorization": f"Bearer {wrong}".encode()}
            for path, method in (("chat/completions", "POST"), ("models", "GET")):
                response = httpx.request(method, f"{guarded.url}/v1/{path}", headers=headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert problem(response)["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="sk-test-3").models.list()
    assert httpx.get(f"{guarded.url}/v1/models").status_code == 401
    assert httpx.get(f"{guarded.url}/health/ready").status_code == 200
    assert KEY not in repr(guarded.options)


def test_pages_may_ask_only_from_the_origins_allowed(gateway: Gateway, guarded: Gateway) -> None:
    def allowed(gateway: Gateway, origin: str) -> str | None:
        headers = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        response = httpx.options(f"{gateway.url}/v1/chat/completions", headers=headers)
        return response.headers.get("access-control-allow-origin")

    assert allowed(gateway, "https://page.example") is None
    assert allowed(guarded, "https://page.example") == "https://page.example"
    assert allowed(guarded, "https://other.example") is None
    refused = httpx.get(f"{guarded.url}/v1/models", headers={"origin": "https://page.example"})
    assert refused.headers["access-control-allow-origin"] == "https://page.example"


def test_a_body_has_a_limit(guarded: Gateway) -> None:
    url = f"{guarded.url}/v1/chat/completions"
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    declared = httpx.post(url, content=b" " * ((1 << 20) + 1), headers=headers)
    assert declared.status_code == 413
    assert "1 MiB" in problem(declared)["message"]

    def pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * (1 << 15)

    undeclared = httpx.post(url, content=pieces(), headers=headers)
    assert undeclared.status_code == 413
    assert problem(undeclared)["code"] == "request_too_large"


def test_a_body_that_does_not_come_is_not_waited_for(guarded: Gateway) -> None:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=5) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


# Health, numbers, the document.


def test_health_and_metrics(http: httpx.Client) -> None:
    assert http.get("/health/live").json() == {"status": "ok"}
    assert http.get("/health/ready").status_code == 200
    http.get("/a/path/that/somebody/made/up")
    page = http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert 'triptych_gateway_requests_total{route="/health/live",status="200"}' in page.text
    assert 'triptych_gateway_requests_total{route="other",status="404"}' in page.text
    assert "triptych_gateway_triton_metrics_up 1.0" in page.text
    assert "nv_inference_request_success" in page.text
    assert "somebody" not in page.text


def test_health_without_a_server() -> None:
    options = GatewayOptions(triton="127.0.0.1:1", triton_metrics="http://127.0.0.1:1", port=0)
    with Gateway(options) as gateway, httpx.Client(base_url=gateway.url) as http:
        assert http.get("/health/live").status_code == 200
        for method, path in (
            ("GET", "/health/ready"),
            ("GET", "/v1/models"),
            ("POST", "/v1/chat/completions"),
        ):
            response = http.request(method, path, json={"model": MODEL, "messages": HELLO})
            assert response.status_code == 503, path
            assert response.headers["retry-after"] == "1"
            assert "127.0.0.1" not in problem(response)["message"]
        assert "triptych_gateway_triton_metrics_up 0.0" in http.get("/metrics").text


def test_the_document(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/health/live",
        "/health/ready",
        "/metrics",
    }
    assert http.get("/docs").status_code == 200
    openapi_spec_validator.validate(document)


def test_made_up_requests_get_what_the_document_says(http: httpx.Client, tmp_path: Path) -> None:
    document = http.get("/openapi.json").json()
    # Else hardly one request would get past the model's name.
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    fields["model"] = {"enum": [MODEL]}
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", "openapi.json",
        "--url", str(http.base_url), "--max-examples", "50", "--phases", "coverage,fuzzing",
        "--generation-deterministic",
        # Some rules no schema tells, as that top_logprobs needs logprobs.
        "--exclude-checks", "positive_data_acceptance",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_langchain_asks_about_a_picture(gateway: Gateway) -> None:
    model = ChatOpenAI(base_url=f"{gateway.url}/v1", api_key="none", model=MODEL, max_retries=0)
    messages = [HumanMessage(content=[text("What is this?"), picture()])]
    answer = model.invoke(messages)
    assert "image 0" in answer.content
    assert answer.usage_metadata["input_tokens"] > 0
    pieces = list(model.stream(messages))
    assert "".join(piece.content for piece in pieces) == answer.content


def test_ready_is_what_would_answer(start_server: Callable[..., Server]) -> None:
    """Triton goes on calling itself ready when a model's process has died."""
    server = start_server("echo")
    with before(server) as gateway:
        url = f"{gateway.url}/health/ready"
        assert httpx.get(url).status_code == 200
        children = psutil.Process(server.pid).children()
        [stub] = [child for child in children if "decode_echo_0_0" in child.cmdline()]
        stub.kill()
        deadline = time.monotonic() + 30
        while (response := httpx.get(url, timeout=30)).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert response.status_code == 503
        assert problem(response)["code"] == "unavailable"
        assert httpx.get(f"http://localhost:{server.http_port}/v2/health/ready").status_code == 200
        assert httpx.get(f"{gateway.url}/health/live").status_code == 200
    server.kill()
    server.stop()


def test_the_command_serves_both(echo_repository: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n")
    program = "import sys; from triptych.cli import main; sys.exit(main())"
    flags = {
        "--model": checkpoint, "--engine": "echo", "--model-repository": echo_repository,
        "--http-port": 0, "--grpc-port": 0, "--metrics-port": 0, "--openai-port": 0,
        "--api-key-file": tmp_path / "keys", "--max-request-mb": 1,
    }  # fmt: skip
    arguments = [str(part) for pair in flags.items() for part in pair]
    process = subprocess.Popen(
        [sys.executable, "-c", program, "serve", "--openai", *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        line = next(line for line in lines if line.startswith("OpenAI's API on "))
        url = line.split()[3].removesuffix(",")
        with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            name = checkpoint.name
            assert client.chat.completions.create(model=name, messages=HELLO).model == name
            assert {model.id for model in client.models.list()} == {MODEL, name}
            with pytest.raises(openai.APIStatusError) as error:
                client.chat.completions.create(
                    model=name, messages=[{"role": "user", "content": "a" * (1 << 20)}]
                )
            assert error.value.status_code == 413
        page = httpx.get(url.replace("/v1", "/metrics")).text
        assert "nv_inference_request_success" in page
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


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


# Leaving.


def seen(gateway: Gateway, name: str) -> float:
    """One of the gateway's numbers."""
    page = httpx.get(f"{gateway.url}/metrics").text
    lines = [line for line in page.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def left(gateway: Gateway) -> float:
    """How many callers went away."""
    route = 'route="/v1/chat/completions",status="499"'
    return seen(gateway, f"triptych_gateway_requests_total{{{route}}}")


def assert_the_engine_is_free(gateway: Gateway) -> None:
    """Its four slots are taken until generations end, which by itself takes fifteen seconds."""
    began = time.monotonic()
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 1}
    response = httpx.post(f"{gateway.url}/v1/chat/completions", json={**body, "n": 4}, timeout=30)
    assert response.status_code == 200
    assert time.monotonic() - began < 5.0


def ask_raw(gateway: Gateway, **options) -> socket.socket:
    """A request on a connection of its own, whose answer is left to the test."""
    messages = [{"role": "user", "content": LONG}]
    body = json.dumps({"model": MODEL, "messages": messages, "max_tokens": 1000, **options})
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body.encode())
    )
    return connection


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"n": 4}, {"n": 4, "stream": True}])
def test_leaving_ends_every_generation(slow: Gateway, options: dict) -> None:
    before = left(slow)
    with ExitStack() as stack:
        connections = [stack.enter_context(ask_raw(slow, **options)) for _ in range(4)]
        if "stream" in options:
            assert connections[0].recv(1000).startswith(b"HTTP/1.1 200 ")
        else:
            time.sleep(0.5)
    assert_the_engine_is_free(slow)
    assert left(slow) == before + 4


def test_leaving_at_any_point_ends_every_generation(slow: Gateway) -> None:
    """Two hundred come and go: in the request, before the first byte, in the answer."""
    dice = random.Random(0)

    async def visit(number: int) -> bool:
        _, writer = await asyncio.open_connection("127.0.0.1", slow.port)
        messages = [{"role": "user", "content": LONG}]
        options = {"stream": number % 2 == 0, "max_tokens": 1000}
        body = json.dumps({"model": MODEL, "messages": messages, **options}).encode()
        whole = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        cut = dice.randrange(len(whole)) if number % 5 == 0 else len(whole)
        writer.write(whole[:cut])
        await writer.drain()
        await asyncio.sleep(dice.random() * 2)
        writer.transport.abort()
        return b"\r\n\r\n" in whole[:cut]

    async def visit_all() -> list[bool]:
        return await asyncio.gather(*(visit(number) for number in range(200)))

    before = left(slow)
    requests = sum(asyncio.run(visit_all()))
    assert_the_engine_is_free(slow)
    assert left(slow) == before + requests
    assert requests > 190
    assert seen(slow, "triptych_gateway_active_requests ") == 1  # this one


def test_the_sdk_closes_a_stream(slow: Gateway) -> None:
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=0) as client:
        streams = [
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": LONG}], stream=True
            )
            for _ in range(4)
        ]
        for stream in streams:
            next(iter(stream))
            stream.close()
    assert_the_engine_is_free(slow)


@pytest.mark.parametrize("stream", [False, True])
def test_the_timeout_of_the_gateway(slow: Gateway, slow_server: Server, stream: bool) -> None:
    with (
        before(slow_server, request_timeout_s=0.5) as gateway,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.APIError, match=r"0\.5 s") as error:
            list(
                client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": LONG}], stream=stream
                )
            )
        assert error.value.code == "deadline_exceeded"
        if not stream:
            assert isinstance(error.value, openai.InternalServerError)
            assert error.value.status_code == 504
    assert_the_engine_is_free(slow)


def test_a_generation_ended_from_elsewhere_is_told(slow: Gateway, slow_server: Server) -> None:
    """In a stream by an event, and no [DONE] follows."""
    with before(slow_server, drain_timeout_s=0.3) as gateway:
        body = {"model": MODEL, "messages": [{"role": "user", "content": LONG}], "stream": True}
        with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            gateway.stop()
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "unavailable"
    with Client(f"localhost:{slow_server.grpc_port}") as client:
        assert client.chat("a", model=MODEL, stream=False, max_tokens=1, timeout=2).text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{gateway.url}/health/live")
