"""The alert desk: alert events become durable and get their revision here, once; the relay copies them to every log.

    publish / update / close ──compare and set──> desk (stream) ──relay──> log:{s0}, log:{s1}, ...
                                                    │                       with relay:{s} = desk id, in one MULTI each
                                                    └─ alert:{desk}:<id>    newest revision, state, words

One stream orders all events, so every shard sees them in one order. The relay may be run by anybody, at any time, by
several at once: a shard machine ignores a desk id that is not above the last it saw. The clock is the server's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import msgpack
import redis

from flows.alert_json import AlertRefused, Changes, check_alert, check_outcome, merge_alert
from flows.guards import AppendsRefused
from flows.log import (
    FIRST,
    LogId,
    SettingsMismatch,
    format_id,
    log_key,
    parse_id,
    read_settings,
    relay_key,
)
from flows.metrics import METRICS, Metrics
from flows.server import LinkOpener, ServerRefused, raise_if_lost, worth_a_line
from flows.wire import MalformedEntry, decode_entry, encode_entry
from geoindex.entries import AUTO_CLOSE_MS, Alert, AlertClose, AlertRevision

logger = logging.getLogger(__name__)

DESK_KEY = "desk"
ALERT_IDS_KEY = "alerts:{desk}"
"""Sorted set: alert ids by the ms of their publishing."""
RELAY_EVENTS_MAX = 100
"""Events of one MULTI."""
RELAY_BLOCK_S = 5.0
CHANGED_AT_ONCE = 1_000
"""Entries of the desk's stream that are read at once by whoever keeps up with it."""

UNASSIGNED: LogId = (0, 0)
"""Desk id of an event that the desk has not ordered yet: what stands in the desk's own payloads."""


class RevisionConflict(Exception):
    """Somebody edited the alert in between: look at it again, and edit what it is now."""

    def __init__(self, alert_id: str, known: int, expected: int) -> None:
        super().__init__(f"alert {alert_id!r}: the known revision is {known}, the edit was made to {expected}")
        self.known = known
        self.expected = expected


@dataclass(frozen=True, slots=True)
class DeskAnswer:
    """An event is durable. It reaches the phones when its copies are in the logs: `Desk.wait_copied(desk_id)`."""

    revision: int
    desk_id: LogId


@dataclass(frozen=True, slots=True)
class DeskAlert:
    """An alert as the desk knows it. Times in ms since 1970, by the server's clock."""

    alert: Alert
    outcome: str | None
    """None: open."""
    content: dict[str, str]
    published_at_ms: int
    changed_at_ms: int

    def is_open(self, now_ms: int) -> bool:
        """Neither closed nor, left open for 30 days past its expiry, closed by itself (rule 12)."""
        return self.outcome is None and now_ms < self.alert.expires_at_ms + AUTO_CLOSE_MS


def alert_key(alert_id: str) -> str:
    """State, revision and words of one alert; of the same hash tag as `desk`."""
    return f"alert:{{desk}}:{alert_id}"


class Companion(Protocol):
    """What is written in the same MULTI as an event, or not at all: what somebody else keeps beside the alert."""

    def keys(self) -> Sequence[str]:
        """Keys of the hash tag `{desk}` that are read: when one changes meanwhile, all is looked at again."""

    def look(self, known: DeskAlert | None, now_ms: int) -> None:
        """Called before the event is made, again after a lost race. What it raises goes up, and nothing is written."""

    def write(self, pipeline: Any, state: DeskAlert) -> None:
        """Queue commands behind the event's. `state`: the alert as it will be."""


