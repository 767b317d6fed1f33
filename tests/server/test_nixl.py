"""The same answers by either road, through a real tritonserver."""

from __future__ import annotations

import json
import queue
import secrets
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import tritonclient.grpc as triton
from msgspec.structs import replace

from conftest import ServerFactory
from engine_contract import words
from ensembles import by_nixl
from generations import generation
from pictures import Asked, asked, noise
from replies import until
from triptych import contract, families
from triptych.contract import Item, Items, Prompt, PromptItem, Ticket
from triptych.errors import LeaseLost, TriptychError, Unavailable
from triptych.server import Server
from triptych_client import Answer, Client, Message, image, user
from triton_inputs import array_input, bytes_input
from unit.qwen import picture
from unit.qwen import request as laid_out

pytestmark = pytest.mark.server


class Roads(NamedTuple):
    """Two ensembles over the same tower and language model."""

    tensor: tuple[Server, str]
    nixl: tuple[Server, str]


@pytest.fixture(scope="module")
def connector(start_server: ServerFactory) -> Iterator[Server]:
    """A server whose engine fetches embeddings itself, in a process that shares nothing with its
    stub: vLLM's own choice on a GPU.
    """
    options = {"extra_args": ("--load-model=chat_vllm_nixl",)}
    spawned = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    server = start_server("vllm", options=options, environ=spawned, embedding_ingest="connector")
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["echo", "vllm", "connector"])
def both(
    request: pytest.FixtureRequest,
    start_server: ServerFactory,
    echo_repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Roads]:
    """A server with an ensemble for each road, or one for each."""
    engine = request.param
    if engine == "connector":
        given, fetching = map(request.getfixturevalue, ("vllm_server", "connector"))
        yield Roads((given, "chat_vllm"), (fetching, "chat_vllm_nixl"))
        return
    repository = tmp_path_factory.mktemp("rewired") / "model_repository"
    shutil.copytree(echo_repository, repository)
    by_nixl(repository, f"chat_{engine}")
    other = "chat_vllm_nixl" if engine == "vllm" else "chat_echo_by_nixl"
    options = {"model_repository": str(repository), "extra_args": (f"--load-model={other}",)}
    server = start_server(engine, options=options, encoder_cache_mb=0)
    yield Roads((server, f"chat_{engine}"), (server, other))
    server.stop()


def messages() -> list[Message]:
    cases = asked(["description", "count", "compare_contents"], each=2, seed=51)
    sizes = [(28, 28), (300, 200), (640, 480), (1024, 768)]
    large = [Asked("", [noise(*size, seed=1)], "Describe the picture.", "") for size in sizes]
    return [
        user(*(image(picture) for picture in case.pictures), case.question)
        for case in [*cases, *large]
    ]


def test_answers_by_nixl_are_those_by_tensor(both: Roads) -> None:
    def ask(message: Message, road: tuple[Server, str]) -> str:
        server, model = road
        with Client(f"localhost:{server.grpc_port}") as client:
            answer = client.chat([message], model=model, stream=False, temperature=0, max_tokens=24)
        assert isinstance(answer, Answer)
        return answer.text

    asking = [*messages(), user("Hello")]
    expected = [ask(message, both.tensor) for message in asking]
    assert [ask(message, both.nixl) for message in asking] == expected
    log = Path(both.nixl[0].options.log_file)
    until(lambda: "embeddings come from an encoder on this host by" in log.read_text())
    assert "UCX chose TCP" not in log.read_text()

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda message: ask(message, both.nixl), asking * 4))


def test_the_engine_fetches_nothing_that_is_in_a_tensor(connector: Server) -> None:
    with Client(f"localhost:{connector.grpc_port}") as client:
        asking: dict[str, Any] = {"model": "chat_vllm", "stream": False, "max_tokens": 4}
        assert client.chat([user("Hello")], **asking)
        with pytest.raises(Exception, match="chat_vllm_nixl, or set embedding_ingest to 'inline'"):
            client.chat([messages()[0]], **asking)


