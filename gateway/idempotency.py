"""One request, made once, however often it is sent: the header Idempotency-Key.

    begin   SET NX {request digest, alert id}    first of all: whoever repeats finds the alert's id
    done    {.., event, revision, at}            in the MULTI of the desk event itself (`flows.desk.Companion`)

So there is no moment at which an event is durable and its key does not know. After a crash, or a lost answer, or while
the first request still runs, a repetition goes the same way: it finds the event and answers as the first did, or it
makes the event, of which the desk's compare-and-set lets one through. Nothing is locked, so nothing stays locked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import redis

from flows.desk import DeskAlert
from gateway.errors import Problem

KEPT_S = 24 * 3600
"""How long a key is remembered."""
KEY_CHARACTERS_MAX = 255
UNNAMED_S = 600
"""A publication without a key that equals one of the same officer's within so long is taken for its repetition."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept under a key. `event` None: begun, and not known to be done."""

    request: str
    """SHA-256 of what was asked for, hex."""
    alert_id: str
    event: str | None = None
    revision: int = 0
    at_ms: int = 0
    """When the desk took the event, by the server's clock."""


class AlreadyDone(Exception):
    """The request was done before, or by somebody else in this moment."""

    def __init__(self, record: Record) -> None:
        super().__init__(record.alert_id)
        self.record = record


def request_digest(*parts: bytes) -> str:
    """SHA-256 over parts, each with its length in front, hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


class Claim:
    """One caller's key, and what stands under it."""

    def __init__(self, client: redis.Redis, caller: str, key: str, request: str, kept_s: int = KEPT_S) -> None:
        """`caller`: keys of different callers have nothing to do with each other. `request`: `request_digest`."""
        self._client = client
        self._request = request
        self._kept_s = kept_s
        self.redis_key = f"idempotency:{{desk}}:{request_digest(caller.encode(), key.encode())}"

    def begin(self, alert_id: str) -> Record:
        """Write down what is begun, or find what was. Returns what stands there now: done, if `event` is not None.

        Raises Problem 422 if something else was asked for under the same key; redis.RedisError.
        """
        record = Record(request=self._request, alert_id=alert_id)
        while True:
            taken = self._client.set(self.redis_key, msgspec.json.encode(record), nx=True, ex=self._kept_s)
            found = record if taken else self.find()
            if found is not None:  # None: it expired in between
                return found

    def find(self) -> Record | None:
        """What stands under the key. Raises as `begin`."""
        raw = cast("bytes | None", self._client.get(self.redis_key))
        if raw is None:
            return None
        record = msgspec.json.decode(raw, type=Record)
        if record.request != self._request:
            raise Problem(
                422,
                "idempotency-key-reused",
                "something else was asked for under this Idempotency-Key; another request needs another key",
            )
        return record

    def forget(self) -> None:
        """What is asked for next under the key is new."""
        self._client.delete(self.redis_key)

    # --- with the event: flows.desk.Companion -----------------------------------------------------------------------

    def keys(self) -> Sequence[str]:
        return (self.redis_key,)

    def look(self) -> None:
        """Raises AlreadyDone."""
        found = self.find()
        if found is not None and found.event is not None:
            raise AlreadyDone(found)

    def write(self, pipeline: Any, event: str, state: DeskAlert) -> None:
        """Queue what makes the key done."""
        record = Record(
            request=self._request,
            alert_id=state.alert.alert_id,
            event=event,
            revision=state.alert.revision,
            at_ms=state.changed_at_ms,
        )
        pipeline.set(self.redis_key, msgspec.json.encode(record), ex=self._kept_s)
