"""Whether `scripts/soak` can tell a leak from what comes and goes."""

from __future__ import annotations

import random

import pytest

from soaking.verdict import judge, slope, tolerance


def ended(series: str, values: list[float]) -> bool:
    [row] = judge([{series: value} for value in values])
    assert (row.first, row.last, row.most) == (values[0], values[-1], max(values))
    return row.ended


@pytest.mark.parametrize("series", ["requests in hand", "leases of the cache", "/dev/shm, files"])
def test_what_must_not_stay_fails_by_one(series: str) -> None:
    assert ended(series, [0.0] * 12)
    assert not ended(series, [0.0] * 11 + [1.0])
    assert ended(series, [4.0] * 5 + [3.0] * 7)


def test_memory_may_come_and_go_but_not_rise() -> None:
    noise = random.Random(0)
    for per_round, good in ((0.0, True), (0.2, True), (2.0, False)):
        values = [200 + per_round * n + noise.uniform(-3, 3) for n in range(25)]
        assert ended("memory of encoder, MiB", values) is good
    warming = [100.0, 150.0, 180.0, 195.0, *[200.0] * 20]
    assert ended("memory of encoder, MiB", warming), "in the first third caches fill"


def test_a_single_dip_is_no_trend() -> None:
    assert slope([5, 5, 5, 1, 5, 5, 5]) == 0
    assert slope([0, 2, 4, 6]) == 2


def test_what_others_change_is_shown_and_not_judged() -> None:
    assert ended("PSS of decode, MiB", [10.0, 400.0, 900.0])


def test_tolerances() -> None:
    assert tolerance("/dev/shm, MiB") == 16
    assert tolerance("memory of serve, MiB") == 8
    assert tolerance("temporary files") == 0
    assert tolerance("RSS of serve, MiB") is None
    assert tolerance("descriptors") == 4
