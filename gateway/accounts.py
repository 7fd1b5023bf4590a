"""Who may ask: partners, officers and operators, and their keys.

    partners:{desk}    hash: name -> PartnerAccount       keys:{desk}    hash: key id -> KeyEntry
    officers:{desk}    hash: name -> OfficerAccount
    operators:{desk}   hash: name -> OperatorAccount

A key is shown once, when it is made. Of it stay the digest and, sealed, what its signatures are checked with. An
account has one key, and two while it is rotated. Whether a key is unknown, wrong, expired or its account disabled: the
answer is the same.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, cast

import msgspec
import redis

from flows.log import add_partner, partner_name_problem
from flows.queue_keeper import disable_partner, enable_partner
from flows.server import raise_if_lost
from gateway.keys import Key, Sealer, matches, new_key, parse_key

Datum = Literal["wgs84", "gcj02", "bd09"]
Level = Literal["ministry", "province", "prefecture", "county", "station"]
Kind = Literal["partner", "officer", "operator"]

KEYS_KEY = "keys:{desk}"
KEYS_MAX = 2
"""Of one account: the new one, and the old one for a while."""
_DIVISION = re.compile(r"[0-9]{6}([0-9]{6})?")
_NAME = re.compile(r"[^\s\x00-\x1f\x7f-\x9f](?:[^\x00-\x1f\x7f-\x9f\u2028\u2029]{0,62}[^\s\x00-\x1f\x7f-\x9f])?")

_LOOK_UP = """
local entry = redis.call('HGET', KEYS[1], ARGV[1])
if not entry then return {} end
local key = cjson.decode(entry)
local account = redis.call('HGET', key.kind .. 's:{desk}', key.owner)
if not account then return {} end
local now = redis.call('TIME')
return {entry, account, now[1] * 1000 + math.floor(now[2] / 1000)}
"""


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """What every account has. Times in ms since 1970, by the server's clock."""

    name: str
    enabled: bool = True
    signed: bool = False
    """Requests have to be signed; the bare key is refused."""
    requests_per_s: float | None = None
    """None: what the configuration says."""
    created_at_ms: int = 0
    key_ids: tuple[str, ...] = ()
    """The newest first."""


class PartnerAccount(Account, frozen=True, kw_only=True):
    """A telecom or app that sends pings and takes pushes."""

    index: int
    """Among the partners of the settings: the one that its pings are written under."""
    datum: Datum = "wgs84"
    """What its coordinates mean. Said once, never guessed."""
    pings_per_s: float | None = None
    """None: what the configuration says."""


class OfficerAccount(Account, frozen=True, kw_only=True):
    """Somebody at a desk."""

    division: str
    """Administrative division code (GB/T 2260; 6 digits, or 12 with township and village): the jurisdiction."""
    level: Level


class OperatorAccount(Account, frozen=True, kw_only=True):
    """Somebody who looks after the deployment."""