class Desk:
    """Publish, edit, close and look at alerts. Thread-safe. Methods raise redis.RedisError.

    After a lost connection an event may or may not be on the desk: `show` tells, or what a `companion` wrote.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def publish(
        self, alert: Alert, content: Mapping[str, str] | None = None, companion: Companion | None = None
    ) -> DeskAnswer:
        """A new alert; its revision becomes 1, whatever `alert` says.

        Raises AlertRefused: faulty, or the id is taken.
        """
        alert = replace(alert, revision=1)
        try:
            check_alert(alert)
        except ValueError as error:
            raise AlertRefused(f"alert {alert.alert_id!r}: {error}") from None

        def change(known: DeskAlert | None, now_ms: int) -> tuple[AlertRevision, DeskAlert]:
            if known is not None:
                state = "is open" if known.is_open(now_ms) else f"was closed as {known.outcome or 'cancelled'}"
                raise AlertRefused(
                    f"alert {alert.alert_id!r}: was published before and {state}; edit it, or take another id"
                )
            return (
                AlertRevision("publish", alert, UNASSIGNED),
                DeskAlert(alert, None, dict(content or {}), now_ms, now_ms),
            )

        return self._change(alert.alert_id, None, change, companion)

    def update(
        self,
        alert_id: str,
        changes: Changes,
        expected_revision: int | None = None,
        content: Mapping[str, str] | None = None,
        companion: Companion | None = None,
    ) -> DeskAnswer:
        """Edit an open alert: what `changes` (see `alert_json.merge_alert`) does not say stays as it is.

        `expected_revision`: the one that the officer saw; None edits whatever is there. `content`: words to replace.
        Raises RevisionConflict; AlertRefused: unknown, closed, faulty, or a change of status.
        """

        def change(known: DeskAlert | None, now_ms: int) -> tuple[AlertRevision, DeskAlert]:
            known = _open_alert(known, alert_id, now_ms)
            try:
                alert = merge_alert(known.alert, changes, known.alert.revision + 1)
            except ValueError as error:
                raise AlertRefused(f"alert {alert_id!r}: {error}") from None
            words = known.content | dict(content or {})
            return (
                AlertRevision("update", alert, UNASSIGNED),
                replace(known, alert=alert, content=words, changed_at_ms=now_ms),
            )

        return self._change(alert_id, expected_revision, change, companion)

    def close(
        self,
        alert_id: str,
        outcome: str,
        expected_revision: int | None = None,
        companion: Companion | None = None,
    ) -> DeskAnswer:
        """End an open alert; everyone told is told so.

        Raises RevisionConflict; AlertRefused: unknown, closed before.
        """
        try:
            check_outcome(outcome)
        except ValueError as error:
            raise AlertRefused(f"alert {alert_id!r}: {error}") from None

        def change(known: DeskAlert | None, now_ms: int) -> tuple[AlertClose, DeskAlert]:
            known = _open_alert(known, alert_id, now_ms)
            alert = replace(known.alert, revision=known.alert.revision + 1)
            return (
                AlertClose(alert_id, alert.revision, outcome, UNASSIGNED),
                replace(known, alert=alert, outcome=outcome, changed_at_ms=now_ms),
            )

        return self._change(alert_id, expected_revision, change, companion)

    def forget_words(self, alert_id: str) -> None:
        """Drop what an alert said in words. Its state and revision stay, and nobody is told."""
        key = alert_key(alert_id)
        while True:
            with self._client.pipeline(transaction=True) as pipeline:
                cast(Any, pipeline).watch(key)
                known = _read_state(cast("bytes | None", self._client.get(key)))
                if known is None:
                    return
                pipeline.multi()
                pipeline.set(key, _write_state(replace(known, content={})))
                try:
                    pipeline.execute()
                except redis.WatchError as error:
                    raise_if_lost(error)
                    continue
            return

    def show(self, alert_id: str) -> DeskAlert | None:
        """One alert; None if there never was one of this id."""
        return _read_state(self._client.get(alert_key(alert_id)))

    def show_each(self, alert_ids: Sequence[str]) -> Sequence[DeskAlert | None]:
        """As `show`, of several in one round trip."""
        if not alert_ids:
            return []
        states = cast("Sequence[bytes | None]", self._client.mget([alert_key(alert_id) for alert_id in alert_ids]))
        return [_read_state(state) for state in states]

    def list(self, only_open: bool = False) -> list[DeskAlert]:
        """All alerts, the last published first."""
        ids = cast("list[bytes]", self._client.zrevrange(ALERT_IDS_KEY, 0, -1))
        alerts = [state for state in self.show_each([raw.decode() for raw in ids]) if state is not None]
        if not only_open:
            return alerts
        now_ms = self.now_ms()
        return [alert for alert in alerts if alert.is_open(now_ms)]

    def now_ms(self) -> int:
        """The desk's clock: the server's."""
        seconds, microseconds = self._client.time()
        return seconds * 1000 + microseconds // 1000

    def wait_copied(self, desk_id: LogId, timeout_s: float) -> bool:
        """Wait until an event is in every log; whether it was within the timeout."""
        settings = read_settings(self._client)
        if settings is None:
            return False
        keys = [relay_key(shard) for shard in range(settings.shard_count)]
        deadline_s = time.monotonic() + timeout_s
        pause_s = 0.001
        while True:
            copied = cast("list[bytes | None]", self._client.mget(keys))
            if all(raw is not None and parse_id(raw) >= desk_id for raw in copied):
                return True
            if time.monotonic() + pause_s > deadline_s:
                return False
            time.sleep(pause_s)
            pause_s = min(0.05, pause_s * 2)

    def _change(
        self, alert_id: str, expected_revision: int | None, change: Any, companion: Companion | None
    ) -> DeskAnswer:
        """Compare and set: the event and the alert's new state in one MULTI, if the state is still what was read."""
        key = alert_key(alert_id)
        while True:
            with self._client.pipeline(transaction=True) as pipeline:
                watched = (key, *(companion.keys() if companion is not None else ()))
                raw, (seconds, microseconds) = _watch_and_read(pipeline, watched, ("GET", key), ("TIME",))
                known, now_ms = _read_state(raw), seconds * 1000 + microseconds // 1000
                if companion is not None:
                    companion.look(known, now_ms)
                if expected_revision is not None and known is not None and known.alert.revision != expected_revision:
                    raise RevisionConflict(alert_id, known.alert.revision, expected_revision)
                event, state = change(known, now_ms)
                kind, payload = encode_entry(event)
                pipeline.multi()
                pipeline.xadd(DESK_KEY, {kind: payload})
                pipeline.set(key, _write_state(state))
                pipeline.zadd(ALERT_IDS_KEY, {alert_id: state.published_at_ms})
                if companion is not None:
                    companion.write(pipeline, state)
                try:
                    desk_id = parse_id(pipeline.execute()[0])
                except redis.WatchError as error:
                    raise_if_lost(error)
                    continue  # somebody was faster: look again, which for a stale edit ends in RevisionConflict
            return DeskAnswer(state.alert.revision, desk_id)


