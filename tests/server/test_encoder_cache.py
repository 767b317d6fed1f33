"""What is not done twice, on a real server whose ensemble ends before the language model."""

from __future__ import annotations

import base64
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from msgspec.structs import replace
from tritonclient.utils import InferenceServerException

from benches import _embed
from embed import Answer
from pictures import encoded, noise
from triptych import contract, families
from triptych.contract import Items
from triptych.encode import Encoder
from triptych.errors import InvalidValue, LeaseLost
from triptych.settings import EncoderSettings

pytestmark = pytest.mark.server

TOLERANCE = {"atol": 1e-5, "rtol": 0}
"""float32; a batch of other sizes sums in another order."""


def url(seed, width=120, height=90):
    data = encoded(noise(width, height, seed), "PNG")
    return "data:image/png;base64," + base64.b64encode(data).decode()


class Served:
    """A server of ``embed``, and who calls it."""

    def __init__(self, server):
        self.server = server
        self._caller = _embed.Caller(server)

    def ask(self, body):
        return Answer(self._caller.ask("embed", body))

    def prepare(self, body):
        """ITEMS and MEDIA as preprocess would hand them on."""
        result = self._caller.ask("preprocess", body)
        items = contract.decode(result.as_numpy("ITEMS")[0, 0], Items).items
        return items, torch.from_numpy(result.as_numpy("MEDIA")[0].copy())

    def encode(self, items, media):
        text = np.array([[contract.encode(Items(items))]], np.object_)
        inputs = {"MEDIA": media.numpy()[None], "ITEMS": text}
        return Answer(self._caller.infer("encoder", inputs))

    def counts(self):
        return _embed.metrics(self.server)


@pytest.fixture(scope="module")
def serve(checkpoint, tmp_path_factory):
    """Start a server with settings and numbers of instances of one's own."""
    running = []

    def start(instances=None, **settings):
        folder = tmp_path_factory.mktemp("embed")
        server = _embed.serve(checkpoint, folder, instances=instances, **settings)
        running.append(server)
        _embed.ready(server.start())
        return Served(server)

    yield start
    for server in running:
        assert server.stop(), "processes or shared memory were left"


@pytest.fixture(scope="module")
def served(serve):
    return serve()


@pytest.fixture(scope="module")
def deaf(serve):
    """Its preprocess does not speak to the encoder, and hands pixels on."""
    return serve(encoder_model="")


@pytest.fixture(scope="module")
def reference(checkpoint):
    """The tower in this process, without a cache."""
    settings = EncoderSettings(model=str(checkpoint), encoder_cache_mb=0)
    return Encoder(families.load(checkpoint), settings, torch.device("cpu"))


class Counted:
    """What the counters have gained since then; an encoder shows them when it has answered."""

    def __init__(self, served):
        self._served = served
        served.encode([], torch.empty(0, dtype=torch.uint8))
        self._before = served.counts()

    def __call__(self, name):
        return self._served.counts()[name] - self._before[name]


def test_a_repeated_picture_is_encoded_once_and_sent_once(served):
    counted = Counted(served)
    first = served.ask(_embed.chat(url(1)))
    assert counted("batch_items_sum") == 1
    for _ in range(6):
        again = served.ask(_embed.chat(url(1)))
        assert again.bytes == first.bytes
        assert again.ticket == first.ticket
        assert again.prompt.token_ids == first.prompt.token_ids
        assert again.prompt.items == [replace(item, cached=True) for item in first.prompt.items]
    assert counted("batch_items_sum") == 1
    assert counted("cache_hits_total") == 6
    assert counted("cache_misses_total") == 1
    assert counted("cache_saved_seconds_total") > 0
    assert served.counts()["cache_bytes"] >= len(first.bytes)


def test_both_preprocess_instances_know_what_one_has_sent(served):
    """Triton takes them in turns, and each holds nothing of its own but by the other's word."""
    served.ask(_embed.chat(url(2)))
    for _ in range(6):
        [item], media = served.prepare(_embed.chat(url(2)))
        assert item.lease
        assert media.numel() == 0


def test_pixels_do_not_cross_triton(served):
    """A picture that nobody has seen is encoded before its request gets to the encoder."""
    counted = Counted(served)
    [item], media = served.prepare(_embed.chat(url(20)))
    assert item.lease
    assert media.numel() == 0
    served.encode([item], media)
    assert counted("batch_items_sum") == 1
    assert counted("cache_hits_total") == 0


def test_known_and_new_pictures_in_one_request(served, reference):
    served.ask(_embed.chat(url(3)))
    counted = Counted(served)
    answer = served.ask(_embed.chat(url(31), url(3), url(32), url(3)))
    assert counted("batch_items_sum") == 2
    alone = [served.ask(_embed.chat(url(seed))).embeddings[0] for seed in (31, 3, 32, 3)]
    for together, expected in zip(answer.embeddings, alone, strict=True):
        torch.testing.assert_close(together, expected, **TOLERANCE)


