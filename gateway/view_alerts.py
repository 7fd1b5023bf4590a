"""Alerts as the operator's view shows them: where the ring is, when it grows, and about how many phones were told.

    desk's stream ──what changed──> the open alerts ─┐
    tally:{s}, handed:{s} ──a question a shard──> sums ─┴─> one JSON object an alert, by jurisdiction
                                                         └─> `told:{desk}:<alert>`: phones told over time

Nothing of the child is in here. Counts are made of what may be shown of each partner, so no hidden one can be worked
out from a sum; below 20 they are null.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import msgpack
import orjson
import redis

from flows.desk import ALERT_IDS_KEY, DESK_KEY, Desk, DeskAlert, changed_alert_ids
from flows.log import LogId, last_id
from flows.tallies import tally_key
from gateway.alert_models import TIME_MS_MAX, moment
from gateway.alert_views import is_matching, reads_by_itself, ring_now
from gateway.cases import read_cases
from gateway.handover import ACKNOWLEDGED, DELIVERED, handed_field, handed_key
from gateway.jurisdiction import MINISTRY
from gateway.phone_counts import shown_count
from gateway.view_history import TOO_SMALL
from geoindex.entries import Settings

logger = logging.getLogger(__name__)

HANDED_EVERY_S = 10.0
"""Delivered and acknowledged are asked for so often; told more often."""
CLOSED_FOLLOWED_MS = 600_000
"""So long after its end it is still written down how many were told of it."""
TOLD_KEPT_S = 35 * 86_400
"""Since the last change of what is told of an alert."""
TOLD_POINTS_MAX = 5_000
READ_AT_ONCE = 500


def told_key(alert_id: str) -> str:
    """Stream: [told, resolved] as they were shown, whenever one of them changed; ids are the steps of the history."""
    return f"told:{{desk}}:{alert_id}"


@dataclass(slots=True)
class Counted:
    """What has become of an alert. None: fewer than 20, or not known."""

    told: int | None = None
    resolved: int | None = None
    delivered: int | None = None
    acknowledged: int | None = None


@dataclass(slots=True)
class _Known:
    """An alert that is open, or ended a short while ago."""

    desk: DeskAlert
    division: str
    counted: Counted = field(default_factory=Counted)
    recorded: tuple[int | None, int | None] | None = None
    """What stands last in `told_key`; None: it was not looked at yet."""


class OpenAlerts:
    """The open alerts, kept up with the desk by whoever calls. One thread at a time."""

    def __init__(self, client: redis.Redis, desk: Desk) -> None:
        self._client = client
        self._desk = desk
        self._seen: LogId | None = None
        """Of the desk's stream; None: nothing was read yet."""
        self._known: dict[str, _Known] = {}
        self._handed_at_s = float("-inf")
        self._by_itself: dict[str, bool] = {}

    def look(self, now_ms: int) -> None:
        """Take up what changed at the desk. Raises redis.RedisError."""
        head = last_id(self._client, DESK_KEY)
        if self._seen is None or head < self._seen:  # the server lost its tail: nothing that was read counts
            self._known.clear()
            raw_ids = cast("list[bytes]", self._client.zrange(ALERT_IDS_KEY, 0, -1))
            changed = [raw.decode() for raw in raw_ids]
        else:
            changed = changed_alert_ids(self._client, self._seen, head)
        for start in range(0, len(changed), READ_AT_ONCE):
            self._take(changed[start : start + READ_AT_ONCE], now_ms)
        self._seen = head
        for alert_id in [name for name, known in self._known.items() if not _is_followed(known.desk, now_ms)]:
            del self._known[alert_id]

    def _take(self, alert_ids: list[str], now_ms: int) -> None:
        found = dict(zip(alert_ids, self._desk.show_each(alert_ids), strict=True))
        followed = [name for name, desk in found.items() if desk is not None and _is_followed(desk, now_ms)]
        for alert_id, case in zip(followed, read_cases(self._client, followed), strict=True):
            desk = cast(DeskAlert, found[alert_id])
            division = MINISTRY if case is None else case.division
            known = self._known.get(alert_id)
            if known is None:
                self._known[alert_id] = _Known(desk, division)
            else:
                known.desk, known.division = desk, division

    def count(self, settings: Settings, now_s: float) -> None:
        """Ask how many phones have been told, and now and then how many pushes were handed over.

        Raises redis.RedisError.
        """
        if not self._known:
            return
        with_handed = now_s - self._handed_at_s >= HANDED_EVERY_S
        if with_handed:
            self._by_itself = {name: reads_by_itself(self._client, name) for name in settings.partners}
            self._handed_at_s = now_s
        alert_ids = list(self._known)
        partners = [name for name in settings.partners if not self._by_itself.get(name, True)]
        names = [
            (alert_id, partner, what)
            for alert_id in alert_ids
            for partner in partners
            for what in (DELIVERED, ACKNOWLEDGED)
        ]
        fields = [handed_field(alert_id, partner, "alert", what) for alert_id, partner, what in names]
        with self._client.pipeline(transaction=False) as pipeline:
            for shard in range(settings.shard_count):
                pipeline.hmget(tally_key(shard), cast(Any, alert_ids))
                if with_handed and fields:
                    pipeline.hmget(handed_key(shard), cast(Any, fields))
            replies = cast("list[list[bytes | None]]", pipeline.execute())
        both = with_handed and bool(fields)
        self._add_told(alert_ids, replies[::2] if both else replies)
        if both:
            self._add_handed(names, replies[1::2])

    def _add_told(self, alert_ids: list[str], replies: Iterable[list[bytes | None]]) -> None:
        told: dict[str, dict[str, int]] = {alert_id: {} for alert_id in alert_ids}
        resolved: dict[str, dict[str, int]] = {alert_id: {} for alert_id in alert_ids}
        for reply in replies:
            for alert_id, payload in zip(alert_ids, reply, strict=True):
                if payload is not None:
                    fields = cast("dict[str, Any]", msgpack.unpackb(payload))
                    for sums, counts in ((told, fields["told"]), (resolved, fields["resolved"])):
                        for partner, count in counts.items():
                            sums[alert_id][partner] = sums[alert_id].get(partner, 0) + count
        for alert_id in alert_ids:
            counted = self._known[alert_id].counted
            counted.told, counted.resolved = shown_sum(told[alert_id]), shown_sum(resolved[alert_id])

    def _add_handed(self, names: list[tuple[str, str, str]], replies: Iterable[list[bytes | None]]) -> None:
        sums = dict.fromkeys(names, 0)
        for reply in replies:
            for name, raw in zip(names, reply, strict=True):
                sums[name] += int(raw or 0)
        by_alert: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
        for (alert_id, partner, what), count in sums.items():
            delivered, acknowledged = by_alert.setdefault(alert_id, ({}, {}))
            # What was acknowledged had been delivered, whatever was counted then.
            delivered[partner] = max(delivered.get(partner, 0), count)
            if what == ACKNOWLEDGED:
                acknowledged[partner] = count
        for alert_id, (delivered, acknowledged) in by_alert.items():
            counted = self._known[alert_id].counted
            counted.delivered, counted.acknowledged = shown_sum(delivered), shown_sum(acknowledged)

    def record(self, step_ms: int) -> None:
        """Write down what is told of each alert, where it has changed. Raises redis.RedisError."""
        fresh = [alert_id for alert_id, known in self._known.items() if known.recorded is None]
        if fresh:
            with self._client.pipeline(transaction=False) as pipeline:
                for alert_id in fresh:
                    pipeline.xrevrange(told_key(alert_id), count=1)
                for alert_id, entries in zip(fresh, pipeline.execute(), strict=True):
                    self._known[alert_id].recorded = _counts(entries[0][1]) if entries else (None, None)
        changed = {
            alert_id: now
            for alert_id, known in self._known.items()
            if (now := (known.counted.told, known.counted.resolved)) != known.recorded
        }
        if not changed:
            return
        with self._client.pipeline(transaction=False) as pipeline:
            for alert_id, (told, resolved) in changed.items():
                key = told_key(alert_id)
                fields = {"told": told or 0, "resolved": resolved or 0}
                pipeline.xadd(key, cast(Any, fields), id=f"{step_ms}-1", maxlen=TOLD_POINTS_MAX)
                pipeline.expire(key, TOLD_KEPT_S)
            # Another gateway may have written the same step: then that stands.
            for written in pipeline.execute(raise_on_error=False):
                if isinstance(written, Exception) and TOO_SMALL not in str(written):
                    raise written
        for alert_id, now in changed.items():
            self._known[alert_id].recorded = now

    def views(self, now_ms: int) -> list[tuple[str, dict[str, Any]]]:
        """Each open alert's division and its view, the last published first."""
        shown = [known for known in self._known.values() if known.desk.is_open(now_ms)]
        shown.sort(key=lambda known: (-known.desk.published_at_ms, known.desk.alert.alert_id))
        return [(known.division, alert_view(known.desk, known.counted, now_ms)) for known in shown]

    def alerts_json(self, now_ms: int) -> list[tuple[str, bytes]]:
        """`views` as JSON objects."""
        return [(division, orjson.dumps(view)) for division, view in self.views(now_ms)]


