"""What stands around the gateway's chats: keys, limits, health, numbers, the document."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import openapi_spec_validator
import psutil
import pytest

from browser import chromium, watched
from gateways import HELLO, KEY, LONG, MODEL, before, picture, problem, text
from triptych.gateway import Gateway, GatewayOptions, watch
from triptych.gateway.keys import ApiKeys
from triptych.server import Server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def guarded(echo_server: Server) -> Iterator[Gateway]:
    options = {"keys": ApiKeys([KEY, "sk-test-2"]), "cors_origins": ("https://page.example",)}
    with before(echo_server, max_body_mb=1, body_timeout_s=0.5, **options) as gateway:
        yield gateway


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


def test_tokens_are_counted(http: httpx.Client) -> None:
    """Those of answers that came to their end, whether their caller asked to be told or not."""

    def counted() -> dict[str, float]:
        pattern = re.compile(r"(triptych_gateway_\w+_tokens_total\{.*\}) (\S+)")
        return {name: float(value) for name, value in pattern.findall(http.get("/metrics").text)}

    def ask(**fields) -> dict:
        content = [picture(), text("a")]
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200
        return {} if "stream" in fields else response.json()["usage"]

    ask()
    before = counted()
    usage = ask()
    once = {name: value - before[name] for name, value in counted().items()}
    prefix, model = "triptych_gateway", f'model="{MODEL}"'
    details = usage["prompt_tokens_details"]
    assert once == {
        f"{prefix}_prompt_tokens_total{{{model}}}": usage["prompt_tokens"],
        f"{prefix}_answer_tokens_total{{{model}}}": usage["completion_tokens"],
        f"{prefix}_cached_prompt_tokens_total{{{model}}}": details["cached_tokens"],
        f'{prefix}_media_tokens_total{{modality="image",{model}}}': details["image_tokens"],
        f'{prefix}_media_tokens_total{{modality="video",{model}}}': 0,
        f'{prefix}_media_tokens_total{{modality="audio",{model}}}': 0,
    }
    assert details["image_tokens"] > 0
    ask(stream=True)
    ask(stream=True, stream_options={"include_usage": True}, n=1)
    thrice = {name: value - before[name] for name, value in counted().items()}
    assert thrice == {name: 3 * value for name, value in once.items()}


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
        "/v1/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/health/live",
        "/health/ready",
        "/metrics",
    }
    openapi_spec_validator.validate(document)


def test_the_documents_page_loads_nothing_from_elsewhere(gateway: Gateway) -> None:
    with chromium() as browser, watched(browser, f"{gateway.url}/docs") as page:
        page.get_by_text("/v1/chat/completions").first.wait_for()
        page.get_by_text("Create Completion", exact=True).first.wait_for()
    assert httpx.get(f"{gateway.url}/docs/other.js").status_code == 404


def test_made_up_requests_get_what_the_document_says(http: httpx.Client, tmp_path: Path) -> None:
    document = http.get("/openapi.json").json()
    # Else hardly one request would get past the model's name.
    for kind in ("ChatCompletionRequest", "CompletionRequest"):
        document["components"]["schemas"][kind]["properties"]["model"] = {"enum": [MODEL]}
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


def test_a_stage_that_dies_is_told(
    start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton goes on calling itself ready, and is silent to those who wait for the stage."""
    monkeypatch.setattr(watch, "SILENT_S", 0.5)
    server = start_server("echo", echo_token_delay_s=0.05)
    body = {"model": MODEL, "messages": [{"role": "user", "content": LONG}]}
    with (
        before(server) as gateway,
        httpx.Client(base_url=gateway.url, trust_env=False, timeout=60) as http,
        ThreadPoolExecutor(1) as threads,
        http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream,
    ):
        assert http.get("/health/ready").status_code == 200
        whole = threads.submit(http.post, "/v1/chat/completions", json=body)
        lines = (line for line in stream.iter_lines() if line)
        assert next(lines).startswith("data: {")
        assert http.get("/v2/nothing").status_code == 404  # the other one has been sent by now
        children = psutil.Process(server.pid).children()
        [stub] = [child for child in children if "decode_echo_0_0" in child.cmdline()]
        stub.kill()
        *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
        assert whole.result(60).status_code == 503
        assert problem(whole.result())["code"] == "unavailable"
        deadline = time.monotonic() + 30
        while (response := http.get("/health/ready")).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert response.status_code == 503
        assert problem(response)["code"] == "unavailable"
        assert httpx.get(f"http://localhost:{server.http_port}/v2/health/ready").status_code == 200
        assert http.get("/health/live").status_code == 200
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
