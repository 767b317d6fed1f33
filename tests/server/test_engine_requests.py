"""What of a request is the engine's: each engine serves it alike, or refuses it by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import save_file

from media_files import clip
from pictures import asked, encoded, noise
from reference import HuggingFaceReference
from triptych import matrix
from triptych.engines.base import Engine
from triptych.engines.sampling import UNDECLARED
from triptych.server import Server
from triptych_client import (
    Client,
    InvalidValue,
    MediaForbidden,
    MediaTooLarge,
    UnknownField,
    UnsupportedMedium,
    image,
    image_embeds,
    user,
    video,
)

pytestmark = pytest.mark.server

ENGINES = {engine.name: engine for engine in matrix.ENGINES}
GREEDY = {"temperature": 0, "max_tokens": 48}
QUESTION = "What is in the picture?"


class Served:
    """A server with one engine, and its client."""

    def __init__(self, engine: type[Engine], client: Client) -> None:
        self.engine = engine
        self._client = client

    def chat(self, *parts: Any, **options: Any) -> Any:
        """The answer to one message, greedy and whole unless ``options`` say otherwise."""
        options = {"stream": False, **GREEDY, **options}
        return self._client.chat([user(*parts)], model=f"chat_{self.engine.name}", **options)


@pytest.fixture(scope="module", params=ENGINES)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    server: Server = request.getfixturevalue(f"{request.param}_server")
    with Client(f"localhost:{server.grpc_port}") as client:
        yield Served(ENGINES[request.param], client)


@pytest.fixture(scope="module")
def trtllm(trtllm_server: Server) -> Iterator[Served]:
    with Client(f"localhost:{trtllm_server.grpc_port}") as client:
        yield Served(ENGINES["trtllm"], client)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> HuggingFaceReference:
    return HuggingFaceReference(checkpoint)


def shown() -> Image.Image:
    [case] = asked(["description"], each=1, seed=3)
    return case.pictures[0]


def test_streamed_pieces_are_the_whole_answer(served: Served) -> None:
    picture = image(encoded(shown(), "PNG"))
    whole = served.chat(picture, QUESTION)
    chunks = list(served.chat(picture, QUESTION, stream=True))

    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert len([chunk for chunk in chunks if chunk.text]) > 1, "it came in one piece"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    # What has come before may be known already, which the usage tells.
    counts = [(told.prompt_tokens, told.total_tokens) for told in (chunks[-1].usage, whole.usage)]
    assert counts[0] == counts[1]
    assert whole.usage.completion_tokens > 1


def test_a_stop_string_and_a_limit_end_the_answer(served: Served) -> None:
    whole = served.chat(QUESTION)
    stop = whole.text[len(whole.text) // 2 :][:3]
    stopped = served.chat(QUESTION, stop=stop)
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    cut = served.chat(QUESTION, max_tokens=2)
    assert cut.finish_reason == "length"
    assert cut.usage.completion_tokens == 2


def test_embeddings_that_a_caller_gives_are_as_good_as_the_picture(
    served: Served, reference: HuggingFaceReference
) -> None:
    picture = shown()
    prepared = prepare(reference, picture)
    [embeddings], [grid] = reference.embeddings(prepared), prepared.grids
    given = served.chat(image_embeds(embeddings.clone(), grid_thw=grid), QUESTION)
    assert given.text == served.chat(image(encoded(picture, "PNG")), QUESTION).text


def prepare(reference: HuggingFaceReference, picture: Image.Image) -> Any:
    parts = [{"type": "image_url"}, {"type": "text", "text": QUESTION}]
    return reference.prepare([{"role": "user", "content": parts}], [picture])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 0.9),
        ("top_k", 3),
        ("min_p", 0.1),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("repetition_penalty", 1.5),
        ("seed", 7),
        ("logprobs", True),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_a_field_is_served_or_refused_by_name(served: Served, name: str, value: Any) -> None:
    fields = {"temperature": 0.7, "max_tokens": 8, name: value}
    if served.engine.sampling.get(name, UNDECLARED).kind == "refused":
        with pytest.raises(UnknownField, match=f"the engine {served.engine.name}") as error:
            served.chat(QUESTION, **fields)
        assert error.value.where == name
    else:
        assert served.chat(QUESTION, **fields).finish_reason in {"stop", "length"}


def test_a_clip_is_served_or_refused_by_name(served: Served) -> None:
    [family] = [kind for kind in matrix.FAMILIES if kind.name == "Qwen2.5-VL"]
    if why := served.engine.refuses(family, "video"):
        with pytest.raises(UnsupportedMedium, match=why):
            served.chat(video(clip()), QUESTION)
    else:
        assert served.chat(video(clip()), QUESTION).text


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"stop": [""]}, "stop[0]"),
    ],
)
def test_wrong_values_are_named(served: Served, fields: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidValue) as error:
        served.chat(QUESTION, **fields)
    assert error.value.where == where


def test_files_for_tensorrt_llm_come_by_the_common_policy(
    trtllm: Served, shared_files: Path, tmp_path: Path, reference: HuggingFaceReference
) -> None:
    """The reference reads any path, and gives the loader of TensorRT-LLM what it finds there."""
    picture = shown()
    allowed, outside, large = (
        folder / name
        for folder, name in (
            (shared_files, "picture.png"), (tmp_path, "picture.png"), (shared_files, "large.png")
        )
    )  # fmt: skip
    allowed.write_bytes(encoded(picture, "PNG"))
    outside.write_bytes(allowed.read_bytes())
    large.write_bytes(encoded(noise(1000, 1000), "PNG"))
    said = trtllm.chat(image(allowed.as_uri()), QUESTION).text

    prepared = prepare(reference, picture)
    [embeddings] = reference.embeddings(prepared)
    file = shared_files / "picture.safetensors"
    grid = prepared.inputs["image_grid_thw"]
    save_file({"mm_embeddings": embeddings.clone(), "image_grid_thw": grid}, file)
    given = {"type": "image_embeds", "image_embeds": {"url": file.as_uri()}}
    assert trtllm.chat(given, QUESTION).text == said

    with pytest.raises(MediaForbidden) as error:
        trtllm.chat(image(outside.as_uri()), QUESTION)
    assert error.value.where == "messages[0].content[0].image_url.url"
    with pytest.raises(MediaTooLarge, match="the limit of 1048576"):
        trtllm.chat(image(large.as_uri()), QUESTION)
