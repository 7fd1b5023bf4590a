"""What every command shares: where words go, exit codes, durations as people write them."""

from __future__ import annotations

import re
from typing import NoReturn

import typer
from rich.console import Console

from flows.log_lines import UNSAFE_MARK, says_unsafe

console = Console()
"""Results."""
notes = Console(stderr=True)
"""Progress, warnings, errors: never mixed into a program's output."""

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
"""Some input was refused and the command was told to mind (`--strict`), or the server said no."""

DURATION_MS_MAX = 100 * 365 * 86_400_000

_UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


def fail(words: str, code: int = EXIT_FAILED) -> NoReturn:
    """Say what is wrong and exit."""
    notes.print(f"error: {words}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def note(words: str) -> None:
    """A line on stderr, for a person."""
    mark = UNSAFE_MARK if says_unsafe() else ""
    notes.print(f"{mark}{words}", markup=False, highlight=False, soft_wrap=True)


def duration_ms(text: str) -> int:
    """`6h`, `90min`, `30s`, `1.5h`, `2d` -> milliseconds. Raises typer.BadParameter."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d)\s*", text)
    if not match or float(match[1]) <= 0:
        raise typer.BadParameter(f"must be a duration above 0 as 6h, 90min, 30s or 2d, got {text!r}")
    ms = float(match[1]) * _UNIT_MS[match[2]]
    if ms > DURATION_MS_MAX:
        raise typer.BadParameter(f"must be at most {DURATION_MS_MAX // _UNIT_MS['d']:,} days, got {text!r}")
    return round(ms)
