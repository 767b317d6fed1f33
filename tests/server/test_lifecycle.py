"""Starting, watching and stopping a real tritonserver: nothing of it may be left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from msgspec.structs import replace

from triptych.errors import ConfigurationError, Unavailable
from triptych.server import Server, ServerOptions
from triptych.server.ports import Claim

pytestmark = pytest.mark.server
SHM = Path("/dev/shm")
FREE = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


@pytest.fixture
def options(checkpoint, echo_repository):
    return ServerOptions(
        model=str(checkpoint),
        engine="echo",
        model_repository=str(echo_repository),
        exit_timeout_s=5,
        **FREE,
    )


def regions(prefix):
    return [path.name for path in SHM.iterdir() if path.name.startswith(prefix)]


def alive(processes):
    return [process for process in processes if process.is_running() and not zombie(process)]


def zombie(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def gone(processes, prefix, *, within):
    """Whether no process and no region is left, waiting a while for both."""
    deadline = time.monotonic() + within
    while alive(processes) or regions(prefix):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def family(pid):
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def test_nothing_is_left_after_stop(options):
    with Server(options) as server:
        server.wait_ready()
        processes = family(server.pid)
        assert len(processes) > 4  # tritonserver and a stub for each instance
        assert len(regions(server.shm_prefix)) >= 4
        assert server.stop() is True
        assert not alive(processes)
        assert not regions(server.shm_prefix)
        assert server.stop() is True


def test_ready_means_that_the_ensemble_answers(echo_server):
    body = {"messages": [{"role": "user", "content": "Is anybody there?"}]}
    answer = httpx.post(
        f"http://127.0.0.1:{echo_server.http_port}/v2/models/chat_echo/generate",
        json={"REQUEST": json.dumps(body)},
        trust_env=False,
    )
    assert answer.status_code == 200
    assert json.loads(answer.json()["CHUNK"])["object"] == "chat.completion.chunk"


def test_it_listens_on_loopback_alone(echo_server):
    sockets = psutil.Process(echo_server.pid).net_connections(kind="inet")
    listening = {entry.laddr for entry in sockets if entry.status == psutil.CONN_LISTEN}
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == set(echo_server.ports.values())


def test_a_stop_while_it_loads_leaves_nothing(options):
    with Server(options) as server:
        deadline = time.monotonic() + 20
        while not server.log.loading and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        processes = family(server.pid)
    assert not alive(processes)
    assert not regions(server.shm_prefix)


def test_a_port_that_is_taken_is_named_before_anything_starts(options, echo_server):
    again = replace(options, http_port=echo_server.http_port)
    with pytest.raises(ConfigurationError, match=f"http port {echo_server.http_port}"):
        Server(again).start()


def test_a_checkpoint_that_is_broken_is_told_in_a_sentence(options, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(options.model, broken)
    (broken / "config.json").write_text('{"model_type": "abacus"}')
    with Server(replace(options, model=str(broken))) as server:
        with pytest.raises(ConfigurationError) as error:
            server.wait_ready()
        processes = family(server.pid) if server.pid and psutil.pid_exists(server.pid) else []
    assert "did not load" in str(error.value)
    assert "abacus" in str(error.value)
    assert "\n" not in str(error.value)
    assert not alive(processes)
    assert not regions(server.shm_prefix)


def test_a_model_process_that_dies_is_noticed(options):
    with Server(options) as server:
        server.wait_ready()
        server.check()
        stubs = [child for child in psutil.Process(server.pid).children()]
        encoder = next(stub for stub in stubs if "encoder_0_0" in stub.cmdline())
        encoder.kill()
        with pytest.raises(Unavailable, match="encoder_0_0"):
            server.watch()


def test_a_tritonserver_that_dies_is_noticed_and_its_stubs_end(options):
    with Server(options) as server:
        server.wait_ready()
        processes = family(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="signal 9"):
            server.watch()
    assert not alive(processes)
    assert not regions(server.shm_prefix)


def plain_command(readme):
    """README's command line for a plain tritonserver, as words."""
    (block,) = (block for block in readme.split("```") if "--load-model=chat_vllm" in block)
    line = block.replace("\\\n", " ").strip().splitlines()[-1]
    return shlex.split(line)


