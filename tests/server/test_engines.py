"""Every engine behind the same ensemble: the same requests, answers, errors and limits.

TensorRT-LLM cannot be installed here; its place is taken by the stand-in of tests/fakes, which
really computes, on the path of its stub alone.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from safetensors.torch import save_file

from babbler import make_babbler
from conftest import ServerFactory
from media_files import clip
from pictures import encoded, noise
from reference import HuggingFaceReference
from triptych import matrix
from triptych.engines.base import Engine
from triptych.server import Server
from triptych_client import (
    Client,
    InvalidValue,
    MediaForbidden,
    MediaTooLarge,
    Unavailable,
    UnknownField,
    UnsupportedMedium,
    image,
    image_embeds,
    user,
    video,
)

pytestmark = pytest.mark.server

STAND_IN = Path(__file__).parents[1] / "fakes" / "tensorrt_llm"
SLOTS = 2
ENGINES = {engine.name: engine for engine in matrix.ENGINES}
GREEDY = {"temperature": 0, "max_tokens": 24}
QUESTION = "What is in the picture?"
PICTURES = [noise(96, 64, 1), noise(56, 120, 2), Image.new("RGB", (84, 84), "red")]


@dataclass
class Served:
    """A server with one engine."""

    engine: type[Engine]
    server: Server
    client: Client
    files: Path
    """Whose files may be named."""

    def chat(self, *parts: Any, **options: Any) -> Any:
        options = {"stream": False, **GREEDY, **options}
        return self.client.chat([user(*parts)], model=f"chat_{self.engine.name}", **options)


@pytest.fixture(scope="module")
def babbler(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_babbler(checkpoint, tmp_path_factory.mktemp("babbler") / "model")


@pytest.fixture(scope="module")
def reference(babbler: Path) -> HuggingFaceReference:
    return HuggingFaceReference(babbler)


@pytest.fixture(scope="module", params=ENGINES)
def served(
    request: pytest.FixtureRequest,
    start_server: ServerFactory,
    echo_repository: Path,
    babbler: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    files = tmp_path_factory.mktemp("files")
    if request.param == "trtllm":
        # Triton puts a model's own folder on its stub's path.
        place = echo_repository / "decode_trtllm" / "1" / STAND_IN.name
        shutil.copytree(STAND_IN, place, dirs_exist_ok=True)
    server = start_server(
        request.param,
        options={"model": str(babbler)},
        max_num_seqs=SLOTS,
        engine_dtype="float32",
        allowed_local_media_path=str(files),
        max_file_size_mb=1,
    )
    with Client(f"localhost:{server.grpc_port}") as client:
        yield Served(ENGINES[request.param], server, client, files)
    server.stop()


@pytest.mark.parametrize("count", range(len(PICTURES) + 1))
def test_greedy_text_is_that_of_hugging_face(
    served: Served, reference: HuggingFaceReference, count: int
) -> None:
    pictures = PICTURES[:count]
    parts = [*({"type": "image_url"} for _ in pictures), {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}]
    ids, said = reference.generate(messages, pictures, 24)
    answer = served.chat(*(image(encoded(picture, "PNG")) for picture in pictures), QUESTION)

    assert answer.text == said
    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.prompt_tokens == len(reference.prepare(messages, pictures).input_ids)


def test_streamed_pieces_are_the_whole_answer(served: Served) -> None:
    shown = image(encoded(PICTURES[0], "PNG"))
    whole = served.chat(shown, QUESTION)
    chunks = list(served.chat(shown, QUESTION, stream=True))

    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert len([chunk for chunk in chunks if chunk.text]) > 1, "it came in one piece"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize("road", ["file", "tensor"])
def test_embeddings_that_a_caller_gives_are_as_good_as_the_picture(
    served: Served, reference: HuggingFaceReference, road: str
) -> None:
    parts = [{"type": "image_url"}, {"type": "text", "text": QUESTION}]
    prepared = reference.prepare([{"role": "user", "content": parts}], PICTURES[:1])
    [embeddings], [grid] = reference.embeddings(prepared), prepared.grids
    embeddings = embeddings.clone()
    if road == "file":
        file = served.files / "picture.safetensors"
        tensors = {"mm_embeddings": embeddings, "image_grid_thw": prepared.inputs["image_grid_thw"]}
        save_file(tensors, file)
        shown = {"type": "image_embeds", "image_embeds": {"url": file.as_uri()}}
    else:
        shown = image_embeds(embeddings, grid_thw=grid)
    assert (
        served.chat(shown, QUESTION).text
        == served.chat(image(encoded(PICTURES[0], "PNG")), QUESTION).text
    )


def test_32_streams_have_their_own_pictures(served: Served) -> None:
    shown = [image(encoded(noise(56, 56, seed), "PNG")) for seed in range(32)]

    def said(part: Any) -> str:
        chunks = served.chat(part, QUESTION, stream=True)
        return "".join(chunk.text for chunk in chunks)

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(said, shown))
    assert together == [served.chat(part, QUESTION).text for part in shown]
    assert len(set(together)) > 16, "the pictures make no difference"


def test_an_abort_frees_the_slot(served: Served) -> None:
    """While the other slot's answer is still under way, one that waited comes to its end."""
    first, other = (
        served.chat(QUESTION, stream=True, max_tokens=tokens, timeout=120)
        for tokens in (2000, 3000)
    )
    next(iter(first))
    chunks = iter(other)
    next(chunks)
    ended = threading.Event()

    def drain() -> None:
        for _ in chunks:
            pass
        ended.set()

    with ThreadPoolExecutor(2) as pool:
        drained = pool.submit(drain)
        waits = pool.submit(lambda: (served.chat("Hello", max_tokens=2), ended.is_set())[1])
        first.cancel()
        assert not waits.result(), "it had to wait for the other answer"
        other.cancel()
        drained.result()