AnyAccount = PartnerAccount | OfficerAccount | OperatorAccount
_TYPES: dict[str, type[AnyAccount]] = {
    "partner": PartnerAccount,
    "officer": OfficerAccount,
    "operator": OperatorAccount,
}
_A = TypeVar("_A", PartnerAccount, OfficerAccount, OperatorAccount)
AccountT = TypeVar("AccountT", bound=AnyAccount, covariant=True)


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a key."""

    kind: Kind
    owner: str
    digest: str
    """SHA-256 of the secret, hex."""
    sealed: str
    """Its signing key, sealed, base64."""
    created_at_ms: int
    valid_until_ms: int | None = None
    """None: until it is rotated."""


class AccountRefused(Exception):
    """An account cannot be made or changed so. The message says why."""


@dataclass(frozen=True)
class Caller(Generic[AccountT]):
    """Whoever a request comes from."""

    kind: Kind
    key_id: str
    account: AccountT
    signed: bool = False

    @property
    def name(self) -> str:
        return self.account.name

    @property
    def actor(self) -> str:
        """As the audit log names it."""
        return f"{self.kind}:{self.account.name}"


@dataclass(frozen=True, slots=True)
class Found:
    """A key that is kept, and its account."""

    key_id: str
    entry: KeyEntry
    account: AnyAccount
    now_ms: int

    @property
    def usable(self) -> bool:
        """Neither expired nor its account disabled."""
        until_ms = self.entry.valid_until_ms
        return self.account.enabled and (until_ms is None or self.now_ms < until_ms)

    def caller(self, signed: bool = False) -> Caller[AnyAccount]:
        return Caller(self.entry.kind, self.key_id, self.account, signed)


def accounts_key(kind: str) -> str:
    """The hash of all accounts of a kind."""
    return f"{kind}s:{{desk}}"


class Accounts:
    """All accounts of a deployment. Thread-safe. Methods raise redis.RedisError."""

    def __init__(self, client: redis.Redis, sealer: Sealer) -> None:
        self._client = client
        self._sealer = sealer
        self._look_up = client.register_script(_LOOK_UP)

    # --- asking -----------------------------------------------------------------------------------------------------

    def find(self, key_id: str) -> Found | None:
        """What is kept of a key, usable or not. One round trip."""
        reply = cast("list[Any]", self._look_up(keys=[KEYS_KEY], args=[key_id]))
        if not reply:
            return None
        raw_entry, raw_account, now_ms = reply
        entry = msgspec.json.decode(raw_entry, type=KeyEntry)
        return Found(key_id, entry, msgspec.json.decode(raw_account, type=_TYPES[entry.kind]), now_ms)

    def authenticate(self, text: str) -> Caller[AnyAccount] | None:
        """Whose key this is; None if it is nobody's, not valid any more, or its account is disabled."""
        key = parse_key(text)
        if key is None:
            return None
        found = self.find(key.key_id)
        same = matches(key, None if found is None else bytes.fromhex(found.entry.digest))
        return found.caller() if found is not None and same and found.usable else None

    def signing_key(self, found: Found) -> bytes:
        """What the key's signatures are checked with. Raises SealBroken."""
        return self._sealer.open(base64.b64decode(found.entry.sealed), _purpose(found.key_id))

    def partners(self) -> list[PartnerAccount]:
        """All of them, by name."""
        return self._all(PartnerAccount)

    def officers(self) -> list[OfficerAccount]:
        """All of them, by name."""
        return self._all(OfficerAccount)

    def operators(self) -> list[OperatorAccount]:
        """All of them, by name."""
        return self._all(OperatorAccount)

    def partner(self, name: str) -> PartnerAccount | None:
        """One partner's account."""
        return self._one(PartnerAccount, name)

    def officer(self, name: str) -> OfficerAccount | None:
        """One officer's account."""
        return self._one(OfficerAccount, name)

    def key_entries(self, account: Account) -> dict[str, KeyEntry]:
        """What is kept of an account's keys, the newest first."""
        if not account.key_ids:
            return {}
        replies = cast("list[bytes | None]", self._client.hmget(KEYS_KEY, list(account.key_ids)))
        return {
            key_id: msgspec.json.decode(raw, type=KeyEntry)
            for key_id, raw in zip(account.key_ids, replies, strict=True)
            if raw is not None
        }

    # --- changing ---------------------------------------------------------------------------------------------------

    def add_partner(
        self,
        name: str,
        *,
        datum: Datum = "wgs84",
        pings_per_s: float | None = None,
        requests_per_s: float | None = None,
        signed: bool = False,
    ) -> Key:
        """A new partner: known to every log, and with an account. The key is in no other place.

        Raises AccountRefused; SettingsMismatch if there are no logs yet.
        """
        if problem := partner_name_problem(name):
            raise AccountRefused(problem)
        if datum not in ("wgs84", "gcj02", "bd09"):
            raise AccountRefused(f"datum must be wgs84, gcj02 or bd09, got {datum!r}")
        for limit_name, limit in (("pings_per_s", pings_per_s), ("requests_per_s", requests_per_s)):
            _check_limit(limit_name, limit)
        if self.partner(name) is not None:
            raise AccountRefused(f"there is a partner {name!r} already")
        settings = add_partner(self._client, [name])
        account = PartnerAccount(
            name=name,
            index=settings.partners.index(name),
            datum=datum,
            pings_per_s=pings_per_s,
            requests_per_s=requests_per_s,
            signed=signed,
        )
        return self._add(account)

    def add_officer(
        self, name: str, division: str, level: Level, *, requests_per_s: float | None = None, signed: bool = False
    ) -> Key:
        """A new officer. Raises AccountRefused."""
        _check_name(name)
        _check_limit("requests_per_s", requests_per_s)
        if not _DIVISION.fullmatch(division):
            raise AccountRefused(f"division must be a code of 6 or 12 digits (GB/T 2260), got {division!r}")
        if level not in ("ministry", "province", "prefecture", "county", "station"):
            raise AccountRefused(f"level must be ministry, province, prefecture, county or station, got {level!r}")
        return self._add(
            OfficerAccount(name=name, division=division, level=level, requests_per_s=requests_per_s, signed=signed)
        )

    def add_operator(self, name: str, *, signed: bool = False) -> Key:
        """A new operator. Raises AccountRefused."""
        _check_name(name)
        return self._add(OperatorAccount(name=name, signed=signed))

    def change_partner(self, name: str, **changes: Any) -> PartnerAccount:
        """Another datum, other limits, signatures demanded or not. Raises AccountRefused."""
        for limit_name in ("pings_per_s", "requests_per_s"):
            _check_limit(limit_name, changes.get(limit_name))
        return self._change(PartnerAccount, name, **changes)

    def rotate(self, kind: Kind, name: str, grace_ms: int) -> Key:
        """A new key; the one before it stays valid for so long, older ones end now. Raises AccountRefused."""
        key = new_key()

        def change(account: AnyAccount, pipeline: Any, now_ms: int) -> AnyAccount:
            old, older = (account.key_ids or (None,))[0], list(account.key_ids[1:])
            kept: tuple[str, ...] = ()
            if old is not None:
                entry = self.key_entries(account).get(old)
                if entry is not None and grace_ms > 0:
                    until_ms = min(now_ms + grace_ms, entry.valid_until_ms or now_ms + grace_ms)
                    entry = msgspec.structs.replace(entry, valid_until_ms=until_ms)
                    pipeline.hset(KEYS_KEY, old, msgspec.json.encode(entry))
                    kept = (old,)
                else:
                    older.append(old)
            if older:
                pipeline.hdel(KEYS_KEY, *older)
            pipeline.hset(KEYS_KEY, key.key_id, msgspec.json.encode(self._entry(key, kind, name, now_ms)))
            changed: AnyAccount = msgspec.structs.replace(account, key_ids=(key.key_id, *kept))
            assert len(changed.key_ids) <= KEYS_MAX
            return changed

        self._compare_and_set(kind, name, change)
        return key

    def disable(self, kind: Kind, name: str) -> bool:
        """No key of the account is valid any more; a partner's queues are dropped. Whether it was enabled before.

        Raises AccountRefused.
        """
        was_enabled = self._set_enabled(kind, name, False)
        if kind == "partner":
            disable_partner(self._client, name)
        return was_enabled

    def enable(self, kind: Kind, name: str) -> bool:
        """Its keys are valid again. Whether it was disabled before. Raises AccountRefused."""
        if kind == "partner" and self.partner(name) is not None:
            enable_partner(self._client, name)
        return not self._set_enabled(kind, name, True)

    def now_ms(self) -> int:
        """The server's clock."""
        seconds, microseconds = self._client.time()
        return seconds * 1000 + microseconds // 1000

    # --- within -----------------------------------------------------------------------------------------------------

    def _all(self, type: type[_A]) -> list[_A]:
        found = cast("dict[bytes, bytes]", self._client.hgetall(accounts_key(_kind_of(type))))
        return [msgspec.json.decode(raw, type=type) for _, raw in sorted(found.items())]

    def _one(self, type: type[_A], name: str) -> _A | None:
        raw = cast("bytes | None", self._client.hget(accounts_key(_kind_of(type)), name))
        return None if raw is None else msgspec.json.decode(raw, type=type)

    def _entry(self, key: Key, kind: Kind, owner: str, now_ms: int) -> KeyEntry:
        sealed = self._sealer.seal(key.signing_key, _purpose(key.key_id))
        return KeyEntry(
            kind=kind,
            owner=owner,
            digest=key.digest.hex(),
            sealed=base64.b64encode(sealed).decode(),
            created_at_ms=now_ms,
        )

    def _add(self, account: AnyAccount) -> Key:
        kind = _kind_of(type(account))
        key, now_ms = new_key(), self.now_ms()
        account = msgspec.structs.replace(account, created_at_ms=now_ms, key_ids=(key.key_id,))
        with self._client.pipeline(transaction=True) as pipeline:
            # The key first: an account without one could not be added again.
            pipeline.hset(KEYS_KEY, key.key_id, msgspec.json.encode(self._entry(key, kind, account.name, now_ms)))
            pipeline.hsetnx(accounts_key(kind), account.name, msgspec.json.encode(account))
            _, added = pipeline.execute()
        if not added:
            self._client.hdel(KEYS_KEY, key.key_id)
            raise AccountRefused(f"there is {_article(kind)} {account.name!r} already")
        return key

    def _change(self, type: type[_A], name: str, **changes: Any) -> _A:
        def change(account: AnyAccount, _pipeline: Any, _now_ms: int) -> AnyAccount:
            changed: AnyAccount = msgspec.structs.replace(account, **changes)
            return changed

        return cast(_A, self._compare_and_set(_kind_of(type), name, change))

    def _set_enabled(self, kind: Kind, name: str, enabled: bool) -> bool:
        """Whether it was enabled before."""
        was_enabled = False

        def change(account: AnyAccount, _pipeline: Any, _now_ms: int) -> AnyAccount:
            nonlocal was_enabled
            was_enabled = account.enabled
            changed: AnyAccount = msgspec.structs.replace(account, enabled=enabled)
            return changed

        self._compare_and_set(kind, name, change)
        return was_enabled

    def _compare_and_set(self, kind: Kind, name: str, change: Any) -> AnyAccount:
        key = accounts_key(kind)
        while True:
            with self._client.pipeline(transaction=True) as pipeline:
                cast(Any, pipeline).watch(key)
                raw = cast("bytes | None", self._client.hget(key, name))
                if raw is None:
                    raise AccountRefused(f"there is no {kind} {name!r}")
                account = msgspec.json.decode(raw, type=_TYPES[kind])
                now_ms = self.now_ms()
                pipeline.multi()
                changed: AnyAccount = change(account, pipeline, now_ms)
                pipeline.hset(key, name, msgspec.json.encode(changed))
                try:
                    pipeline.execute()
                except redis.WatchError as error:
                    raise_if_lost(error)
                    continue
            return changed


def _kind_of(type: type[AnyAccount]) -> Kind:
    (kind,) = (kind for kind, known in _TYPES.items() if known is type)
    return cast(Kind, kind)


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeio" else f"a {kind}"


def _purpose(key_id: str) -> str:
    return f"signing key {key_id}"


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise AccountRefused(f"a name must have 1 to 64 characters on one line, got {name[:70]!r}")


def _check_limit(name: str, limit: float | None) -> None:
    if limit is not None and not 0 < limit <= 1e9:
        raise AccountRefused(f"{name} must be above 0 and at most 1e9, got {limit}")
