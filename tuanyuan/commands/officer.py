"""`tuanyuan officer add | list | rotate | disable | enable`: accounts of those who publish alerts."""

from __future__ import annotations

from typing import Annotated, cast, get_args

import orjson
import typer

from gateway.accounts import Level
from tuanyuan import account_commands
from tuanyuan.account_commands import JsonOption, NameArgument
from tuanyuan.accounts_output import describe, json_of, show_key
from tuanyuan.connection import SecretFileOption, ValkeyOption, VarOption, registry
from tuanyuan.console import EXIT_USAGE, console, fail

EPILOG = """
Examples:

    tuanyuan officer add "西湖 值班" --division 330106 --level county       prints the key, once

    tuanyuan officer list

    tuanyuan officer disable "西湖 值班"

From county level on an officer publishes, edits and closes alerts in the own division and its parts.
"""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Accounts of officers: who publishes, edits and closes alerts.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(epilog=EPILOG)
def add(
    name: NameArgument,
    division: Annotated[str, typer.Option(help="Administrative division code (GB/T 2260): 6 or 12 digits.")],
    level: Annotated[str, typer.Option(help=f"One of {', '.join(get_args(Level))}.")],
    signed: Annotated[bool, typer.Option("--signed", help="Demand signed requests.")] = False,
    json: JsonOption = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
    secret_file: SecretFileOption = None,
) -> None:
    """Add an officer. Prints the key."""
    if level not in get_args(Level):
        fail(f"--level must be one of {', '.join(get_args(Level))}, got {level!r}", EXIT_USAGE)
    with registry(valkey, var, secret_file) as known:
        details = {"division": division, "level": level, "signed": signed}
        with known.audit.recording(known.actor, "officer.add", name, details):
            key = known.accounts.add_officer(name, division, cast(Level, level), signed=signed)
        show_key(name, key, json)


@app.command("list", epilog=EPILOG)
def list_(
    json: Annotated[bool, typer.Option("--json", help="Print a JSON line for each.")] = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
    secret_file: SecretFileOption = None,
) -> None:
    """Show all officers."""
    with registry(valkey, var, secret_file) as known:
        for account in known.accounts.officers():
            if json:
                console.out(orjson.dumps(json_of(known, account)).decode(), highlight=False)
            else:
                words = f"{account.name}: {account.level}, {account.division}{describe(known, account)}"
                console.out(words, highlight=False)


account_commands.add_to(
    app,
    "officer",
    "an officer",
    EPILOG,
    disabled="No key of the officer is valid any more, from the next request on.",
    enabled="The officer's keys are valid again.",
)
