from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from contextlib import ExitStack, asynccontextmanager, closing

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from triptych import families
from triptych.contract import Item
from triptych.encode import Encoder, lookup
from triptych.encode.ahead import EncodeAhead, Pending, choose
from triptych.encode.lookup_client import LookupClient
from triptych.encode.lookup_server import LookupServer
from triptych.encode.peers import Peers
from triptych.settings import EncoderSettings
from unit.qwen import WIDTH, write_checkpoint

ITEM = Item("image", "h", "uint8", (56, 56, 3), 0, 4, (1, 4, 4))


@pytest.fixture
def folder(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "sockets"


class Tower:
    """Embeddings that are the first pixel; waits and fails when told to."""

    def __init__(self):
        self.go = threading.Event()
        self.go.set()
        self.batches = []

    def encode(self, items, media):
        assert self.go.wait(10)
        self.batches.append([item.hash for item in items])
        if any(item.hash == "bad" for item in items):
            raise RuntimeError("this one cannot be done")
        return [torch.full((4, WIDTH), float(array.flatten()[0])) for array in media]


class Instance:
    """An encoder instance with its side road, and a tower that does what the test says."""

    def __init__(self, family, folder, name="encoder@encoder_0", **settings):
        settings = EncoderSettings(model=str(family.checkpoint.path), **settings)
        self.encoder = Encoder(family, settings, torch.device("cpu"), name=name)
        self.tower = self.encoder._tower = Tower()
        self.cache = self.encoder.cache
        self.ahead = EncodeAhead(self.encoder, settings.max_encoder_tokens)
        self.server = LookupServer(self.encoder, self.ahead, folder)

    def close(self):
        self.tower.go.set()
        self.ahead.stop()
        self.server.stop()


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return families.load(write_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint"))


@pytest.fixture
def start(family, folder):
    with ExitStack() as stack:

        def start(name="encoder@encoder_0", **settings):
            return stack.enter_context(closing(Instance(family, folder, name, **settings)))

        yield start


@pytest.fixture
def encoder(start):
    return start()


def pixels(fill):
    return np.full((56, 56, 3), fill, np.uint8)


async def bring(client, name, fill, **changes):
    """Bring a picture whose pixels are all ``fill``; its content and claim are ``name``."""
    item = replace(ITEM, hash=name, **changes)
    return await client.bring(
        name, f"content of {name}", f"note of {name}", item, pixels(fill).data
    )


def redeemed(encoder, lease):
    entry = encoder.cache.redeem(lease)
    encoder.cache.release(entry)
    return entry.embeddings


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


async def test_what_is_brought_is_leased_and_found_from_then_on(folder, encoder):
    async with client_of(folder) as client, client_of(folder) as other:
        assert await client.find("mine") is None
        brought = await bring(client, "mine", 5)
        assert torch.equal(redeemed(encoder, brought.lease), torch.full((4, WIDTH), 5.0))
        for each in (client, other):
            found = await each.find("mine")
            assert found.note == "note of mine"
            assert torch.equal(redeemed(encoder, found.lease), torch.full((4, WIDTH), 5.0))
    assert encoder.tower.batches == [["mine"]]
    counters = encoder.cache.counters
    assert (counters.misses, counters.hits) == (1, 2)


async def test_one_content_brought_by_many_is_encoded_once(folder, encoder):
    async with client_of(folder) as client, client_of(folder) as other:
        encoder.tower.go.clear()
        bringing = [asyncio.create_task(bring(one, "mine", 5)) for one in [client, other] * 8]
        await until(lambda: "content of mine" in encoder.ahead._pending)
        assert await asyncio.wait_for(client.find("another"), 5) is None, "answered meanwhile"
        encoder.tower.go.set()
        leases = {found.lease for found in await asyncio.gather(*bringing)}
    assert len(leases) == 16
    assert encoder.tower.batches == [["mine"]]


async def test_what_nobody_waits_for_is_not_encoded(folder, encoder):
    """A request that is cancelled, one of two that want the same, and one that hangs up."""
    async with client_of(folder) as client, client_of(folder) as gone:
        encoder.tower.go.clear()
        first = asyncio.create_task(bring(client, "first", 1))
        await until(lambda: encoder.encoder._one_pass.locked())
        left = asyncio.create_task(bring(client, "left", 2))
        both = [asyncio.create_task(bring(client, "both", 3)) for _ in range(2)]
        lost = asyncio.create_task(bring(gone, "lost", 4))
        await until(lambda: len(encoder.ahead._pending) == 4)
        left.cancel()
        both[0].cancel()
        await gone.close()
        assert await lost is None
        await until(lambda: len(encoder.ahead._pending) == 2)
        encoder.tower.go.set()
        assert await first
        assert await both[1]
        assert await bring(client, "left", 2), "it may come again"
    assert encoder.tower.batches == [["first"], ["both"], ["left"]]


async def test_who_waits_too_long_leaves(folder, encoder, monkeypatch):
    monkeypatch.setattr("triptych.encode.lookup_client.ENCODE_TIMEOUT_S", 0.1)
    async with client_of(folder) as client:
        encoder.tower.go.clear()
        first = asyncio.create_task(bring(client, "first", 1))
        await until(lambda: encoder.encoder._one_pass.locked())
        assert await bring(client, "second", 2) is None
        await until(lambda: "content of second" not in encoder.ahead._pending)
        assert await first is None
        encoder.tower.go.set()
    await until(lambda: not encoder.ahead._pending)
    assert encoder.tower.batches == [["first"]]


class Steps:
    """A tower that waits before every pass for the test to let it."""

    def __init__(self):
        self.passes = []
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def encode(self, items, media):
        pairs = zip(items, media, strict=True)
        self.passes.append([(item.hash, array.shape[0]) for item, array in pairs])
        self.begun.release()
        assert self.go.acquire(timeout=10)
        return [torch.ones(item.tokens, WIDTH) for item in items]


@pytest.mark.parametrize("stays", [True, False])
async def test_small_media_pass_between_the_parts_of_a_long_clip(folder, start, stays):
    encoder = start(max_encoder_tokens=8)
    steps = encoder.encoder._tower = Steps()
    clip = replace(ITEM, modality="video", hash="clip", shape=(8, 56, 56, 3), tokens=16)
    clip = replace(clip, grid_thw=(4, 4, 4))
    async with client_of(folder) as client:
        frames = np.zeros(clip.shape, np.uint8)
        long = asyncio.create_task(client.bring("clip", "clip", "", clip, frames.data))
        await asyncio.to_thread(steps.begun.acquire)
        small = [asyncio.create_task(bring(client, name, 1)) for name in "abc"]
        await until(lambda: len(encoder.ahead._pending) == 4)
        if not stays:
            long.cancel()
            await until(lambda: not encoder.ahead._pending["clip"].done)
        for _ in range(5):
            steps.go.release()
        assert all(await asyncio.gather(*small))
        assert steps.passes[0] == [("clip", 4)]
        if stays:
            lease = (await long).lease
            assert torch.equal(redeemed(encoder, lease), torch.ones(16, WIDTH))
            assert steps.passes[1:] == [[("a", 56), ("b", 56)], [("clip", 4)], [("c", 56)]]
        else:
            assert [("clip", 4)] not in steps.passes[1:]


async def test_small_media_go_first_in_batches_of_the_budget(folder, start, monkeypatch):
    encoder = start(max_encoder_tokens=8)
    async with client_of(folder) as client:
        encoder.tower.go.clear()
        first = asyncio.create_task(bring(client, "first", 1))
        await until(lambda: encoder.encoder._one_pass.locked())
        monkeypatch.setattr("triptych.encode.ahead.PATIENCE_S", 60.0)
        bringing = []
        for number, name in enumerate(["large", "a", "b", "c"]):
            large = {"shape": (112, 56, 3), "grid_thw": (1, 8, 4), "tokens": 8}
            data = np.full((112, 56, 3), 7, np.uint8) if name == "large" else pixels(number)
            item = replace(ITEM, hash=name, **(large if name == "large" else {}))
            bringing.append(asyncio.create_task(client.bring(name, name, "", item, data.data)))
        await until(lambda: len(encoder.ahead._pending) == 5)
        encoder.tower.encode = lambda items, media: (
            encoder.tower.batches.append([item.hash for item in items])
            or [torch.zeros(item.tokens, WIDTH) for item in items]
        )
        encoder.tower.go.set()
        await asyncio.gather(first, *bringing)
    assert encoder.tower.batches == [["first"], ["a", "b"], ["c"], ["large"]]


def test_what_has_waited_too_long_goes_first():
    def pending(tokens, since):
        return Pending("", replace(ITEM, tokens=tokens), torch.empty(0), since)

    small, large, larger = pending(4, 9.9), pending(100, 9.0), pending(200, 8.0)
    assert choose([small, large, larger], 50, now=9.95) == [larger]
    assert choose([small, large], 50, now=9.95) == [small]
    assert choose([small, large], 200, now=10.1) == [large, small]


def test_the_lower_priority_goes_first_and_then_as_ever():
    def pending(tokens, since, priority):
        return Pending("", replace(ITEM, tokens=tokens), torch.empty(0), since, priority)

    waited, small, first = pending(4, 8.0, 0), pending(2, 9.9, 0), pending(100, 9.9, -1)
    assert choose([waited, small, first], 200, now=10.0) == [first, waited, small]
    assert choose([waited, small, first], 50, now=10.0) == [first]
    assert choose([small, waited], 2, now=10.0) == [waited]


async def test_who_waits_for_a_content_lends_it_priority(folder, start):
    encoder = start(max_encoder_tokens=8)
    async with client_of(folder) as client:
        encoder.tower.go.clear()
        tasks = [asyncio.create_task(bring(client, "first", 1))]
        await until(lambda: encoder.encoder._one_pass.locked())
        for name, fill, priority in [("late", 2, 0), ("other", 3, 5), ("late", 2, -3)]:
            item = replace(ITEM, hash=name)
            data = pixels(fill).data
            tasks.append(asyncio.create_task(client.bring(name, name, "", item, data, priority)))
            wanted = name
            await until(lambda wanted=wanted: wanted in encoder.ahead._pending)
        await until(lambda: encoder.ahead._pending["late"].priority == -3)
        assert encoder.ahead._pending["other"].priority == 5
        encoder.tower.go.set()
        assert all(await asyncio.gather(*tasks))


async def test_what_fails_is_told_and_the_rest_is_done(folder, encoder, caplog):
    async with client_of(folder) as client:
        encoder.tower.go.clear()
        bringing = [
            asyncio.create_task(bring(client, name, number))
            for number, name in enumerate(["good", "bad", "better"])
        ]
        await until(lambda: len(encoder.ahead._pending) == 3)
        encoder.tower.go.set()
        good, bad, better = await asyncio.wait_for(asyncio.gather(*bringing), 10)
        assert bad is None
        assert (redeemed(encoder, good.lease) == 0).all()
        assert (redeemed(encoder, better.lease) == 2).all()
    assert "this one cannot be done" in caplog.text


async def test_what_there_is_no_room_for_is_not_taken(folder, encoder):
    encoder.cache._tiers["device"].limit = 4 * WIDTH * 4
    async with client_of(folder) as client:
        held = await bring(client, "one", 1)
        assert await bring(client, "two", 2) is None, "the lease holds all there is"
        assert encoder.tower.batches == [["one"]]
        redeemed(encoder, held.lease)
        # The thread that encoded "one" lets go of it a moment after it has answered.
        for _ in range(1000):
            if await bring(client, "two", 2):
                break
            await asyncio.sleep(0.005)
        assert encoder.tower.batches == [["one"], ["two"]]


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 9},
        {"grid_thw": None},
        {"shape": (56, 56)},
        {"shape": (560, 560, 3)},
        {"keep": False},
    ],
    ids=str,
)
async def test_what_the_family_does_not_take_is_not_taken(folder, encoder, changes):
    async with client_of(folder) as client:
        assert await bring(client, "mine", 1, **changes) is None
        assert await bring(client, "mine", 1)


