"""How commands show accounts and keys."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import orjson

from gateway.accounts import Account
from gateway.keys import Key
from tuanyuan.connection import Registry
from tuanyuan.console import console, note


def show_key(name: str, key: Key, json: bool) -> None:
    """The key on stdout, once; what it is on stderr."""
    if json:
        console.out(orjson.dumps({"name": name, "key_id": key.key_id, "key": key.text}).decode(), highlight=False)
        return
    note(f"the key of {name}; it is not shown again:")
    console.out(key.text, highlight=False)


def describe(known: Registry, account: Account) -> str:
    """State and keys of an account, for people."""
    words = "" if account.enabled else ", disabled"
    if account.signed:
        words += ", signed requests only"
    if account.requests_per_s is not None:
        words += f", at most {account.requests_per_s:g} requests/s"
    for key_id, entry in known.accounts.key_entries(account).items():
        words += f"\n    key {key_id}, made {_date(entry.created_at_ms)}"
        if entry.valid_until_ms is not None:
            words += f", valid until {_date(entry.valid_until_ms)}"
    return words


def json_of(known: Registry, account: Account) -> dict[str, Any]:
    """An account as programs read it: everything but secrets."""
    fields: dict[str, Any] = msgspec.to_builtins(account)
    del fields["key_ids"]
    fields["keys"] = [
        {"key_id": key_id, "created_at_ms": entry.created_at_ms, "valid_until_ms": entry.valid_until_ms}
        for key_id, entry in known.accounts.key_entries(account).items()
    ]
    return fields


def _date(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
