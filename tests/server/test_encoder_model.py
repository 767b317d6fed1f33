"""The model ``encoder`` alone, on a real server, spoken to as any Triton model."""

from __future__ import annotations

import contextlib
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from msgspec.structs import replace
from tritonclient.utils import InferenceServerException

from triptych import contract, families
from triptych.contract import Items, Ticket
from triptych.encode import Encoder
from triptych.errors import InvalidValue, TriptychError
from triptych.server import Server, ServerOptions
from triptych.settings import EncoderSettings
from unit.qwen import picture, request

pytestmark = pytest.mark.server

TOLERANCE = {"atol": 1e-5, "rtol": 0}
"""float32; a batch of other sizes sums in another order."""


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """No ensemble, so `Server.wait_ready`, which chats, does not serve here."""
    log = tmp_path_factory.mktemp("encoder") / "tritonserver.log"
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    options = ServerOptions(model=str(checkpoint), ensemble="encoder", log_file=str(log), **ports)
    server = Server(options)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def client(server):
    deadline = time.monotonic() + 60
    with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        while "encoder" not in server.log.loaded or not metrics_are_served(server):
            assert time.monotonic() < deadline, server.log.tail()
            time.sleep(0.1)
        yield client


@pytest.fixture(scope="module")
def family(checkpoint):
    return families.load(checkpoint)


@pytest.fixture(scope="module")
def encoder(checkpoint, family):
    return Encoder(family, EncoderSettings(model=str(checkpoint)), torch.device("cpu"))


def infer(client, items, media, outputs=("EMBEDDINGS", "TICKET")):
    text = items if isinstance(items, bytes) else contract.encode(Items(items))
    pixels = triton.InferInput("MEDIA", [1, media.numel()], "UINT8")
    pixels.set_data_from_numpy(media.numpy()[None])
    listing = triton.InferInput("ITEMS", [1, 1], "BYTES")
    listing.set_data_from_numpy(np.array([[text]], dtype=np.object_))
    wanted = [triton.InferRequestedOutput(name) for name in outputs]
    return client.infer("encoder", [pixels, listing], outputs=wanted)


def ticket(result):
    return contract.decode(result.as_numpy("TICKET")[0, 0], Ticket)


def floats(result):
    """EMBEDDINGS as float32; a copy, because the client's array is read-only."""
    return torch.from_numpy(result.as_numpy("EMBEDDINGS")[0].view(np.float32).copy())


def refused(client, items, media):
    with pytest.raises(InferenceServerException) as caught:
        infer(client, items, media)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    error = TriptychError.parse(caught.value.message())
    assert isinstance(error, InvalidValue)
    return error


def statistics(client):
    [model] = client.get_inference_statistics("encoder").model_stats
    return model.inference_count, model.execution_count


def metrics_are_served(server):
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics").close()
        return True
    return False


def metric(server, name):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as page:
        found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", page.read().decode(), re.MULTILINE)
    assert found, name
    return float(found[1])


def test_answer_is_the_encoders(client, encoder, family):
    asked = request(picture(family, 60, 60), picture(family, 200, 100, seed=1))
    result = infer(client, *asked)
    [expected] = encoder.encode([asked])
    assert ticket(result) == expected.ticket
    assert result.as_numpy("EMBEDDINGS").shape == (1, expected.embeddings.numel())
    torch.testing.assert_close(floats(result), expected.embeddings.view(torch.float32), **TOLERANCE)


def test_concurrent_requests_share_passes_and_keep_apart(client, server, encoder, family):
    """32 different pictures at once: everyone has their own, in fewer passes than pictures.

    They come while a large one is encoded, since the encoder may be faster than who asks.
    """
    large = request(picture(family, 1400, 1400, seed=99))
    asked = [request(picture(family, 40 + 10 * n, 200 - 5 * n, seed=n)) for n in range(32)]
    requests, executions = statistics(client)
    passes = metric(server, "triptych_encoder_batch_items_count")
    encoded = metric(server, "triptych_encoder_batch_items_sum")
    with ThreadPoolExecutor(33) as threads:
        first = threads.submit(infer, client, *large)
        results = list(threads.map(lambda one: infer(client, *one), asked))
        first.result()
    for one, result in zip(asked, results, strict=True):
        [expected] = encoder.encode([one])
        torch.testing.assert_close(
            floats(result), expected.embeddings.view(torch.float32), **TOLERANCE
        )
    more_requests, more_executions = statistics(client)
    assert more_requests - requests == 33
    assert more_executions - executions < 33
    deadline = time.monotonic() + 10  # the counters are told after the answers
    while metric(server, "triptych_encoder_batch_items_sum") - encoded < 33:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert metric(server, "triptych_encoder_batch_items_sum") - encoded == 33
    assert metric(server, "triptych_encoder_batch_items_count") - passes < 33


def test_no_media(client):
    result = infer(client, *request())
    assert ticket(result).items == []
    assert result.as_numpy("EMBEDDINGS").shape == (1, 0)


@pytest.mark.parametrize("outputs", [("TICKET",), ("EMBEDDINGS",)])
def test_only_what_is_asked_for(client, family, outputs):
    result = infer(client, *request(picture(family, 60, 60)), outputs)
    assert [output.name for output in result.get_response().outputs] == list(outputs)


def test_faulty_items_are_named_and_the_server_goes_on(client, family):
    items, media = request(picture(family, 60, 60))
    assert refused(client, [replace(items[0], grid_thw=None)], media).where == "items[0]"
    assert "do not lie in MEDIA" in refused(client, items, media[:-64]).what
    assert refused(client, b"{}", media).where == "ITEMS"
    assert refused(client, b"nonsense", media).where == "ITEMS"
    assert ticket(infer(client, items, media)).items[0].shape[0] == items[0].tokens


def test_a_faulty_request_does_not_hurt_its_batch(client, family):
    items, media = request(picture(family, 60, 60))
    faulty = [replace(items[0], tokens=1)]
    with ThreadPoolExecutor(16) as threads:
        answers = [threads.submit(infer, client, items, media) for _ in range(8)]
        faults = [threads.submit(refused, client, faulty, media) for _ in range(8)]
    assert all("makes 4 tokens, got 1" in fault.result().what for fault in faults)
    first, *others = [floats(answer.result()) for answer in answers]
    for other in others:
        torch.testing.assert_close(other, first, **TOLERANCE)