def test_thirty_two_at_once_are_encoded_once(served):
    counted = Counted(served)
    body = _embed.chat(url(4))
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(served.ask, [body] * 32))
    assert len({answer.bytes for answer in answers}) == 1
    assert counted("batch_items_sum") == 1
    assert counted("cache_hits_total") == 31


def test_a_forged_hash_neither_borrows_nor_plants(served, deaf, reference):
    """Whoever reaches the encoder may write any hash: pixels decide."""
    honest, evil = _embed.chat(url(5)), _embed.chat(url(6))
    [item], pixels = deaf.prepare(honest)
    [other], evil_pixels = deaf.prepare(evil)
    forged = replace(other, hash=item.hash)
    planted = served.encode([forged], evil_pixels)
    [expected] = reference.encode([([forged], evil_pixels)])
    torch.testing.assert_close(
        planted.embeddings[0].flatten(), expected.embeddings.view(torch.float32), **TOLERANCE
    )
    answer = served.ask(honest)
    [expected] = reference.encode([([item], pixels)])
    torch.testing.assert_close(
        answer.embeddings[0].flatten(), expected.embeddings.view(torch.float32), **TOLERANCE
    )


@pytest.mark.parametrize("lease", ["made up", "encoder@encoder_0_0/" + "0" * 32, "../x/y"])
def test_a_forged_lease_is_refused(served, lease):
    served.ask(_embed.chat(url(7)))
    [item], _ = served.prepare(_embed.chat(url(7)))
    with pytest.raises(LeaseLost, match="send the request again") as caught:
        served.encode([replace(item, lease=lease)], torch.empty(0, dtype=torch.uint8))
    assert caught.value.where == "items[0]"


def test_a_lease_is_good_for_its_own_item(served):
    served.ask(_embed.chat(url(8)))
    nothing = torch.empty(0, dtype=torch.uint8)
    [item], _ = served.prepare(_embed.chat(url(8)))
    with pytest.raises(InvalidValue, match="the lease is of"):
        served.encode([replace(item, tokens=1, grid_thw=(1, 2, 2), shape=(28, 28, 3))], nothing)


def test_everyone_has_their_own_while_the_cache_is_full(serve, reference):
    """24 pictures of 2 MiB of embeddings in a cache of 1 MiB, asked for 96 times at once."""
    small = serve(encoder_cache_mb=1)
    sizes = {seed: (300 + 6 * seed, 330 - 5 * seed) for seed in range(24)}
    bodies = {seed: _embed.chat(url(seed, *size)) for seed, size in sizes.items()}
    plain = serve(encoder_cache_mb=0)
    expected = {seed: plain.ask(body).embeddings[0] for seed, body in bodies.items()}
    assert sum(one.nbytes for one in expected.values()) > 2 << 20
    order = [seed for seed in bodies for _ in range(4)]
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda seed: small.ask(bodies[seed]), order))
    for seed, answer in zip(order, answers, strict=True):
        torch.testing.assert_close(answer.embeddings[0], expected[seed], **TOLERANCE)
    counts = small.counts()
    assert counts["cache_bytes"] <= 1 << 20
    assert counts["cache_evictions_total"] > 0
    assert counts["cache_misses_total"] >= 24
    assert counts["cache_lost_leases_total"] == 0


def test_without_a_cache_pixels_are_sent_and_encoded_each_time(serve):
    plain = serve(encoder_cache_mb=0)
    first = plain.ask(_embed.chat(url(9)))
    assert plain.ask(_embed.chat(url(9))).bytes == first.bytes
    [item], media = plain.prepare(_embed.chat(url(9)))
    assert not item.lease
    assert media.numel() == item.nbytes > 0
    counts = plain.counts()
    assert (counts["batch_items_sum"], counts["cache_hits_total"]) == (2, 0)
    assert counts["cache_bytes"] == 0


def test_without_asking_pixels_are_sent_and_not_encoded_twice(deaf):
    counted = Counted(deaf)
    first = deaf.ask(_embed.chat(url(10)))
    assert deaf.ask(_embed.chat(url(10))).bytes == first.bytes
    [item], media = deaf.prepare(_embed.chat(url(10)))
    assert not item.lease
    assert media.numel() == item.nbytes > 0
    assert counted("batch_items_sum") == 1


def test_two_encoders_serve_each_others_leases(serve):
    """Whichever instance Triton chooses, what another holds is not encoded again."""
    pair = serve({"encoders": 2})
    bodies = [_embed.chat(url(seed)) for seed in range(4)]
    firsts = [pair.ask(body) for body in bodies]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(pair.ask, bodies * 6))  # so that both have answered
        counted = Counted(pair)
        answers = list(threads.map(pair.ask, bodies * 12))
    for answer, first in zip(answers, firsts * 12, strict=True):
        assert answer.bytes == first.bytes
    assert counted("batch_items_sum") == 0
    assert counted("cache_lost_leases_total") == 0


