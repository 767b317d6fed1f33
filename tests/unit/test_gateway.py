"""The gateway's parts, and the whole before a Triton that fails as a real one does now and then."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from replies import until
from triptych.chat import request
from triptych.cli import main
from triptych.errors import ConfigurationError, InvalidValue, TriptychError, UnknownField
from triptych.gateway import Gateway, GatewayOptions, asked, prompts, schema_requests, watch
from triptych.gateway.faults import BadKey, ModelNotFound, headers_of, write_error
from triptych.gateway.keys import ApiKeys
from triptych_client import grpc_transport

BODY = {"model": "chat_x", "messages": [{"role": "user", "content": "Hello"}]}


def chunk(text: str, finish: str | None = None, usage: dict | None = None) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    head = {"id": "i", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return json.dumps({**head, "choices": [choice], **({"usage": usage} if usage else {})})


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers each chat with the next script: chunks, and texts of errors."""

    def __init__(self, *scripts: list[str]) -> None:
        self._scripts = list(scripts)
        self.requests: list[tuple[str, dict]] = []
        self.looks = 0
        """Requests to the stage itself."""
        self.aborted: str | None = ""
        """What that stage says to them: nothing wrong, an error, or nothing at all."""
        self.patience: int | None = 0
        """How many of them a script waits for at ``(wait)``; None: for ever."""
        self._ended = threading.Event()

    def end(self) -> None:
        """Let go of whoever waits."""
        self._ended.set()

    def ModelConfig(self, request, context):
        response = service_pb2.ModelConfigResponse()
        step = response.config.ensemble_scheduling.step.add(model_name="decode_x")
        step.output_map["OUT"] = "CHUNK"
        return response

    def ModelStreamInfer(self, requests, context):
        for asking in requests:
            if asking.model_name == "decode_x":
                self.looks += 1
                if self.aborted is None:
                    self._ended.wait()
                yield service_pb2.ModelStreamInferResponse(error_message=self.aborted or "")
                continue
            self.requests.append((asking.id, json.loads(asking.raw_input_contents[0][4:])))
            for step in self._scripts.pop(0):
                while step == "(wait)" and (self.patience is None or self.looks < self.patience):
                    if self._ended.wait(0.01):
                        return
                if step == "(wait)":
                    continue
                response = service_pb2.ModelStreamInferResponse()
                if step.startswith("{"):
                    response.infer_response.outputs.add(name="CHUNK", datatype="BYTES", shape=[1])
                    raw = len(step).to_bytes(4, "little") + step.encode()
                    response.infer_response.raw_output_contents.append(raw)
                else:
                    response.error_message = step
                yield response


