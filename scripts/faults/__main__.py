"""``python -m faults [FAULT...] [--engine echo|vllm] [--json] [--list]``."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from faults import referee
from faults.load import Load
from faults.plays import Play, copy_of, plays
from faults.referee import Row
from faults.repository import ROOT, with_echo
from faults.room import Room
from faults.served import Served

CHECKPOINT = ROOT / "models" / "tiny-qwen2.5-vl"
TOKEN_DELAY_S = 0.02
"""Of the engine echo: so that answers last, and are cut off."""
PLAYS_A_SERVER = 4
"""After one another; a server gives up, and pauses longer and longer, if faults follow in a row."""
WIDTH = 110


def main() -> int:
    """Play; exit status 1 when a fault was not mended as it should be."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description="Play faults under load.")
    parser.add_argument("faults", nargs="*", help="all unless given")
    parser.add_argument("--engine", choices=["echo", "vllm"], default="echo")
    parser.add_argument("--list", action="store_true", help="name the faults")
    parser.add_argument("--json", action="store_true", help="print only the rows, as JSON")
    arguments = parser.parse_args()
    known = [play.name for play in plays(CHECKPOINT)]
    if arguments.list:
        sys.stdout.write("\n".join(known) + "\n")
        return 0
    if unknown := set(arguments.faults) - set(known):
        parser.error(f"there is no fault {', '.join(sorted(unknown))}; see --list")
    out = Console(stderr=arguments.json, width=WIDTH, highlight=False)
    logging.getLogger("triptych_client").setLevel(logging.ERROR)  # it tells of each lost answer
    rows = []
    for row in play_all(arguments.engine, arguments.faults, out.print):
        rows.append(row)
    if arguments.json:
        sys.stdout.write(msgspec.json.encode(rows).decode() + "\n")
    else:
        out.print(_table(arguments.engine, rows))
        for row in rows:
            for reason in row.why:
                out.print(f"[red]{row.fault}:[/] {reason}", markup=True)
    return 0 if all(row.passed for row in rows) else 1


def play_all(engine: str, names: list[str], say: Callable[[str], None]) -> Iterator[Row]:
    """Play the faults called ``names``, or all that there are for an engine."""
    with tempfile.TemporaryDirectory(prefix="triptych-chaos-") as name:
        folder = Path(name)
        (folder / "disk").mkdir()
        model = copy_of(CHECKPOINT, folder)
        repository = with_echo(folder / "model_repository")
        chosen = [
            play
            for play in plays(model)
            if (not names or play.name in names) and (not play.engines or engine in play.engines)
        ]
        with Room(folder / "disk") as room:
            if not room.is_own:
                say("no mount namespace here: what is filled up is not played")

            def served(*flags: str) -> Served:
                return Served(room, *_flags(engine, model, repository, folder / "disk"), *flags)

            yield from _survived([play for play in chosen if not play.last_words], served, say)
            if ends := [play for play in chosen if play.last_words]:
                yield from _ended(ends, served, say)


def _survived(
    chosen: list[Play], served: Callable[..., Served], say: Callable[[str], None]
) -> Iterator[Row]:
    """Faults that a server survives, some with one server, which is stopped after them."""
    for first in range(0, len(chosen), PLAYS_A_SERVER):
        with _running(served(f"--max-restarts={2 * PLAYS_A_SERVER}")) as (server, load):
            for play in chosen[first : first + PLAYS_A_SERVER]:
                row = referee.mended(play, server, load)
                say(_line(row))
                yield row
            load.stop()
            row = referee.stopped(server)
            referee.leave(row, server.left())
        say(_line(row))
        yield row


def _ended(
    chosen: list[Play], served: Callable[..., Served], say: Callable[[str], None]
) -> Iterator[Row]:
    """Faults that end a server, each with one of its own.

    What nobody is left to remove, the next server does, so it is counted when that is there.
    """
    last: Row | None = None
    for play in [*chosen, None]:
        with _running(served("--max-restarts=1")) as (server, load):
            if last is not None:
                referee.leave(last, server.left())
                say(_line(last))
                yield last
            if play is not None:
                last = referee.ended(play, server, load)
            else:
                load.stop()
                server.stop()


@contextmanager
def _running(server: Served) -> Iterator[tuple[Served, Load]]:
    try:
        load = Load(server.wait_ready())
        load.start()
        yield server, load
    except BaseException:
        sys.stderr.write(f"the server's last words:\n{server.said()}\n")
        raise
    finally:
        server.kill()


def _flags(engine: str, model: Path, repository: Path, disk: Path) -> list[str]:
    flags = {
        "engine": engine,
        "model": model,
        "model-repository": repository,
        "log-file": disk / "tritonserver.log",
        "echo-token-delay-s": TOKEN_DELAY_S,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def _line(row: Row) -> str:
    verdict = "[green]mended" if row.passed else "[red]not mended"
    lines = [f"{row.fault}: {verdict if row.played else 'cannot be played here'}[/]"]
    return "\n  ".join([*lines, *(escape(line) for line in row.said)])


def _table(engine: str, rows: list[Row]) -> Table:
    heads = ("fault", "noticed", "mended", "answered", "refused", "wrong", "hangs", "left", "")
    table = Table(*heads, title=f"faults with the engine {engine}, seconds and requests")
    for row in rows:
        if not row.played:
            table.add_row(row.fault, "cannot be played here")
            continue
        seconds = ("–" if s is None else f"{s:.1f}" for s in (row.detection_s, row.recovery_s))
        counts = (row.answered, row.refused, row.wrong, row.hangs, row.leftovers)
        verdict = "[green]passed" if row.passed else "[red]failed"
        table.add_row(row.fault, *seconds, *map(str, counts), verdict)
    return table


if __name__ == "__main__":
    sys.exit(main())
