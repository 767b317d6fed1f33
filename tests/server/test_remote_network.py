"""Two encoder servers and a decode server, each in a network namespace, and links that are cut.

All are started by README's commands, and embeddings travel by NIXL over TCP.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from benches import _embed
from ensembles import by_nixl, by_remote_encoder
from journey import Journey, ask
from namespaces import Host, hosts
from traffic import Traffic
from triptych.errors import Unavailable

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
PREFIX = f"triptych_net_{os.getpid()}_"
"""Of the shared memory of all servers here, which are killed and leave it."""
TIMEOUT_S = 2.0
"""For embeddings to arrive; and a server that says nothing for so long is lost."""
ENSEMBLE = "chat_echo_by_nixl_remote"
QUESTIONS = [tuple(range(seed, seed + 1 + seed % 3)) for seed in range(0, 90, 2)]
"""Pictures of each."""
Answers = dict[tuple[int, ...], str]


class Network:
    """The servers and what they were started with."""

    def __init__(self, machines: list[Host], repository: Path, checkpoint: Path, logs: Path):
        self.encoders, self.decode = machines[:2], machines[2]
        self._repository = repository
        self._logs = logs
        self._environ = {
            "PATH": f"{ROOT / '.venvs' / 'vllm' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "UCX_TLS": "tcp",  # else UCX copies between processes, whatever their networks
            "TRIPTYCH_MODEL": str(checkpoint),
            "TRIPTYCH_HANDOVER_KEY": "known to all",
            "TRIPTYCH_HANDOVER_AT_START": "true",
            "TRIPTYCH_HANDOVER_TIMEOUT_S": f"{TIMEOUT_S}",
            "TRIPTYCH_ENCODER_HEALTH_TIMEOUT_S": f"{TIMEOUT_S}",
            "TRIPTYCH_ENCODER_ADDRESSES": ",".join(self.address(one) for one in self.encoders),
            # One picture a pass, so that both encoders make the same bits.
            "TRIPTYCH_MAX_ENCODER_TOKENS": "1",
        }

    def address(self, host: Host) -> str:
        return f"{host.address}:8001"

    def start(self, host: Host) -> None:
        model = ENSEMBLE if host is self.decode else "encoder"
        command = [
            "tritonserver",
            f"--model-repository={self._repository}",
            "--disable-auto-complete-config",
            "--model-control-mode=explicit",
            f"--load-model={model}",
            f"--backend-config=python,shm-region-prefix-name={PREFIX}",
            "--backend-config=python,shm-default-byte-size=16777216",
            "--backend-config=python,shm-growth-byte-size=16777216",
        ]
        host.start(command, self._environ, self.log(host))

    def wait(self, host: Host, within_s: float = 90.0) -> None:
        model = ENSEMBLE if host is self.decode else "encoder"
        deadline = time.monotonic() + within_s
        with triton.InferenceServerClient(self.address(host)) as client:
            while not is_ready(client, model):
                assert time.monotonic() < deadline, self.log(host).read_text()[-4000:]
                time.sleep(0.1)

    def kill(self, *encoders: Host) -> None:
        """Returns when the pool has noticed."""
        for host in encoders:
            host.kill()
        self.until("lost", *encoders)

    def bring_back(self, *encoders: Host) -> None:
        """Likewise."""
        for host in encoders:
            self.start(host)
        for host in encoders:
            self.wait(host)
        self.until("ready", *encoders)

    def log(self, host: Host) -> Path:
        return self._logs / f"{host.address}.log"

    def told(self, text: str) -> int:
        """How often the decode server's log says it."""
        return self.log(self.decode).read_text().count(text)

    def until(self, state: str, *encoders: Host) -> None:
        """Wait until the pool says that of all of them."""
        deadline = time.monotonic() + 30
        while {self._state(host) for host in encoders} != {state}:
            assert time.monotonic() < deadline, f"{list(map(self._state, encoders))}, not {state}"
            time.sleep(0.05)

    def _state(self, host: Host) -> str:
        pattern = rf"encoder {re.escape(self.address(host))} is (\w+)"
        return re.findall(pattern, self.log(self.decode).read_text())[-1]