def _watch_and_read(pipeline: Any, keys: Sequence[str], *reads: tuple[str | int, ...]) -> list[Any]:
    """WATCH, and what is to stay as it is now, in one round trip. Answers as the client gives them, without WATCH's.

    Behind it the pipeline is as behind its own `watch`, which would wait for an answer before anything can be read.
    Raises redis.RedisError.
    """
    connection = pipeline.connection = pipeline.connection or pipeline.connection_pool.get_connection()
    commands = [("WATCH", *keys), *reads]
    connection.send_packed_command(connection.pack_commands(commands))
    answers: list[Any] = []
    for command in commands:
        try:
            answers.append(pipeline.parse_response(connection, command[0]))
        except redis.ResponseError as error:
            answers.append(error)  # those of the other commands have to be read, too
    for answer in answers:
        if isinstance(answer, redis.ResponseError):
            raise answer
    return answers[1:]


def _open_alert(known: DeskAlert | None, alert_id: str, now_ms: int) -> DeskAlert:
    if known is None:
        raise AlertRefused(f"alert {alert_id!r}: was never published")
    if not known.is_open(now_ms):
        raise AlertRefused(f"alert {alert_id!r}: was closed as {known.outcome or 'cancelled'}, and stays so")
    return known


def changed_alert_ids(client: redis.Redis, seen: LogId, head: LogId) -> list[str]:
    """Alerts that the desk's stream names behind `seen`, up to `head`; each once. Raises redis.RedisError."""
    alert_ids: dict[str, None] = {}
    while seen < head:
        entries = cast(
            "list[tuple[bytes, dict[bytes, bytes]]]",
            client.xrange(DESK_KEY, f"({format_id(seen)}", format_id(head), count=CHANGED_AT_ONCE),
        )
        if not entries:
            break
        for _, fields in entries:
            try:
                event = decode_entry(*next(iter(fields.items())))
            except MalformedEntry:
                continue  # the relay counts and logs it
            if isinstance(event, AlertRevision):
                alert_ids[event.alert.alert_id] = None
            elif isinstance(event, AlertClose):
                alert_ids[event.alert_id] = None
        seen = parse_id(entries[-1][0])
    return list(alert_ids)


