from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import asynccontextmanager, closing

import pytest
import torch

from triptych.contract import Item
from triptych.encode import lookup
from triptych.encode.cache import EmbeddingCache
from triptych.encode.lookup_client import LookupClient
from triptych.encode.lookup_server import LookupServer
from triptych.encode.peers import Peers

ITEM = Item("image", "h", "uint8", (56, 56, 3), 0, 4, (1, 4, 4))


@pytest.fixture
def folder(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "sockets"


class Encoder:
    """The cache of an encoder instance, and its socket."""

    def __init__(self, folder, name="encoder@encoder_0", revision="one"):
        self.cache = EmbeddingCache(torch.device("cpu"), 1 << 20, name=name)
        self.server = LookupServer(self.cache, revision, folder)

    def put(self, key, fill=0.0, dtype=torch.float32):
        self.cache.put(key, ITEM, torch.full((4, 8), fill, dtype=dtype), 0.25)
        self.server.arrived(key)

    def close(self):
        self.server.stop()


@pytest.fixture
def encoder(folder):
    with closing(Encoder(folder)) as encoder:
        yield encoder


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it comes true in another thread
            await asyncio.sleep(0.01)


@asynccontextmanager
async def client_of(folder):
    client = LookupClient(folder, "encoder")
    try:
        yield client
    finally:
        await client.close()


async def test_found_after_it_was_told_and_encoded(folder, encoder):
    async with client_of(folder) as client:
        assert await client.find("mine") is None
        await client.tell("mine", "content", "my note")
        assert await client.find("mine") is None
        encoder.put("content", 5.0)
        found = await client.find("mine")
        assert found.note == "my note"
        entry = encoder.cache.redeem(found.lease)
        assert (entry.embeddings == 5.0).all()


async def test_two_clients_share_what_one_has_told(folder, encoder):
    async with client_of(folder) as one, client_of(folder) as other:
        await one.tell("mine", "content", "")
        encoder.put("content")
        assert await one.find("mine")
        assert await other.find("mine")


async def test_waits_for_what_is_on_its_way(folder, encoder):
    async with client_of(folder) as client:
        await client.tell("mine", "content", "")
        waiting = [asyncio.create_task(client.find("mine", wait_s=10)) for _ in range(8)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        assert await client.find("another") is None, "others are answered meanwhile"
        encoder.put("content")
        found = await asyncio.wait_for(asyncio.gather(*waiting), 5)
        assert len({each.lease for each in found}) == 8


async def test_waits_no_longer_than_for_a_failure(folder, encoder):
    async with client_of(folder) as client:
        await client.tell("mine", "content", "")
        waiting = asyncio.create_task(client.find("mine", wait_s=10))
        await asyncio.sleep(0.1)
        encoder.server.arrived("content")  # it failed: it will not come
        assert await asyncio.wait_for(waiting, 5) is None


async def test_does_not_wait_for_what_nobody_has_told(folder, encoder):
    async with client_of(folder) as client:
        begun = time.monotonic()
        assert await client.find("mine", wait_s=10) is None
        assert time.monotonic() - begun < 5


async def test_waiting_ends(folder, encoder):
    async with client_of(folder) as client:
        await client.tell("mine", "content", "")
        assert await client.find("mine", wait_s=0.05) is None
        await until(lambda: not encoder.server._waiting)


async def test_an_encoder_that_is_not_there_holds_nothing(folder):
    async with client_of(folder) as client:
        assert await client.find("mine") is None
        await client.tell("mine", "content", "")


async def test_an_encoder_that_comes_back_is_found_again(folder, monkeypatch):
    monkeypatch.setattr("triptych.encode.lookup_client.SCAN_EVERY_S", 0.0)
    async with client_of(folder) as client:
        for _ in range(2):
            with closing(Encoder(folder)) as encoder:
                await client.tell("mine", "content", "")
                encoder.put("content")
                await until(lambda: encoder.cache.claimed("mine"))
                assert await client.find("mine")
            assert await client.find("mine") is None


async def test_an_encoder_that_does_not_answer_is_passed_over(folder, encoder, monkeypatch, caplog):
    monkeypatch.setattr("triptych.encode.lookup_client.ANSWER_TIMEOUT_S", 0.1)
    async with client_of(folder) as client:
        await client.tell("mine", "content", "")
        encoder.put("content")
        monkeypatch.setattr(encoder.server, "_answer", lambda *_, **__: True)
        assert await client.find("mine") is None
    assert "did not answer in time" in caplog.text


async def test_another_models_encoder_is_not_asked(folder, encoder):
    with closing(Encoder(folder, "encoder2@encoder2_0")) as other:
        async with client_of(folder) as client:
            await client.tell("mine", "content", "")
            other.put("content")
            assert await client.find("mine") is None
            assert other.cache.claimed("mine") is None


async def test_all_instances_are_told_and_any_may_hold(folder, encoder):
    with closing(Encoder(folder, "encoder@encoder_1")) as second:
        async with client_of(folder) as client:
            await client.tell("mine", "content", "")
            waiting = asyncio.create_task(client.find("mine", wait_s=10))
            await asyncio.sleep(0.1)
            second.put("content")
            assert (await asyncio.wait_for(waiting, 5)).lease.startswith("encoder@encoder_1/")
            assert (await client.find("mine")).lease.startswith("encoder@encoder_1/")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_another_instance_takes_what_this_one_leased(folder, encoder, dtype):
    encoder.put("content", 3.0, dtype)
    encoder.cache.claim("mine", "content", "")
    token = encoder.cache.lease("mine").token
    fetched = Peers(folder, "one").take(token)
    assert (fetched.key, fetched.item, fetched.seconds) == ("content", ITEM, 0.25)
    assert fetched.embeddings.dtype == dtype
    assert torch.equal(fetched.embeddings, torch.full((4, 8), 3.0, dtype=dtype))
    assert Peers(folder, "one").take(token) is None, "good once"
    assert encoder.cache.use("content").pins == 1, "given back"


def test_a_tower_of_another_revision_takes_nothing(folder, encoder):
    encoder.put("content")
    encoder.cache.claim("mine", "content", "")
    token = encoder.cache.lease("mine").token
    assert Peers(folder, "two").take(token) is None
    assert encoder.cache.redeem(token), "and costs no lease"


@pytest.mark.parametrize(
    "token",
    [
        "", "/", "x", "../../etc/passwd", "encoder@../x/1", "encoder@encoder_0",
        "encoder@encoder_9/0", "encoder@encoder_0/" + "0" * 32, "encoder@" + "x" * 200 + "/1",
    ],
)  # fmt: skip
def test_forged_leases_lead_nowhere(folder, encoder, token):
    assert Peers(folder, "one").take(token) is None
    assert encoder.cache.redeem(token) is None


@pytest.mark.parametrize("words", [b"nonsense\n", b"{}\n", b"\xff\xfe\n", b"x" * (2 << 20)])
async def test_nonsense_ends_its_own_connection_only(folder, encoder, words):
    async with client_of(folder) as client:
        await client.find("mine")
        with socket.socket(socket.AF_UNIX) as intruder:
            intruder.connect(str(folder / "encoder@encoder_0.sock"))
            intruder.settimeout(5)
            try:
                intruder.sendall(words)
                assert intruder.recv(1) == b""
            except (BrokenPipeError, ConnectionResetError):
                pass
        await client.tell("mine", "content", "")
        encoder.put("content")
        assert await client.find("mine")


def test_the_sockets_are_this_users_alone(folder, encoder):
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("which", ["parent", "folder"])
async def test_a_folder_that_others_may_enter_is_not_used(tmp_path, which):
    parent = tmp_path / "parent"
    folder = parent / "sockets"
    folder.mkdir(mode=0o700, parents=True)
    parent.chmod(0o700)
    (parent if which == "parent" else folder).chmod(0o755)
    with pytest.raises(PermissionError, match="not this user's alone"):
        Encoder(folder)
    assert Peers(folder, "one").take("encoder@encoder_0/1") is None


def test_a_link_in_the_place_of_the_folder_is_not_used(tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "sockets").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        Encoder(tmp_path / "sockets")


def test_nothing_is_left(folder):
    encoder = Encoder(folder)
    encoder.close()
    encoder.close()
    assert not folder.exists()


def test_what_killed_servers_left_is_removed(tmp_path):
    tmp_path.chmod(0o700)
    long_ago = time.time() - 3600
    for name in ("dead", "alive", "new"):
        folder = tmp_path / name
        folder.mkdir(mode=0o700)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "encoder@encoder_0.sock"))
        if name == "alive":
            listener.listen()
            alive = listener
        else:
            listener.close()
        if name != "new":
            os.utime(folder, (long_ago, long_ago))
    with closing(alive), closing(Encoder(tmp_path / "sockets")):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["alive", "new", "sockets"]


def test_instances_have_names_that_are_safe():
    assert lookup.instance("encoder", "encoder_0_0") == "encoder@encoder_0_0"
    with pytest.raises(ValueError, match="cannot be the name of a socket"):
        lookup.instance("../encoder", "encoder_0")


def test_the_place_is_the_same_in_every_stub():
    assert lookup.place() == lookup.place()
    assert lookup.place().parent.name == f"triptych-{os.geteuid()}"