def test_what_the_engine_cannot_fetch_is_encoded_again(connector: Server, checkpoint: Path) -> None:
    family = families.load(checkpoint)
    prompt, _ = generation(family, words(family), logprobs=True, top_logprobs=5)

    def tickets(height: int, width: int) -> tuple[Ticket, Ticket]:
        """One that can be redeemed, and one of a lease that has ended."""
        made = contract.decode(encode(connector, *laid_out(picture(family, height, width))), Ticket)
        [item] = made.items
        assert item.nixl is not None
        span = replace(item.nixl, generation=item.nixl.generation + 1)
        return made, replace(made, items=[replace(item, nixl=span)])

    def answer(ticket: Ticket) -> Any:
        """How likely each token was, which hangs on every value of the embeddings."""
        [item] = ticket.items
        place = PromptItem("image", 1, item.shape[0], item.hash)
        ids = words(family, pictures=1)
        asked = replace(prompt, token_ids=ids, items=[place], id=secrets.token_hex(8))
        (chunk,) = ask_decode(connector, "decode_vllm", asked, contract.encode(ticket))
        return chunk["choices"][0]["logprobs"]["content"]

    good, lost = tickets(56, 84)
    said = answer(lost)
    assert "encoded again" in connector.log.tail(100)
    assert answer(good) == said
    assert len({other["logprob"] for other in said[0]["top_logprobs"]}) == 5
    with pytest.raises(LeaseLost):
        answer(replace(tickets(84, 56)[1], again=None))


def test_its_processes_end_without_a_crash(connector: Server) -> None:
    assert connector.stop()
    log = Path(connector.options.log_file).read_text()
    assert "successfully unloaded 'decode_vllm'" in log
    assert "Segfault" not in log  # told by a handler that comes with vLLM's libraries


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
    ticket = encode(server, *laid_out(picture(family, 56, 84)))
    assert [item.where for item in contract.decode(ticket, Ticket).items] == ["nixl"]

    kill_stub(server, "encoder")
    prompt, _ = generation(family, [1, 2, 3])
    for _ in range(2):  # the first takes the time that NIXL needs to start in decode
        begun = time.monotonic()
        with pytest.raises(Unavailable, match="send the request again"):
            ask_decode(server, "decode_echo", prompt, ticket)
    assert time.monotonic() - begun < 2.0 + 1.0
    server.stop()


def encode(server: Server, items: list[Item], media: Any) -> bytes:
    """The TICKET of an encoder that is asked for no EMBEDDINGS."""
    asking = [
        array_input(contract.MEDIA, media[None].numpy(), "UINT8"),
        bytes_input(contract.ITEMS, contract.encode(Items(items)), (1, 1)),
    ]
    wanted = [triton.InferRequestedOutput(contract.TICKET)]
    with triton.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        answer = client.infer("encoder", asking, outputs=wanted)
    ticket: bytes = answer.as_numpy(contract.TICKET).item()
    return ticket


def ask_decode(server: Server, model: str, prompt: Prompt, ticket: bytes) -> list[Any]:
    """The chunks of the responses.

    Raises:
        TriptychError: The last response is one.
    """
    asking = [
        bytes_input(contract.PROMPT, contract.encode(prompt), (1,)),
        bytes_input(contract.TICKET, ticket, (1, 1)),
    ]
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    chunks = []
    with triton.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(model, asking, enable_empty_final_response=True)
        last, error = False, None
        while not last:
            result, failed = answers.get(timeout=30)
            error = error or failed
            response = failed or result.get_response()
            last = failed is not None or response.parameters["triton_final_response"].bool_param
            if result and response.raw_output_contents:
                chunks.append(json.loads(result.as_numpy(contract.CHUNK)[0]))
        client.stop_stream()
    if error:
        raise TriptychError.parse(error.message())
    return chunks


def kill_stub(server: Server, model: str) -> None:
    for child in psutil.Process(server.pid).children(recursive=True):
        if f"/{model}/" in " ".join(child.cmdline()):
            child.kill()
            while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
