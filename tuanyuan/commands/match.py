"""`tuanyuan match`: the offline run over recorded files."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from bytewax.testing import run_main
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from flows.match import build_flow
from flows.recording import PingReader, SetAside, UnreadableFile
from flows.replay import (
    CHUNK_ROWS,
    CollectedPushes,
    CollectingSink,
    Recording,
    RecordingSource,
    TimedEntry,
    read_alert_events,
)
from geoindex.entries import Settings
from geoindex.shard import ShardMachine
from tuanyuan.console import EXIT_REFUSED, EXIT_USAGE, duration_ms, fail, note, notes

EPILOG = """
Example:

    tuanyuan match --pings pings.csv.gz --alerts alerts.jsonl --out pushes.jsonl

Rows and alerts that cannot be used are set aside, counted and shown on stderr with file and line; everything else
is matched. With --strict the exit code is then 3.
"""


def match(
    pings: Annotated[Path, typer.Option(help="CSV (gzip if .gz): device_id,lat,lng,observed_at[,partner][,at].")],
    alerts: Annotated[Path, typer.Option(help="JSON lines of alert events: publish, update, close.")],
    out: Annotated[Path, typer.Option(help="Where the pushes go: JSON lines, sorted by `at`.")],
    live_window: Annotated[str, typer.Option(help="How long a location stays live.")] = "6h",
    shards: Annotated[int, typer.Option(min=1, max=4096, help="Shards; changes nothing in the result.")] = 1,
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows read at a time; likewise.")] = CHUNK_ROWS,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 if anything was set aside.")] = False,
) -> None:
    """Match recorded pings against recorded alerts, in file time, without a server."""
    settings = Settings(shard_count=shards, live_window_ms=duration_ms(live_window))
    for path, what in ((pings, "pings"), (alerts, "alerts")):
        if not path.is_file():
            fail(f"--{what}: no such file: {path}", EXIT_USAGE)
        if out.exists() and out.samefile(path):
            fail(f"--out: {out} is --{what} itself, which would be lost", EXIT_USAGE)
    try:
        collected, set_aside = _run(pings, alerts, settings, batch_rows)
    except (UnreadableFile, OSError) as problem:
        fail(str(problem), EXIT_USAGE)
    _write(collected, out)
    _report(collected, set_aside, out)
    if strict and any(part.counts for part in set_aside):
        raise typer.Exit(EXIT_REFUSED)


def _run(pings: Path, alerts: Path, settings: Settings, batch_rows: int) -> tuple[CollectedPushes, list[SetAside]]:
    events, refused_alerts = read_alert_events(alerts, settings)
    reader = PingReader(pings, batch_rows)
    recording = Recording(reader, events, settings)
    collected = CollectedPushes()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=notes, transient=True) as progress:
        task = progress.add_task(pings.name, total=max(1, reader.size_bytes))

        def moved(_entry: TimedEntry) -> None:
            progress.update(task, completed=reader.bytes_read)

        source = RecordingSource(recording, moved)
        flow = build_flow(source, CollectingSink(collected, settings.shard_count), lambda _shard: ShardMachine())
        # An exception in the midst of the engine would end in a panic of its own: Ctrl-C ends the recording instead.
        before = signal.signal(signal.SIGINT, lambda _number, _frame: source.stop())
        try:
            run_main(flow)
        finally:
            signal.signal(signal.SIGINT, before)
        if source.stopped:
            raise KeyboardInterrupt
        if source.problem is not None:
            raise source.problem
    return collected, [reader.set_aside, refused_alerts]


def _write(collected: CollectedPushes, out: Path) -> None:
    """All or nothing: a run that ends early leaves no half of a file."""
    try:
        handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
        try:
            with os.fdopen(handle, "wb") as lines:
                lines.writelines(collected.lines())
            os.chmod(name, 0o644)
            os.replace(name, out)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as problem:
        fail(f"--out: {problem}")


def _report(collected: CollectedPushes, set_aside: list[SetAside], out: Path) -> None:
    for part in set_aside:
        for words in part.examples:
            note(words)
    counts = dict(collected.pings_refused)
    for reason, count in set_aside[0].counts.items():
        counts[reason] = counts.get(reason, 0) + count
    refused = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()) if count) or "none"
    note(f"pings: {collected.pings_accepted:,} accepted; set aside: {refused}")
    if set_aside[1].counts:
        note(f"alert events refused: {sum(set_aside[1].counts.values())}")
    note(f"pushes: {collected.device_count:,} -> {out}")