async def test_pixels_that_are_shorter_than_said_are_not_taken(folder, encoder):
    async with client_of(folder) as client:
        short = pixels(1).reshape(-1)[:-1].data
        assert await client.bring("mine", "mine", "", ITEM, short) is None
        assert await client.bring("mine", "mine", "", ITEM, pixels(1).data)


async def test_an_encoder_that_is_not_there_holds_nothing(folder):
    async with client_of(folder) as client:
        assert await client.find("mine") is None
        assert await bring(client, "mine", 1) is None


async def test_an_encoder_that_stops_lets_go_of_who_waits(folder, start):
    encoder = start()
    async with client_of(folder) as client:
        encoder.tower.go.clear()
        first = asyncio.create_task(bring(client, "first", 1))
        await until(lambda: encoder.encoder._one_pass.locked())
        second = asyncio.create_task(bring(client, "second", 1))
        await until(lambda: len(encoder.ahead._pending) == 2)
        await asyncio.to_thread(encoder.close)
        assert await asyncio.wait_for(second, 10) is None
        await asyncio.wait_for(first, 10)


async def test_an_encoder_that_comes_back_is_found_again(family, folder, monkeypatch):
    monkeypatch.setattr("triptych.encode.lookup_client.SCAN_EVERY_S", 0.0)
    async with client_of(folder) as client:
        for _ in range(2):
            with closing(Instance(family, folder)):
                assert await bring(client, "mine", 1)
                assert await client.find("mine")
            assert await client.find("mine") is None


