"""What is served: every family, medium, form and engine, as the code itself has it.

A family says which media it takes and which of them its engine encodes itself, an engine what it
refuses; nothing is written down here a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Literal, get_args

import msgspec

from triptych.contract import Modality
from triptych.engines.base import Engine
from triptych.engines.vllm import VllmEngine
from triptych.families import FAMILIES, Family

Form = Literal["url", "data", "file", "embeddings"]
"""``url``: http and https; ``data``: data URI; ``file``: file URL, where a directory is allowed;
``embeddings``: precomputed ones, by any of the three."""

ENGINES: tuple[type[Engine], ...] = (VllmEngine,)
"""All but ``echo``, which serves whatever a family does and has no model."""

Row = tuple[str, ...]


class Cell(msgspec.Struct, frozen=True):
    """Whether one medium of one family is served in one form by one engine."""

    family: str
    medium: Modality
    form: Form
    engine: str
    served: bool
    why: str = ""
    """Why not."""


def cells(
    families: Iterable[type[Family]] = FAMILIES, engines: Iterable[type[Engine]] = ENGINES
) -> list[Cell]:
    """The whole matrix, families in the order of `FAMILIES`."""
    engines = list(engines)
    return [
        Cell(family.name, medium, form, engine.name, served=not why, why=why)
        for family in families
        for medium in get_args(Modality)
        for engine in engines
        for form in get_args(Form)
        for why in (_why_not(family, medium, form, engine),)
    ]


def markdown(matrix: Iterable[Cell]) -> str:
    """A table for README, without an end of line."""
    header, *rows = table(matrix)
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in lines)


def table(matrix: Iterable[Cell]) -> Iterator[Row]:
    """A header, then a row for each medium of each family: what each engine serves, why not all."""
    matrix = list(matrix)
    engines = list(dict.fromkeys(cell.engine for cell in matrix))
    yield ("family", "medium", *engines, "why not")
    for (family, medium), found in groupby(matrix, lambda cell: (cell.family, cell.medium)):
        row = list(found)
        forms = [
            ", ".join(cell.form for cell in row if cell.served and cell.engine == engine) or "no"
            for engine in engines
        ]
        reasons = dict.fromkeys(cell.why for cell in row if not cell.served)
        yield (family, medium, *forms, "; ".join(reasons))


def _why_not(family: type[Family], medium: Modality, form: Form, engine: type[Engine]) -> str:
    if medium not in family.modalities:
        return f"the family takes no {medium}"
    if form == "embeddings" and medium in family.engine_encodes:
        return "the engine takes frames alone and encodes them itself"
    return engine.refuses(family, medium)