def is_ready(client: triton.InferenceServerClient, model: str) -> bool:
    try:
        return bool(client.is_model_ready(model))
    except InferenceServerException:
        return False


@pytest.fixture(scope="module")
def network(
    echo_repository: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Network]:
    repository = tmp_path_factory.mktemp("network") / "model_repository"
    shutil.copytree(echo_repository, repository)
    assert by_remote_encoder(repository, by_nixl(repository, "chat_echo")) == ENSEMBLE
    with ExitStack() as stack:
        stack.callback(sweep)
        try:
            machines = stack.enter_context(hosts(["one", "two", "decode"]))
        except PermissionError as error:
            pytest.skip(f"no network namespaces here: {error}")
        network = Network(machines, repository, checkpoint, tmp_path_factory.mktemp("logs"))
        for host in machines:
            network.start(host)
        for host in machines:
            network.wait(host)
        network.until("ready", *network.encoders)
        yield network


def sweep() -> None:
    """Remove what servers that were killed have left."""
    for region in Path("/dev/shm").glob(f"{PREFIX}*"):
        region.unlink()


@pytest.fixture(scope="module")
def caller(network: Network) -> Iterator[_embed.Caller]:
    caller = _embed.Caller(network.address(network.decode))
    yield caller
    caller.close()


@pytest.fixture(scope="module")
def answers(caller: _embed.Caller) -> Answers:
    """What every question is answered while all is well."""
    return {seeds: ask(caller, ENSEMBLE, *seeds) for seeds in QUESTIONS}


def traffic(caller: _embed.Caller, answers: Answers) -> Traffic:
    return Traffic(lambda seeds: ask(caller, ENSEMBLE, *seeds), answers, 4)


def test_embeddings_come_from_other_hosts(network: Network, answers: Answers) -> None:
    assert len({*answers.values()}) == len(answers)
    assert network.told("embeddings come from an encoder on another host by") >= 1
    assert network.told("on this host") == 0


def test_an_encoder_that_is_killed_and_comes_back(
    network: Network, caller: _embed.Caller, answers: Answers
) -> None:
    first, second = network.encoders
    with traffic(caller, answers) as running:
        running.go_on(20)
        network.kill(first)
        running.go_on(40)
        network.bring_back(first)
        network.kill(second)
        running.go_on(40)
        network.bring_back(second)


def test_an_encoder_that_is_cut_off_and_comes_back(
    network: Network, caller: _embed.Caller, answers: Answers
) -> None:
    first, second = network.encoders
    with traffic(caller, answers) as running:
        running.go_on(20)
        first.cut()
        network.until("lost", first)
        running.go_on(40)
        first.mend()
        network.until("ready", first)
        running.go_on(40)
        network.kill(second)
        running.go_on(40)


def test_embeddings_behind_a_cut_link_are_made_again_by_the_other(
    network: Network, caller: _embed.Caller, answers: Answers
) -> None:
    network.kill(*network.encoders)
    network.bring_back(*network.encoders)  # decode has no connection yet to where they are
    again = network.told("; encoded again")
    [seed] = QUESTIONS[0]
    journey = Journey(caller, "remote_encoder", seed)
    [agent] = journey.ticket.agents
    [owner] = [host for host in network.encoders if agent in network.log(host).read_text()]
    owner.cut()
    try:
        assert journey.finish() == answers[QUESTIONS[0]]
    finally:
        owner.mend()
    assert network.told("; encoded again") == again + 1


def test_encoders_that_are_all_cut_off(network: Network, caller: _embed.Caller) -> None:
    for host in network.encoders:
        host.cut()
    try:
        with pytest.raises(Unavailable, match="no encoder is left"):
            ask(caller, ENSEMBLE, 0)
    finally:
        for host in network.encoders:
            host.mend()
