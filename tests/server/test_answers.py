"""The main job: true answers about pictures, through a real tritonserver and a real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from pictures import Asked, asked, encoded
from tiny.shapes import IMAGE_TYPES, PAIR_TYPES
from triptych.server import Server
from triptych_client import Client, assistant, image, system, user

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def client(vllm_server: Server) -> Iterator[Client]:
    with Client(f"localhost:{vllm_server.grpc_port}") as client:
        yield client


def answer(client: Client, case: Asked) -> str:
    message = user(*(image(picture) for picture in case.pictures), case.question)
    return client.chat([message], stream=False, temperature=0, max_tokens=96).text


@pytest.mark.parametrize("unseen", [False, True], ids=["held-out pictures", "held-out pairs"])
def test_answers_are_true(client: Client, unseen: bool) -> None:
    cases = asked([*IMAGE_TYPES, *PAIR_TYPES], each=4, seed=20_000 + unseen, unseen=unseen)
    wrong = [
        f"{case.type}: {case.question} → {said!r}, drawn was {case.answer!r}"
        for case in cases
        if (said := answer(client, case)) != case.answer
    ]
    assert len(wrong) <= 0.08 * len(cases), "\n".join(wrong)


def test_streamed_pieces_are_the_whole_answer(client: Client) -> None:
    [case] = asked(["description"], each=1, seed=3)
    message = user(image(case.pictures[0]), case.question)
    whole = client.chat([message], stream=False, temperature=0)
    chunks = list(client.chat([message], stream=True, temperature=0))

    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert len([chunk for chunk in chunks if chunk.text]) > 1, "it came in one piece"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation_with_pictures_in_several_turns(client: Client) -> None:
    first, second = asked(["contents", "contents"], each=1, seed=5)
    said = client.chat(
        [
            system("You are a helpful assistant."),
            user(image(first.pictures[0]), first.question),
            assistant(first.answer),
            user(second.question, image(second.pictures[0])),
        ],
        stream=False,
        temperature=0,
    )
    assert said.text == second.answer


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_format_is_seen(client: Client, kind: str) -> None:
    [case] = asked(["colour"], each=1, seed=8)
    data = encoded(case.pictures[0], kind, quality=95)
    message = user(image(data), case.question)
    assert client.chat([message], stream=False, temperature=0).text == case.answer


def test_each_of_32_concurrent_answers_belongs_to_its_own_picture(
    client: Client, vllm_server: Server
) -> None:
    distinct = {case.answer: case for case in asked(["description"], each=60, seed=11)}
    cases = list(distinct.values())[:32]
    assert len(cases) == 32
    before = encoder_batches(vllm_server)
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda case: answer(client, case), cases))
    after = encoder_batches(vllm_server)

    assert together == [answer(client, case) for case in cases]
    passes, items = after[0] - before[0], after[1] - before[1]
    assert items == 32
    assert passes <= 16, f"{passes} forward passes for 32 pictures: the encoder did not batch"


def encoder_batches(server: Server) -> tuple[int, int]:
    """Forward passes of the encoder so far, and pictures in them."""
    metrics = httpx.get(f"http://localhost:{server.metrics_port}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[:1] not in ("#", ""))
    named = {name.partition("{")[0]: float(value) for name, value in values.items()}
    return (
        int(named.get("triptych_encoder_batch_items_count", 0)),
        int(named.get("triptych_encoder_batch_items_sum", 0)),
    )


def test_characters_of_several_bytes_are_never_cut(client: Client) -> None:
    # Greedy and long: whatever the model makes of it, every piece must be whole characters.
    chunks = list(
        client.chat(
            [user("Say: 你好 🙂 ünï")], stream=True, temperature=1.8, seed=4, max_tokens=200
        )
    )
    text = "".join(chunk.text for chunk in chunks)
    assert text.encode()
    for chunk in chunks[:-2]:
        assert not chunk.text.endswith("\N{REPLACEMENT CHARACTER}")


def test_generate_gives_the_whole_answer_at_once(vllm_server: Server) -> None:
    [case] = asked(["shape"], each=1, seed=13)
    message = user(image(case.pictures[0]), case.question)
    url = f"http://localhost:{vllm_server.http_port}/v2/models/chat_vllm/generate"
    body = {"messages": [message], "temperature": 0}
    reply = httpx.post(url, json={"REQUEST": json.dumps(body)}, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.json()["TEXT"] == case.answer
    chunk = json.loads(reply.json()["CHUNK"])
    assert chunk["choices"][0]["finish_reason"] == "stop"
    assert chunk["usage"]["total_tokens"] == (
        chunk["usage"]["prompt_tokens"] + chunk["usage"]["completion_tokens"]
    )


def test_http_and_grpc_say_the_same(client: Client, vllm_server: Server) -> None:
    [case] = asked(["description"], each=1, seed=17)
    message = user(image(case.pictures[0]), case.question)
    with Client(f"http://localhost:{vllm_server.http_port}") as over_http:
        streamed = "".join(c.text for c in over_http.chat([message], stream=True, temperature=0))
    assert streamed == client.chat([message], stream=False, temperature=0).text


def test_a_picture_of_a_single_colour_is_served(client: Client) -> None:
    plain = Image.new("RGB", (64, 64), "white")
    said = client.chat([user(image(plain), "What is in the picture?")], stream=False, max_tokens=32)
    assert said.text
