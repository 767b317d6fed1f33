"""``remote_encoder`` in the place of ``encoder``: real servers on one host, for the encoder too."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from msgspec.structs import replace

from benches import _embed
from conftest import LOOPBACK_FREE, ServerFactory
from ensembles import by_nixl, by_remote_encoder
from journey import Journey, ask
from pictures import asked
from traffic import Traffic
from triptych import contract, families
from triptych.contract import Item, Items, Ticket
from triptych.errors import InvalidValue, LeaseLost, Unavailable
from triptych.server import Server, ServerOptions
from triptych_client import Client, image, user
from unit.qwen import picture, request

pytestmark = pytest.mark.server

ALONE = {"max_encoder_tokens": 1}
"""Every medium has a forward pass to itself, so that all encoders make the same bits."""
LEASE_S = 0.5
"""Of the server's own encoder."""

OWN, OWN_NIXL = "chat_echo", "chat_echo_by_nixl"
REMOTE, REMOTE_NIXL = "chat_echo_remote", "chat_echo_by_nixl_remote"
CASES: list[tuple[int, ...]] = [(1,), (2, 3, 4), (), (5, 5), (1, 6, 2, 7, 8)]
"""Pictures of each request."""


class Machine:
    """A server that runs ``encoder`` alone, which may be killed and come back."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self._options: dict[str, Any] = {
            "model": str(checkpoint),
            "ensemble": "encoder",
            "settings": {**ALONE, "handover_at_start": True},
            "log_file": str(folder / "tritonserver.log"),
            **LOOPBACK_FREE,
        }
        self.alive = False
        self.server = Server(ServerOptions(**self._options)).start()
        self._options["grpc_port"] = self.server.grpc_port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._options['grpc_port']}"

    @property
    def encoded(self) -> float:
        """How many items it has encoded."""
        return _embed.metrics(self.server)["cache_misses_total"]

    def wait(self) -> None:
        _embed.ready(self.server, "encoder")
        self.alive = True

    def restart(self) -> None:
        self.kill()
        self.server = Server(ServerOptions(**self._options)).start()
        self.wait()

    def kill(self) -> None:
        self.alive = False
        self.server.kill()
        self.server.stop()


def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def machines(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Machine]]:
    started: list[Machine] = []
    try:
        for name in "ab":
            started.append(Machine(checkpoint, tmp_path_factory.mktemp(f"encoder-{name}")))
        yield started
    finally:
        for machine in started:
            machine.kill()


@pytest.fixture(scope="module")
def server(
    machines: list[Machine],
    start_server: ServerFactory,
    echo_repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """All four ensembles: with an encoder of its own and without, by tensor and by NIXL."""
    repository = tmp_path_factory.mktemp("remote") / "model_repository"
    shutil.copytree(echo_repository, repository)
    names = [by_nixl(repository, OWN), by_remote_encoder(repository, OWN)]
    names.append(by_remote_encoder(repository, OWN_NIXL))
    assert names == [OWN_NIXL, REMOTE, REMOTE_NIXL]
    server = start_server(
        "echo",
        options={
            "model_repository": str(repository),
            "extra_args": tuple(f"--load-model={name}" for name in names),
        },
        encoder_addresses=tuple(machine.address for machine in machines),
        encoder_health_interval_s=0.2,
        encoder_model="",  # preprocess must not give the pixels to the encoder of this server
        handover_at_start=True,
        handover_timeout_s=3.0,
        handover_lease_s=LEASE_S,
        **ALONE,
    )
    yield server
    server.stop()


@pytest.fixture(scope="module")
def caller(server: Server) -> Iterator[_embed.Caller]:
    caller = _embed.Caller(server)
    yield caller
    caller.close()


@pytest.fixture
def both(machines: list[Machine], server: Server) -> list[Machine]:
    """The machines, those too that a test has killed."""
    for machine in machines:
        if not machine.alive:
            machine.restart()
    until(lambda: _embed.metrics(server, "triptych_remote_encoder_").get("ready") == len(machines))
    return machines


@pytest.mark.parametrize("ensemble", [REMOTE, REMOTE_NIXL])
def test_answers_are_those_of_an_encoder_of_ones_own(
    both: list[Machine], caller: _embed.Caller, ensemble: str
) -> None:
    expected = [ask(caller, OWN, *seeds) for seeds in CASES]
    assert [ask(caller, ensemble, *seeds) for seeds in CASES] == expected
    with ThreadPoolExecutor(16) as pool:
        many = list(pool.map(lambda seeds: ask(caller, ensemble, *seeds), CASES * 8))
    assert many == expected * 8


def test_a_picture_is_encoded_once_wherever_it_is_asked_about(
    both: list[Machine], caller: _embed.Caller
) -> None:
    before = [machine.encoded for machine in both]
    for seed in [*range(100, 112)] * 3:
        ask(caller, REMOTE, seed)
    made = [machine.encoded - then for machine, then in zip(both, before, strict=True)]
    assert sum(made) == 12
    assert min(made) > 0, "all pictures went to one server"


def beside(repository: Path, model: str, name: str, **parameters: str) -> None:
    """A copy of a model under another name, with settings in its configuration."""
    shutil.copytree(repository / model, repository / name)
    config = repository / name / "config.pbtxt"
    lines = [config.read_text().replace(f'name: "{model}"', f'name: "{name}"')]
    lines += [
        f'parameters {{ key: "{key}"  value {{ string_value: "{value}" }} }}'
        for key, value in parameters.items()
    ]
    config.write_text("\n".join(lines))


@pytest.fixture
def edited(both: list[Machine], vllm_server: Server) -> Iterator[list[str]]:
    """Both ensembles with ``remote_encoder``, loaded into a server that runs."""
    repository = vllm_server.options.repository
    addresses = ",".join(machine.address for machine in both)
    beside(repository, "remote_encoder", "remote_encoder_pool", encoder_addresses=addresses)
    # The one that is there speaks to the encoder of its server.
    beside(repository, "preprocess", "preprocess_deaf", encoder_model="")
    names = [by_remote_encoder(repository, name) for name in ("chat_vllm", "chat_vllm_nixl")]
    for name in names:
        config = repository / name / "config.pbtxt"
        text = config.read_text().replace('"preprocess"', '"preprocess_deaf"')
        config.write_text(text.replace('"remote_encoder"', '"remote_encoder_pool"'))
    made = [*names, "preprocess_deaf", "remote_encoder_pool"]
    with triton.InferenceServerClient(f"127.0.0.1:{vllm_server.grpc_port}") as client:
        for name in names:
            client.load_model(name)
        yield names
        for name in made:
            client.unload_model(name)
    for name in made:
        shutil.rmtree(repository / name)


def test_tokens_of_vllm_are_those_with_an_encoder_of_its_own(
    vllm_server: Server, edited: list[str]
) -> None:
    with Client(f"127.0.0.1:{vllm_server.grpc_port}") as client:
        for case in asked(["description", "count", "compare_contents"], each=2, seed=52):
            message = user(*map(image, case.pictures), case.question)
            told = [
                client.chat([message], model=model, stream=False, temperature=0).text
                for model in ("chat_vllm", *edited)
            ]
            assert told == [case.answer] * 3


def inputs(items: list[Item], media: Any = ()) -> dict[str, Any]:
    """ITEMS and MEDIA as a caller of ``remote_encoder`` itself would send them."""
    listing = np.array([[contract.encode(Items(items))]], np.object_)
    return {"MEDIA": np.asarray(media, np.uint8).reshape(1, -1), "ITEMS": listing}


def test_pixels_are_kept_for_one_more_use(
    both: list[Machine], checkpoint: Path, caller: _embed.Caller
) -> None:
    family = families.load(checkpoint)
    items, media = request(picture(family, 56, 84, 1), picture(family, 84, 56, 2))

    def ticket(sent: dict[str, Any]) -> Ticket:
        result = caller.infer("remote_encoder", sent, ["TICKET"])
        return contract.decode(result.as_numpy("TICKET").item(), Ticket)

    first = ticket(inputs(items, media))
    assert first.again
    assert first.again.model == "remote_encoder"
    second = ticket(inputs(first.again.items))
    assert [(item.hash, item.shape, item.where) for item in second.items] == [
        (item.hash, (item.tokens, family.embedding_width), "nixl") for item in items
    ]
    assert second.again is None
    with pytest.raises(LeaseLost, match="no longer kept") as caught:
        ticket(inputs(first.again.items))
    assert caught.value.where == "items[0]"


def test_mistakes_are_told_with_their_place(
    both: list[Machine], checkpoint: Path, caller: _embed.Caller
) -> None:
    family = families.load(checkpoint)
    items, media = request(picture(family, 56, 84, 1), picture(family, 84, 56, 2))
    for wrong, what in (
        (replace(items[1], grid_thw=(1, 2, 2)), "grid"),  # which the far encoder sees
        (replace(items[1], offset=media.numel()), "do not lie in MEDIA"),
        (replace(items[1], tokens=0), "at least one"),
    ):
        with pytest.raises(InvalidValue, match=what) as caught:
            caller.infer("remote_encoder", inputs([items[0], wrong], media))
        assert caught.value.where == "items[1]"
    broken = np.array([[b"{"]], np.object_)
    with pytest.raises(InvalidValue) as caught:
        caller.infer("remote_encoder", {**inputs(items, media), "ITEMS": broken})
    assert caught.value.where == "ITEMS"


def test_embeddings_whose_lease_ran_out_are_published_again(
    server: Server, caller: _embed.Caller
) -> None:
    journey = Journey(caller, "encoder", 402)
    made = _embed.metrics(server)["cache_misses_total"]
    time.sleep(LEASE_S + 0.2)
    assert journey.finish() == ask(caller, OWN, 402)
    assert _embed.metrics(server)["cache_misses_total"] == made
    assert "no longer holds this item's embeddings; send the request again; encoded again" in (
        server.log.tail(20)
    )


def test_requests_under_way_outlive_the_encoders_death(
    both: list[Machine], caller: _embed.Caller
) -> None:
    first, second = both
    expected = {seed: ask(caller, OWN, seed, seed + 1) for seed in range(200, 240)}
    answers = {(road, seed): expected[seed] for seed in expected for road in (REMOTE, REMOTE_NIXL)}
    with Traffic(lambda asked: ask(caller, *asked, asked[1] + 1), answers) as traffic:
        traffic.go_on(20)
        first.kill()
        traffic.go_on(20)
        first.restart()
        until(lambda: first.encoded > 0)
        second.kill()
        traffic.go_on(20)


@pytest.mark.parametrize("fate", ["killed", "restarted"])
def test_embeddings_whose_encoder_is_gone_are_made_again_by_another(
    both: list[Machine], server: Server, caller: _embed.Caller, fate: str
) -> None:
    seed = {"killed": 400, "restarted": 401}[fate]
    before = [machine.encoded for machine in both]
    journey = Journey(caller, "remote_encoder", seed)
    [owner] = [one for one, made in zip(both, before, strict=True) if one.encoded > made]
    if fate == "killed":
        owner.kill()
    else:
        owner.restart()
    assert journey.finish() == ask(caller, OWN, seed)
    assert "; encoded again" in server.log.tail(20)
    with pytest.raises(LeaseLost, match="no longer kept"):  # it was good for one use
        journey.finish()


def test_what_cannot_be_made_again_is_an_error(both: list[Machine], caller: _embed.Caller) -> None:
    journey = Journey(caller, "remote_encoder", 404)
    for machine in both:
        machine.kill()
    with pytest.raises(Unavailable, match="no encoder is left"):
        journey.finish()


def test_with_no_encoder_left_that_is_said_and_texts_are_answered(
    both: list[Machine], caller: _embed.Caller
) -> None:
    for machine in both:
        machine.kill()
    for _ in range(2):
        with pytest.raises(Unavailable, match="no encoder is left") as caught:
            ask(caller, REMOTE, 300)
        assert all(machine.address in caught.value.what for machine in both)
    assert ask(caller, REMOTE) == ask(caller, OWN)