async def test_an_encoder_that_does_not_answer_is_passed_over(folder, encoder, monkeypatch, caplog):
    monkeypatch.setattr("triptych.encode.lookup_client.ANSWER_TIMEOUT_S", 0.1)
    async with client_of(folder) as client:
        await bring(client, "mine", 1)
        monkeypatch.setattr(encoder.server, "_answer", lambda *_: None)
        assert await client.find("mine") is None
    assert "did not answer in time" in caplog.text


async def test_another_models_encoder_is_not_asked(folder, start):
    other = start("encoder2@encoder2_0")
    async with client_of(folder) as client:
        assert await bring(client, "mine", 1) is None
    assert other.tower.batches == []


async def test_instances_share_the_work_and_any_may_hold(folder, start):
    instances = [start(f"encoder@encoder_{number}") for number in range(2)]
    for each in instances:
        each.tower.go.clear()
    async with client_of(folder) as client:
        bringing = [asyncio.create_task(bring(client, name, 1)) for name in "abcd"]
        await until(lambda: [len(each.ahead._pending) for each in instances] == [2, 2])
        for each in instances:
            each.tower.go.set()
        leases = [found.lease for found in await asyncio.gather(*bringing)]
        for lease, name in zip(leases, "abcd", strict=True):
            found = await client.find(name)
            assert found.lease.partition("/")[0] == lease.partition("/")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_another_instance_takes_what_this_one_leased(folder, encoder, dtype):
    entry = encoder.cache.put("content", ITEM, torch.full((4, 8), 3.0, dtype=dtype), 0.25)
    token = encoder.cache.lease_entry(entry)
    peers = Peers(folder, encoder.encoder.revision)
    fetched = peers.take(token)
    assert (fetched.key, fetched.item, fetched.seconds) == ("content", ITEM, 0.25)
    assert fetched.embeddings.dtype == dtype
    assert torch.equal(fetched.embeddings, torch.full((4, 8), 3.0, dtype=dtype))
    assert peers.take(token) is None, "good once"
    assert entry.pins == 1, "given back"


