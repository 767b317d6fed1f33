"""What waits is merged, outboxes take turns, and nothing follows the last parcel."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replies import Recorded, until
from triptych.engines.base import Delta, TokenLogprob, Usage
from triptych.errors import Cancelled, InternalError
from triptych.stages import outbox as outbox_module
from triptych.stages.outbox import Outbox, Parcel, Sender

USAGE = Usage(3, 5)
END = Delta("!", 1, finish_reason="stop", usage=USAGE)


@pytest.fixture
def sender() -> Iterator[Sender]:
    sender = Sender(poll_s=0.005)
    sender.start()
    yield sender
    sender.stop(5)


def test_the_first_text_goes_out_at_once(sender: Sender) -> None:
    reply = Recorded()
    sender.put(Outbox(reply, stream=True), Delta("a", 1))
    until(lambda: [parcel.text for parcel in reply.parcels] == ["a"])


def test_what_comes_while_the_sender_is_busy_is_merged(sender: Sender) -> None:
    reply = Recorded()
    outbox = Outbox(reply, stream=True)
    reply.gate.clear()
    sender.put(outbox, Delta("a", 1))
    assert reply.entered.wait(5)
    entry = TokenLogprob("b", -1.0)
    for delta in (Delta("b", 1, (entry,)), Delta("", 1), Delta("c", 1, (entry,)), END):
        sender.put(outbox, delta)
    reply.gate.set()
    until(lambda: reply.done)

    assert reply.parcels == [Parcel("a"), Parcel("bc!", (entry, entry), "stop", USAGE)]


def test_outboxes_take_turns(sender: Sender) -> None:
    log: list[tuple[str, Parcel]] = []
    busy, first, second = (Recorded(log, name) for name in ("busy", "first", "second"))
    boxes = [Outbox(reply, stream=True) for reply in (busy, first, second)]
    busy.gate.clear()
    sender.put(boxes[0], Delta("x", 1))
    assert busy.entered.wait(5)
    for _ in range(3):
        sender.put(boxes[1], Delta("a", 1))
    sender.put(boxes[2], Delta("b", 1))
    sender.put(boxes[0], Delta("y", 1))
    busy.gate.set()
    until(lambda: len(log) == 4)

    assert [(name, parcel.text) for name, parcel in log] == [
        ("busy", "x"),
        ("first", "aaa"),
        ("second", "b"),
        ("busy", "y"),
    ]


def test_after_a_round_the_sender_rests_but_not_for_what_is_urgent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_REST_S", 3600.0)
    monkeypatch.setattr(outbox_module, "SHARE", 1e-9)
    sender = Sender()
    sender.start()
    reply, other = Recorded(), Recorded()
    outbox = Outbox(reply, stream=True)
    for text in "ab":  # the first is urgent, the second makes a round
        sender.put(outbox, Delta(text, 1))
        until(lambda text=text: reply.parcels[-1:] == [Parcel(text)])
    for text in "cd":
        sender.put(outbox, Delta(text, 1))
    sender.put(Outbox(other, stream=True), Delta("first", 1))
    until(lambda: other.parcels == [Parcel("first")])
    assert len(reply.parcels) == 2

    sender.put(outbox, END)
    until(lambda: reply.done)
    assert reply.parcels[2:] == [Parcel("cd!", (), "stop", USAGE)]
    sender.stop(5)


def test_without_stream_everything_comes_in_one_parcel(sender: Sender) -> None:
    reply = Recorded()
    outbox = Outbox(reply, stream=False)
    for delta in (Delta("a", 1), Delta("b", 1), END):
        sender.put(outbox, delta)
    until(lambda: reply.done)
    assert reply.parcels == [Parcel("ab!", (), "stop", USAGE)]


def test_text_held_back_is_not_worth_a_response(sender: Sender) -> None:
    reply, other = Recorded(), Recorded()
    outbox = Outbox(reply, stream=True)
    sender.put(outbox, Delta("", 1))
    sender.put(Outbox(other, stream=True), END)
    until(lambda: other.done)
    assert not reply.parcels
    sender.put(outbox, Delta("é", 1))
    until(lambda: reply.parcels == [Parcel("é")])


def test_nothing_follows_the_last_parcel(sender: Sender) -> None:
    reply, other = Recorded(), Recorded()
    outbox = Outbox(reply, stream=True)
    sender.put(outbox, END)
    until(lambda: reply.done)
    sender.put(outbox, Delta("late", 1))
    sender.fail(outbox, Cancelled("late"))
    sender.put(Outbox(other, stream=True), END)
    until(lambda: other.done)
    assert len(reply.parcels) == 1


def test_an_error_is_last(sender: Sender) -> None:
    reply = Recorded()
    outbox = Outbox(reply, stream=False)
    error = Cancelled("gone")
    sender.put(outbox, Delta("a", 1))
    sender.fail(outbox, error)
    sender.put(outbox, END)
    until(lambda: reply.done)
    assert reply.parcels == [Parcel(error=error)]


def test_a_caller_who_goes_away_is_seen_once(sender: Sender) -> None:
    reply = Recorded()
    calls: list[int] = []
    outbox = Outbox(reply, stream=True, on_cancel=lambda: calls.append(1))
    sender.open(outbox)
    until(lambda: reply.polls > 2)
    assert not calls
    reply.cancelled = True
    until(lambda: calls)
    polls = reply.polls
    time.sleep(0.03)
    assert calls == [1]
    assert reply.polls == polls


def test_callers_are_no_longer_watched_after_the_end(sender: Sender) -> None:
    reply = Recorded()
    outbox = Outbox(reply, stream=True, on_cancel=lambda: None)
    sender.open(outbox)
    sender.put(outbox, END)
    until(lambda: reply.done)
    polls = reply.polls
    time.sleep(0.03)
    assert reply.polls == polls
    sender.open(outbox)
    time.sleep(0.03)
    assert reply.polls == polls


def test_a_reply_that_breaks_ends_its_own_request_only(sender: Sender) -> None:
    broken, whole = Recorded(), Recorded()
    broken.fails = True
    ended = threading.Event()
    outbox = Outbox(broken, stream=True, on_cancel=ended.set)
    sender.open(outbox)
    sender.put(outbox, Delta("a", 1))
    assert ended.wait(5)
    sender.put(outbox, END)
    sender.put(Outbox(whole, stream=True), END)
    until(lambda: whole.done)
    assert len(broken.parcels) == 1
    assert broken.closes == 1


def test_one_thread_does_it_all(sender: Sender) -> None:
    replies = [Recorded() for _ in range(8)]
    for reply in replies:
        outbox = Outbox(reply, stream=True, on_cancel=lambda: None)
        threading.Thread(target=sender.open, args=(outbox,)).start()
        threading.Thread(target=sender.put, args=(outbox, END)).start()
    until(lambda: all(reply.done for reply in replies))
    assert len(set.union(*(reply.threads for reply in replies))) == 1


def test_stop_answers_what_is_open() -> None:
    sender = Sender()
    sender.start()
    reply, waiting = Recorded(), Recorded()
    sender.open(Outbox(reply, stream=True))
    sender.put(Outbox(waiting, stream=True), END)
    sender.stop(5)
    sender.stop(5)
    assert waiting.parcels == [Parcel("!", (), "stop", USAGE)]
    [parcel] = reply.parcels
    assert isinstance(parcel.error, InternalError)


@given(st.lists(st.lists(st.text(max_size=3), min_size=1), min_size=1, max_size=4), st.booleans())
def test_nothing_is_lost_and_nothing_comes_twice(texts: list[list[str]], stream: bool) -> None:
    sender = Sender()
    replies = [Recorded() for _ in texts]
    boxes = [Outbox(reply, stream=stream) for reply in replies]
    sender.start()
    for index in range(max(map(len, texts))):
        for box, parts in zip(boxes, texts, strict=True):
            if index < len(parts):
                reason = "stop" if index == len(parts) - 1 else None
                sender.put(box, Delta(parts[index], 1, finish_reason=reason))
    sender.stop(5)
    for reply, parts in zip(replies, texts, strict=True):
        assert "".join(parcel.text for parcel in reply.parcels) == "".join(parts)
        assert [parcel.last for parcel in reply.parcels].count(True) == 1
        assert reply.done
