"""Plays a fault, and says what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from faults.load import Asked, Load
from faults.plays import Play
from faults.served import Served

LOOK_S = 0.05
NOTICE_S = 2.0
"""The most that may pass until a fault is noticed."""
MEND_S = 240.0
"""The most that may pass until all is well again."""
SETTLE_S = 1.0
"""After which what an ended process has left is counted."""


TOLD = r"starting again|ready again|out of service|given up after|media worker was"


class Row(msgspec.Struct, kw_only=True):
    """What became of one fault."""

    fault: str
    played: bool = True
    """False: this machine does not let us."""
    detection_s: float | None = None
    """Until somebody said so, and readiness did; None: nobody had to."""
    recovery_s: float | None = None
    """Until requests on every road were answered again; of an end, until it was the end."""
    answered: int = 0
    refused: int = 0
    """Answered by an error that says: not now, and not your fault."""
    wrong: int = 0
    hangs: int = 0
    leftovers: int = 0
    why: list[str] = []
    """What was wrong, hung or left."""
    said: list[str] = []
    """What the server said of it."""

    @property
    def passed(self) -> bool:
        """Whether it was as it should be."""
        if not self.played:
            return True
        return (
            self.recovery_s is not None
            and (self.detection_s is None or self.detection_s <= NOTICE_S)
            and not (self.wrong or self.hangs or self.leftovers)
        )


def mended(play: Play, served: Served, load: Load) -> Row:
    """Play a fault that the server survives, under load."""
    _until(lambda: load.answered_since(time.monotonic() - 30) and served.ready(), MEND_S)
    row = Row(fault=play.name)
    began = time.monotonic()
    undo = play.begin(served)
    if undo is None:
        return Row(fault=play.name, played=False)
    taken_back = None if play.lasts_s else began
    noticed = None if play.notice else began
    well_since = 0.0
    while time.monotonic() < began + MEND_S:
        now = time.monotonic()
        if taken_back is None and now >= began + play.lasts_s:
            undo()
            taken_back = now
        noticed = noticed or served.said_when(play.notice, began)
        unready = began if play.hidden else served.unready_since(began)
        if not served.ready():
            well_since = 0.0
        elif noticed and unready and taken_back:
            well_since = well_since or now
            if load.answered_since(well_since):
                row.recovery_s = round(time.monotonic() - began, 2)
                break
        time.sleep(LOOK_S)
    if not play.lasts_s:
        undo()
    row.said = served.lines_with(TOLD, began)
    if play.notice:
        now = time.monotonic()
        row.detection_s = round(max(noticed or now, unready or now) - began, 2)
    return _judged(row, served, load, began)


def ended(play: Play, served: Served, load: Load) -> Row:
    """Play a fault that the server ends of; nothing of it must be left, and no request hang."""
    row = Row(fault=play.name)
    load.ends = True
    # Who asks has only just begun to, and somebody is to be in the middle of an answer.
    _until(lambda: load.answered_since(0) and load.under_way(), MEND_S)
    began = time.monotonic()
    undo = play.begin(served)
    if _until(lambda: not served.alive(), MEND_S):
        row.recovery_s = round(time.monotonic() - began, 2)
    load.stop()
    if undo is not None:
        undo()
    if served.said_when(play.last_words) is None:
        row.wrong += 1
        row.why.append(f"it did not say {play.last_words!r}")
    _count(row, [asked for asked in load.done if asked.ended >= began])
    return row


def stopped(served: Served) -> Row:
    """Stop a server as Ctrl-C does, after all that it has been through."""
    row = Row(fault="stop")
    began = time.monotonic()
    if (code := served.stop()) != 0:
        row.wrong = 1
        row.why.append(f"exit code {code}: {served.said(began)}")
    row.recovery_s = round(time.monotonic() - began, 2)
    return row


def leave(row: Row, left: list[str]) -> None:
    """Count what was left."""
    row.leftovers += len(left)
    row.why += left


def _judged(row: Row, served: Served, load: Load, began: float) -> Row:
    until = time.monotonic() + SETTLE_S
    time.sleep(SETTLE_S)
    leave(row, served.left())
    # Who asked meanwhile has an answer, or hangs.
    _until(lambda: all(a.began > until for a in load.under_way()), MEND_S)
    asked = [asked for asked in load.done if asked.ended >= began and asked.began <= until]
    load.check(asked)
    _count(row, asked)
    return row


def _count(row: Row, asked: list[Asked]) -> None:
    row.answered = sum(each.answered for each in asked)
    row.refused = sum(bool(each.refusal) for each in asked)
    row.wrong += sum(bool(each.fault) for each in asked)
    row.hangs = sum(each.hung for each in asked)
    row.why += [f"{each.road}: {each.fault}" for each in asked if each.fault]


def _until(condition: Callable[[], Any], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True
