"""Who was owed what: a slow, separate answer to the same question that the shard machines answer.

Reads shard logs entry by entry and applies the matching rules with dictionaries and whole-column haversines: no
cells, no covers, no device table, no stay boxes, nothing of `geoindex.shard`. What it finds is compared, push by
push, with what stands in the queues.

    logs ──> OwedPushes ──┐
                          ├──> missed / extra / duplicate
    queues ───────────────┘
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from geoindex.columns import E7, F64, I64, PingBatch
from geoindex.entries import AUTO_CLOSE_MS, HOUR_MS, Alert, AlertClose, AlertRevision, LogEntry, Settings

EARTH_RADIUS_KM = 6371.0088
ROWS_MIN = 1024


class OwedPush(NamedTuple):
    """One device told one thing. Two of the same are one too many."""

    kind: str
    alert_id: str
    revision: int
    partner: str
    device_id: str


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What the queues hold beside what was owed, each push counted as often as it is wrong."""

    pushes: int
    missed: list[OwedPush]
    extra: list[OwedPush]
    duplicate: list[OwedPush]

    @property
    def clean(self) -> bool:
        return not (self.missed or self.extra or self.duplicate)

    def line(self) -> str:
        return (
            f"{self.pushes:,} pushes, {len(self.missed)} missed, {len(self.extra)} extra, "
            f"{len(self.duplicate)} duplicate"
        )


def compare(owed: Iterable[OwedPush], queued: Iterable[OwedPush]) -> AuditResult:
    """Compare as multisets."""
    owed_counts, queued_counts = Counter(owed), Counter(queued)
    return AuditResult(
        pushes=queued_counts.total(),
        missed=sorted(push for push in owed_counts if push not in queued_counts),
        extra=sorted(push for push in queued_counts if push not in owed_counts),
        duplicate=sorted((queued_counts - Counter(dict.fromkeys(queued_counts, 1))).elements()),
    )


@dataclass
class _Open:
    alert: Alert
    told: set[int] = field(default_factory=set)
    clock_ms: int = 0
    """Up to when its growth and expiry have been worked through."""


