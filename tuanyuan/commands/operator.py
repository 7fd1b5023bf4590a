"""`tuanyuan operator add | list | rotate | disable | enable`: accounts of those who run the deployment."""

from __future__ import annotations

from typing import Annotated

import orjson
import typer

from tuanyuan import account_commands
from tuanyuan.account_commands import JsonOption, NameArgument
from tuanyuan.accounts_output import describe, json_of, show_key
from tuanyuan.connection import SecretFileOption, ValkeyOption, VarOption, registry
from tuanyuan.console import console

EPILOG = """
Examples:

    tuanyuan operator add night-shift                   prints the key, once

    tuanyuan operator disable night-shift
"""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Accounts of operators: who looks after the deployment.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(epilog=EPILOG)
def add(
    name: NameArgument,
    signed: Annotated[bool, typer.Option("--signed", help="Demand signed requests.")] = False,
    json: JsonOption = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
    secret_file: SecretFileOption = None,
) -> None:
    """Add an operator. Prints the key."""
    with registry(valkey, var, secret_file) as known:
        with known.audit.recording(known.actor, "operator.add", name, {"signed": signed}):
            key = known.accounts.add_operator(name, signed=signed)
        show_key(name, key, json)


@app.command("list", epilog=EPILOG)
def list_(
    json: Annotated[bool, typer.Option("--json", help="Print a JSON line for each.")] = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
    secret_file: SecretFileOption = None,
) -> None:
    """Show all operators."""
    with registry(valkey, var, secret_file) as known:
        for account in known.accounts.operators():
            if json:
                console.out(orjson.dumps(json_of(known, account)).decode(), highlight=False)
            else:
                words = f"{account.name}: operator{describe(known, account)}"
                console.out(words, highlight=False)


account_commands.add_to(
    app,
    "operator",
    "an operator",
    EPILOG,
    disabled="No key of the operator is valid any more, from the next request on.",
    enabled="The operator's keys are valid again.",
)
