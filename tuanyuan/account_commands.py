"""What is done to every account, whoever's it is: `rotate`, `disable`, `enable`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from gateway.accounts import Kind
from tuanyuan.accounts_output import show_key
from tuanyuan.connection import Registry, SecretFileOption, ValkeyOption, VarOption, registry
from tuanyuan.console import duration_ms, note

NameArgument = Annotated[str, typer.Argument(help="The account's name, as it stands in the audit log.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
GraceOption = Annotated[str | None, typer.Option(help="How long the old key stays valid: 24h, 30min, 0. Default: 24h.")]


def add_to(
    app: typer.Typer,
    kind: Kind,
    whose: str,
    epilog: str,
    disabled: str,
    enabled: str,
    on_disable: Callable[[Registry, str, dict[str, Any]], None] = lambda known, name, result: None,
) -> None:
    """Add the three commands for accounts of one kind.

    `whose`: "an officer"; `disabled`, `enabled`: what help says of the two. `on_disable(registry, name, result)` does
    what else has to be done, and puts what came of it into the row of the audit log.
    """

    @app.command(
        epilog=epilog,
        help=f"Give {whose} a new key. The old one stays valid for a while; an older one than that ends now.",
    )
    def rotate(
        name: NameArgument,
        grace: GraceOption = None,
        json: JsonOption = False,
        valkey: ValkeyOption = None,
        var: VarOption = None,
        secret_file: SecretFileOption = None,
    ) -> None:
        with registry(valkey, var, secret_file) as known:
            grace_ms = round(known.config.key_grace_h * 3_600_000) if grace is None else _grace_ms(grace)
            with known.audit.recording(known.actor, f"{kind}.rotate", name, {"grace_ms": grace_ms}) as result:
                key = known.accounts.rotate(kind, name, grace_ms)
                result["key_id"] = key.key_id
            show_key(name, key, json)

    @app.command(epilog=epilog, help=disabled)
    def disable(
        name: NameArgument, valkey: ValkeyOption = None, var: VarOption = None, secret_file: SecretFileOption = None
    ) -> None:
        with registry(valkey, var, secret_file) as known:
            with known.audit.recording(known.actor, f"{kind}.disable", name) as result:
                result["was_enabled"] = known.accounts.disable(kind, name)
                on_disable(known, name, result)
            note(f"{name} is disabled" + ("" if result["was_enabled"] else ", as before"))

    @app.command(epilog=epilog, help=enabled)
    def enable(
        name: NameArgument, valkey: ValkeyOption = None, var: VarOption = None, secret_file: SecretFileOption = None
    ) -> None:
        with registry(valkey, var, secret_file) as known:
            with known.audit.recording(known.actor, f"{kind}.enable", name) as result:
                result["was_disabled"] = known.accounts.enable(kind, name)
            note(f"{name} is enabled" + ("" if result["was_disabled"] else ", as before"))


def _grace_ms(text: str) -> int:
    return 0 if text.strip() == "0" else duration_ms(text)
