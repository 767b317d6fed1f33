"""Greedy fp32 answers through the whole chain are Hugging Face's own, token for token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pictures import asked, noise
from reference import HuggingFaceReference
from triptych.server import Server
from triptych_client import Client, assistant, image, system, user

pytestmark = pytest.mark.server

SIZES = [(8, 8), (1, 1), (28, 28), (57, 31), (300, 200), (1024, 768), (4000, 30), (30, 4000)]
"""Width and height; Qwen2.5-VL refuses sides that differ by a factor over 200."""
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def client(vllm_server: Server) -> Iterator[Client]:
    with Client(f"localhost:{vllm_server.grpc_port}") as client:
        yield client


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> HuggingFaceReference:
    return HuggingFaceReference(checkpoint)


def check(
    client: Client,
    reference: HuggingFaceReference,
    messages: Sequence[Any],
    pictures: Sequence[Image.Image] = (),
) -> None:
    """Both answer the conversation; tokens, text and counts must agree."""
    said = client.chat(messages, stream=False, temperature=0, max_tokens=MAX_TOKENS, logprobs=True)
    ids, text = reference.generate(messages, list(pictures), max_new_tokens=MAX_TOKENS)
    tokens = [reference.tokenizer.decode([token]) for token in ids]

    assert said.text == text
    assert [entry.token for entry in said.logprobs or ()] == tokens
    assert said.usage is not None
    assert said.usage.completion_tokens == len(ids)
    prompt = reference.prepare(messages, list(pictures)).input_ids
    assert said.usage.prompt_tokens == len(prompt)


def test_without_a_picture(client: Client, reference: HuggingFaceReference) -> None:
    check(client, reference, [user("Hello")])
    check(client, reference, [system("Be brief."), user("How many circles? ünï 你好 🙂")])


@pytest.mark.parametrize(("width", "height"), SIZES, ids=lambda side: str(side))
def test_one_picture_of_any_size(
    client: Client, reference: HuggingFaceReference, width: int, height: int
) -> None:
    picture = noise(width, height, seed=width)
    check(client, reference, [user(image(picture), "Describe the picture.")], [picture])


def test_pictures_of_drawn_shapes(client: Client, reference: HuggingFaceReference) -> None:
    for case in asked(["description", "count", "compare_contents"], each=3, seed=31):
        parts = [image(picture) for picture in case.pictures]
        check(client, reference, [user(*parts, case.question)], case.pictures)


def test_several_pictures_between_words(client: Client, reference: HuggingFaceReference) -> None:
    pictures = [noise(100, 60, 1), noise(333, 222, 2), noise(56, 56, 3)]
    message = user(
        "First", image(pictures[0]), "then", image(pictures[1]), image(pictures[2]), "compare."
    )
    check(client, reference, [message], pictures)


def test_pictures_in_several_turns(client: Client, reference: HuggingFaceReference) -> None:
    pictures = [noise(120, 90, 4), noise(64, 200, 5)]
    messages = [
        system("You describe pictures."),
        user(image(pictures[0]), "What is in the picture?"),
        assistant("A red circle."),
        user("And here?", image(pictures[1])),
        assistant("A blue square."),
        user("Which of them has more shapes?"),
    ]
    check(client, reference, messages, pictures)