def _write_state(state: DeskAlert) -> bytes:
    _, payload = encode_entry(AlertRevision("publish", state.alert, UNASSIGNED))
    fields = {
        "alert": payload,
        "outcome": state.outcome,
        "content": state.content,
        "published_at_ms": state.published_at_ms,
        "changed_at_ms": state.changed_at_ms,
    }
    return cast(bytes, msgpack.packb(fields))


def _read_state(raw: object) -> DeskAlert | None:
    if raw is None:
        return None
    fields = msgpack.unpackb(cast(bytes, raw))
    revision = decode_entry(b"publish", fields["alert"])
    assert isinstance(revision, AlertRevision), "the desk keeps revisions"
    return DeskAlert(
        revision.alert, fields["outcome"], fields["content"], fields["published_at_ms"], fields["changed_at_ms"]
    )


# --- the relay --------------------------------------------------------------------------------------------------------


class Relay:
    """Copies desk events to the shard logs, in desk order. Idempotent; any number may run at once."""

    def __init__(self, client: redis.Redis, metrics: Metrics = METRICS, is_cluster: bool | None = None) -> None:
        """`is_cluster`: whether the server is a node of one; None: it is asked."""
        self._client = client
        self._metrics = metrics
        self._is_cluster = is_cluster
        self._keys: list[str] = []
        """Where each shard's position is kept; empty until the logs have been seen."""

    def copy_pending(self) -> LogId:
        """Copy what any log still lacks; returns the last desk id that is in all of them.

        Raises SettingsMismatch if there are no logs yet; redis.RedisError: then call again, nothing is copied twice
        that matters.
        """
        if not self._keys:
            settings = read_settings(self._client)
            if settings is None:
                raise SettingsMismatch("there are no logs yet to copy alerts to; start `tuanyuan run` first")
            if self._is_cluster is None:
                self._is_cluster = self._client.info("server").get("redis_mode") == "cluster"
            self._keys = [relay_key(shard) for shard in range(settings.shard_count)]
        # One question for all shards: most of the time no log lacks anything.
        with self._client.pipeline(transaction=False) as asking:
            asking.xrevrange(DESK_KEY, count=1)
            asking.mget(self._keys)
            last, raws = asking.execute()
        newest = parse_id(last[0][0]) if last else FIRST
        positions = [_position(raw) for raw in raws]
        lacking = [shard for shard, copied in enumerate(positions) if copied < newest]
        if not lacking:
            return min(positions)
        # A cluster takes no transaction over the keys of several shards. Elsewhere one saves 4 round trips a shard, and
        # a server that takes large appends lets each of them wait for the disk.
        together = [[shard] for shard in lacking] if self._is_cluster else [lacking]
        copied_to = [self._copy_to(shards, min(positions[shard] for shard in shards)) for shards in together]
        return min(*copied_to, *(copied for copied in positions if copied >= newest), newest)

    def _copy_to(self, shards: Sequence[int], seen: LogId) -> LogId:
        """Copy what the logs of some shards lack; returns the last desk id that all of them have, `seen` by now."""
        keys = [relay_key(shard) for shard in shards]
        while True:
            with self._client.pipeline(transaction=True) as pipeline:
                # Watched, so that a slow relay does not turn `relay` back behind a faster one's copies.
                raws, behind_seen = _watch_and_read(pipeline, keys, ("MGET", *keys), _events_behind(seen))
                copied = [_position(raw) for raw in cast("list[bytes | None]", raws)]
                events = [(parse_id(raw_id), fields) for raw_id, fields in behind_seen]
                if not events:
                    return min(copied)
                pipeline.multi()
                for shard, known in zip(shards, copied, strict=True):
                    for desk_id, fields in events:
                        entry = self._entry(desk_id, fields) if desk_id > known else None
                        if entry is not None:
                            kind, payload = entry
                            pipeline.xadd(log_key(shard), {kind: payload})
                    pipeline.set(relay_key(shard), format_id(max(known, events[-1][0])))
                try:
                    pipeline.execute()
                except redis.WatchError as error:
                    raise_if_lost(error)
                    continue
            seen = events[-1][0]
            if len(events) < RELAY_EVENTS_MAX:
                return seen

    def _entry(self, desk_id: LogId, fields: Mapping[bytes, bytes]) -> tuple[bytes, bytes] | None:
        """An event with its desk id in it; None, counted and logged, if what stands on the desk is no event."""
        try:
            if len(fields) != 1:
                raise MalformedEntry(f"must have one field, got {len(fields)}")
            ((kind, payload),) = fields.items()
            event = decode_entry(kind, payload)
            if not isinstance(event, AlertRevision | AlertClose):
                raise MalformedEntry(f"must be an alert event, got {kind[:32]!r}")
        except MalformedEntry as malformed:
            self._metrics.count("malformed_entries_total")
            logger.error("desk entry %s is passed over: %s", format_id(desk_id), malformed)
            return None
        return encode_entry(replace(event, desk_id=desk_id))


