"""The same answers by either road, through a real tritonserver."""

from __future__ import annotations

import queue
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import tritonclient.grpc as triton

from conftest import ServerFactory
from ensembles import by_nixl
from generations import generation
from pictures import Asked, asked, noise
from triptych import contract, families
from triptych.contract import Items, Ticket
from triptych.errors import TriptychError, Unavailable
from triptych.server import Server
from triptych_client import Answer, Client, Message, image, user
from triton_inputs import array_input, bytes_input
from unit.qwen import picture
from unit.qwen import request as laid_out

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=["echo", "vllm"])
def both(
    request: pytest.FixtureRequest,
    start_server: ServerFactory,
    echo_repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Server, str, str]]:
    """A server with an ensemble for each road, over the same encoder and engine."""
    engine = request.param
    repository = tmp_path_factory.mktemp("rewired") / "model_repository"
    shutil.copytree(echo_repository, repository)
    by_nixl(repository, f"chat_{engine}")
    other = "chat_vllm_nixl" if engine == "vllm" else "chat_echo_by_nixl"
    options = {"model_repository": str(repository), "extra_args": (f"--load-model={other}",)}
    server = start_server(engine, options=options, encoder_cache_mb=0)
    yield server, f"chat_{engine}", other
    server.stop()


def messages() -> list[Message]:
    cases = asked(["description", "count", "compare_contents"], each=2, seed=51)
    sizes = [(28, 28), (300, 200), (640, 480), (1024, 768)]
    large = [Asked("", [noise(*size, seed=1)], "Describe the picture.", "") for size in sizes]
    return [
        user(*(image(picture) for picture in case.pictures), case.question)
        for case in [*cases, *large]
    ]


def test_answers_by_nixl_are_those_by_tensor(both: tuple[Server, str, str]) -> None:
    server, tensor, nixl = both
    with Client(f"localhost:{server.grpc_port}") as client:

        def ask(message: Message, model: str) -> Answer:
            return client.chat([message], model=model, stream=False, temperature=0, max_tokens=24)

        asking = [*messages(), user("Hello")]
        expected = [ask(message, tensor) for message in asking]
        assert [ask(message, nixl).text for message in asking] == [one.text for one in expected]
        assert "embeddings come from an encoder on this host by" in server.log.tail(400)
        assert "UCX chose TCP" not in server.log.tail(400)

        with ThreadPoolExecutor(16) as pool:
            many = list(pool.map(lambda message: ask(message, nixl), asking * 4))
        assert all(one.text for one in many)


def test_the_shipped_ensemble_is_the_edited_one(tmp_path: Path, repository_root: Path) -> None:
    repository = tmp_path / "model_repository"
    shutil.copytree(repository_root / "model_repository", repository)
    by_nixl(repository, "chat_vllm")

    def statements(name: str) -> list[str]:
        text = (repository / name / "config.pbtxt").read_text().replace(name, "")
        return [" ".join(line.split()) for line in text.splitlines() if line[:1] != "#"]

    assert statements("chat_vllm_by_nixl") == statements("chat_vllm_nixl")


def test_a_dead_encoder_is_an_error_in_time(start_server: ServerFactory, checkpoint: Path) -> None:
    server = start_server("echo", options={"exit_timeout_s": 3}, handover_timeout_s=2.0)
    family = families.load(checkpoint)
    items, media = laid_out(picture(family, 56, 84))
    asking = [
        array_input(contract.MEDIA, media[None].numpy(), "UINT8"),
        bytes_input(contract.ITEMS, contract.encode(Items(items)), (1, 1)),
    ]
    wanted = [triton.InferRequestedOutput(contract.TICKET)]
    with triton.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        ticket = client.infer("encoder", asking, outputs=wanted).as_numpy(contract.TICKET).item()
    assert [item.where for item in contract.decode(ticket, Ticket).items] == ["nixl"]

    kill_stub(server, "encoder")
    prompt, _ = generation(family, [1, 2, 3])
    orphan = [
        bytes_input(contract.PROMPT, contract.encode(prompt), (1,)),
        bytes_input(contract.TICKET, ticket, (1, 1)),
    ]
    for _ in range(2):  # the first takes the time that NIXL needs to start in decode
        begun = time.monotonic()
        error = TriptychError.parse(ask_decode(server, orphan))
        assert isinstance(error, Unavailable)
        assert "send the request again" in error.what
    assert time.monotonic() - begun < 2.0 + 1.0
    server.stop()


def ask_decode(server: Server, inputs: list[Any]) -> str:
    """The error that the request ends with."""
    errors: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with triton.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        client.start_stream(lambda result, error: errors.put(error))
        client.async_stream_infer("decode_echo", inputs)
        error = errors.get(timeout=10)
        client.stop_stream()
    return str(error.message())


def kill_stub(server: Server, model: str) -> None:
    for child in psutil.Process(server.pid).children(recursive=True):
        if f"/{model}/" in " ".join(child.cmdline()):
            child.kill()
            while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
