"""`tuanyuan simulate`: the program under a virtual clock and a seeded adversary, against oracles."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tuanyuan.console import EXIT_FAILED, EXIT_USAGE, console, fail, note, notes

if TYPE_CHECKING:
    from loadtest.simulation.run import SeedResult, Totals

EPILOG = """
Examples:

    tuanyuan simulate --seeds 1000

    tuanyuan simulate --seed 4711

    tuanyuan simulate --mutation plain-pipeline --seeds 200

A seed is a run: the same seed gives the same faults at the same moments. One that fails is printed with what was
violated and with what happened before; --seed plays it again. The exit code is 1 if anything was violated, also with
--mutation, which breaks the program on purpose to show that the simulator would notice.

Seeds beyond repair are those whose disk faults, two at once, left no checkpoint to start from: they end there, are
counted by themselves, and hold nothing against the program. In --json: seeds = played_to_the_end + beyond_repair + the
number of failing_seeds.
"""

FAILURES_SHOWN_MAX = 3


def simulate(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --first on.")] = 1000,
    seed: Annotated[int | None, typer.Option(min=0, help="Only this one.")] = None,
    first: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one a core.")] = 0,
    mutation: Annotated[str | None, typer.Option(help="Break the program on purpose; see --list-mutations.")] = None,
    list_mutations: Annotated[
        bool, typer.Option("--list-mutations", help="The mistakes that --mutation knows.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of words.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="With --seed: the last things that happened, in any case.")
    ] = False,
) -> None:
    """Play many small worlds with crashes, lost writes and other faults, and check every promise in each."""
    from loadtest.simulation.mutations import MUTATIONS
    from loadtest.simulation.run import run_seeds

    if list_mutations:
        for name, known in MUTATIONS.items():
            console.print(f"{name:26} {known.words}", markup=False, highlight=False, soft_wrap=True)
        return
    if mutation is not None and mutation not in MUTATIONS:
        fail(f"--mutation: there is no {mutation!r}; known are {', '.join(MUTATIONS)}", EXIT_USAGE)
    if trace and seed is None:
        fail("--trace is for one --seed", EXIT_USAGE)
    wanted = range(first, first + seeds) if seed is None else range(seed, seed + 1)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=notes,
        transient=True,
        disable=not notes.is_terminal,
    ) as progress:
        task = progress.add_task("seeds", total=len(wanted))
        totals = run_seeds(wanted, jobs or os.cpu_count() or 1, mutation, _moved(progress, task, trace))
    if json:
        sys.stdout.buffer.write(orjson.dumps(totals.as_json(), option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()
    else:
        _print(totals)
    for result in sorted(totals.failed, key=lambda result: result.seed)[:FAILURES_SHOWN_MAX]:
        _show(result, mutation)
    if totals.failed:
        raise typer.Exit(EXIT_FAILED)


def _moved(progress: Progress, task: object, trace: bool) -> Callable[[SeedResult], None]:
    def moved(result: SeedResult) -> None:
        progress.advance(task)  # type: ignore[arg-type]
        if trace and not result.violations:
            for line in result.trace:
                note(line)

    return moved


def _print(totals: Totals) -> None:
    found = totals.as_json()
    console.print(
        f"{found['seeds']:,} seeds, {found['violations']} violations, {found['turns']:,} turns, "
        f"{found['pushes']:,} pushes in {found['seconds']:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    ended = f"{found['played_to_the_end']:,} played to the end, {found['beyond_repair']} beyond repair"
    if totals.beyond_repair:
        seeds = ", ".join(map(str, totals.beyond_repair))
        ended += f": disk faults left no checkpoint to start from, and no accounts were made of seeds {seeds}"
    console.print(ended, highlight=False, soft_wrap=True)
    faults = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in found["faults"].items())
    console.print(f"faults: {faults}", highlight=False, soft_wrap=True)


def _show(result: SeedResult, mutation: str | None) -> None:
    note(f"seed {result.seed}: {len(result.violations)} violations, trace {result.trace_hash}")
    for line in result.trace:
        note(f"    {line}")
    for violation in result.violations:
        note(f"  violated: {violation.rule}: {violation.words}")
    again = f" --mutation {mutation}" if mutation else ""
    note(f"  again: tuanyuan simulate --seed {result.seed}{again}")
