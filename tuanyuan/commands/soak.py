"""`tuanyuan soak`: the fault table, line by line, on a deployment of its own."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import orjson
import typer
from rich.table import Table

from tuanyuan.console import EXIT_FAILED, EXIT_USAGE, console, fail, note

EPILOG = """
Examples:

    tuanyuan soak --list

    tuanyuan soak kill-flow kill-valkey

    tuanyuan soak --minutes 10 --json

Every line starts a server and flows of its own in a temporary folder, breaks them, and ends with a quiet phase and a
full account: missed, extra, duplicate and unretracted must be 0, else the exit code is 1. `partition` and `disk-full`
need root on Linux; elsewhere they are named as not played, and the exit code is 1 only if they were asked for by name.
"""


def soak(
    names: Annotated[list[str] | None, typer.Argument(help="Lines of the table. Default: all.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="About how long at most, over all lines.")] = 60.0,
    list_lines: Annotated[bool, typer.Option("--list", help="Show the table and what plays each line.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Every line at its small size, as the tests play it.")] = False,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Break a deployment in every way of the fault table, and account for every push afterwards."""
    from loadtest.interrupts import interruptible
    from loadtest.soak.runner import run_all
    from loadtest.soak.table import BY_NAME, LINES

    wanted = names or list(BY_NAME)
    for name in wanted:
        if name not in BY_NAME:
            fail(f"there is no line {name!r}; there are {', '.join(BY_NAME)}", EXIT_USAGE)
    if list_lines:
        _show([(line.name, line.fault, line.command) for line in LINES if line.name in wanted], json)
        return
    lines = [BY_NAME[name] for name in wanted]
    with interruptible(signal.SIGINT, signal.SIGTERM):
        outcomes = run_all(lines, not smoke, note, note if json else _print, seed, minutes)
    passed = all(outcome.passed or (outcome.not_here and not names) for outcome in outcomes)
    if json:
        found = {"passed": passed, "seed": seed, "lines": [outcome.as_json() for outcome in outcomes]}
        sys.stdout.buffer.write(orjson.dumps(found, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()
    if not passed:
        raise typer.Exit(EXIT_FAILED)


def _print(words: str) -> None:
    console.print(words, markup=False, highlight=False, soft_wrap=True)


def _show(rows: list[tuple[str, str, str]], json: bool) -> None:
    if json:
        lines = [{"name": name, "fault": fault, "command": command} for name, fault, command in rows]
        sys.stdout.buffer.write(orjson.dumps({"lines": lines}, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()
        return
    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("line", "fault", "played by"):
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)
