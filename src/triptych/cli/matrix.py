"""``triptych matrix``: what each engine serves of media and of sampling, and why not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import typer

from triptych import matrix


def show(*, sampling: bool, as_json: bool, as_markdown: bool) -> None:
    """Print it: JSON, README's table, or a table for a person."""
    found: Sequence[matrix.Cell | matrix.SamplingCell]
    if sampling:
        found = fields = matrix.sampling()
        rows, below = matrix.sampling_table(fields), matrix.refused(fields)
    else:
        found = cells = matrix.cells()
        rows, below = matrix.table(cells), ""
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    elif as_markdown:
        typer.echo(matrix.markdown(rows))
    else:
        _print(rows)
        typer.echo(below, nl=bool(below))


def _print(rows: Iterable[matrix.Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    header, *rest = rows
    table = Table(*header)
    last = ""
    for row in rest:
        if last and row[0] != last:
            table.add_section()
        table.add_row(row[0] if row[0] != last else "", *row[1:])
        last = row[0]
    Console().print(table)
