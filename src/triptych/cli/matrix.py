"""``triptych matrix``: which engine serves which medium of which family, and why not."""

from __future__ import annotations

import msgspec
import typer

from triptych import matrix


def show(*, as_json: bool, as_markdown: bool) -> None:
    """Print it: JSON, README's table, or a table for a person."""
    found = matrix.cells()
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    elif as_markdown:
        typer.echo(matrix.markdown(found))
    else:
        _print(found)


def _print(found: list[matrix.Cell]) -> None:
    from rich.console import Console
    from rich.table import Table

    header, *rows = matrix.table(found)
    table = Table(*header)
    last = ""
    for row in rows:
        if last and row[0] != last:
            table.add_section()
        table.add_row(row[0] if row[0] != last else "", *row[1:])
        last = row[0]
    Console().print(table)
