"""``python -m benches NAME [--quick] [--json]``."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from benches import Row
from benches._tell import WIDTH


def main() -> int:
    """Run one bench; exit status 1 when a goal was missed."""
    names = sorted(
        path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")
    )
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("name", choices=names)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", action="store_true", help="print only the rows, as JSON")
    arguments = parser.parse_args()
    rows: list[Row] = import_module(f"benches.{arguments.name}").run(arguments.quick)
    if arguments.json:
        sys.stdout.write(msgspec.json.encode(rows).decode() + "\n")
    else:
        _table(arguments.name, rows)
    return 0 if all(row.reached for row in rows) else 1


def _table(title: str, rows: list[Row]) -> None:
    table = Table("measured", "value", "goal", "spread", "", title=title)
    for row in rows:
        sign = "≤" if row.better == "lower" else "≥"
        verdict = "[green]reached" if row.reached else "[red]missed"
        goal = f"{sign} {row.goal:g}"
        table.add_row(row.name, f"{row.value:.3f}", goal, f"{row.spread:.3f}", verdict)
    Console(width=WIDTH).print(table)


if __name__ == "__main__":
    sys.exit(main())
