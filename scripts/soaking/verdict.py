"""Whether what a server holds grows with what it was asked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import median

import msgspec

from soaking.sample import Sample

SETTLED = 1 / 3
"""The part of a run in which caches fill, pools reach their size and allocators theirs."""

TOLERANCES: dict[str, tuple[float | None, str]] = {
    "MiB": (8.0, "allocators take and give memory back by arenas of MiBs, and leave holes in them"),
    "RSS": (None, "files that others map too, or the kernel has dropped, come and go"),
    "PSS": (None, "likewise: it falls when another server starts, whose libraries are the same"),
    "/dev/shm, MiB": (16.0, "a stub's region grows by one step where more came together than ever"),
    "descriptors": (4, "a pool opens one more connection where more came together than ever"),
    "threads": (8, "likewise gRPC's pools of threads, in each process"),
}
"""By how a series' name begins, or else ends: what it may have grown over the rest of a run, and
why; None: whatever it likes; 0 unless given."""


class Row(msgspec.Struct, kw_only=True):
    """What became of one series."""

    series: str
    first: float
    last: float
    most: float
    growth: float
    """Over all but the first third: the slope (Theil-Sen: the median of all pairs') times that."""
    tolerance: float | None
    """None: it is not judged."""
    ended: bool
    """Whether it is as it was."""


def judge(samples: Sequence[Sample]) -> list[Row]:
    """Each series of some samples, evenly spaced."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    return [_row(name, [sample.get(name, 0.0) for sample in samples]) for name in names]


def tolerance(series: str) -> float | None:
    """What a series may grow; None: it is shown, and not judged."""
    for name in (series[:3], series, series.rpartition(" ")[2]):
        if name in TOLERANCES:
            return TOLERANCES[name][0]
    return 0.0


def slope(values: Sequence[float]) -> float:
    """From one value to the next: of all pairs the median, which few odd ones do not move."""
    pairs = itertools.combinations(enumerate(values), 2)
    return median((later - earlier) / (j - i) for (i, earlier), (j, later) in pairs)


def _row(series: str, values: Sequence[float]) -> Row:
    start = int(len(values) * SETTLED)
    settled = values[start:]
    growth = slope(settled) * (len(settled) - 1)
    limit = tolerance(series)
    return Row(
        series=series,
        first=values[0],
        last=values[-1],
        most=max(values),
        growth=growth,
        tolerance=limit,
        # Where nothing may grow, the end may not be above the beginning either, whatever the slope.
        ended=limit is None
        or (growth <= limit and (limit > 0 or values[-1] <= max(values[: start + 1]))),
    )
