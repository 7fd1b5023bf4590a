"""What a partner has said of its webhook, and the secrets that its deliveries are signed with.

    webhook:{desk}:<partner>        the settings below, as JSON
    webhook-tries:{desk}:<partner>  hash: entry name -> vain deliveries that count, of entries not yet given up

Secrets are those of Standard Webhooks: `whsec_` and base64 of 24 to 64 bytes; ours have 32. They are kept sealed. When
one is replaced, the one before it goes on signing for a day, so that a receiver may know either.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, cast

import msgspec
import redis
from standardwebhooks import Webhook as Signer

from flows.server import raise_if_lost
from gateway.keys import Sealer

State = Literal["unverified", "active", "disabled"]
SECRET_PREFIX = "whsec_"
SECRET_BYTES = 32
OLD_SECRET_MS = 24 * 3_600_000
"""How long a replaced secret goes on signing."""


class SealedSecret(msgspec.Struct, frozen=True, kw_only=True):
    """A secret as it is kept."""

    sealed: str
    """Base64."""
    until_ms: int | None = None
    """None: until it is replaced."""


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """One partner's webhook. Times in ms since 1970."""

    url: str
    state: State
    secrets: tuple[SealedSecret, ...]
    """The newest first; two at most."""
    created_at_ms: int
    changed_at_ms: int
    verified_at_ms: int | None = None
    """When a test event was last accepted."""
    reason: str = ""
    """Why it is not active."""


def webhook_key(partner: str) -> str:
    """The settings of a partner's webhook."""
    return f"webhook:{{desk}}:{partner}"


def tries_key(partner: str) -> str:
    """Vain deliveries by entry."""
    return f"webhook-tries:{{desk}}:{partner}"


def read_webhook(client: redis.Redis, partner: str) -> Webhook | None:
    """A partner's webhook, if it has one. Raises redis.RedisError."""
    return _decoded(cast("bytes | None", client.get(webhook_key(partner))))


def read_webhooks(client: redis.Redis, partners: Sequence[str]) -> dict[str, Webhook]:
    """Those that there are. Raises redis.RedisError."""
    if not partners:
        return {}
    raws = cast("list[bytes | None]", client.mget([webhook_key(partner) for partner in partners]))
    found = {partner: _decoded(raw) for partner, raw in zip(partners, raws, strict=True)}
    return {partner: webhook for partner, webhook in found.items() if webhook is not None}


def _decoded(raw: bytes | None) -> Webhook | None:
    return None if raw is None else msgspec.json.decode(raw, type=Webhook)


def replace_webhook(client: redis.Redis, partner: str, known: Webhook | None, new: Webhook | None) -> bool:
    """Put `new` (None: nothing) in the place of `known`; False if something else stands there now.

    Raises redis.RedisError.
    """
    key = webhook_key(partner)
    with client.pipeline(transaction=True) as transaction:
        pipeline = cast(Any, transaction)
        pipeline.watch(key)
        if _decoded(pipeline.get(key)) != known:
            return False
        pipeline.multi()
        if new is None:
            pipeline.delete(key, tries_key(partner))
        else:
            pipeline.set(key, msgspec.json.encode(new))
        try:
            pipeline.execute()
        except redis.WatchError as error:
            raise_if_lost(error)
            return False
    return True


# --- secrets ----------------------------------------------------------------------------------------------------------


def new_secret() -> str:
    """A fresh one."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def check_secret(text: str) -> str:
    """The secret itself. Raises ValueError, without the secret in it."""
    try:
        raw = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not text.startswith(SECRET_PREFIX) or not 24 <= len(raw) <= 64:
        raise ValueError(f"a secret must be {SECRET_PREFIX} and base64 of 24 to 64 bytes")
    return text


def sealed_secret(sealer: Sealer, partner: str, secret: str) -> SealedSecret:
    """As it is kept."""
    return SealedSecret(sealed=base64.b64encode(sealer.seal(secret.encode(), _purpose(partner))).decode())


def secrets_of(sealer: Sealer, partner: str, webhook: Webhook, now_ms: float) -> list[str]:
    """Those that sign now, the newest first. Raises SealBroken."""
    return [
        sealer.open(base64.b64decode(secret.sealed), _purpose(partner)).decode()
        for secret in webhook.secrets
        if secret.until_ms is None or now_ms < secret.until_ms
    ]


def _purpose(partner: str) -> str:
    return f"webhook secret {partner}"


def signed_headers(secrets: Sequence[str], message_id: str, body: bytes, now_ms: float) -> dict[str, str]:
    """The headers of a delivery after Standard Webhooks: one signature for each secret."""
    at = datetime.fromtimestamp(int(now_ms // 1000), UTC)
    signatures = [Signer(secret).sign(message_id, at, body.decode()) for secret in secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
