"""What a bench says on the way; its rows are printed at the end."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

WIDTH = 140
_CONSOLE = Console(stderr=True, highlight=False, width=WIDTH)


def tell(what: str | Sequence[str], rows: Sequence[Sequence[str]] | None = None) -> None:
    """Print a line, or with ``rows`` a table whose head is ``what``."""
    if rows is None:
        _CONSOLE.print(what, soft_wrap=True)
        return
    table = Table()
    for number, head in enumerate(what):
        table.add_column(head, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _CONSOLE.print(table)