@pytest.mark.parametrize("fields", [{"top_k": 3, "top_p": 0.9, "temperature": 0.7}, {"stop": "e"}])
def test_sampling_is_served(served: Served, fields: dict[str, Any]) -> None:
    assert served.chat(QUESTION, **fields).finish_reason in {"stop", "length"}


def test_fields_that_the_engine_does_not_take_are_refused_by_name(served: Served) -> None:
    asked = {"min_p": 0.1, "repetition_penalty": 1.5, "seed": 7, "logprobs": True}
    for name, value in asked.items():
        if served.engine.sampling[name].kind == "refused":
            with pytest.raises(UnknownField, match=served.engine.name) as error:
                served.chat(QUESTION, **{name: value})
            assert error.value.where == name
        else:
            assert served.chat(QUESTION, **{name: value}).text


def test_media_come_by_the_common_policy(served: Served, tmp_path: Path) -> None:
    allowed = served.files / "picture.png"
    allowed.write_bytes(encoded(PICTURES[0], "PNG"))
    outside = tmp_path / "picture.png"
    outside.write_bytes(allowed.read_bytes())
    large = served.files / "large.png"
    large.write_bytes(encoded(noise(1000, 1000), "PNG"))

    assert served.chat(image(allowed.as_uri()), QUESTION).text
    with pytest.raises(MediaForbidden) as error:
        served.chat(image(outside.as_uri()), QUESTION)
    assert error.value.where == "messages[0].content[0].image_url.url"
    with pytest.raises(MediaTooLarge, match="the limit of 1048576"):
        served.chat(image(large.as_uri()), QUESTION)
    with pytest.raises(InvalidValue, match="must be an integer"):
        served.chat(QUESTION, max_tokens="many")


def test_a_medium_that_the_engine_does_not_take_is_refused_by_name(served: Served) -> None:
    family = next(kind for kind in matrix.FAMILIES if kind.name == "Qwen2.5-VL")
    if why := served.engine.refuses(family, "video"):
        with pytest.raises(UnsupportedMedium, match=why):
            served.chat(video(clip()), QUESTION)
    else:
        assert served.chat(video(clip()), QUESTION).text


def test_an_engine_that_is_killed_ends_its_answers_and_comes_again(served: Served) -> None:
    processes = engine_processes(served)
    if not processes:
        pytest.skip(f"{served.engine.name} has no process of its own here")
    stream = served.chat(QUESTION, stream=True, max_tokens=3000, timeout=120)
    chunks = iter(stream)
    next(chunks)
    for process in processes:
        process.kill()
    with pytest.raises(Unavailable) as error:
        list(chunks)
    assert "Traceback" not in str(error.value)
    deadline = time.monotonic() + 120
    while True:
        try:
            assert served.chat("Hello").text
            return
        except Unavailable:
            assert time.monotonic() < deadline, "it does not come again"
            time.sleep(0.2)


def engine_processes(served: Served) -> list[psutil.Process]:
    """What the stub of the decode stage has started."""
    return [
        child
        for stub in psutil.Process(served.server.pid).children(recursive=True)
        if any(f"decode_{served.engine.name}" in word for word in stub.cmdline())
        for child in stub.children()
        if not any("resource_tracker" in word for word in child.cmdline())
    ]
