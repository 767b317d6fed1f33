"""Embeddings beside the request, as a tensor of its own: in the message, and in shared memory."""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch
import tritonclient.grpc as grpcclient
from tritonclient.utils import shared_memory

from pictures import Asked, asked, encoded
from triptych import families
from triptych.contract import CHUNK, REQUEST, REQUEST_TENSORS, TEXT, Item
from triptych.errors import TriptychError
from triptych.media import image
from triptych.server import Server
from triptych_client import Client, InvalidValue, image_embeds, user
from triptych_client import image as picture

pytestmark = pytest.mark.server

WAIT_S = 60.0
Octets = npt.NDArray[np.uint8]


class Direct:
    """The ensemble as any Triton client sees it."""

    def __init__(self, server: Server) -> None:
        self.client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
        self._answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self._answers.put((result, error)))

    def ask(self, question: str, *parts: Any, tensors: Octets | None, region: str = "") -> str:
        content = [*parts, {"type": "text", "text": question}]
        body = {"messages": [{"role": "user", "content": content}]}
        data = json.dumps({**body, "temperature": 0, "max_tokens": 96}).encode()
        inputs = [grpcclient.InferInput(REQUEST, [1], "BYTES")]
        inputs[0].set_data_from_numpy(np.array([data], dtype=np.object_))
        if tensors is not None:
            inputs.append(grpcclient.InferInput(REQUEST_TENSORS, [tensors.size], "UINT8"))
            if region:
                inputs[1].set_shared_memory(region, tensors.size)
            else:
                inputs[1].set_data_from_numpy(tensors)
        self.client.async_stream_infer("chat_vllm", inputs)
        result, error = self._answers.get(timeout=WAIT_S)
        if error is not None:
            raise TriptychError.parse(error.message())
        assert result.as_numpy(CHUNK).size == 1
        text: bytes = result.as_numpy(TEXT)[0]
        return text.decode()

    def close(self) -> None:
        self.client.stop_stream()
        self.client.close()


@pytest.fixture(scope="module")
def direct(vllm_server: Server) -> Iterator[Direct]:
    direct = Direct(vllm_server)
    yield direct
    direct.close()


@pytest.fixture(scope="module")
def case() -> Asked:
    [case] = asked(["description"], each=1, seed=11)
    return case


@pytest.fixture(scope="module")
def embedded(checkpoint: Any, case: Asked) -> tuple[dict[str, Any], Octets]:
    """The part, and the bytes that it names, after some that nobody names."""
    family = families.load(checkpoint)
    tower = family.load_tower(torch.device("cpu"), torch.float32)
    pixels, plan = image.load(encoded(case.pictures[0], "PNG"), family, max_pixels=10**8)
    item = Item("image", "x", "uint8", pixels.shape, 0, plan.tokens, plan.grid_thw)
    with torch.inference_mode():
        [embeddings] = tower.encode([item], [torch.from_numpy(pixels.copy())])
    found = embeddings.numpy()
    place = {"offset": 7, "shape": list(found.shape), "dtype": "float32"}
    named = {"tensor": place, "image_grid_thw": list(plan.grid_thw or ())}
    octets = np.frombuffer(bytes(7) + found.tobytes(), np.uint8)
    return {"type": "image_embeds", "image_embeds": named}, octets


def test_the_answer_is_that_to_the_picture(vllm_server, direct, case, embedded) -> None:
    with Client(f"localhost:{vllm_server.grpc_port}") as client:
        message = user(picture(case.pictures[0]), case.question)
        seen = client.chat([message], stream=False, temperature=0, max_tokens=96).text
    part, octets = embedded
    assert direct.ask(case.question, part, tensors=octets) == seen
    assert seen == case.answer


@pytest.mark.parametrize("dtype", ["float32", "torch.float32"])
def test_by_the_client_library(vllm_server, direct, case, embedded, dtype) -> None:
    part, octets = embedded
    shape = part["image_embeds"]["tensor"]["shape"]
    embeddings = octets[7:].copy().view(np.float32).reshape(shape)
    given = torch.from_numpy(embeddings) if dtype.startswith("torch") else embeddings
    shown = image_embeds(given, grid_thw=part["image_embeds"]["image_grid_thw"])
    asked = {"stream": False, "temperature": 0, "max_tokens": 96}
    with Client(f"localhost:{vllm_server.grpc_port}") as client:
        said = client.chat([user(shown, case.question)], **asked).text
    assert said == direct.ask(case.question, part, tensors=octets)
    with Client(f"http://localhost:{vllm_server.http_port}") as client:
        with pytest.raises(InvalidValue, match="by gRPC alone"):
            client.chat([user(shown, case.question)], **asked)
        assert client.chat("Hello", stream=False, max_tokens=4).text


def test_from_shared_memory(direct, case, embedded) -> None:
    part, octets = embedded
    name = f"triptych-test-{os.getpid()}"
    region = shared_memory.create_shared_memory_region(name, f"/{name}", octets.size)
    try:
        shared_memory.set_shared_memory_region(region, [octets])
        direct.client.register_system_shared_memory(name, f"/{name}", octets.size)
        try:
            said = direct.ask(case.question, part, tensors=octets, region=name)
        finally:
            direct.client.unregister_system_shared_memory(name)
    finally:
        shared_memory.destroy_shared_memory_region(region)
    assert said == direct.ask(case.question, part, tensors=octets)


def test_a_request_may_do_without(vllm_server, direct) -> None:
    assert direct.ask("Hello", tensors=None)
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4})
    url = f"http://localhost:{vllm_server.http_port}/v2/models/chat_vllm/generate"
    assert httpx.post(url, json={REQUEST: body}, timeout=WAIT_S).json()[TEXT]


def test_mistakes_are_named(direct, case, embedded) -> None:
    part, octets = embedded
    broken = octets.copy()
    broken[7:11] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    for tensors, said in (
        (None, "which has 0"),
        (octets[:-1], f"which has {octets.size - 1}"),
        (broken, "finite"),
    ):
        with pytest.raises(TriptychError, match=said) as error:
            direct.ask(case.question, part, tensors=tensors)
        assert error.value.where == "messages[0].content[0].image_embeds.tensor"
    with pytest.raises(TriptychError, match="no part names them") as error:
        direct.ask("Hello", tensors=octets)
    assert error.value.where == REQUEST_TENSORS
