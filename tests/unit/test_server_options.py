from __future__ import annotations

import socket

import pytest

from triptych.errors import ConfigurationError
from triptych.server import Server, ServerOptions
from triptych.server.command import arguments, environ
from triptych.server.installation import Installation, find

PORTS = {"http": 1, "grpc": 2, "metrics": 3}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": ""}, ["no model"]),
        ({"model": "/nowhere"}, ["/nowhere", "not a directory"]),
        ({"model": "/"}, ["config.json"]),
        ({"engine": "abacus"}, ["chat_abacus", "there is: chat_", "chat_vllm"]),
        ({"model_repository": "/"}, ["chat_vllm", "none"]),
        ({"settings": {"max_modle_len": 1}}, ["max_modle_len", "max_model_len"]),
    ],
)
def test_what_is_wrong_is_named_before_anything_starts(model, change, words):
    options = ServerOptions(**{"model": model, **change})
    with pytest.raises(ConfigurationError) as error:
        Server(options).start()
    for word in words:
        assert word in str(error.value)


def test_a_taken_port_is_named(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = ServerOptions(model=model, http_port=0, grpc_port=port, metrics_port=0)
        with pytest.raises(ConfigurationError, match=f"grpc port {port} on 127.0.0.1"):
            Server(options).start()


def test_one_port_cannot_serve_two_things(model):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ServerOptions(model=model, http_port=port, grpc_port=port, metrics_port=0)
    with pytest.raises(ConfigurationError, match=f"grpc port {port}"):
        Server(options).start()


def test_only_the_ensemble_is_loaded(model):
    command = arguments(find(), ServerOptions(model=model), PORTS, "mine_", "key")
    assert [word for word in command if word.startswith("--load-model")] == [
        "--load-model=chat_vllm"
    ]
    assert "--http-address=127.0.0.1" in command
    assert "--grpc-port=2" in command
    assert "--backend-config=python,shm-region-prefix-name=mine_" in command


def test_settings_reach_the_stages_through_the_environment(model):
    options = ServerOptions(model=model, settings={"allowed_media_domains": ("a.org", "b.org")})
    result = environ(Installation(binary=find().binary), options, {"PATH": "/bin", "KEPT": "1"})
    assert result["TRIPTYCH_MODEL"] == model
    assert result["TRIPTYCH_ALLOWED_MEDIA_DOMAINS"] == "a.org,b.org"
    assert result["KEPT"] == "1"
    assert result["PATH"].endswith(":/bin")
