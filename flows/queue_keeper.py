"""Keeping the push queues: trimmed behind what every group has acknowledged, watched for partners that do not read.

    every 5 s, for all queues of this process's shards, in bundles of commands on one link:

    XLEN, XINFO GROUPS ──> XPENDING, XRANGE of what is not known yet ──> SET trimmed:{s3}:amap ──> XTRIM

    kept    what a group has not acknowledged: pending, or not delivered yet
            what the shard's log can still account for: caused by entries that are not trimmed there (`flows.audit`)
            all of it, while no group has ever read the queue: its partner was not set up, which is an alarm

A queue is trimmed, never deleted: its last id stays, and with it the refusal of everything that was in it already. A
cut lies between the pushes of two log entries, and `trimmed:{s3}:amap` names it: what is missing behind it was lost.

A partner that is disabled has its queues emptied, and kept empty. Its pushes are written as before, so that their ids
are what the log says; who is enabled again gets what is written from then on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import redis

from flows.dead_letters import dead_key
from flows.log import (
    FIRST,
    LogId,
    SettingsMismatch,
    done_key,
    format_id,
    parse_id,
    push_key,
    read_settings,
    settings_key,
    trimmed_key,
)
from flows.metrics import METRICS, Metrics
from flows.push_commands import first_push_id, log_id_of
from flows.server import Link, LinkOpener, ServerRefused, packed, worth_a_line
from flows.wire import SETTINGS, decode_entry
from geoindex.entries import Settings

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
"""Half of the 10 s within which an alarm has to come. A round over 1,536 queues (64 shards, 24 partners) takes 20 ms
of one core here and 6 ms of the server's (*measured*)."""
UNREAD_ALARM_MS = 300_000
BUNDLE_COMMANDS = 512
"""Commands sent before their replies are read: about 40 KB, a millisecond of the server's time."""
TRIM_ENTRIES = 2_000
"""Of one XTRIM, about: the server needs 2 us for each of 10 KB (*measured*: 100,000 at once stop it for 220 ms)."""
DISABLED_KEY = "disabled"
"""Set: names of the partners that are disabled."""
ALARM = "queue_unread"
END: LogId = ((1 << 63) - 1, 0)
"""Behind every entry."""


# --- disabling a partner ----------------------------------------------------------------------------------------------


def disable_partner(client: redis.Redis, partner: str) -> bool:
    """Drop a partner's queues and dead letters, within seconds, and all that is written there from now on.

    Whether it was enabled before. Raises ValueError for a partner that does not exist; redis.RedisError.
    """
    _check_partner(client, partner)
    return bool(client.sadd(DISABLED_KEY, partner))


def enable_partner(client: redis.Redis, partner: str) -> bool:
    """Keep a partner's queues again. What was dropped does not come back: not even the `alert` of a later `resolved`.

    Whether it was disabled before. Raises ValueError for a partner that does not exist; redis.RedisError.
    """
    _check_partner(client, partner)
    return bool(client.srem(DISABLED_KEY, partner))


def disabled_partners(client: redis.Redis) -> frozenset[str]:
    """Names of the partners that are disabled."""
    return frozenset(name.decode() for name in cast(set[bytes], client.smembers(DISABLED_KEY)))


def _check_partner(client: redis.Redis, partner: str) -> None:
    settings = read_settings(client)
    known = () if settings is None else settings.partners
    if partner not in known:
        raise ValueError(f"no such partner: {partner!r}; there are {', '.join(known) or 'none yet'}")


def queue_trimmed_key(shard: int, partner: str) -> str:
    """Id below which a queue was trimmed: the first that the pushes of a log entry could have."""
    return f"trimmed:{{s{shard}}}:{partner}"


# --- the keeper -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Group:
    """A consumer group, as the server has it."""

    name: bytes
    pending_count: int
    delivered: LogId
    """The last entry that was handed to a consumer."""
    all_delivered: bool
    pending_min: LogId = END


