"""What is told to preprocess afterwards: a lease that is lost, a request that nobody waits for."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest
import torch
from msgspec.structs import replace

from triptych import families
from triptych.chat.messages import MediaPart
from triptych.encode import Encoder, lookup, recall
from triptych.encode.peers import Peers
from triptych.encode.recall import Recall
from triptych.errors import InvalidValue, LeaseLost
from triptych.settings import EncoderSettings
from triptych.stages.leased import Leased
from unit.qwen import WIDTH, picture, request, write_checkpoint

NOTHING = torch.empty(0, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "sockets"


class Preprocess:
    """An instance that knows some leases, and what it was told."""

    def __init__(self, known=()):
        self.known = dict(known)
        self.asked: list[str] = []
        self.dropped: list[str] = []

    async def again(self, lease):
        self.asked.append(lease)
        return self.known.pop(lease, None)


@asynccontextmanager
async def listening(folder, *instances, model="preprocess"):
    recalls = [
        Recall(
            lookup.address(folder, f"{model}@{model}_{number}"),
            instance.again,
            instance.dropped.append,
        )
        for number, instance in enumerate(instances)
    ]
    for one in recalls:
        await one.start()
    try:
        yield
    finally:
        for one in recalls:
            await one.close()
            await one.close()


async def ask(folder, lost):
    return await asyncio.to_thread(recall.again, folder, lost)


async def test_whoever_knows_the_lease_gives_another(folder):
    first, second = Preprocess({"a": "b"}), Preprocess({"c": "d"})
    async with listening(folder, first, second):
        assert await ask(folder, "a") == "b"
        assert await ask(folder, "c") == "d"
        assert await ask(folder, "a") is None
        assert await ask(folder, "never given") is None
    assert not folder.exists(), "nothing is left"
    assert await ask(folder, "c") is None


async def test_all_are_told_of_a_request_that_nobody_waits_for(folder):
    instances = Preprocess(), Preprocess()
    async with listening(folder, *instances):
        await asyncio.to_thread(recall.drop, folder, "mine")
        async with asyncio.timeout(10):
            while [one.dropped for one in instances] != [["mine"], ["mine"]]:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


async def test_other_models_are_not_asked(folder):
    other = Preprocess({"a": "b"})
    async with listening(folder, other, model="encoder"):
        assert await ask(folder, "a") is None
        await asyncio.to_thread(recall.drop, folder, "mine")
    assert (other.asked, other.dropped) == ([], [])


async def test_one_that_fails_or_says_nothing_is_passed_over(folder, monkeypatch, caplog):
    monkeypatch.setattr(recall, "AGAIN_TIMEOUT_S", 0.2)

    class Broken(Preprocess):
        async def again(self, lease):
            raise ValueError("no idea")

    class Mute(Preprocess):
        async def again(self, lease):
            await asyncio.sleep(60)

    async with listening(folder, Broken(), Mute(), Preprocess({"a": "b"})):
        assert await ask(folder, "a") == "b"
    assert "no idea" in caplog.text
    assert "could not be asked about a lost lease" in caplog.text


@pytest.mark.parametrize("words", [b"nonsense\n", b"{}\n", b"\xff\n", b"x" * (2 << 20)])
async def test_nonsense_ends_its_own_connection_only(folder, words):
    def intrude():
        with socket.socket(socket.AF_UNIX) as intruder:
            intruder.connect(str(folder / "preprocess@preprocess_0.sock"))
            intruder.settimeout(5)
            try:
                intruder.sendall(words)
                assert intruder.recv(1) == b""
            except (BrokenPipeError, ConnectionResetError):
                pass

    async with listening(folder, Preprocess({"a": "b"})):
        await asyncio.to_thread(intrude)
        assert await ask(folder, "a") == "b"


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return families.load(write_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint"))


@pytest.fixture
def encoder(family, folder):
    settings = EncoderSettings(model=str(family.checkpoint.path))
    encoder = Encoder(family, settings, torch.device("cpu"))
    encoder.share(Peers(folder, encoder.revision))
    return encoder


def held(encoder, medium):
    """A lease on a medium's embeddings, which are all 3."""
    entry = encoder.cache.put("key", medium[0], torch.full((medium[0].tokens, WIDTH), 3.0), 0.1)
    token = encoder.cache.lease_entry(entry)
    encoder.cache.release(entry)
    return token


async def test_a_request_whose_lease_is_lost_is_answered(folder, family, encoder):
    medium, other = picture(family, 56, 84), picture(family, 56, 56, seed=1)
    item = replace(medium[0], lease="encoder@gone/1")
    async with listening(folder, Preprocess({item.lease: held(encoder, medium)})):
        lost, untouched = await asyncio.to_thread(
            encoder.encode, [([item], NOTHING), request(other)]
        )
    assert (lost.embeddings.view(torch.float32) == 3).all()
    assert untouched.ticket.items[0].shape == (other[0].tokens, WIDTH)
    assert encoder.cache.counters.lost == 0


async def test_what_an_encoder_promised_outlives_it(folder, family, encoder):
    """The promise goes by the name of the lease, which preprocess knows when nobody else does."""
    medium = picture(family, 56, 84)
    item = replace(medium[0], lease=held(encoder, medium))
    [answer] = await asyncio.to_thread(encoder.encode, [([item], NOTHING)])
    [promised] = encoder.promise([item], answer.keys)
    assert promised.lease == item.lease
    settings = EncoderSettings(model=str(family.checkpoint.path))
    another = Encoder(family, settings, torch.device("cpu"))
    another.share(Peers(folder, another.revision))
    async with listening(folder, Preprocess({item.lease: held(another, medium)})):
        [again] = await asyncio.to_thread(another.encode, [([promised], NOTHING)])
    assert torch.equal(again.embeddings, answer.embeddings)
    [kept] = encoder.encode([([promised], NOTHING)])
    assert torch.equal(kept.embeddings, answer.embeddings), "and its own process has it still"


async def test_another_medium_in_its_place_is_refused(folder, family, encoder):
    medium, other = picture(family, 56, 84), picture(family, 84, 56)
    item = replace(medium[0], lease="lost")
    async with listening(folder, Preprocess({"lost": held(encoder, other)})):
        [answer] = await asyncio.to_thread(encoder.encode, [([item], NOTHING)])
    assert isinstance(answer, InvalidValue)


@pytest.mark.parametrize("given", [{}, {"lost": "made up"}])
async def test_what_cannot_be_had_again_is_lost(folder, family, encoder, given):
    item = replace(picture(family, 56, 84)[0], lease="lost")
    async with listening(folder, Preprocess(given)):
        [answer] = await asyncio.to_thread(encoder.encode, [([item], NOTHING)])
    assert isinstance(answer, LeaseLost)
    assert encoder.cache.counters.lost == 1


def part(url):
    return MediaPart(kind="image_url", url=url, where="here")


def test_parts_are_remembered_within_a_bound():
    leased = Leased(max_bytes=10_000)
    for number in range(20):
        leased.remember(str(number), part("x" * 1000), f"hash {number}")
    assert len(leased) == 4
    assert leased.take("15") is None
    given = leased.take("16")
    assert given is not None
    assert (given.part.url, given.hash) == ("x" * 1000, "hash 16")
    assert leased.take("16") is None, "once"
    leased.remember("large", part("x" * 50_000), "")
    assert len(leased) == 1
    assert leased.take("large")
    leased.remember("small", part("x"), "")
    leased.remember("other", part("x"), "")
    assert len(leased) == 2
