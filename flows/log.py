"""Shard logs: one append-only stream a shard, holding everything that can change it.

    log:{s3}        the log of shard 3: entries of one field, kind -> payload (`flows.wire`)
    settings:{s3}   payload of its latest settings entry: the entry itself may be trimmed away
    trimmed:{s3}    id of the last entry that was trimmed away
    done:{s3}       id of the last entry whose pushes are all in the queues
    relay:{s3}      desk id of the last alert event that was copied into the log
    push:{s3}:amap  the queue of one partner
    desk            alert events in the order of their revisions; `{desk}` is the tag of all that belongs to it

The shard is the keys' hash tag, so that a shard's keys live on one node of a cluster. None of the streams is ever
deleted: the ids would start again.

    senders ──LogWriter──> log:{s} ──> flows.log_reader
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import redis

from flows.server import (
    Link,
    LinkOpener,
    ServerRefused,
    check_server,
    connect,
    masked_url,
    packed,
    raise_if_lost,
)
from flows.wire import (
    SETTINGS,
    MalformedEntry,
    decode_entry,
    encode_entry,
    encode_pings,
    slice_pings,
    split_by_shard,
)
from geoindex.columns import PingBatch
from geoindex.entries import LogEntry, Settings

__all__ = [
    "FIRST",
    "Appended",
    "LogId",
    "LogWriter",
    "RawEntry",
    "ServerRefused",
    "SettingsMismatch",
    "add_partner",
    "check_server",
    "connect",
    "done_key",
    "ensure_settings",
    "format_id",
    "last_id",
    "log_key",
    "masked_url",
    "parse_id",
    "push_key",
    "read_settings",
    "relay_key",
    "settings_key",
    "trimmed_key",
]

logger = logging.getLogger(__name__)

LogId = tuple[int, int]
"""A stream entry's id: (ms since 1970 by the server's clock, sequence number within that ms)."""
FIRST: LogId = (0, 0)
"""Before every entry."""

PINGS_PER_ENTRY_MAX = 16_384
"""About 750 KB. Larger gains nothing: decoding costs 1 ns a ping less at most, and an entry is the unit of latency."""
_MULTI, _EXEC = packed("MULTI"), packed("EXEC")
SEND_BYTES = 8 << 20
"""Appends sent before their replies are read."""


def log_key(shard: int) -> str:
    """The shard's log."""
    return f"log:{{s{shard}}}"


def settings_key(shard: int) -> str:
    """Payload of the shard's latest settings entry."""
    return f"settings:{{s{shard}}}"


def trimmed_key(shard: int) -> str:
    """Id of the last entry trimmed from the shard's log."""
    return f"trimmed:{{s{shard}}}"


def done_key(shard: int) -> str:
    """Id of the last log entry whose pushes are all in the queues."""
    return f"done:{{s{shard}}}"


def relay_key(shard: int) -> str:
    """Desk id of the last alert event in the shard's log."""
    return f"relay:{{s{shard}}}"


def push_key(shard: int, partner: str) -> str:
    """The shard's push queue of one partner."""
    return f"push:{{s{shard}}}:{partner}"


def parse_id(raw: bytes | str) -> LogId:
    """`<ms>-<seq>` -> (ms, seq). Raises ValueError."""
    ms, _, seq = (raw.decode() if isinstance(raw, bytes) else raw).partition("-")
    return int(ms), int(seq)


def format_id(log_id: LogId) -> str:
    """(ms, seq) -> `<ms>-<seq>`."""
    return f"{log_id[0]}-{log_id[1]}"


def last_id(client: redis.Redis, stream: str) -> LogId:
    """The id of the last entry a stream ever had; FIRST if it does not exist."""
    try:
        info = client.xinfo_stream(stream)
    except redis.ResponseError as error:
        if "no such key" in str(error):
            return FIRST
        raise
    return parse_id(info["last-generated-id"])


@dataclass(frozen=True, slots=True)
class RawEntry:
    """One log entry as it stands in the log. `run_id`: the run of the server it was read from."""

    shard: int
    ms: int
    seq: int
    kind: bytes
    payload: bytes
    run_id: str

    @property
    def log_id(self) -> LogId:
        return self.ms, self.seq


# --- settings ---------------------------------------------------------------------------------------------------------


