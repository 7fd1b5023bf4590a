"""`tuanyuan operator add | list | rotate | disable | enable`: accounts of those who run the deployment."""

from __future__ import annotations

from typing import Annotated

import orjson
import typer

from tuanyuan.accounts_output import GraceOption, describe, json_of, show_key
from tuanyuan.commands.partner import JsonOption, rotated
from tuanyuan.connection import SecretFileOption, ValkeyOption, VarOption, registry
from tuanyuan.console import console, note

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

NameArgument = Annotated[str, typer.Argument(help="As it stands in the audit log.")]


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


@app.command(epilog=EPILOG)
def rotate(
    name: NameArgument,
    grace: GraceOption = None,
    json: JsonOption = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
    secret_file: SecretFileOption = None,
) -> None:
    """Give an operator a new key. The old one stays valid for a while; an older one than that ends now."""
    with registry(valkey, var, secret_file) as known:
        show_key(name, rotated(known, "operator", name, grace), json)


@app.command(epilog=EPILOG)
def disable(
    name: NameArgument, valkey: ValkeyOption = None, var: VarOption = None, secret_file: SecretFileOption = None
) -> None:
    """No key of the operator is valid any more, from the next request on."""
    with registry(valkey, var, secret_file) as known:
        with known.audit.recording(known.actor, "operator.disable", name) as result:
            result["was_enabled"] = known.accounts.disable("operator", name)
        note(f"{name} is disabled" + ("" if result["was_enabled"] else ", as before"))


@app.command(epilog=EPILOG)
def enable(
    name: NameArgument, valkey: ValkeyOption = None, var: VarOption = None, secret_file: SecretFileOption = None
) -> None:
    """The operator's keys are valid again."""
    with registry(valkey, var, secret_file) as known:
        with known.audit.recording(known.actor, "operator.enable", name) as result:
            result["was_disabled"] = known.accounts.enable("operator", name)
        note(f"{name} is enabled" + ("" if result["was_disabled"] else ", as before"))