def wait_for(served, line):
    """Until the server's log holds ``line``."""
    deadline = time.monotonic() + 60
    while line not in served.server.log.tail(1000):
        assert time.monotonic() < deadline, served.server.log.tail()
        time.sleep(0.1)


def test_an_encoder_that_was_reloaded_answers_and_learns_anew(serve):
    """A lease of the encoder before it is lost: preprocess loads its medium again, once."""
    once = serve()
    body = _embed.chat(url(11))
    first = once.ask(body)
    [item], nothing = once.prepare(body)
    assert item.lease
    with triton.InferenceServerClient(f"127.0.0.1:{once.server.grpc_port}") as client:
        client.unload_model("embed")
        client.unload_model("encoder")
        wait_for(once, "successfully unloaded 'encoder'")
        client.load_model("embed")
    counted = Counted(once)
    assert once.encode([item], nothing).bytes == first.bytes
    assert counted("batch_items_sum") == 1
    assert counted("cache_lost_leases_total") == 0
    with pytest.raises(LeaseLost):
        once.encode([item], nothing)
    assert once.ask(body).bytes == first.bytes


LATE_CONFIG = """
name: "late"
backend: "python"
max_batch_size: 0
input [ { name: "ITEMS" data_type: TYPE_STRING dims: [ 1, 1 ] } ]
output [ { name: "LATE" data_type: TYPE_STRING dims: [ 1, 1 ] } ]
"""
LATE_MODEL = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.6)
        items = [pb_utils.get_input_tensor_by_name(one, "ITEMS").as_numpy() for one in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("LATE", one)]) for one in items]
"""


def test_a_lease_that_runs_out_on_its_way_fails_nobody(checkpoint, tmp_path):
    """The ensemble with a step between preprocess and encoder that takes longer than leases last.

    Callers see the time that it takes, and nothing else.
    """
    server = _embed.serve(checkpoint, tmp_path, encoder_lease_s=0.4)
    repository = Path(server.options.model_repository)
    (repository / "late" / "1").mkdir(parents=True)
    (repository / "late" / "config.pbtxt").write_text(LATE_CONFIG)
    (repository / "late" / "1" / "model.py").write_text(LATE_MODEL)
    ensemble = repository / "embed" / "config.pbtxt"
    step = (
        '{ model_name: "late" model_version: -1 input_map { key: "ITEMS" value: "ITEMS" } '
        'output_map { key: "LATE" value: "LATE" } },\n    { model_name: "encoder"'
    )
    text = ensemble.read_text()
    wired = re.sub(r'\{\s+model_name: "encoder"', step, text)
    wired = re.sub(
        r'(key: "ITEMS" +value: )"ITEMS"( \}\s+output_map \{ key: "TICKET")', r'\1"LATE"\2', wired
    )
    assert wired.count('"LATE"') == 3
    ensemble.write_text(wired)
    try:
        _embed.ready(server.start())
        served = Served(server)
        first = served.ask(_embed.chat(url(50), url(51)))
        assert served.ask(_embed.chat(url(50), url(51))).bytes == first.bytes
        counts = served.counts()
        assert (counts["batch_items_sum"], counts["cache_lost_leases_total"]) == (2, 0)
        assert server.log.tail(1000).count("a lease was lost, and its medium was loaded again") == 4
    finally:
        assert server.stop(), "processes or shared memory were left"


def test_callers_see_nothing_of_an_encoder_that_is_loaded_anew(serve):
    """Requests go on while it is; none fails, and none gets another answer."""
    busy = serve()
    bodies = [_embed.chat(url(seed)) for seed in range(40, 44)]
    expected = [busy.ask(body).bytes for body in bodies]
    over = threading.Event()

    def ask_on() -> int:
        asked = 0
        while not over.is_set():
            assert [busy.ask(body).bytes for body in bodies] == expected
            asked += len(bodies)
        return asked

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask_on) for _ in range(4)]
        try:
            # Triton loads nothing anew that has not changed.
            Path(busy.server.options.model_repository, "encoder", "1", "model.py").touch()
            with triton.InferenceServerClient(f"127.0.0.1:{busy.server.grpc_port}") as client:
                client.load_model("encoder")
            wait_for(busy, "successfully unloaded 'encoder'")
        finally:
            over.set()
        assert all(one.result() for one in asking)


def test_refused_is_refused_by_triton_too(served):
    """The error's status, which gRPC shows of a model that is not decoupled."""
    served.ask(_embed.chat(url(12)))
    [item], _ = served.prepare(_embed.chat(url(12)))
    with triton.InferenceServerClient(f"127.0.0.1:{served.server.grpc_port}") as client:
        pixels = triton.InferInput("MEDIA", [1, 0], "UINT8")
        pixels.set_data_from_numpy(np.empty((1, 0), np.uint8))
        listing = triton.InferInput("ITEMS", [1, 1], "BYTES")
        text = contract.encode(Items([replace(item, lease="none")]))
        listing.set_data_from_numpy(np.array([[text]], np.object_))
        with pytest.raises(InferenceServerException) as caught:
            client.infer("encoder", [pixels, listing])
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