class SettingsMismatch(Exception):
    """The logs were written under settings that cannot go together with the ones wanted. Names what differs."""


_PARTNER_NAME = re.compile(r"[^\s:{}\x00-\x1f\x7f]{1,64}")
"""A partner's name becomes part of a key."""


def ensure_settings(client: redis.Redis, settings: Settings) -> Settings:
    """The settings in force: those that the logs begin with, or, where there are no logs yet, these.

    Shard 0 decides, so that two processes that start at once agree; the others get what it has. Existing settings win
    in everything but shard count, hash function and format, which must be equal. A `hash_key` is chosen by the caller.
    Raises SettingsMismatch; ValueError for a partner's name that cannot be part of a key.
    """
    _check_names(settings.partners)
    existing = _settings_of(client, 0)
    if existing is None:
        existing = _append_settings(client, 0, None, settings)
    for name, wanted, got in (
        ("shard count", settings.shard_count, existing.shard_count),
        ("hash function", settings.hash_name, existing.hash_name),
        ("format version", settings.format_version, existing.format_version),
    ):
        if wanted != got:
            raise SettingsMismatch(f"the logs were begun with {name} {got}, which never changes; wanted {wanted}")
    _spread_settings(client, existing)
    return existing


def read_settings(client: redis.Redis) -> Settings | None:
    """The latest settings that *every* shard has, so that what is sent under them is understood; None: no logs yet."""
    first = _settings_of(client, 0)
    if first is None or first.shard_count == 1:
        return first
    # Shards are written in order, so the last one has what all have.
    return _settings_of(client, first.shard_count - 1)


def add_partner(client: redis.Redis, names: Iterable[str]) -> Settings:
    """Append partners to the settings of every log; names already there are left as they are.

    When it returns, every shard knows them. Raises SettingsMismatch if there are no logs; ValueError for a bad name.
    """
    wanted = list(dict.fromkeys(names))
    _check_names(wanted)
    settings = _settings_of(client, 0)
    while True:
        if settings is None:
            raise SettingsMismatch("there are no logs yet; start `tuanyuan run` first")
        new = tuple(name for name in wanted if name not in settings.partners)
        if not new:
            break
        extended = replace(settings, partners=settings.partners + new)
        settings = _append_settings(client, 0, settings, extended)
    _spread_settings(client, settings)
    return settings


def partner_name_problem(name: str) -> str | None:
    """Why a name cannot be a partner's, or None."""
    if _PARTNER_NAME.fullmatch(name) and len(name.encode()) <= 64:
        return None
    return f"a partner's name must have 1 to 64 bytes, without spaces and :{{}}, got {name[:70]!r}"


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if problem := partner_name_problem(name):
            raise ValueError(problem)


def _settings_of(client: redis.Redis, shard: int) -> Settings | None:
    payload = cast(bytes | None, client.get(settings_key(shard)))
    if payload is None:
        return None
    try:
        entry = decode_entry(SETTINGS, payload)
    except MalformedEntry as malformed:
        raise SettingsMismatch(f"{settings_key(shard)} must hold settings: {malformed}") from None
    return cast(Settings, entry)


def _append_settings(client: redis.Redis, shard: int, expected: Settings | None, settings: Settings) -> Settings:
    """Append a settings entry if the shard's settings are still `expected`; returns the settings in force then."""
    kind, payload = encode_entry(settings)
    with client.pipeline(transaction=True) as pipeline:
        try:
            cast(Any, pipeline).watch(settings_key(shard), log_key(shard))
            # First the log: it never exists without settings, not even for a moment.
            has_entries = bool(client.exists(log_key(shard)))
            current = _settings_of(client, shard)
            if current != expected:
                assert current is not None, "settings are never taken away"
                return current
            if current is None and has_entries:
                raise SettingsMismatch(f"{log_key(shard)} has entries but no settings: it is not one of our logs")
            pipeline.multi()
            pipeline.xadd(log_key(shard), {kind: payload})
            pipeline.set(settings_key(shard), payload)
            pipeline.execute()
        except redis.WatchError as error:
            raise_if_lost(error)
            current = _settings_of(client, shard)
            assert current is not None, "whoever came first wrote settings"
            return current
    return settings