def test_the_readmes_plain_tritonserver_serves(
    repository_root, checkpoint, echo_repository, tmp_path
):
    setting, program, *flags = plain_command((repository_root / "README.md").read_text())
    assert setting.startswith("TRIPTYCH_MODEL=")
    assert program == "tritonserver"
    assert "--model-repository=model_repository" in flags
    flags = [flag.replace("chat_vllm", "chat_echo") for flag in flags]
    claim = Claim("127.0.0.1", {"http": 0, "grpc": 0, "metrics": 0})
    ports = claim.ports
    prefix = f"plain_{os.getpid()}_"
    log = tmp_path / "tritonserver.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                Path(sys.executable).with_name(program),
                *flags,
                f"--backend-config=python,shm-region-prefix-name={prefix}",
                *(f"--{name}-port={port}" for name, port in ports.items()),
                *(f"--{name}-address=127.0.0.1" for name in ports),
            ],
            cwd=echo_repository.parent,
            env={**os.environ, "TRIPTYCH_MODEL": str(checkpoint)},
            stdout=output,
            stderr=output,
        )
    try:
        url = f"http://127.0.0.1:{ports['http']}/v2"
        deadline = time.monotonic() + 60
        while not answers(f"{url}/health/ready"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
        answer = httpx.post(
            f"{url}/models/chat_echo/generate", json={"REQUEST": body}, trust_env=False
        )
        assert "CHUNK" in answer.json()
    finally:
        processes = family(process.pid) if process.poll() is None else []
        process.terminate()
        process.wait(40)
        claim.release()
    assert gone(processes, prefix, within=5)


def answers(url):
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False).status_code == httpx.codes.OK
    return False


class Command:
    """``triptych serve`` as a person starts it."""

    def __init__(self, options, log, **changes):
        words = {
            "model": options.model,
            "engine": "echo",
            "model-repository": options.model_repository,
            "http-port": 0,
            "grpc-port": 0,
            "metrics-port": 0,
            **changes,
        }
        command = [str(Path(sys.executable).with_name("triptych")), "serve"]
        for name, value in words.items():
            command += [f"--{name}", str(value)]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)

    def wait_ready(self):
        deadline = time.monotonic() + 120
        while "ready after" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.family = family(self.process.pid)
        (server,) = [each for each in self.family if each.name() == "tritonserver"]
        (flag,) = [word for word in server.cmdline() if "shm-region-prefix-name" in word]
        self.prefix = flag.rpartition("=")[2]
        self.server = server


@pytest.fixture
def serve(options, tmp_path):
    started = []

    def start(**changes):
        started.append(Command(options, tmp_path / "serve.log", **changes))
        return started[-1]

    yield start
    for command in started:
        command.process.kill()
        command.process.wait()
        for process in getattr(command, "family", []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_serve_cleanly(serve, number):
    command = serve()
    command.wait_ready()
    assert regions(command.prefix)
    command.process.send_signal(number)
    assert command.process.wait(30) == 0
    assert gone(command.family, command.prefix, within=0)


def test_a_second_signal_stops_serve_at_once(serve):
    command = serve()
    command.wait_ready()
    command.server.suspend()  # it cannot stop by itself
    began = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(10) == 130
    assert time.monotonic() - began < 8
    assert gone(command.family, command.prefix, within=0)


@pytest.mark.parametrize("engine", ["echo", "vllm"])
def test_serve_that_is_killed_takes_tritonserver_with_it(serve, engine):
    command = serve(engine=engine)
    command.wait_ready()
    command.process.kill()
    command.process.wait(5)
    assert gone(command.family, command.prefix, within=45)


def test_a_tritonserver_that_is_killed_takes_the_engines_processes_with_it(serve):
    command = serve(engine="vllm", **{"max-restarts": 0})
    command.wait_ready()
    command.server.kill()
    assert command.process.wait(20) == 1
    assert gone(command.family, command.prefix, within=0)


def test_serve_ends_when_it_may_not_start_tritonserver_again(serve):
    command = serve(**{"max-restarts": 0})
    command.wait_ready()
    command.server.kill()
    assert command.process.wait(20) == 1
    said = command.log.read_text()
    assert "given up after 0 restarts" in said
    assert "signal 9" in said
    assert gone(command.family, command.prefix, within=0)


@pytest.mark.parametrize("model", ["/nowhere", "/"])
def test_serve_without_a_model_says_so(serve, model):
    command = serve(model=model)
    assert command.process.wait(20) != 0
    said = command.log.read_text()
    assert model in said
    assert "Traceback" not in said


def test_serve_says_why_a_model_does_not_load(serve, checkpoint, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(checkpoint, broken)
    (broken / "config.json").write_text('{"model_type": "abacus"}')
    command = serve(model=broken)
    assert command.process.wait(60) == 1
    said = command.log.read_text()
    assert "abacus" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) < 12
