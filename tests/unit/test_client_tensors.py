"""Embeddings as the client sends them, read as the server reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from triptych.chat.request import parse
from triptych.contract import ITEM_SIZE
from triptych_client import AsyncClient, Client, InvalidValue, image_embeds, text, user
from triptych_client.grpc_wire import chat_request
from triptych_client.requests import Call, build_call
from triptych_client.tensors import ALIGNMENT

FLOATS = np.arange(12, dtype=np.float32).reshape(4, 3)


def call(*parts) -> Call:
    return build_call([user(*parts)], model="m", stream=False, timeout=None, sampling={})


def received(sent: Call) -> list[bytes]:
    """The bytes that each part names."""
    found = []
    for part in parse(sent.body).media:
        place = part.tensor
        assert place is not None
        end = place.offset + place.shape[0] * place.shape[1] * ITEM_SIZE[place.dtype]
        assert end <= len(sent.tensors)
        found.append(sent.tensors[place.offset : end])
    return found


@pytest.mark.parametrize(
    ("source", "dtype", "expected"),
    [
        (FLOATS, "float32", FLOATS.tobytes()),
        (FLOATS.astype(np.float16), "float16", FLOATS.astype(np.float16).tobytes()),
        (FLOATS.astype(">f4"), "float32", FLOATS.tobytes()),
        (FLOATS[::2, 1:], "float32", FLOATS[::2, 1:].tobytes()),
        (torch.from_numpy(FLOATS), "float32", FLOATS.tobytes()),
        (torch.from_numpy(FLOATS).T, "float32", FLOATS.T.tobytes()),
        (
            torch.from_numpy(FLOATS).bfloat16().requires_grad_(),
            "bfloat16",
            (FLOATS.view(np.uint32) >> 16).astype(np.uint16).tobytes(),  # these have no more bits
        ),
    ],
)
def test_what_is_sent_is_what_is_read(source, dtype, expected):
    sent = call("look:", image_embeds(source, grid_thw=(1, 2, 4)))
    [part] = parse(sent.body).media
    assert part.tensor is not None
    assert (part.tensor.shape, part.tensor.dtype) == (tuple(source.shape), dtype)
    assert part.tensor.grid_thw == (1, 2, 4)
    assert received(sent) == [expected]


def test_several_lie_end_to_end_and_one_that_comes_twice_once():
    odd = image_embeds(np.ones((1, 3), np.float16))
    other = image_embeds(FLOATS)
    sent = call(odd, other, text("and"), odd)
    ones = np.ones(3, np.float16).tobytes()
    assert received(sent) == [ones, FLOATS.tobytes(), ones]
    assert len(sent.tensors) == ALIGNMENT + FLOATS.nbytes


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (np.zeros((2, 3)), "got float64"),
        (np.zeros((2, 3), np.int8), "got int8"),
        (np.zeros((2, 3, 1), np.float32), r"shape = \(2, 3, 1\)"),
        (np.zeros((0, 3), np.float32), r"shape = \(0, 3\)"),
        (torch.zeros(6), r"shape = \(6,\)"),
        ([[1.0, 2.0]], "got list"),
        (b"1234", "got bytes"),
    ],
)
def test_other_arrays_are_refused(source, said):
    with pytest.raises(InvalidValue, match=said):
        image_embeds(source)


def test_triton_gets_an_input_of_bytes():
    sent = call(image_embeds(FLOATS))
    request = chat_request(sent)
    assert [(i.name, i.datatype, list(i.shape)) for i in request.inputs] == [
        ("REQUEST", "BYTES", [1]),
        ("TENSORS", "UINT8", [len(sent.tensors)]),
    ]
    assert request.raw_input_contents[1] == FLOATS.tobytes()
    assert [i.name for i in chat_request(call("Hello")).inputs] == ["REQUEST"]


async def test_http_does_not_carry_them():
    message = user(image_embeds(FLOATS))
    with Client("http://localhost:1") as client:
        for _ in range(2):
            with pytest.raises(InvalidValue, match="by gRPC alone"):
                client.chat([message], stream=False)
        with pytest.raises(InvalidValue, match="by gRPC alone"), client.chat([message]):
            pass
    async with AsyncClient("http://localhost:1") as client:
        with pytest.raises(InvalidValue, match="by gRPC alone"):
            await client.chat([message], stream=False)
