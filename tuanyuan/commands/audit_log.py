"""`tuanyuan audit-log list | verify`: who did what at the desk, and whether somebody has changed it since."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import orjson
import typer

from gateway.audit_log import Head, HeadFile, last_rows, read_head, read_rows, verify
from gateway.audit_log import Row as AuditRow
from gateway.keys import Sealer
from tuanyuan.connection import SecretFileOption, ValkeyOption, VarOption, read_gateway_config, server
from tuanyuan.console import EXIT_FAILED, EXIT_USAGE, console, fail, note

EPILOG = """
Examples:

    tuanyuan audit-log list --last 50

    tuanyuan audit-log verify                           prints the newest row's number and hash: keep them elsewhere

    tuanyuan audit-log verify --head 1041:5f2c…          and that this row is still there, and still the same

Rows that were edited, exchanged, inserted, or taken out of the middle show in the chain itself. That the end was cut
off shows only against a head that was kept elsewhere: each gateway keeps one under its --var, and --head names more.
"""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Every action of a desk and every refusal, in rows chained by hash: list, verify.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("list", epilog=EPILOG)
def list_(
    last: Annotated[int, typer.Option(min=1, max=100_000, help="So many of the newest rows.")] = 100,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON line for each.")] = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """Show the newest rows, the newest last."""
    with server(valkey, var) as client:
        rows = last_rows(client, last)
    for row in rows:
        console.out(orjson.dumps(row.to_json()).decode() if json else _line(row), highlight=False)


@app.command("verify", epilog=EPILOG)
def verify_(
    head: Annotated[list[str] | None, typer.Option(help="A row's number and hash that were kept; repeatable.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
    secret_file: SecretFileOption = None,
) -> None:
    """Check every row, the chain, the seals and the end. Exits with 1 if anything is not what was written."""
    config = read_gateway_config(valkey=valkey, var=var, secret_file=secret_file)
    try:
        heads = [Head.parse(text) for text in head or ()]
        if (kept := HeadFile(config.audit_head_path).read()) is not None:
            heads.append(kept)
        sealer = Sealer.read(config.secret_path) if config.secret_path.exists() else None
    except (ValueError, OSError) as problem:
        fail(str(problem), EXIT_USAGE)
    if sealer is None:
        note(f"warning: there is no key file {config.secret_path}: seals are not checked, only the chain")
    if kept is None:
        note(f"warning: no gateway has kept a head at {config.audit_head_path}: a cut-off end may not show")
    with server(valkey, var) as client:
        newest, following = read_head(client)  # before the rows: what is appended meanwhile is no break
        count, breaks = verify(read_rows(client), sealer, heads, following - 1)
    if json:
        found = {
            "rows": count,
            "head": str(newest),
            "seals_checked": sealer is not None,
            "breaks": [{"row": broken.number, "words": broken.words} for broken in breaks],
        }
        console.out(orjson.dumps(found).decode(), highlight=False)
    else:
        for broken in breaks:
            console.out(f"row {broken.number}: {broken.words}", highlight=False)
        note(f"{count:,} rows, {len(breaks):,} breaks; head {newest}")
    if breaks:
        raise typer.Exit(EXIT_FAILED)


def _line(row: AuditRow) -> str:
    at = datetime.fromtimestamp(row.at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    details = f"  {orjson.dumps(row.details).decode()}" if row.details else ""
    return f"{row.number}  {at}  {row.actor}  {row.action}  {row.target}  {row.outcome}{details}"
