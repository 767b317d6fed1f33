"""One module a bench, each with ``run(quick: bool) -> list[Row]``."""

from __future__ import annotations

from statistics import median, quantiles
from typing import Literal

import msgspec


class Row(msgspec.Struct, frozen=True):
    """One goal, and what was measured in this run."""

    name: str
    value: float
    """A ratio, so that it means the same on every machine."""
    goal: float
    better: Literal["lower", "higher"]
    spread: float
    """From the first to the third quartile over the rounds, in units of ``value``."""

    @property
    def reached(self) -> bool:
        """Whether the goal is met."""
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal

    @staticmethod
    def of(
        name: str, ratios: list[float], goal: float, better: Literal["lower", "higher"] = "lower"
    ) -> Row:
        """The median of one ratio a round, and their spread."""
        first, _, third = quantiles(ratios, n=4)
        return Row(name, round(median(ratios), 4), goal, better, round(third - first, 4))
