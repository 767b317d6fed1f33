"""The engines that run here, each in a real tritonserver: one suite says that they are alike."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

import qwen_checkpoints
from conftest import ServerFactory
from generations import whole
from pictures import asked, encoded, noise
from reference import HuggingFaceReference
from triptych.server import Server
from triptych_client import Client, Unavailable, image, user
from triptych_client.answers import Answer

pytestmark = pytest.mark.server

ENGINES = ["vllm", "sglang", "trtllm"]
PROCESSES = {"vllm": ["VLLM::EngineCore"], "sglang": ["sglang_process", "sglang::scheduler"]}
"""What an engine cannot do without, by its command line."""
TOKENS = 32
RECOVERY_S = 60.0
PICTURES = {
    "none": [],
    "one": [noise(120, 96)],
    "several": [noise(120, 96), noise(64, 200, 1), noise(57, 60, 2)],
    "the same twice": [noise(120, 96), noise(120, 96)],
}

Ask = Callable[..., Answer]


class Served:
    """A server with one engine, and its client."""

    def __init__(self, server: Server, engine: str, client: Client) -> None:
        self.server = server
        self.engine = engine
        self.model = f"chat_{engine}"
        self.client = client

    def ask(self, pictures: list[Image.Image], question: str, **fields: Any) -> Answer:
        """A greedy answer."""
        message = user(*(image(encoded(picture, "PNG")) for picture in pictures), question)
        fields = {"temperature": 0, "max_tokens": TOKENS, **fields}
        return self.client.chat([message], model=self.model, stream=False, **fields)

    def stream(self, **fields: Any) -> Any:
        """A long answer, as it comes."""
        fields = {"temperature": 0, "max_tokens": 900, **fields}
        return self.client.chat([user("Go on.")], model=self.model, stream=True, **fields)

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of the engine whose command line holds ``name``."""
        found = psutil.Process(self.server.pid).children(recursive=True)
        return [each for each in found if name in " ".join(each.cmdline()) + each.name()]


@pytest.fixture(scope="module", params=ENGINES)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """The trained Qwen2.5-VL."""
    server = request.getfixturevalue(f"{request.param}_server")
    with Client(f"localhost:{server.grpc_port}") as client:
        yield Served(server, request.param, client)


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_checkpoints.tiny_qwen2_vl(tmp_path_factory.mktemp("qwen2") / "model")


@pytest.fixture(scope="module", params=ENGINES)
def single(
    request: pytest.FixtureRequest, start_server: ServerFactory, qwen2_vl: Path
) -> Iterator[Served]:
    """A Qwen2-VL that answers at length, in an engine with one slot."""
    server = start_server(request.param, options={"model": str(qwen2_vl)}, max_num_seqs=1)
    with Client(f"localhost:{server.grpc_port}") as client:
        yield Served(server, request.param, client)
    server.stop()


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> HuggingFaceReference:
    return HuggingFaceReference(checkpoint)


@pytest.fixture(scope="module")
def qwen2_reference(qwen2_vl: Path) -> HuggingFaceReference:
    return HuggingFaceReference(qwen2_vl)


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_qwen2_5_vl_says_what_hugging_face_does(
    served: Served, reference: HuggingFaceReference, pictures: list[Image.Image]
) -> None:
    assert_same(served, reference, pictures)


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_qwen2_vl_says_what_hugging_face_does(
    single: Served, qwen2_reference: HuggingFaceReference, pictures: list[Image.Image]
) -> None:
    assert_same(single, qwen2_reference, pictures)


def assert_same(
    served: Served, reference: HuggingFaceReference, pictures: list[Image.Image]
) -> None:
    question = "What is there?"
    parts = [*[{"type": "image_url"}] * len(pictures), {"type": "text", "text": question}]
    ids, said = reference.generate([{"role": "user", "content": parts}], pictures, TOKENS)
    answer = served.ask(pictures, question)
    assert whole(answer.text) == whole(said)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(ids)


def test_each_of_32_streams_belongs_to_its_own_picture(served: Served) -> None:
    distinct = {case.answer: case for case in asked(["description"], each=60, seed=11)}
    cases = list(distinct.values())[:32]
    assert len(cases) == 32

    def streamed(case: Any) -> str:
        message = user(*(image(picture) for picture in case.pictures), case.question)
        chunks = served.client.chat([message], model=served.model, stream=True, temperature=0)
        return "".join(chunk.text for chunk in chunks)

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(streamed, cases))
    alone = [served.ask(list(case.pictures), case.question, max_tokens=96).text for case in cases]
    assert together == alone


def test_an_abort_frees_the_engines_slot(single: Served) -> None:
    entire = single.stream().collect()
    assert entire.usage.completion_tokens > 300, "it would end by itself"
    with single.stream() as running, ThreadPoolExecutor(1) as pool:
        chunks = iter(running)
        next(chunks)
        waiting = pool.submit(single.ask, [], "Hello", max_tokens=2)
        running.cancel()
        assert waiting.result(10).text
        tokens = sum(1 for _ in chunks)
    assert running.cancelled
    assert tokens < entire.usage.completion_tokens / 2


def test_an_engine_killed_in_a_stream_is_told_and_replaced(single: Served) -> None:
    if single.engine not in PROCESSES:
        pytest.skip(f"the stand-in of {single.engine} runs in the stub")
    expected = single.ask([noise(60, 60)], "And now?").text
    stubs = single.processes(f"decode_{single.engine}/")
    assert len(stubs) == 1
    for process in PROCESSES[single.engine]:
        chunks = iter(single.stream())
        next(chunks)
        [killed] = single.processes(process)
        os.kill(killed.pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="engine"):
            list(chunks)
        assert answer_again(single, [noise(60, 60)], "And now?") == expected
    assert single.processes(f"decode_{single.engine}/") == stubs, "the stage itself lives on"


def answer_again(served: Served, pictures: list[Image.Image], question: str) -> str:
    """The first answer of the engine that follows one that has died."""
    deadline = time.monotonic() + RECOVERY_S
    while True:
        try:
            return served.ask(pictures, question).text
        except Unavailable:
            assert time.monotonic() < deadline, "there is no engine again"
            time.sleep(0.2)