def _is_followed(desk: DeskAlert, now_ms: int) -> bool:
    return desk.is_open(now_ms) or (desk.outcome is not None and now_ms - desk.changed_at_ms < CLOSED_FOLLOWED_MS)


def shown_sum(counts: Mapping[str, int]) -> int | None:
    """The sum of what may be shown of each partner; None: of none of them anything."""
    shown = [count for count in map(shown_count, counts.values()) if isinstance(count, int)]
    return sum(shown) if shown else None


def alert_view(desk: DeskAlert, counted: Counted, now_ms: int) -> dict[str, Any]:
    """An open alert as `gateway.view_models.ViewAlert` describes it."""
    alert = desk.alert
    ring = ring_now(desk, now_ms)
    assert ring is not None, "the alert is open"
    return {
        "id": alert.alert_id,
        "revision": alert.revision,
        "status": alert.status,
        "state": "open" if is_matching(desk, now_ms) else "expired",
        "location": {"lat": alert.lat, "lng": alert.lng},
        "missing_since": _moment(alert.missing_since_ms),
        "published_at": _moment(desk.published_at_ms),
        "schedule": [list(step) for step in alert.schedule],
        "ring_km": ring.km,
        "next_growth_ms": ring.next_growth,
        "next_ring_km": ring.next_km,
        "expires_at": _moment(alert.expires_at_ms),
        "audience": None if alert.audience is None else list(alert.audience),
        "told": counted.told,
        "delivered": counted.delivered,
        "acknowledged": counted.acknowledged,
        "retracted": counted.resolved,
    }


def _moment(at_ms: int) -> str:
    """From 1970 to 2100: what was published at the terminal may lie beyond."""
    return moment(max(0, min(TIME_MS_MAX, at_ms)))


# --- told over time ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToldHistory:
    """Parallel lists: a number holds until the next one."""

    at_ms: list[int]
    told: list[int | None]
    resolved: list[int | None]


def read_told(client: redis.Redis, alert_id: str, points_max: int) -> ToldHistory:
    """What was told of an alert over time; of more points than asked for, evenly some. Raises redis.RedisError."""
    entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(told_key(alert_id)))
    if len(entries) > points_max:
        step = (len(entries) - 1) / (points_max - 1)
        entries = [entries[round(index * step)] for index in range(points_max)]
    points = [(int(entry_id.partition(b"-")[0]), *_counts(fields)) for entry_id, fields in entries]
    return ToldHistory(*(list(column) for column in zip(*points, strict=True))) if points else ToldHistory([], [], [])


def _counts(fields: Mapping[bytes, bytes]) -> tuple[int | None, int | None]:
    return int(fields[b"told"]) or None, int(fields[b"resolved"]) or None
