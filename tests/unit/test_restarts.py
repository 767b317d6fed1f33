"""When what has ended is started again, and when it is given up."""

from __future__ import annotations

from triptych.restarts import STEADY_S, Restarts, doubling


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_failures_in_a_row_are_given_longer_pauses_and_then_up() -> None:
    restarts = Restarts((0.0, 1.0))
    assert [restarts.failed() for _ in range(4)] == [0.0, 1.0, None, None]
    assert restarts.count == restarts.limit == 2


def test_steady_service_makes_good_what_was_before() -> None:
    clock = Clock()
    restarts = Restarts((0.0, 1.0), clock)
    for _ in range(5):
        restarts.serves()
        clock.now += STEADY_S
        assert restarts.failed() == 0.0


def test_short_service_does_not() -> None:
    clock = Clock()
    restarts = Restarts((0.0, 1.0), clock)
    pauses = []
    for _ in range(3):
        restarts.serves()
        clock.now += STEADY_S - 1
        pauses.append(restarts.failed())
    assert pauses == [0.0, 1.0, None]


def test_a_start_that_fails_is_no_service() -> None:
    clock = Clock()
    restarts = Restarts((0.0, 1.0), clock)
    restarts.serves()
    assert restarts.failed() == 0.0
    clock.now += STEADY_S
    assert restarts.failed() == 1.0


def test_pauses_double_up_to_the_longest() -> None:
    assert doubling(6, 5.0) == (0.0, 1.0, 2.0, 4.0, 5.0, 5.0)
    assert doubling(0, 5.0) == ()
