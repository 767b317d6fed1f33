"""What is served: every family, medium, form and engine, as the code itself has it.

A family says which media it takes and which of them its engine encodes itself, an engine what it
refuses and what it makes of a request's sampling; nothing is written down here a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Literal, get_args

import msgspec

from triptych.chat.request import UNSERVED
from triptych.contract import Modality
from triptych.engines.base import Engine
from triptych.engines.sampling import FIELDS, UNDECLARED
from triptych.engines.sglang import SglangEngine
from triptych.engines.trtllm import TrtllmEngine
from triptych.engines.vllm import VllmEngine
from triptych.families import FAMILIES, Family

Form = Literal["url", "data", "file", "embeddings"]
"""``url``: http and https; ``data``: data URI; ``file``: file URL, where a directory is allowed;
``embeddings``: precomputed ones, by any of the three."""

ENGINES: tuple[type[Engine], ...] = (VllmEngine, SglangEngine, TrtllmEngine)
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
    caution: str = ""
    """What to know of the engine before relying on it."""


def cells(
    families: Iterable[type[Family]] = FAMILIES, engines: Iterable[type[Engine]] = ENGINES
) -> list[Cell]:
    """The whole matrix, families in the order of `FAMILIES`."""
    engines = list(engines)
    return [
        Cell(family.name, medium, form, engine.name, not why, why, engine.caution)
        for family in families
        for medium in get_args(Modality)
        for engine in engines
        for form in get_args(Form)
        for why in (_why_not(family, medium, form, engine),)
    ]


class SamplingCell(msgspec.Struct, frozen=True):
    """What one engine makes of one field of a request."""

    field: str
    meaning: str
    """Empty: of a field that no engine is asked for."""
    engine: str
    support: Literal["supported", "mapped", "refused"]
    how: str = ""
    """What it is mapped to, or why it is refused."""


def sampling(engines: Iterable[type[Engine]] = ENGINES) -> list[SamplingCell]:
    """The fields that draw an answer, then those that are refused before any engine."""
    served = [
        SamplingCell(field.name, field.meaning, engine.name, support.kind, support.how)
        for field in FIELDS
        for engine in engines
        for support in (engine.sampling.get(field.name, UNDECLARED),)
    ]
    unserved = [
        SamplingCell(name, "", engine.name, "refused") for name in UNSERVED for engine in engines
    ]
    return [*served, *unserved]


def sampling_table(cells: Iterable[SamplingCell]) -> Iterator[Row]:
    """A header, then a row for each field: what it means, and what each engine makes of it."""
    told = [cell for cell in cells if cell.meaning]
    yield ("field", "meaning", *dict.fromkeys(cell.engine for cell in told))
    for (field, meaning), found in groupby(told, lambda cell: (cell.field, cell.meaning)):
        shown = [f"{cell.support}: {cell.how}" if cell.how else cell.support for cell in found]
        yield (f"`{field}`", meaning, *shown)


def refused(cells: Iterable[SamplingCell]) -> str:
    """One sentence with the fields that are refused before any engine."""
    names = dict.fromkeys(cell.field for cell in cells if not cell.meaning)
    return f"Refused by name whatever the engine: {', '.join(f'`{name}`' for name in names)}."


def markdown(rows: Iterable[Row]) -> str:
    """A table for README, without an end of line."""
    header, *rest = rows
    lines = [header, ("---",) * len(header), *rest]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in lines)


def table(matrix: Iterable[Cell]) -> Iterator[Row]:
    """A header, then a row for each medium of each family: what each engine serves, why not all."""
    matrix = list(matrix)
    engines = {cell.engine: cell.caution for cell in matrix}
    shown = [f"{engine} ({caution})" if caution else engine for engine, caution in engines.items()]
    yield ("family", "medium", *shown, "why not")
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
        return family.unserved.get(medium, f"the family takes no {medium}")
    if form == "embeddings" and medium in family.engine_encodes:
        return "the engine takes frames alone and encodes them itself"
    return engine.refuses(family, medium)
