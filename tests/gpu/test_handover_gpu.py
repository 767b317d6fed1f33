"""Hand-over on a GPU: device memory to device memory, and never by way of the host."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import places
from handover import KEY, MIB, Spec, owner, same
from pictures import noise
from triptych.handover import seal
from triptych.handover.reader import NixlFetcher
from triptych_client import Client, image, user

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def far(cuda):
    with owner(384 * MIB, device=str(cuda)) as started:
        yield started


@pytest.fixture(scope="module")
def fetcher(cuda):
    fetcher = NixlFetcher(384 * MIB, KEY, device=cuda)
    yield fetcher
    fetcher.close()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 8), (1369, 3584), (4096, 8192)])
def test_embeddings_stay_on_the_device_bit_for_bit(cuda, far, fetcher, dtype, shape):
    specs = [Spec(seed, shape, dtype) for seed in range(2)]
    tensors = fetcher.fetch(far.publish(*specs)).result(30)
    for tensor, spec in zip(tensors, specs, strict=True):
        assert tensor.device == cuda
        assert same(tensor.cpu(), spec)
    far.leases(0)


@pytest.mark.parametrize("nbytes", [0, 1, 64, 1000, 1369 * 3584 * 2, (96 << 20) + 8])
def test_a_gpu_seals_as_the_cpu_does(cuda, nbytes):
    """By the kernel, and by what stands in for it where it cannot be compiled."""
    assert seal._kernel() is not None
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    there = data.to(cuda)
    [expected] = seal.checksums([data], "sum64")
    assert seal.checksums([there]) == [expected]
    header = torch.empty(seal.HEADER_BYTES, dtype=torch.uint8, device=cuda)
    seal.write_header(header, 2**52)
    pieces = [there, there[: nbytes // 16 * 8]]
    assert seal.examine(header, pieces, [expected] * 2) == (2**52, [True, nbytes == 0])
    if nbytes:
        there[nbytes // 2] ^= 1
        assert seal.examine(header, [there], [expected]) == (2**52, [False])


def test_embeddings_cross_stubs_without_the_host(cuda, start_server, echo_repository, tmp_path):
    repository, notes = tmp_path / "model_repository", tmp_path / "notes"
    shutil.copytree(echo_repository, repository)
    places.watch(repository, notes)
    server = start_server("echo", options={"model_repository": str(repository)})
    with Client(f"localhost:{server.grpc_port}") as client:
        asked = user(image(noise(280, 280, seed=1)), "What is this?")
        client.chat([asked], model="chat_echo", stream=False, max_tokens=1)
    server.stop()
    seen = [json.loads(line) for line in notes.read_text().splitlines()]
    assert [what for what, _ in seen] == ["tower", "encoder", "decode", "engine"]
    assert all(place == places.GPU for _, place in seen), seen


def test_everyone_has_their_own_embeddings_while_many_wait(cuda, start_server):
    """Triton has the memory of an input back long before a request that waits is generated."""
    server = start_server("echo", max_num_seqs=1, echo_token_delay_s=0.001)
    asked = [user(image(noise(560, 560, seed=seed)), "What is this?") for seed in range(8)]

    def answer(message):
        with Client(f"localhost:{server.grpc_port}") as client:
            return client.chat([message], model="chat_echo", stream=False, max_tokens=24).text

    alone = [answer(message) for message in asked]
    assert len(set(alone)) == len(asked)
    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(answer, asked * 8)) == alone * 8
    server.stop()