def _events_behind(desk_id: LogId) -> tuple[str | int, ...]:
    """The command that reads the desk's next events."""
    return "XRANGE", DESK_KEY, f"({format_id(desk_id)}", "+", "COUNT", RELAY_EVENTS_MAX


def _position(raw: bytes | None) -> LogId:
    """The last desk event that a log has."""
    return FIRST if raw is None else parse_id(raw)


class RelayThread:
    """A safety net in every flow process: copies what a crashed publisher left on the desk, and waits for more."""

    def __init__(
        self,
        client: redis.Redis,
        open_link: LinkOpener,
        metrics: Metrics = METRICS,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` is called ahead of every copying; it may raise AppendsRefused, and copying then waits."""
        self._client = client
        self._open_link = open_link
        self._check = check
        self._relay = Relay(client, metrics)
        self._link: Any = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="desk-relay", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop and wait for the thread's end."""
        self._stopping.set()
        link = self._link
        if link is not None:
            link.close()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                if self._link is None:
                    self._link = self._open_link()
                self._check()
                copied = self._relay.copy_pending()
                failures = 0
                if self._stopping.is_set():
                    break
                # Wakes up with the desk's next event.
                self._link.ask(
                    "XREAD", "COUNT", 1, "BLOCK", round(RELAY_BLOCK_S * 1000), "STREAMS", DESK_KEY, format_id(copied)
                )
            except (redis.RedisError, ServerRefused, SettingsMismatch, AppendsRefused) as error:
                if self._link is not None:
                    self._link.close()
                    self._link = None
                if self._stopping.is_set():
                    break
                failures += 1
                if worth_a_line(failures):
                    logger.warning("alert events cannot be copied to the logs (try %d): %s", failures, error)
                self._stopping.wait(min(1.0, 0.02 * 2 ** min(failures, 8)))
        if self._link is not None:
            self._link.close()
