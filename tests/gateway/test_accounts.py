"""Accounts and keys on a real server: what is kept, how long a key is valid, who can be asked about."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from flows.log import SettingsMismatch, read_settings
from flows.queue_keeper import disabled_partners
from gateway.accounts import KEYS_KEY, AccountRefused, Accounts, OfficerAccount, PartnerAccount
from gateway.keys import Key, Sealer, new_key
from geoindex.entries import Settings

HOUR_MS = 3_600_000
GRACE_MS = 24 * HOUR_MS


@pytest.fixture
def accounts(client: redis.Redis, settings: Settings, tmp_path: Path) -> Accounts:
    return Accounts(client, Sealer.read(tmp_path / "gateway.key"))


def valid(accounts: Accounts, key: Key) -> bool:
    return accounts.authenticate(key.text) is not None


def turn_back(accounts: Accounts, client: redis.Redis, key: Key, by_ms: int) -> None:
    """As if a key's validity had begun to end so long ago: the server's clock cannot be turned."""
    found = accounts.find(key.key_id)
    assert found is not None and found.entry.valid_until_ms is not None
    raw = cast(bytes, client.hget(KEYS_KEY, key.key_id)).decode()
    until_ms = found.entry.valid_until_ms
    client.hset(KEYS_KEY, key.key_id, raw.replace(str(until_ms), str(until_ms - by_ms)))


def test_a_new_partner_is_in_every_logs_settings_and_its_key_is_its_own(
    accounts: Accounts, client: redis.Redis
) -> None:
    key = accounts.add_partner("meituan", datum="gcj02", pings_per_s=5000)
    caller = accounts.authenticate(key.text)
    assert caller is not None
    assert (caller.kind, caller.name, caller.key_id, caller.actor) == (
        "partner",
        "meituan",
        key.key_id,
        "partner:meituan",
    )
    assert isinstance(caller.account, PartnerAccount)
    assert (caller.account.index, caller.account.datum, caller.account.pings_per_s) == (2, "gcj02", 5000)
    settings = read_settings(client)
    assert settings is not None and settings.partners == ("amap", "baidu", "meituan")


def test_a_partner_of_the_settings_gets_an_account_with_its_own_index(accounts: Accounts) -> None:
    accounts.add_partner("baidu")
    account = accounts.partner("baidu")
    assert account is not None and account.index == 1
    assert accounts.partner("amap") is None


def test_nothing_that_is_kept_opens_anything(accounts: Accounts, client: redis.Redis, tmp_path: Path) -> None:
    key = accounts.add_partner("amap")
    kept = b"".join(
        part
        for name in cast("list[bytes]", client.keys("*{desk}*"))
        for pair in cast("dict[bytes, bytes]", client.hgetall(name)).items()
        for part in pair
    )
    assert key.digest.hex().encode() in kept
    for secret in (key.secret, key.text.encode(), key.text[-43:].encode(), key.signing_key):
        assert secret not in kept
        assert secret.hex().encode() not in kept
    found = accounts.find(key.key_id)
    assert found is not None
    assert accounts.signing_key(found) == key.signing_key


def test_another_secret_under_a_known_id_is_nobodys(accounts: Accounts) -> None:
    key = accounts.add_partner("amap")
    assert accounts.authenticate(Key(key.key_id, new_key().secret).text) is None
    assert accounts.authenticate(new_key().text) is None
    assert accounts.authenticate("Bearer") is None


def test_while_a_key_is_rotated_both_are_valid_and_never_a_third(accounts: Accounts, client: redis.Redis) -> None:
    first = accounts.add_partner("amap")
    second = accounts.rotate("partner", "amap", GRACE_MS)
    assert valid(accounts, first) and valid(accounts, second)
    third = accounts.rotate("partner", "amap", GRACE_MS)
    assert not valid(accounts, first)
    assert valid(accounts, second) and valid(accounts, third)
    assert client.hlen(KEYS_KEY) == 2
    turn_back(accounts, client, second, GRACE_MS)
    assert not valid(accounts, second) and valid(accounts, third)


def test_the_grace_of_an_old_key_is_not_prolonged(accounts: Accounts, client: redis.Redis) -> None:
    first = accounts.add_partner("amap")
    accounts.rotate("partner", "amap", GRACE_MS)
    turn_back(accounts, client, first, GRACE_MS - 60_000)
    assert valid(accounts, first)
    turn_back(accounts, client, first, 60_000)
    assert not valid(accounts, first)


def test_a_key_that_was_stolen_ends_at_once(accounts: Accounts, client: redis.Redis) -> None:
    first = accounts.add_officer("值班", "330106", "county")
    second = accounts.rotate("officer", "值班", 0)
    assert not valid(accounts, first) and valid(accounts, second)
    assert client.hlen(KEYS_KEY) == 1


def test_a_disabled_partner_has_no_valid_key_and_no_queue(accounts: Accounts, client: redis.Redis) -> None:
    key = accounts.add_partner("amap")
    other = accounts.add_partner("baidu")
    assert accounts.disable("partner", "amap")
    assert not accounts.disable("partner", "amap")
    assert not valid(accounts, key) and valid(accounts, other)
    assert disabled_partners(client) == {"amap"}
    assert accounts.enable("partner", "amap")
    assert not accounts.enable("partner", "amap")
    assert valid(accounts, key)
    assert disabled_partners(client) == frozenset()


def test_a_partners_datum_and_limits_can_be_changed(accounts: Accounts) -> None:
    key = accounts.add_partner("amap")
    accounts.change_partner("amap", datum="gcj02", signed=True)
    caller = accounts.authenticate(key.text)
    assert caller is not None and isinstance(caller.account, PartnerAccount)
    assert (caller.account.datum, caller.account.signed, caller.account.index) == ("gcj02", True, 0)


def test_an_officer_has_a_division_and_a_level(accounts: Accounts) -> None:
    accounts.add_officer("西湖 值班", "330106", "county")
    assert accounts.officer("西湖 值班") == accounts.officers()[0]
    account = accounts.officers()[0]
    assert isinstance(account, OfficerAccount)
    assert (account.division, account.level, account.enabled) == ("330106", "county", True)
    accounts.add_operator("night shift")
    assert [operator.name for operator in accounts.operators()] == ["night shift"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda a: a.add_partner("a b"), "a partner's name must have 1 to 64 bytes"),
        (lambda a: a.add_partner("x", datum="utm"), "datum must be wgs84, gcj02 or bd09, got 'utm'"),
        (lambda a: a.add_partner("x", pings_per_s=0), "pings_per_s must be above 0"),
        (lambda a: a.add_officer("x", "33010", "county"), "division must be a code of 6 or 12 digits"),
        (lambda a: a.add_officer("x", "330106", "mayor"), "level must be ministry, province"),
        (lambda a: a.add_officer("", "330106", "county"), "a name must have 1 to 64 characters"),
        (lambda a: a.add_officer("a\nb", "330106", "county"), "a name must have 1 to 64 characters"),
        (lambda a: a.change_partner("x", datum="gcj02"), "there is no partner 'x'"),
        (lambda a: a.rotate("officer", "x", 0), "there is no officer 'x'"),
        (lambda a: a.disable("partner", "x"), "there is no partner 'x'"),
        (lambda a: a.enable("operator", "x"), "there is no operator 'x'"),
    ],
)
def test_an_account_that_cannot_be_is_refused(
    accounts: Accounts, client: redis.Redis, make: Callable[[Any], object], words: str
) -> None:
    with pytest.raises(AccountRefused, match=re.escape(words)):
        make(accounts)
    assert client.keys("*s:{desk}") == []


def test_an_account_is_made_once(accounts: Accounts, client: redis.Redis) -> None:
    key = accounts.add_operator("op")
    with pytest.raises(AccountRefused, match="there is an operator 'op' already"):
        accounts.add_operator("op")
    assert valid(accounts, key)
    assert client.hlen(KEYS_KEY) == 1


def test_a_partner_needs_logs(client: redis.Redis, tmp_path: Path) -> None:
    with pytest.raises(SettingsMismatch, match="there are no logs yet"):
        Accounts(client, Sealer.read(tmp_path / "k")).add_partner("amap")


def test_rotations_at_the_same_time_leave_two_keys(accounts: Accounts, client: redis.Redis) -> None:
    accounts.add_partner("amap")
    made: list[Key] = []
    threads = [
        threading.Thread(target=lambda: made.append(accounts.rotate("partner", "amap", GRACE_MS))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(made) == 4
    account = accounts.partner("amap")
    assert account is not None
    assert client.hlen(KEYS_KEY) == len(account.key_ids) == 2
    assert sum(valid(accounts, key) for key in made) == 2
