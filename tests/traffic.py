"""Requests that go on while something happens to the servers, all of which must be answered."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Asked = TypeVar("Asked")


class Traffic:
    """Asks the same questions over and over, some at a time, until it is left.

    Args:
        ask: Gets one answer.
        answers: The questions and what must come.
        at_a_time: How many.
    """

    def __init__(
        self, ask: Callable[[Asked], str], answers: Mapping[Asked, str], at_a_time: int = 6
    ) -> None:
        self._ask = ask
        self._answers = answers
        self._at_a_time = at_a_time
        self._pool = ThreadPoolExecutor(at_a_time)
        self._questions = itertools.cycle(answers)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._right = 0
        self._wrong: list[str] = []

    def __enter__(self) -> Traffic:
        for _ in range(self._at_a_time):
            self._pool.submit(self._run)
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._pool.shutdown()
        assert self._wrong == []

    def go_on(self, count: int, within_s: float = 60.0) -> None:
        """Wait until so many more answers have come, or a wrong one."""
        target, deadline = self._right + count, time.monotonic() + within_s
        while self._right < target and not self._wrong:
            assert time.monotonic() < deadline, f"{self._right} of {target} answers came"
            time.sleep(0.01)

    def _run(self) -> None:
        while not self._over.is_set():
            with self._lock:
                question = next(self._questions)
            try:
                answer = self._ask(question)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            with self._lock:
                if answer == self._answers[question]:
                    self._right += 1
                else:
                    self._wrong.append(f"{question}: {answer}")