def test_a_tower_of_another_revision_takes_nothing(folder, encoder):
    entry = encoder.cache.put("content", ITEM, torch.zeros(4, 8), 0.25)
    token = encoder.cache.lease_entry(entry)
    assert Peers(folder, "another").take(token) is None
    assert encoder.cache.redeem(token), "and costs no lease"


@pytest.mark.parametrize(
    "token",
    [
        "", "/", "x", "../../etc/passwd", "encoder@../x/1", "encoder@encoder_0",
        "encoder@encoder_9/0", "encoder@encoder_0/" + "0" * 32, "encoder@" + "x" * 200 + "/1",
    ],
)  # fmt: skip
def test_forged_leases_lead_nowhere(folder, encoder, token):
    assert Peers(folder, encoder.encoder.revision).take(token) is None
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
        assert await bring(client, "mine", 1)


def test_the_sockets_are_this_users_alone(folder, encoder):
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("which", ["parent", "folder"])
def test_a_folder_that_others_may_enter_is_not_used(family, tmp_path, which):
    parent = tmp_path / "up"
    folder = parent / "in"
    folder.mkdir(mode=0o700, parents=True)
    parent.chmod(0o700)
    (parent if which == "parent" else folder).chmod(0o755)
    with pytest.raises(PermissionError, match="not this user's alone"):
        Instance(family, folder)
    assert Peers(folder, "one").take("encoder@encoder_0/1") is None


def test_a_link_in_the_place_of_the_folder_is_not_used(family, tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "sockets").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        Instance(family, tmp_path / "sockets")


def test_nothing_is_left(family, folder):
    encoder = Instance(family, folder)
    encoder.close()
    encoder.close()
    assert not folder.exists()


def test_what_killed_servers_left_is_removed(family, tmp_path):
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
    with closing(alive), closing(Instance(family, tmp_path / "sockets")):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["alive", "new", "sockets"]


def test_instances_have_names_that_are_safe():
    assert lookup.instance("encoder", "encoder_0_0") == f"encoder@encoder_0_0.{os.getpid()}"
    with pytest.raises(ValueError, match="cannot be the name of a socket"):
        lookup.instance("../encoder", "encoder_0")


def test_the_place_is_the_same_in_every_stub():
    assert lookup.place() == lookup.place()
    assert lookup.place().parent.name == f"triptych-{os.geteuid()}"
