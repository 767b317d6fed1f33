"""An engine that dies or hangs is replaced, and nobody waits for what it would have said."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from engine_contract import words
from generations import collect, generation
from triptych import families
from triptych.engines import kept
from triptych.engines.echo import EchoEngine
from triptych.engines.kept import KeptEngine
from triptych.errors import Cancelled, ConfigurationError, TriptychError, Unavailable
from triptych.families import Family
from triptych.settings import DecodeSettings


class Mortal(EchoEngine):
    """An echo with a process of its own, which it cannot do without."""

    alive: ClassVar[list[Mortal]] = []
    starts: ClassVar[list[str]] = []
    """What comes of the next starts: a fault, or ''."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        if self.starts and (fault := self.starts.pop(0)):
            raise ConfigurationError(fault)
        await super().start()
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        self.process = subprocess.Popen(sleeper)  # noqa: ASYNC220  # it is not waited for
        self.alive.append(self)

    @property
    def pids(self) -> list[int]:
        return [self.process.pid] if self.process else []

    async def health(self) -> None:
        await super().health()
        if self.process is None or self.process.poll() is not None:
            raise Unavailable("the engine has died")

    async def stop(self) -> None:
        await super().stop()
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kept, "LOOK_S", 0.01)
    monkeypatch.setattr(kept, "PAUSES_S", (0.0, 0.01))
    Mortal.alive.clear()
    Mortal.starts.clear()
    yield
    assert all(engine.process.poll() is not None for engine in Mortal.alive if engine.process)


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Family:
    return families.load(checkpoint)


class Kept:
    """A started `KeptEngine` that remembers what it told."""

    def __init__(self, family: Family, delay_s: float = 0.0) -> None:
        settings = DecodeSettings(
            model=str(family.checkpoint.path), max_num_seqs=2, echo_token_delay_s=delay_s
        )
        self.family = family
        self.told: list[str] = []
        self.ended: list[TriptychError] = []
        self.engine = KeptEngine(
            Mortal, settings, family, on_outage=self.told.append, on_end=self.ended.append
        )

    async def __aenter__(self) -> Kept:
        await self.engine.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.engine.stop()

    def ask(self, **sampling: Any) -> asyncio.Task[list[Any]]:
        prompt, media = generation(self.family, words(self.family) * 20, **sampling)
        return asyncio.create_task(collect(self.engine, prompt, media))

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110  # what it asks about tells nobody
                await asyncio.sleep(0.005)


def signal_engine(number: signal.Signals) -> None:
    os.kill(Mortal.alive[-1].pids[0], number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_one_that_ends_is_replaced(family: Family, number: signal.Signals) -> None:
    async with Kept(family, delay_s=0.02) as server:
        asked = [server.ask(max_tokens=400) for _ in range(4)]  # two wait for a slot
        await asyncio.sleep(0.1)
        signal_engine(number)
        for answer in asked:
            with pytest.raises(Unavailable, match="died"):
                await answer
        await server.until(lambda: server.told[-1:] == [""])
        assert len(server.told) == 2
        assert await server.ask(max_tokens=2)
        assert len(Mortal.alive) == 2
        assert not server.ended


async def test_one_that_waits_for_ever_is_replaced(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "STUCK_S", 0.2)
    async with Kept(family, delay_s=1000.0) as server:
        with pytest.raises(Unavailable, match="died"):
            await server.ask()
        assert "not moved" in server.told[0]


async def test_one_with_nothing_to_do_does_not_hang(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "STUCK_S", 0.01)
    async with Kept(family) as server:
        await asyncio.sleep(0.2)
        assert not server.told


async def test_there_is_a_refusal_while_there_is_none(family: Family) -> None:
    Mortal.starts[:] = ["", "no such weights"]
    async with Kept(family) as server:
        signal_engine(signal.SIGKILL)
        await server.until(lambda: server.told)
        with pytest.raises(Unavailable, match="another is being started"):
            await server.ask()
        await server.until(lambda: server.told[-1] == "")
        assert "no such weights" in server.told[1]
        assert await server.ask(max_tokens=2)


async def test_it_is_given_up_after_so_many_starts(family: Family) -> None:
    Mortal.starts[:] = ["", "no such weights", "no such weights either"]
    async with Kept(family) as server:
        signal_engine(signal.SIGKILL)
        await server.until(lambda: server.ended)
        assert [error.what for error in server.ended] == ["no such weights either"]
        with pytest.raises(Unavailable):
            await server.engine.health()


async def test_a_first_start_that_fails_is_the_callers_affair(family: Family) -> None:
    Mortal.starts[:] = ["no such weights"]
    server = Kept(family)
    with pytest.raises(ConfigurationError, match="no such weights"):
        await server.engine.start()
    await server.engine.stop()
    assert not server.told


async def test_what_its_caller_ends_is_cancelled_all_the_same(family: Family) -> None:
    async with Kept(family, delay_s=0.02) as server:
        prompt, media = generation(family, words(family) * 20, max_tokens=400)
        answer = asyncio.create_task(collect(server.engine, prompt, media))
        await asyncio.sleep(0.1)
        await server.engine.abort(prompt.id)
        with pytest.raises(Cancelled):
            await answer


async def test_a_stop_while_one_starts_leaves_none(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "PAUSES_S", (60.0,))
    async with Kept(family) as server:
        signal_engine(signal.SIGKILL)
        await server.until(lambda: server.told)
    with pytest.raises(Unavailable):
        await server.engine.health()
    await server.engine.stop()