@dataclass(slots=True)
class _Queue:
    """What is known of one queue."""

    shard: int
    partner: str
    key: str
    cut: LogId
    """Below this it was trimmed."""
    entry_count: int = 0
    groups: list[_Group] = field(default_factory=list)
    next_of: dict[bytes, tuple[LogId, LogId]] = field(default_factory=dict)
    """By group: what it had been delivered, and the first entry behind that. Asked for once, not in every round."""

    def oldest(self) -> LogId | None:
        """The oldest entry that a group has not acknowledged; None if there is none."""
        if not self.entry_count:
            return None
        found = [group.pending_min for group in self.groups if group.pending_count]
        found += [following for _, following in self.next_of.values()]
        return min(found, default=None)

    def acknowledged(self) -> LogId:
        """Below this, every group has acknowledged everything; FIRST without groups."""
        floors = []
        for group in self.groups:
            if group.pending_count:
                floors.append(group.pending_min)
            elif not group.all_delivered:
                # Without a known follower, as after entries were deleted by hand: behind what was delivered.
                behind = group.delivered[0], group.delivered[1] + 1
                floors.append(self.next_of.get(group.name, (FIRST, behind))[1])
        return min(floors, default=END if self.groups else FIRST)


class QueueKeeper:
    """Trims and watches the queues of one process's shards. One thread, one link. Two keepers of a shard do no harm.

    A link belongs to one run of the server: what was learned of the groups is never used on another one.
    """

    def __init__(
        self,
        open_link: LinkOpener,
        shards: Iterable[int],
        metrics: Metrics = METRICS,
        keeps_all: bool = False,
        unread_alarm_ms: float = UNREAD_ALARM_MS,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """`keeps_all`: what was acknowledged stays as well; disabled partners' queues are emptied all the same."""
        self._open_link = open_link
        self._shards = list(shards)
        self._label = _ranges(self._shards)
        self._metrics = metrics
        self._keeps_all = keeps_all
        self._unread_alarm_ms = unread_alarm_ms
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="queue-keeper", daemon=True)
        self._link: Link | None = None
        self._queues: dict[tuple[int, str], _Queue] = {}
        self._settings_payload: bytes | None = None
        self._partners: tuple[str, ...] = ()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop and wait for the thread's end."""
        self._stopping.set()
        link = self._link
        if self._thread.is_alive():
            self._thread.join(timeout_s / 2)
        if self._thread.is_alive() and link is not None:
            link.close()  # a server that hangs
            self._thread.join(timeout_s / 2)

    def _run(self) -> None:
        failures = 0
        while not self._stopping.wait(self._interval_s if failures == 0 else min(self._interval_s, 0.1 * 2**failures)):
            try:
                self.round()
                failures = 0
            except (redis.RedisError, ServerRefused, SettingsMismatch) as error:
                if self._stopping.is_set():
                    break
                failures = min(failures + 1, 1 << 16)
                self._metrics.count("queue_keeper_errors_total")
                if worth_a_line(failures):
                    logger.warning("queues are not trimmed (try %d): %s", failures, error)
                self._close_link()
        self._close_link()

    def _close_link(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = None
        self._queues = {}

    def round(self) -> int:
        """Look at every queue once, trim what may go, set the gauges and the alarm; how many entries went.

        Public for simulators and tests. Raises redis.RedisError, ServerRefused: the link is closed by the caller's
        next round; SettingsMismatch.
        """
        if self._link is None:
            self._link = self._open_link()
            self._queues = {}
        link = self._link
        self._learn_partners(link)
        disabled = {name.decode() for name in cast(list[bytes], link.ask("SMEMBERS", DISABLED_KEY))}
        done, trimmed = self._positions(link)
        queues = self._known_queues(link)
        self._look(link, queues)
        trimmed_count = 0
        cuts = [(queue, self._cut(queue, disabled, done, trimmed)) for queue in queues]
        due = [(queue, cut) for queue, cut in cuts if cut > queue.cut and queue.entry_count]
        if due:
            trimmed_count = self._trim(link, due)
        for partner in disabled:
            _ask(link, [("XTRIM", dead_key(shard, partner), "MAXLEN", "=", 0) for shard in self._shards])
        self._report(queues, disabled, link.now_ms())
        return trimmed_count

    # --- looking ----------------------------------------------------------------------------------------------------

    def _learn_partners(self, link: Link) -> None:
        """Partners are only ever appended, so a queue that is known stays one."""
        payload = cast("bytes | None", link.ask("GET", settings_key(self._shards[0])))
        if payload is None or payload == self._settings_payload:
            return
        self._partners = cast(Settings, decode_entry(SETTINGS, payload)).partners
        self._settings_payload = payload

    def _positions(self, link: Link) -> tuple[dict[int, LogId], dict[int, LogId]]:
        """Of each shard: what is done, and up to where its log was trimmed."""
        keys = [*map(done_key, self._shards), *map(trimmed_key, self._shards)]
        replies = [FIRST if raw is None else parse_id(cast(bytes, raw)) for raw in _ask_each(link, "GET", keys)]
        count = len(self._shards)
        return (
            dict(zip(self._shards, replies[:count], strict=True)),
            dict(zip(self._shards, replies[count:], strict=True)),
        )

    def _known_queues(self, link: Link) -> list[_Queue]:
        pairs = [(shard, partner) for shard in self._shards for partner in self._partners]
        new = [pair for pair in pairs if pair not in self._queues]
        cuts = _ask_each(link, "GET", [queue_trimmed_key(*pair) for pair in new])
        for (shard, partner), raw in zip(new, cuts, strict=True):
            cut = FIRST if raw is None else parse_id(cast(bytes, raw))
            self._queues[shard, partner] = _Queue(shard, partner, push_key(shard, partner), cut)
        return [self._queues[pair] for pair in pairs]

    def _look(self, link: Link, queues: Sequence[_Queue]) -> None:
        """Learn each queue's length, its groups, and the oldest entries that they have not acknowledged."""
        replies = _ask(
            link, [words for queue in queues for words in (("XLEN", queue.key), ("XINFO", "GROUPS", queue.key))]
        )
        for index, queue in enumerate(queues):
            length, groups = replies[2 * index : 2 * index + 2]
            if isinstance(length, redis.ResponseError):
                raise length
            queue.entry_count = cast(int, length)
            queue.groups = (
                [] if isinstance(groups, redis.ResponseError) else [_group(flat) for flat in cast(Any, groups)]
            )
            names = {group.name for group in queue.groups} or {b""}
            queue.next_of = {name: known for name, known in queue.next_of.items() if name in names}

        asked: list[tuple[_Queue, _Group, tuple[str | bytes | int, ...]]] = []
        for queue in queues:
            if not queue.entry_count:
                queue.next_of = {}
                continue
            for group in queue.groups or [_Group(b"", 0, FIRST, all_delivered=False)]:
                known = queue.next_of.get(group.name)
                if group.pending_count:
                    asked.append((queue, group, ("XPENDING", queue.key, group.name)))
                if group.pending_count or group.all_delivered:
                    queue.next_of.pop(group.name, None)
                elif known is None or known[0] != group.delivered:
                    after = f"({format_id(group.delivered)}"
                    asked.append((queue, group, ("XRANGE", queue.key, after, "+", "COUNT", 1)))
        for (queue, group, words), reply in zip(asked, _ask(link, [words for _, _, words in asked]), strict=True):
            if isinstance(reply, redis.ResponseError):
                if "NOGROUP" in str(reply):
                    continue  # destroyed since
                raise reply
            found = cast(list[Any], reply)
            if words[0] == "XRANGE":
                queue.next_of.pop(group.name, None)
                if found:
                    queue.next_of[group.name] = group.delivered, parse_id(found[0][0])
            elif found[0]:
                group.pending_min = parse_id(found[1])
            else:
                group.pending_min, group.pending_count = group.delivered, 0  # acknowledged since: next time

    # --- trimming ---------------------------------------------------------------------------------------------------

    def _cut(self, queue: _Queue, disabled: set[str], done: dict[int, LogId], trimmed: dict[int, LogId]) -> LogId:
        """The id below which the queue may be trimmed now: the first that pushes of some log entry could have."""
        if queue.partner in disabled:
            return _behind(done[queue.shard])
        if self._keeps_all:
            return FIRST
        return min(first_push_id(log_id_of(queue.acknowledged())), _behind(trimmed[queue.shard]))

    def _trim(self, link: Link, due: Sequence[tuple[_Queue, LogId]]) -> int:
        """First the marks, then the trims: at every moment, what is missing lies below its mark."""
        marks = [("SET", queue_trimmed_key(queue.shard, queue.partner), format_id(cut)) for queue, cut in due]
        for (queue, cut), reply in zip(due, _ask(link, marks), strict=True):
            if not isinstance(reply, redis.ResponseError):
                queue.cut = cut
            # A server that is full takes no SET, and trimming is what it needs most. The mark is set next time.
        total = 0
        for queue, cut in due:
            # In steps, for the server does nothing else meanwhile.
            nearly = ("XTRIM", queue.key, "MINID", "~", format_id(cut), "LIMIT", TRIM_ENTRIES)
            while queue.entry_count > TRIM_ENTRIES and (count := cast(int, link.ask(*nearly))):
                total += self._count_trimmed(queue, count)
        exactly = [("XTRIM", queue.key, "MINID", "=", format_id(cut)) for queue, cut in due]
        for (queue, _), reply in zip(due, _ask(link, exactly), strict=True):
            if isinstance(reply, redis.ResponseError):
                raise reply
            total += self._count_trimmed(queue, cast(int, reply))
        return total

    def _count_trimmed(self, queue: _Queue, count: int) -> int:
        if count:
            self._metrics.count("queue_entries_trimmed_total", count, partner=queue.partner)
        return count

    # --- watching ---------------------------------------------------------------------------------------------------

    def _report(self, queues: Sequence[_Queue], disabled: set[str], now_ms: float) -> None:
        for partner in self._partners:
            of_partner = [queue for queue in queues if queue.partner == partner]
            labels = {"partner": partner, "shards": self._label}
            enabled = partner not in disabled
            oldest = min((found for queue in of_partner if (found := queue.oldest())), default=None)
            age_ms = max(0.0, now_ms - oldest[0]) if oldest and enabled else 0.0
            pending = sum(group.pending_count for queue in of_partner for group in queue.groups)
            self._metrics.gauge("queue_entries", sum(queue.entry_count for queue in of_partner), **labels)
            self._metrics.gauge("queue_pending", pending if enabled else 0, **labels)
            self._metrics.gauge("queue_oldest_unacknowledged_ms", age_ms, **labels)
            words = None
            if age_ms > self._unread_alarm_ms:
                read_never = any(queue.entry_count and not queue.groups for queue in of_partner)
                words = f"the oldest unacknowledged push of {partner!r} is {age_ms / 1000:,.0f} s old" + (
                    ", and some of its queues have no consumer group" if read_never else ""
                )
            self._metrics.alarms.put(ALARM, words, partner)


def _behind(log_id: LogId) -> LogId:
    """The id below which lies what a log entry, and those before it, have caused; FIRST for FIRST."""
    return FIRST if log_id == FIRST else first_push_id((log_id[0], log_id[1] + 1))


def _group(flat: Sequence[Any]) -> _Group:
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    return _Group(
        fields[b"name"],
        fields[b"pending"],
        parse_id(fields[b"last-delivered-id"]),
        all_delivered=fields[b"lag"] == 0,
    )


def _ask(link: Link, commands: Sequence[tuple[str | bytes | int, ...]]) -> list[object]:
    """The commands' replies in order, error replies among them; so many at a time as the server does in a moment."""
    replies: list[object] = []
    for start in range(0, len(commands), BUNDLE_COMMANDS):
        bundle = commands[start : start + BUNDLE_COMMANDS]
        link.send([packed(*words) for words in bundle])
        replies += [link.receive() for _ in bundle]
    return replies


def _ask_each(link: Link, command: str, keys: Sequence[str]) -> list[object]:
    """One command's replies for each of many keys. Raises redis.ResponseError for an error reply."""
    replies = _ask(link, [(command, key) for key in keys])
    for reply in replies:
        if isinstance(reply, redis.ResponseError):
            raise reply
    return replies


def _ranges(shards: Sequence[int]) -> str:
    """`0-3,7`: whose queues a gauge is about."""
    parts: list[list[int]] = []
    for shard in sorted(shards):
        if parts and parts[-1][1] == shard - 1:
            parts[-1][1] = shard
        else:
            parts.append([shard, shard])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
