"""What the commands that serve tell programs, and how they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from triptych.server import Server

pytestmark = pytest.mark.server

COMMAND = str(Path(sys.executable).with_name("triptych"))


@contextmanager
def serving(*arguments: str, log: Path) -> Iterator[tuple[subprocess.Popen[str], dict]]:
    """A command that serves, and the object that it prints when it does."""
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [COMMAND, *arguments, "--json"], stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            yield process, json.loads(line)
        finally:
            process.terminate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code after SIGTERM, and what else was on stdout."""
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def test_serve_tells_where_everything_is(
    echo_repository: Path, checkpoint: Path, tmp_path: Path
) -> None:
    command = ["serve", "--model", str(checkpoint), "--engine", "echo", "--openai"]
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics", "openai")]
    repository = ["--model-repository", str(echo_repository)]
    with serving(*command, *ports, *repository, log=tmp_path / "log") as (process, told):
        assert told["ready"] is True
        assert told["model"] == "chat_echo"
        with httpx.Client(trust_env=False) as http:
            assert http.get(f"{told['http']}/v2/health/ready").status_code == 200
            assert "nv_inference" in http.get(told["metrics"]).text
            names = [model["id"] for model in http.get(f"{told['openai']}/models").json()["data"]]
            assert names == ["chat_echo", checkpoint.name]
            assert "<title>Triptych" in http.get(told["playground"]).text
        chat = [COMMAND, "chat", "Hello", "--server", told["grpc"], "--model", "chat_echo"]
        said = subprocess.run(chat, check=True, capture_output=True, text=True)
        assert "Hello" in said.stdout
        assert ended(process) == (0, "")


@pytest.mark.parametrize("page", [True, False])
def test_the_gateway_tells_where_it_is(echo_server: Server, tmp_path: Path, page: bool) -> None:
    triton = f"127.0.0.1:{echo_server.grpc_port}"
    flags = ["--triton", triton, "--port", "0", "--playground" if page else "--no-playground"]
    with serving("gateway", *flags, log=tmp_path / "log") as (process, told):
        assert told["triton"] == triton
        assert httpx.get(f"{told['openai']}/models", trust_env=False).status_code == 200
        assert ("playground" in told) is page
        root = told["openai"].removesuffix("/v1")
        answer = httpx.get(f"{root}/playground/", trust_env=False)
        assert answer.status_code == (200 if page else 404)
        assert ended(process) == (0, "")
