"""Generations on an engine's loop: who ends them, and how."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_contract import words
from generations import generation
from replies import Recorded, until
from triptych import families
from triptych.contract import Prompt
from triptych.engines.echo import EchoEngine
from triptych.errors import Cancelled, ConfigurationError, InternalError
from triptych.families import Family
from triptych.settings import DecodeSettings
from triptych.stages.generations import Aborts, Generations
from triptych.stages.outbox import Outbox, Sender


class Broken(EchoEngine):
    """Fails in the way that ``fault`` says."""

    def __init__(self, *args: Any, fault: str) -> None:
        super().__init__(*args)
        self.fault = fault
        self.stopped = 0

    async def start(self) -> None:
        if self.fault == "start":
            raise ConfigurationError("no such weights")
        await super().start()

    async def generate(self, prompt: Prompt, media: Any) -> Any:
        async for delta in super().generate(prompt, media):
            if self.fault == "generate":
                raise ZeroDivisionError
            if delta.finish_reason is None:
                yield delta

    async def stop(self) -> None:
        self.stopped += 1
        await super().stop()


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Family:
    return families.load(checkpoint)


@pytest.fixture
def sender() -> Iterator[Sender]:
    sender = Sender(poll_s=0.005)
    sender.start()
    yield sender
    sender.stop(5)


def settings(family: Family, **values: float) -> DecodeSettings:
    return DecodeSettings(model=str(family.checkpoint.path), **values)


@pytest.fixture
def generations(family: Family, sender: Sender) -> Iterator[Generations]:
    """Of an echo that takes 10 ms a token."""
    engine = EchoEngine(settings(family, echo_token_delay_s=0.01), family)
    generations = Generations(engine, sender)
    generations.start()
    yield generations
    generations.stop()


class Running:
    """A generation under a Triton request id."""

    def __init__(
        self, generations: Generations, family: Family, request_id: str, max_tokens: int = 1000
    ) -> None:
        self.reply = Recorded()
        prompt, media = generation(family, words(family) * 20, max_tokens=max_tokens)
        generations.begin(request_id, prompt, media, Outbox(self.reply, stream=True))

    @property
    def error(self) -> BaseException | None:
        return self.reply.parcels[-1].error if self.reply.parcels else None


def test_deltas_reach_the_reply(generations: Generations, family: Family) -> None:
    running = Running(generations, family, "a", max_tokens=6)
    until(lambda: running.reply.done)
    assert "".join(parcel.text for parcel in running.reply.parcels).startswith("prompt: ")
    assert running.reply.parcels[-1].finish_reason == "length"


def test_abort_ends_every_generation_of_that_request_id(
    generations: Generations, family: Family
) -> None:
    ended = [Running(generations, family, "a") for _ in range(2)]
    other = Running(generations, family, "b", max_tokens=30)
    until(lambda: all(running.reply.parcels for running in [*ended, other]))
    generations.abort("a")
    until(lambda: all(isinstance(running.error, Cancelled) for running in ended))
    until(lambda: other.reply.done)
    assert other.error is None


def test_an_abort_that_comes_first_waits_for_its_generation(
    generations: Generations, family: Family
) -> None:
    generations.abort("a")
    running = Running(generations, family, "a")
    until(lambda: isinstance(running.error, Cancelled))
    again = Running(generations, family, "a", max_tokens=2)
    until(lambda: again.reply.done)
    assert again.error is None


def test_an_abort_that_comes_late_does_not_hit_the_next(
    generations: Generations, family: Family
) -> None:
    running = Running(generations, family, "a", max_tokens=2)
    until(lambda: running.reply.done)
    generations.abort("a")
    again = Running(generations, family, "a", max_tokens=2)
    until(lambda: again.reply.done)
    assert again.error is None


def test_an_abort_right_behind_its_generation(generations: Generations, family: Family) -> None:
    ended = [Running(generations, family, "a") for _ in range(20)]
    generations.abort("a")
    until(lambda: all(isinstance(running.error, Cancelled) for running in ended))


def test_a_caller_who_goes_away_ends_the_generation(
    generations: Generations, family: Family
) -> None:
    running = Running(generations, family, "")
    until(lambda: running.reply.parcels)
    running.reply.cancelled = True
    until(lambda: isinstance(running.error, Cancelled))


def test_stop_ends_what_runs_and_the_threads(family: Family, sender: Sender) -> None:
    before = threading.active_count()
    engine = EchoEngine(settings(family, echo_token_delay_s=10), family)
    generations = Generations(engine, sender)
    generations.start()
    running = Running(generations, family, "a")
    generations.stop()
    generations.stop()
    until(lambda: isinstance(running.error, Cancelled))
    assert threading.active_count() == before


def test_a_start_that_fails_leaves_nothing(family: Family, sender: Sender) -> None:
    before = threading.active_count()
    engine = Broken(settings(family), family, fault="start")
    generations = Generations(engine, sender)
    with pytest.raises(ConfigurationError, match="no such weights"):
        generations.start()
    assert engine.stopped == 1
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("fault", "expected"), [("generate", ZeroDivisionError), ("no end", InternalError)]
)
def test_an_engine_that_fails_a_request_answers_it(
    family: Family, sender: Sender, fault: str, expected: type[Exception]
) -> None:
    generations = Generations(Broken(settings(family), family, fault=fault), sender)
    generations.start()
    running = Running(generations, family, "a", max_tokens=3)
    until(lambda: isinstance(running.error, expected))
    generations.stop()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_aborts_are_forgotten_after_a_while() -> None:
    clock = Clock()
    aborts = Aborts(clock)
    aborts.remember("a")
    clock.now = Aborts.KEEP_S - 1
    aborts.remember("b")
    clock.now = Aborts.KEEP_S
    assert not aborts.claim("a")
    assert aborts.claim("b")
    assert not aborts.claim("b")


def test_aborts_are_bounded() -> None:
    aborts = Aborts()
    for number in range(Aborts.LIMIT + 1):
        aborts.remember(str(number))
    assert not aborts.claim("0")
    assert aborts.claim("1")