@contextmanager
def gateway_before(triton: Triton, **options) -> Iterator[httpx.Client]:
    server = grpc.server(ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with (
            Gateway(GatewayOptions(triton=f"127.0.0.1:{port}", port=0, **options)) as gateway,
            httpx.Client(base_url=gateway.url, trust_env=False, timeout=30) as http,
        ):
            yield http
    finally:
        triton.end()
        server.stop(0).wait()


def ask(http: httpx.Client, **options) -> httpx.Response:
    return http.post("/v1/chat/completions", json={**BODY, **options})


def go_on(http: httpx.Client, **options) -> httpx.Response:
    body = {"model": "chat_x", "prompt": "Once", **options}
    return http.post("/v1/completions", json=body)


def events(response: httpx.Response) -> list:
    """The events of a stream, whatever they are."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


LOST = "in ensemble 'chat_x', [lease_lost] the encoder was restarted"


@pytest.mark.parametrize("stream", [True, False])
def test_lost_embeddings_are_encoded_anew_once(stream: bool) -> None:
    triton = Triton([LOST], [chunk("Hi", "stop")], [LOST], [LOST])
    with gateway_before(triton) as http:
        answer = ask(http, stream=stream)
        assert answer.status_code == 200
        assert '"Hi"' in answer.text
        refused = ask(http, stream=stream)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "lease_lost"
    assert refused.headers["retry-after"] == "1"
    assert len({request_id for request_id, _ in triton.requests}) == 4


def test_lost_embeddings_after_the_first_piece_are_told() -> None:
    with gateway_before(Triton([chunk("Hi"), LOST])) as http:
        *_, last = [line for line in ask(http, stream=True).iter_lines() if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "lease_lost"


@pytest.mark.parametrize("n", [1, 2])
def test_a_fault_in_mid_stream_is_the_last_event(n: int) -> None:
    scripts = [[chunk("Hi"), "[unavailable] the engine has died"] for _ in range(n)]
    with gateway_before(Triton(*scripts)) as http:
        answer = ask(http, stream=True, n=n)
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        counted = 'requests_total{route="/v1/chat/completions",status="503"} 1.0'
        until(lambda: counted in http.get("/metrics").text)  # the caller has its end a bit sooner
    assert answer.status_code == 200
    assert json.loads(events[0])["choices"][0]["delta"]["content"] == "Hi"
    error = json.loads(events[-1])["error"]
    assert (error["code"], error["type"]) == ("unavailable", "server_error")
    assert "[DONE]" not in events


@pytest.mark.parametrize(
    ("said", "lost"),
    [("Stub process 'decode_x_0_0' is not healthy.", True), (None, True), ("", False)],
    ids=["dead", "hangs", "alive"],
)
def test_who_waits_long_is_looked_after(
    said: str | None, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that has died says so when it is asked; one that is busy answers."""
    monkeypatch.setattr(watch, "SILENT_S", 0.1)
    monkeypatch.setattr(watch, "PATIENCE", 1)
    monkeypatch.setattr(grpc_transport, "CONTROL_TIMEOUT_S", 1.0)
    triton = Triton([chunk("Hi"), "(wait)", chunk(" there", "stop")])
    triton.patience, triton.aborted = (None if lost else 10), said
    with gateway_before(triton) as http:
        *_, last = events(ask(http, stream=True))
    if lost:
        assert last["error"]["code"] == "unavailable"
    else:
        assert last == "[DONE]"
        assert triton.looks >= 10


@pytest.mark.parametrize("n", [1, 2])
def test_a_fault_of_our_own_in_mid_stream_is_told_too(n: int) -> None:
    """Such as a chunk that is none of what chunks are."""
    broken = json.dumps({**json.loads(chunk("a")), "choices": [{"delta": {}, "index": "x"}]})
    scripts = [[chunk("Hi"), broken] for _ in range(n)]
    with gateway_before(Triton(*scripts)) as http:
        answer = go_on(http, stream=True, n=n)
        *_, last = events(answer)
        counted = 'requests_total{route="/v1/completions",status="500"} 1.0'
        until(lambda: counted in http.get("/metrics").text)  # the caller has its end a bit sooner
    assert answer.status_code == 200
    assert last["error"]["code"] == "internal"
    assert "index" not in last["error"]["message"]


def test_the_place_of_a_fault_names_the_prompt() -> None:
    said = "[invalid_value] prompt[7]: must be a token of the model, got 9999"
    with gateway_before(Triton([said], [said], [chunk("a", "stop")])) as http:
        one = go_on(http, prompt=[1] * 8)
        several = go_on(http, prompt=[[9] * 8, [1] * 8])
    assert one.json()["error"]["param"] == "prompt[7]"
    assert several.json()["error"]["param"] in ("prompt[0][7]", "prompt[1][7]")


@pytest.mark.parametrize(
    ("text", "status", "kind", "code"),
    [
        ("in ensemble 'chat_x', Exceeds maximum queue size", 429, "rate_limit_error",
         "overloaded"),
        ("in ensemble 'chat_x', Request timeout expired", 504, "server_error",
         "deadline_exceeded"),
        ("Server is stopping, scheduler for model has stopped accepting new inference requests",
         503, "server_error", "unavailable"),
        ("[media_unreadable] a: is broken", 422, "invalid_request_error", "media_unreadable"),
        ("[media_type] a: is a GIF", 415, "invalid_request_error", "media_type"),
        ("[media_too_large] a: 50 MiB", 413, "invalid_request_error", "media_too_large"),
        ("[media_forbidden] a: is private", 403, "permission_error", "media_forbidden"),
        ("[overloaded] 64 requests wait", 429, "rate_limit_error", "overloaded"),
        ("[cancelled] the generation was ended", 499, "request_cancelled", "cancelled"),
        ("[media_timeout] a: 30 s", 408, "invalid_request_error", "media_timeout"),
        ("[internal] the secret of the house", 500, "server_error", "internal"),
        ("the secret of the house", 500, "server_error", "internal"),
        ("Request for unknown model: 'chat_x' is not found", 404, "invalid_request_error",
         "not_found"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [True, False])
def test_every_error_has_its_status(
    text: str, status: int, kind: str, code: str, stream: bool
) -> None:
    with gateway_before(Triton([text])) as http:
        answer = ask(http, stream=stream)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == (kind, code)
    assert "secret" not in error["message"]


def test_an_answer_in_two_chunks_that_was_to_be_whole_is_a_fault() -> None:
    with gateway_before(Triton([chunk("a"), chunk("b", "stop")])) as http:
        answer = ask(http)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"


def test_a_gateway_stops_what_it_never_began() -> None:
    gateway = Gateway(GatewayOptions(port=0))
    gateway.stop()
    gateway.stop()


def test_a_port_is_taken_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigurationError, match="cannot be used"):
            Gateway(GatewayOptions(port=taken.getsockname()[1]))
    with pytest.raises(ConfigurationError):
        Gateway(GatewayOptions(host="host.invalid"))


def test_pieces_of_an_answer_do_not_wait_for_one_another() -> None:
    with Gateway(GatewayOptions(port=0)) as gateway:
        listener = gateway._socket
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"triton": "http://localhost:8000"}, "gRPC"),
        ({"triton": "localhost"}, "port"),
        ({"triton": "a b:1"}, "address"),
        ({"triton_metrics": "localhost:8002"}, "URL"),
        ({"served_model_name": ("=chat_vllm",)}, "alias"),
        ({"max_body_mb": 0}, "max_body_mb"),
        ({"request_timeout_s": -1.0}, "request_timeout_s"),
    ],
)
def test_options_that_are_wrong(options: dict, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        GatewayOptions(**options).check()


def test_aliases() -> None:
    names = ("a", "b=chat_y", "c/d=chat_z")
    assert GatewayOptions(served_model_name=names).aliases == {
        "a": "",
        "b": "chat_y",
        "c/d": "chat_z",
    }
    assert GatewayOptions(served_model_name=names, model="chat_x").aliases["a"] == "chat_x"


# Keys.


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-1\n\n  sk-2  \n")
    keys = ApiKeys.read(["sk-0"], str(file))
    assert all(key in keys for key in ("sk-0", "sk-1", "sk-2"))
    assert not any(key in keys for key in ("", "sk", "sk-", "sk-11", "# ours", "SK-1"))
    assert repr(keys) == "ApiKeys(3)"
    assert not ApiKeys.read([], "")
    file.write_text("# none\n")
    for flags, name in ((["  "], ""), ([], str(file)), ([], str(tmp_path / "nowhere"))):
        with pytest.raises(ConfigurationError):
            ApiKeys.read(flags, name)


# What is read of a request, and what goes on.

CHANGES = st.dictionaries(
    st.sampled_from(["n", "seed", "stream_options"]), st.integers() | st.none(), max_size=3
)
FIELDS = st.dictionaries(
    st.text(max_size=8), st.none() | st.integers() | st.text(max_size=8) | st.lists(st.text())
)


@given(FIELDS, CHANGES, st.sampled_from(["", " ", "\r\n\t "]), st.sampled_from([None, 2]))
def test_overriding_is_setting(fields: dict, changes: dict, space: str, indent: int | None) -> None:
    fields = {"model": "m", **fields}
    body = f"{space}{json.dumps(fields, indent=indent)}{space}".encode()
    assert msgspec.json.decode(asked.override(body, changes)) == {**fields, **changes}


def read(**fields) -> tuple[asked.Asked, list[dict]]:
    found = asked.read(json.dumps({"model": "m", **fields}).encode())
    return found, [json.loads(body) for body in found.bodies]


@pytest.mark.parametrize(
    ("options", "wanted", "sent"),
    [
        ({}, False, {}),
        ({"stream_options": None}, False, {}),
        ({"stream_options": {}}, False, {}),
        ({"stream_options": {"include_usage": None}}, False, {}),
        ({"stream_options": {"include_usage": False}}, False, {}),
        ({"stream_options": {"include_usage": True}}, True, {}),
        ({"stream_options": {"include_usage": 7}}, False, {"include_usage": 7}),
        ({"stream_options": {"other": 1}}, False, {"other": 1}),
    ],
)
def test_usage_is_counted_in_every_stream(options: dict, wanted: bool, sent: dict) -> None:
    """With the finish reason, which spares a response; what is wrong is the stages' to refuse."""
    found, [body] = read(stream=True, **options)
    assert found.stream
    assert found.include_usage is wanted
    assert body["stream_options"] == {**sent, "usage_with_finish": True}


def test_options_of_a_wrong_type_go_on() -> None:
    assert read(stream=True, stream_options=7)[1] == [
        {"model": "m", "stream": True, "stream_options": 7}
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_the_gateways_own_is_no_callers(stream: bool) -> None:
    with pytest.raises(UnknownField) as error:
        read(stream=stream, stream_options={"usage_with_finish": False})
    assert error.value.where == "stream_options.usage_with_finish"


def test_what_is_not_streamed_goes_on_as_it_came() -> None:
    raw = b' {"model":"m", "stream" : null,"n":1,"x":"\\u00e9"} '
    assert asked.read(raw).bodies == [raw]
    found, [body] = read(stream=False, stream_options={"include_usage": True})
    assert not found.stream
    assert body["stream_options"] == {"include_usage": True}  # refused by preprocess


@given(st.integers(request.INT64_MIN, request.INT64_MAX), st.integers(2, asked.MAX_CHOICES))
def test_seeds_of_several_answers(seed: int, n: int) -> None:
    _, bodies = read(n=n, seed=seed)
    seeds = [body["seed"] for body in bodies]
    assert seeds[0] == seed
    assert len(set(seeds)) == n
    assert all(request.INT64_MIN <= each <= request.INT64_MAX for each in seeds)
    assert all(body["n"] == 1 for body in bodies)


@pytest.mark.parametrize("n", [0, -1, asked.MAX_CHOICES + 1, 1 << 70, "2", 2.0, [], {}])
def test_n_out_of_its_range(n: object) -> None:
    with pytest.raises(InvalidValue) as error:
        read(n=n)
    assert error.value.where == "n"


@pytest.mark.parametrize("n", [True, 1.0])
def test_what_equals_one_and_is_none_is_left_to_preprocess(n: object) -> None:
    _, [body] = read(n=n)
    assert body["n"] is not None
    assert repr(body["n"]) == repr(n)


# The document's request against what is read.


def documented(kind: type[msgspec.Struct]) -> dict:
    (_, components) = msgspec.json.schema_components([kind])
    return components[kind.__name__]["properties"]


CHAT = documented(schema_requests.ChatCompletionRequest)
COMPLETION = documented(schema_requests.CompletionRequest)
OWN = {"n"}
"""The gateway's own: preprocess makes one answer a request."""
TOOL = {"type": "function", "function": {"name": "f"}}


def accepts(**fields) -> bool:
    if "prompt" not in fields:
        fields = {"messages": BODY["messages"], **fields}
    if "top_logprobs" in fields:
        fields["logprobs"] = True
    if {"tool_choice", "parallel_tool_calls"} & fields.keys():
        fields["tools"] = [TOOL]
    if isinstance(fields.get("tools"), list):
        names = (f"f{number}" for number in range(len(fields["tools"])))
        fields["tools"] = [{"function": {"name": name}} for name in names]
    try:
        request.parse(json.dumps(fields))
    except TriptychError:
        return False
    return True


def test_the_documents_fields_are_those_that_are_read() -> None:
    known = set(request.ChatRequest.__struct_fields__) - {"include_usage", "usage_with_finish"}
    known |= {"n", "stream_options"}
    assert set(CHAT) == known - {"prompt"} | {"max_completion_tokens"}
    assert set(COMPLETION) == known - set(prompts.OF_CHATS) | {"best_of", "echo"}


@pytest.mark.parametrize("name", sorted(CHAT.keys() - OWN))
def test_the_documents_limits_are_those_that_hold(name: str) -> None:
    check_limits(name, CHAT[name], lambda value: accepts(**{name: value}))


def accepts_completion(**fields) -> bool:
    body = {"model": "m", "prompt": "Once", **fields}
    try:
        for each in prompts.read(json.dumps(body).encode()).bodies:
            request.parse(each)
    except TriptychError:
        return False
    return True


@pytest.mark.parametrize("name", sorted(COMPLETION.keys() - {"best_of"}))
def test_the_limits_of_completions_are_those_that_hold(name: str) -> None:
    check_limits(name, COMPLETION[name], lambda value: accepts_completion(**{name: value}))


def check_limits(name: str, field: dict, accepts: Callable[[object], bool]) -> None:
    for kind in field.get("anyOf", [field]):
        for limit, accepted, refused in limits(kind):
            assert accepts(accepted), (name, limit, accepted)
            if refused is not None:
                assert not accepts(refused), (name, limit, refused)
        if kind.get("type") == "null":
            assert accepts(None), name


def limits(kind: dict) -> Iterator[tuple[str, object, object]]:
    step = 1 if kind.get("type") == "integer" else 1e-6
    make: Callable[[int], object] = (lambda n: "a" * n) if kind.get("type") == "string" else (
        lambda n: ["a"] * n
    )  # fmt: skip
    for limit, accepted, refused in (
        ("minimum", 0, -step),
        ("maximum", 0, step),
        ("exclusiveMinimum", step, 0),
    ):
        if limit in kind:
            yield limit, kind[limit] + accepted, kind[limit] + refused
    if kind.get("type") == "array" and "maxItems" in kind:
        yield "maxItems", make(kind["maxItems"]), make(kind["maxItems"] + 1)
    if kind.get("type") == "string" and "maxLength" in kind:
        yield "maxLength", make(kind["maxLength"]), make(kind["maxLength"] + 1)


# Light, and told what is wrong.


def test_the_gateway_is_light() -> None:
    program = (
        "import sys, triptych.gateway; "
        "heavy = {'torch', 'numpy', 'av', 'PIL', 'tokenizers', 'transformers', 'vllm', 'jinja2'}; "
        "found = heavy & sys.modules.keys(); assert found <= {'numpy'}, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gateway", "--triton", "http://a:1"], "gRPC"),
        (["gateway", "--api-key", ""], "must not be empty"),
        (["gateway", "--api-key-file", "/nowhere"], "/nowhere"),
        (["gateway", "--served-model-name", "=x"], "alias"),
        (["gateway", "--host", "host.invalid"], "host.invalid"),
        (["serve", "--api-key", "a"], "need --openai"),
        (["serve", "--openai", "--api-key-file", "/nowhere"], "/nowhere"),
    ],
)
def test_the_command_line_is_wrong(arguments: list[str], said: str, capsys) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_command_without_the_extra_names_it(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "triptych.cli.gateway", None)
    assert main(["gateway"]) == 2
    assert "triptych[gateway]" in capsys.readouterr().err


def test_errors_in_openais_form() -> None:
    assert json.loads(write_error(400, "is wrong", code="c", param="a.b")) == {
        "error": {
            "message": "a.b: is wrong",
            "type": "invalid_request_error",
            "param": "a.b",
            "code": "c",
        }
    }
    assert headers_of(BadKey("")) == {"www-authenticate": "Bearer"}
    assert headers_of(ModelNotFound("")) == {}
