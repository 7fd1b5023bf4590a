"""`tuanyuan audit`: was everybody told what they were owed, and nobody twice?"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated

import orjson
import typer

from flows.checkpoints import CheckpointStore
from flows.log import FIRST, LogId, format_id
from flows.reconcile import Reconciliation, ShardAccount, reconcile
from tuanyuan.connection import ValkeyOption, VarOption, read_config, server, settings_of
from tuanyuan.console import EXIT_REFUSED, EXIT_USAGE, console, duration_ms, fail, note

PROGRESS_S = 2.0

EPILOG = """
Examples:

    tuanyuan audit                                    of the server under ./var, running or not

    tuanyuan audit --valkey redis://valkey:6379 --var /srv/tuanyuan --json

    tuanyuan audit --partner amap --since 10m

Recomputes from the shard logs who was owed what, without the shard machines, and compares that with the queues, up to
what is done at the time: the flow may go on meanwhile. A log that was trimmed is taken up at the oldest checkpoint
under --var that it still reaches; the output says from where to where it vouches. Exit code 0: clean; 1: not; 3:
nothing is wrong with what could be checked, but for some shard what is owed is not known.
"""


def audit(
    partner: Annotated[str | None, typer.Option(help="Only this partner's queues.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Go back no further than that, as 10m, where checkpoints allow it.")
    ] = None,
    lines: Annotated[int, typer.Option(min=0, help="Faults to print; --json prints up to 10,000 of a kind.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """Check every push in the queues against what the logs owe: missed, extra, duplicate, unretracted."""
    since_ms = None if since is None else round(time.time() * 1000) - duration_ms(since)
    with server(valkey, var) as client:
        settings = settings_of(client)
        if partner is not None and partner not in settings.partners:
            fail(f"no such partner: {partner!r}; there are {', '.join(settings.partners) or 'none yet'}", EXIT_USAGE)
        store = CheckpointStore(read_config(valkey=valkey, var=var).checkpoint_directory, settings)
        started_s = said_s = time.monotonic()

        def progress(shard: int, pings: int, part: float) -> None:
            nonlocal said_s
            if time.monotonic() - said_s > PROGRESS_S:
                said_s = time.monotonic()
                note(f"shard {shard} of {settings.shard_count}: {part:.0%} of its log, {pings:,} pings ...")

        result = reconcile(client, store, settings, partner, since_ms, progress)
        took_s = time.monotonic() - started_s
    if json:
        console.out(orjson.dumps(_to_json(result, took_s)).decode(), highlight=False)
    else:
        _print(result, took_s, lines)
    if not result.clean:
        raise typer.Exit(1)
    if not result.complete:
        raise typer.Exit(EXIT_REFUSED)


def _print(result: Reconciliation, took_s: float, lines: int) -> None:
    for account in result.shards:
        for words in account.notes:
            note(f"shard {account.shard}: {words}")
        note(f"shard {account.shard}: {_vouched(account)}")
        for partner, log_id in account.later.items():
            note(f"shard {account.shard}: {partner!r} only from {_moment(log_id)}: its queue was trimmed up to there")
    for name in result.left_out:
        note(f"left out: {name!r} is disabled, its queues are dropped")
    shown = 0
    for fault in result.faults:
        if shown == lines:
            break
        console.print(fault.line(), markup=False, highlight=False, soft_wrap=True)
        shown += 1
    total = sum(result.counts.values())
    if total > shown:
        note(f"{total - shown:,} more faults; --lines shows more of them, --json all")
    pings = sum(account.pings for account in result.shards)
    note(f"{pings:,} pings in {took_s:.1f} s")
    verdict = "verified" if result.clean and result.complete else "not all verified" if result.clean else "NOT CLEAN"
    console.print(f"{verdict}: {result.line()}", highlight=False, soft_wrap=True)


def _vouched(account: ShardAccount) -> str:
    structure = f"{account.told:,} pushes in its queues: nothing twice, in order, every end told"
    if account.began is None:
        return f"only looked at {structure}"
    begin = "its beginning" if account.began == FIRST else f"the checkpoint of {_moment(account.began)}"
    return (
        f"from {begin} to {_moment(account.cut)}: {account.owed:,} pushes owed by {account.pings:,} pings, "
        f"{account.compared:,} compared; {structure}"
    )


def _moment(log_id: LogId) -> str:
    at = datetime.fromtimestamp(log_id[0] / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"{at} ({format_id(log_id)})"


def _to_json(result: Reconciliation, took_s: float) -> dict[str, object]:
    counts = result.counts
    return {
        "clean": result.clean,
        "complete": result.complete,
        "pushes": sum(account.told for account in result.shards),
        **counts,
        "faults": [fault._asdict() for fault in result.faults],
        "left_out": result.left_out,
        "seconds": round(took_s, 3),
        "shards": [
            {
                "shard": account.shard,
                "began": None if account.began is None else format_id(account.began),
                "cut": format_id(account.cut),
                "pings": account.pings,
                "owed": account.owed,
                "told": account.told,
                "compared": account.compared,
                "partners_from": {partner: format_id(log_id) for partner, log_id in account.later.items()},
                "notes": account.notes,
            }
            for account in result.shards
        ],
    }