def _spread_settings(client: redis.Redis, settings: Settings) -> None:
    """Give every other shard these settings, unless it has them, or newer ones, already.

    Partners are only ever appended, and shard 0 orders the appends: of two lists the longer is the newer.
    """
    for shard in range(1, settings.shard_count):
        current = _settings_of(client, shard)
        while current is None or (current != settings and len(current.partners) <= len(settings.partners)):
            current = _append_settings(client, shard, current, settings)


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Appended:
    """One entry that the server has acknowledged, which under `appendfsync always` means: is on disk."""

    shard: int
    log_id: LogId
    ping_count: int


class LogWriter:
    """Appends pings to the shard logs. For one thread."""

    def __init__(self, open_link: LinkOpener, settings: Settings, check: Callable[[], None] = lambda: None) -> None:
        """`check` is called ahead of every append; what it raises (`Guards.check_pings`) stops it."""
        self.settings = settings
        self._open_link = open_link
        self._check = check
        self._link: Link | None = None

    def append_pings(self, batch: PingBatch) -> list[Appended]:
        """Split the pings by shard and append them, at most PINGS_PER_ENTRY_MAX an entry; order kept within a shard.

        `batch`: screened, partners by the settings' list, without `at_ms`.
        Raises redis.ResponseError (say, out of memory), redis.ConnectionError, redis.TimeoutError, ServerRefused and
        what `check` raises: then some of the entries may have been appended. Send the whole batch again: a ping that
        comes twice changes nothing.
        """
        appended: list[Appended] = []
        waiting: list[tuple[int, bytes, int]] = []
        waiting_bytes = 0
        for shard, pings in enumerate(split_by_shard(batch, self.settings)):
            if pings is None:
                continue
            for start in range(0, len(pings), PINGS_PER_ENTRY_MAX):
                part = slice_pings(pings, start, min(start + PINGS_PER_ENTRY_MAX, len(pings)))
                payload = encode_pings(part)
                waiting.append((shard, payload, len(part)))
                waiting_bytes += len(payload)
                if waiting_bytes >= SEND_BYTES:
                    appended += self._append(waiting)
                    waiting, waiting_bytes = [], 0
        return appended + self._append(waiting)

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _append(self, entries: list[tuple[int, bytes, int]]) -> list[Appended]:
        if not entries:
            return []
        self._check()
        if self._link is None:
            self._link = self._open_link()
        parts: list[bytes] = []
        for shard, payload, _ in entries:
            key = log_key(shard).encode()
            parts += [
                b"*5\r\n$4\r\nXADD\r\n$%d\r\n%b\r\n$1\r\n*\r\n$5\r\npings\r\n$%d\r\n" % (len(key), key, len(payload)),
                payload,
                b"\r\n",
            ]
        try:
            replies = self._in_one_sync(self._link, parts, len(entries))
        except redis.ResponseError:
            raise
        except BaseException:
            self.close()
            raise
        return [
            Appended(shard, parse_id(cast(bytes, reply)), ping_count)
            for (shard, _, ping_count), reply in zip(entries, replies, strict=True)
        ]

    @staticmethod
    def _in_one_sync(link: Link, parts: list[bytes], count: int) -> list[object]:
        """Send `count` commands; the answers. Raises what the server refuses.

        The server takes one large command from a link between two of its fsyncs, and does nothing else while it waits
        for the disk: eight XADDs are eight fsyncs, and whoever reads or pushes waits for all of them. Inside a MULTI
        they are one. On a cluster the shards' keys have different slots, and there is no MULTI over them.
        """
        if link.is_cluster or count == 1:
            link.send(parts)
            replies = [link.receive() for _ in range(count)]
        else:
            link.send([_MULTI, *parts, _EXEC])
            replies = [link.receive() for _ in range(count + 1)]
            executed = link.receive()
            # Refused as a whole, after or without one of the commands having been.
            replies = [*replies, executed] if isinstance(executed, redis.ResponseError) else cast(Any, executed)
        for reply in replies:
            if isinstance(reply, redis.ResponseError):
                raise reply
        return replies


def append_entry(client: redis.Redis, shard: int, entry: LogEntry) -> LogId:
    """Append one entry to one shard's log: for tests and tools. Alert events go through the desk."""
    kind, payload = encode_entry(entry)
    return parse_id(cast(bytes, client.xadd(log_key(shard), {kind: payload})))