class OwedPushes:
    """Apply the entries of one shard's log in order; `pushes` is who was owed what."""

    def __init__(self) -> None:
        self.pushes: list[OwedPush] = []
        self._settings = Settings()
        self._rows: dict[tuple[int, bytes], int] = {}
        self._names: list[tuple[int, str]] = []
        self._partner = np.zeros(ROWS_MIN, np.int64)
        self._lat = np.zeros(ROWS_MIN)
        self._lng = np.zeros(ROWS_MIN)
        self._observed_at_ms = np.zeros(ROWS_MIN, np.int64)
        self._open: dict[str, _Open] = {}
        self._closed: set[str] = set()
        self._desk_id = (0, 0)

    def apply(self, at_ms: int, entry: LogEntry) -> None:
        """One log entry with the time in its id."""
        if isinstance(entry, PingBatch) and entry.at_ms is not None:
            raise ValueError("an audit reads live logs: a ping batch must not carry a clock of its own")
        self._pass_time(at_ms)
        if isinstance(entry, Settings):
            self._settings = entry
        elif isinstance(entry, PingBatch):
            self._pings(at_ms, entry)
        elif isinstance(entry, AlertRevision | AlertClose) and entry.desk_id > self._desk_id:
            self._desk_id = entry.desk_id
            if isinstance(entry, AlertRevision):
                self._revision(at_ms, entry)
            elif entry.alert_id not in self._open:
                self._closed.add(entry.alert_id)
            else:
                known = self._open[entry.alert_id].alert.revision
                if entry.revision is None or entry.revision > known:
                    self._close(entry.alert_id, entry.revision or known)

    def _pass_time(self, at_ms: int) -> None:
        while True:
            due = [
                (time_ms, alert_id)
                for alert_id, opened in self._open.items()
                for time_ms in _moments(opened.alert, opened.clock_ms)
                if time_ms <= at_ms
            ]
            if not due:
                return
            time_ms, alert_id = min(due)
            opened = self._open[alert_id]
            if time_ms >= opened.alert.expires_at_ms + AUTO_CLOSE_MS:
                self._close(alert_id, opened.alert.revision)
                continue
            opened.clock_ms = time_ms
            self._meet_everyone(opened, time_ms)

    def _revision(self, at_ms: int, event: AlertRevision) -> None:
        alert = event.alert
        opened = self._open.get(alert.alert_id)
        if alert.alert_id in self._closed or (alert.status == "exercise" and not alert.audience):
            return
        if opened is None:
            if event.event == "update":
                return
            opened = self._open[alert.alert_id] = _Open(alert)
        else:
            if alert.revision <= opened.alert.revision or alert.status != opened.alert.status:
                return
            opened.alert = alert
            self._push("update", alert, alert.revision, opened.told)
        opened.clock_ms = at_ms
        self._meet_everyone(opened, at_ms)

    def _close(self, alert_id: str, revision: int) -> None:
        opened = self._open.pop(alert_id)
        self._closed.add(alert_id)
        self._push("resolved", opened.alert, revision, opened.told)

    def _pings(self, at_ms: int, batch: PingBatch) -> None:
        accepted = (batch.observed_at_ms <= at_ms + self._settings.future_tolerance_ms) & (
            batch.observed_at_ms >= at_ms - self._settings.live_window_ms
        )
        rows = self._rows_of(batch)
        pending = np.flatnonzero(accepted)
        while len(pending):
            # One ping of each device at a time, in order: a device may ping twice in a batch.
            _, first = np.unique(rows[pending], return_index=True)
            now = pending[np.sort(first)]
            pending = np.setdiff1d(pending, now, assume_unique=True)
            newer = now[batch.observed_at_ms[now] >= self._observed_at_ms[rows[now]]]
            self._lat[rows[newer]] = batch.lat_e7[newer] / E7
            self._lng[rows[newer]] = batch.lng_e7[newer] / E7
            self._observed_at_ms[rows[newer]] = batch.observed_at_ms[newer]
            for opened in self._open.values():
                self._meet(opened, at_ms, rows[now])

    def _rows_of(self, batch: PingBatch) -> I64:
        """Row of each ping's device; a new device gets the next row and a location before all times."""
        raw = batch.id_bytes.tobytes()
        rows = np.empty(len(batch), np.int64)
        start = 0
        for position, (partner, end) in enumerate(zip(batch.partner.tolist(), batch.id_end.tolist(), strict=True)):
            key = (partner, raw[start:end])
            start = end
            row = self._rows.get(key)
            if row is None:
                row = self._rows[key] = len(self._names)
                self._names.append((partner, key[1].decode()))
                if row == len(self._partner):
                    self._partner, self._lat, self._lng, self._observed_at_ms = (
                        np.concatenate([column, np.zeros_like(column)])
                        for column in (self._partner, self._lat, self._lng, self._observed_at_ms)
                    )
                self._partner[row] = partner
                self._observed_at_ms[row] = np.iinfo(np.int64).min
            rows[position] = row
        return rows

    def _meet_everyone(self, opened: _Open, at_ms: int) -> None:
        self._meet(opened, at_ms, np.arange(len(self._names)))

    def _meet(self, opened: _Open, at_ms: int, rows: I64) -> None:
        """Tell the alert to those of `rows` that are live, of its audience, inside, and not told yet."""
        alert = opened.alert
        if at_ms > alert.expires_at_ms or not len(rows):
            return
        rows = rows[self._observed_at_ms[rows] >= at_ms - self._settings.live_window_ms]
        if alert.audience is not None:
            audience = [index for index, name in enumerate(self._settings.partners) if name in alert.audience]
            rows = rows[np.isin(self._partner[rows], audience)]
        near = rows[_distance_km(alert.lat, alert.lng, self._lat[rows], self._lng[rows]) <= _radius_km(alert, at_ms)]
        found = [row for row in near.tolist() if row not in opened.told]
        self._push("alert", alert, alert.revision, found)
        opened.told.update(found)

    def _push(self, kind: str, alert: Alert, revision: int, rows: Iterable[int]) -> None:
        for row in rows:
            partner, device_id = self._names[row]
            self.pushes.append(OwedPush(kind, alert.alert_id, revision, self._settings.partners[partner], device_id))


def _distance_km(lat: float, lng: float, lats: F64, lngs: F64) -> F64:
    """Great-circle distances by the haversine formula (Sinnott, Sky and Telescope 68, 1984)."""
    phi, phis = math.radians(lat), np.radians(lats)
    half_chord2 = np.sin((phis - phi) / 2) ** 2 + math.cos(phi) * np.cos(phis) * np.sin(np.radians(lngs - lng) / 2) ** 2
    return np.asarray(2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.minimum(half_chord2, 1.0))))


def _step_end_ms(hours: float) -> int:
    """The first whole millisecond not before `hours`, these read to the microsecond."""
    return math.ceil(round(hours * HOUR_MS * 1000) / 1000)


def _radius_km(alert: Alert, at_ms: int) -> float:
    """Rule 4."""
    for hours, km in alert.schedule:
        if hours is None or at_ms - alert.missing_since_ms < _step_end_ms(hours):
            return km
    raise AssertionError("a schedule's last step has no end")


def _moments(alert: Alert, after_ms: int) -> list[int]:
    """When something happens to an open alert by itself, after that time: growth while it matches, automatic close."""
    grows = [alert.missing_since_ms + _step_end_ms(hours) for hours, _ in alert.schedule if hours is not None]
    return [time_ms for time_ms in grows if after_ms < time_ms <= alert.expires_at_ms] + [
        max(alert.expires_at_ms + AUTO_CLOSE_MS, after_ms)
    ]
