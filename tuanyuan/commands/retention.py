"""`tuanyuan retention`: is a raw ping kept for longer than promised, in any file under `var`?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from flows.raw_pings import FileFinding, count_id, limit_ms, scan
from tuanyuan.connection import VarOption, read_config
from tuanyuan.console import EXIT_FAILED, EXIT_USAGE, console, duration_ms, fail, notes

EPILOG = """
Examples:

    tuanyuan retention --var /var/lib/tuanyuan            exit code 1: a raw ping is too old, or a file cannot be read

    tuanyuan retention --find 86f3c2a19d --json           where this device's id stands, in any file

Needs no server. A stopped deployment keeps the locations of its last checkpoints: after an hour this says so.
"""


def retention(
    live_window: Annotated[
        str | None, typer.Option(help="As 6h. Default: the longest that the files themselves name.")
    ] = None,
    find: Annotated[str | None, typer.Option(help="A device id: count where it stands, instead.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    var: VarOption = None,
) -> None:
    """Look into every file under `var` for raw pings older than the live window + 1 h; exit with 1 if there is one."""
    folder = read_config(var=var).var
    if not folder.is_dir():
        fail(f"no such folder: {folder}", EXIT_USAGE)
    try:
        if find is not None:
            _find(folder, find, json)
            return
        findings: list[FileFinding] = []
        columns = TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=notes, transient=True) as progress:
            task = progress.add_task("looking", total=None)
            for finding in scan(folder):
                findings.append(finding)
                progress.update(task, description=f"{len(findings)} files, last {finding.path.name}")
    except OSError as problem:
        fail(f"{problem.filename}: {problem.strerror}")
    _report(findings, limit_ms(findings, None if live_window is None else duration_ms(live_window)), json)


def _report(findings: list[FileFinding], allowed_ms: int, json: bool) -> None:
    now_ms = round(time.time() * 1000)
    too_old = [finding for finding in findings if _age_ms(finding, now_ms) > allowed_ms]
    clean = not too_old and not any(finding.problem for finding in findings)
    holding = [finding for finding in findings if finding.ping_count or finding.problem]
    if json:
        view = {
            "clean": clean,
            "allowed_ms": allowed_ms,
            "file_count": len(findings),
            "oldest_age_ms": max((_age_ms(finding, now_ms) for finding in findings), default=0),
            "files": [
                {
                    "path": str(finding.path),
                    "kind": finding.kind,
                    "size_bytes": finding.size_bytes,
                    "ping_count": finding.ping_count,
                    "oldest_age_ms": None if finding.oldest_ms is None else _age_ms(finding, now_ms),
                    "too_old": finding in too_old,
                    "problem": finding.problem,
                }
                for finding in holding
            ],
        }
        console.out(orjson.dumps(view).decode(), highlight=False)
    else:
        for finding in holding:
            words = f"{finding.path}: {finding.kind}, {finding.ping_count:,} pings"
            if finding.oldest_ms is not None:
                words += f", the oldest {_age_ms(finding, now_ms) / 60_000:,.1f} min old"
            if finding in too_old:
                words += ": TOO OLD"
            console.out(words + (f": {finding.problem}" if finding.problem else ""), highlight=False)
        verdict = "nothing is older" if clean else "NOT CLEAN"
        console.out(f"{len(findings)} files; allowed are {allowed_ms / 60_000:,.0f} min: {verdict}", highlight=False)
    if not clean:
        raise typer.Exit(EXIT_FAILED)


def _age_ms(finding: FileFinding, now_ms: int) -> int:
    return 0 if finding.oldest_ms is None else max(0, now_ms - finding.oldest_ms)


def _find(folder: Path, device_id: str, json: bool) -> None:
    """Counts of one device's id, in files that have it."""
    counts: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            count = count_id(path, device_id.encode())
            if count:
                counts[str(path)] = count
    if json:
        console.out(orjson.dumps({"files": counts}).decode(), highlight=False)
        return
    for name, count in counts.items():
        console.out(f"{name}: {count:,} times", highlight=False)
    if not counts:
        console.out("in no file", highlight=False)
