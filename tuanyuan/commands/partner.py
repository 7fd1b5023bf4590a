"""`tuanyuan partner add | list | set | rotate | disable | enable | acl`: accounts of telecoms and apps."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
import redis
import typer

from gateway import direct_access
from gateway.accounts import PartnerAccount
from tuanyuan import account_commands
from tuanyuan.account_commands import JsonOption
from tuanyuan.accounts_output import describe, json_of, show_key
from tuanyuan.connection import (
    Registry,
    SecretFileOption,
    ValkeyOption,
    VarOption,
    registry,
    settings_of,
)
from tuanyuan.console import EXIT_REFUSED, EXIT_USAGE, console, fail, note

EPILOG = """
Examples:

    tuanyuan partner add amap --datum gcj02             prints the key, once

    tuanyuan partner rotate amap --grace 24h            a second key; the first stays valid for a day

    tuanyuan partner disable amap                       no key is valid, queues are dropped

    tuanyuan partner acl amap --apply                   a Valkey user that reads amap's queues, and nothing else

A key is in no other place than this command's output: only its SHA-256 is kept. Every change is in the audit log.
"""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Accounts of partners: who sends pings and takes pushes.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

NameArgument = Annotated[str, typer.Argument(help="The partner's name: part of its queues' names.")]
DatumOption = Annotated[str | None, typer.Option(help="What its coordinates mean: wgs84, gcj02 or bd09.")]
PingsOption = Annotated[float | None, typer.Option(min=0.01, help="Limit in the long run. Default: the gateway's.")]
RequestsOption = Annotated[float | None, typer.Option(min=0.01, help="Likewise, of requests.")]
SignedOption = Annotated[bool | None, typer.Option("--signed/--unsigned", help="Demand signed requests.")]


@app.command(epilog=EPILOG)
def add(
    name: NameArgument,
    datum: DatumOption = None,
    pings_per_s: PingsOption = None,
    requests_per_s: RequestsOption = None,
    signed: SignedOption = None,
    json: JsonOption = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
    secret_file: SecretFileOption = None,
) -> None:
    """Add a partner: to the logs' settings, and with an account. Prints its key."""
    with registry(valkey, var, secret_file) as known:
        options: dict[str, Any] = {"datum": _datum(datum) or "wgs84", "signed": bool(signed)}
        with known.audit.recording(known.actor, "partner.add", name, options):
            key = known.accounts.add_partner(name, pings_per_s=pings_per_s, requests_per_s=requests_per_s, **options)
        show_key(name, key, json)


@app.command("list", epilog=EPILOG)
def list_(
    json: Annotated[bool, typer.Option("--json", help="Print a JSON line for each.")] = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
    secret_file: SecretFileOption = None,
) -> None:
    """Show all partners, also those that are in the logs' settings without an account."""
    with registry(valkey, var, secret_file) as known:
        accounts = {account.name: account for account in known.accounts.partners()}
        for name in settings_of(known.client).partners:
            account = accounts.get(name)
            if json:
                line = {"name": name, "account": account is not None} | (json_of(known, account) if account else {})
                console.out(orjson.dumps(line).decode(), highlight=False)
            elif account is None:
                console.out(f"{name}: no account", highlight=False)
            else:
                console.out(f"{name}: {account.datum}{_limits(account)}{describe(known, account)}", highlight=False)


@app.command("set", epilog=EPILOG)
def set_(
    name: NameArgument,
    datum: DatumOption = None,
    pings_per_s: PingsOption = None,
    requests_per_s: RequestsOption = None,
    signed: SignedOption = None,
    valkey: ValkeyOption = None,
    var: VarOption = None,
    secret_file: SecretFileOption = None,
) -> None:
    """Change what is said of a partner. It holds from its next request on."""
    given = {
        "datum": _datum(datum),
        "pings_per_s": pings_per_s,
        "requests_per_s": requests_per_s,
        "signed": signed,
    }
    changes = {option: value for option, value in given.items() if value is not None}
    if not changes:
        fail("say what to change: --datum, --pings-per-s, --requests-per-s, --signed or --unsigned", EXIT_USAGE)
    with registry(valkey, var, secret_file) as known:
        with known.audit.recording(known.actor, "partner.set", name, changes):
            known.accounts.change_partner(name, **changes)
        note(f"{name}: " + ", ".join(f"{option} is {value}" for option, value in changes.items()))


def _revoke_direct_access(known: Registry, name: str, result: dict[str, Any]) -> None:
    try:
        result["user_dropped"] = direct_access.revoke(known.client, name)
    except redis.ResponseError as problem:
        note(f"warning: whether {name} has a Valkey user could not be looked at: {problem}")


account_commands.add_to(
    app,
    "partner",
    "a partner",
    EPILOG,
    disabled="No key of the partner is valid any more; its queues and its Valkey user are dropped, within seconds.",
    enabled="The partner's keys are valid again, and its queues are kept. What was dropped does not come back.",
    on_disable=_revoke_direct_access,
)


@app.command(epilog=EPILOG)
def acl(
    name: NameArgument,
    apply: Annotated[bool, typer.Option("--apply", help="Make the user known to the server now.")] = False,
    json: JsonOption = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
    secret_file: SecretFileOption = None,
) -> None:
    """Print a Valkey user that may read this partner's queues and dead letters, with consumer groups, and nothing else.

    There is none that may send: whoever can append to a log could write other partners' pings, and alerts, into it.
    """
    with registry(valkey, var, secret_file) as known:
        settings = settings_of(known.client)
        if known.accounts.partner(name) is None:
            fail(f"there is no partner {name!r} with an account: tuanyuan partner add {name}", EXIT_REFUSED)
        access = direct_access.direct_access(name, settings.shard_count)
        kept = None
        if apply:
            with known.audit.recording(known.actor, "partner.acl", name, {"user": access.user}):
                try:
                    kept = direct_access.apply(known.client, access)
                except redis.ResponseError as problem:
                    fail(f"the server refuses the user: {problem}", EXIT_REFUSED)
        if json:
            shown = {
                "user": access.user,
                "password": access.password,
                "line": access.line(),
                "queues": list(access.queues),
                "applied": apply,
                "kept": kept,
            }
            console.out(orjson.dumps(shown).decode(), highlight=False)
            return
        console.out(access.line(), highlight=False)
        note(f"password, shown this once: {access.password}")
        note(f"queues: {access.queues[0]} to {access.queues[-1]}")
        if not apply:
            note("not known to the server yet: add the line to its aclfile, or use --apply")
        elif not kept:
            note("known until the server's next start: it has no aclfile. Add the line to its configuration")


def _datum(datum: str | None) -> str | None:
    if datum not in (None, "wgs84", "gcj02", "bd09"):
        fail(f"--datum must be wgs84, gcj02 or bd09, got {datum!r}", EXIT_USAGE)
    return datum


def _limits(account: PartnerAccount) -> str:
    return "" if account.pings_per_s is None else f", at most {account.pings_per_s:g} pings/s"
