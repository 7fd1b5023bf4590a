"""Who was owed what: a separate answer to the same question that the shard machines answer.

Reads shard logs entry by entry and applies the matching rules with a dictionary of device ids, whole-column haversines
and bits for who was told: no cells, no covers, no device table, no stay boxes, nothing of `geoindex.shard`. What it
finds is compared, push by push, with what stands in the queues (`flows.reconcile`) or was pulled from them (`compare`).

    logs ──> OwedPushes ──┐
                          ├──> missed / extra / duplicate / unretracted
    queues ───────────────┘

A ping costs about half a microsecond: a dictionary look-up and, for each open alert, a comparison of latitudes; only
who is not told yet and within a ring's latitudes gets a distance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from geoindex.columns import E7, F64, I32, I64, U8, U16, U32, Bool, PingBatch
from geoindex.entries import AUTO_CLOSE_MS, HOUR_MS, Alert, AlertClose, AlertRevision, LogEntry, Settings

EARTH_RADIUS_KM = 6371.0088
ROWS_MIN = 1024
WORD_ALERTS = 64
NEVER_SEEN = np.iinfo(np.int64).min
"""`observed_at_ms` of a device without a location."""
NEVER_DUE = np.iinfo(np.int64).max
PAIRS_MAX = 1 << 22
"""Alerts times devices that are looked at together: 40 MB."""
BAND_SPARE_DEG = 1e-6
"""A tenth of a metre: no rounding keeps a device at a ring's northern edge from having its distance taken."""


class OwedPush(NamedTuple):
    """One device told one thing. Two of the same are one too many."""

    kind: str
    alert_id: str
    revision: int
    partner: str
    device_id: str


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What was told beside what was owed, each push counted as often as it is wrong."""

    pushes: int
    missed: list[OwedPush]
    extra: list[OwedPush]
    duplicate: list[OwedPush]
    unretracted: list[OwedPush] = field(default_factory=list)
    """The `alert` of a closed alert to a device that was never told `resolved`."""

    @property
    def clean(self) -> bool:
        return not (self.missed or self.extra or self.duplicate or self.unretracted)

    def line(self) -> str:
        return (
            f"{self.pushes:,} pushes, {len(self.missed)} missed, {len(self.extra)} extra, "
            f"{len(self.duplicate)} duplicate, {len(self.unretracted)} unretracted"
        )


def compare(owed: Iterable[OwedPush], told: Iterable[OwedPush], closed: Collection[str] = ()) -> AuditResult:
    """Compare as multisets. `closed`: alerts that have ended; everyone told of one must have heard so."""
    owed_counts, told_counts = Counter(owed), Counter(told)
    resolved = {(push.alert_id, push.partner, push.device_id) for push in told_counts if push.kind == "resolved"}
    return AuditResult(
        pushes=told_counts.total(),
        missed=sorted(push for push in owed_counts if push not in told_counts),
        extra=sorted(push for push in told_counts if push not in owed_counts),
        duplicate=sorted((told_counts - Counter(dict.fromkeys(told_counts, 1))).elements()),
        unretracted=sorted(
            push
            for push in told_counts
            if push.kind == "alert"
            and push.alert_id in closed
            and (push.alert_id, push.partner, push.device_id) not in resolved
        ),
    )


class Owed(NamedTuple):
    """Devices that one log entry owes one thing. `rows` i64[n]: their rows, see `Roll`."""

    log_id: tuple[int, int]
    kind: str
    alert_id: str
    revision: int
    rows: I64


@dataclass(frozen=True, slots=True)
class StartingFacts:
    """What is taken as given when a log is not read from its beginning: all that its past can still change.

    The device columns are parallel: ids as in `PingBatch`, `observed_at_ms` NEVER_SEEN where there is no location.
    """

    settings: Settings
    clock_ms: int
    desk_id: tuple[int, int]
    closed: frozenset[str]
    open: Sequence[tuple[Alert, I64]]
    """Open alerts, each with the positions of the devices that were told."""
    partner: U16
    id_bytes: U8
    id_end: U32
    lat_e7: I32
    lng_e7: I32
    observed_at_ms: I64


class Roll:
    """Every device that was ever named, by row: rows count up from 0 and stay."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}
        self._keys: list[bytes] = []
        self._prefixes: list[bytes] = []

    def __len__(self) -> int:
        return len(self._keys)

    def rows_of(self, partner: U16, id_bytes: U8, id_end: U32) -> I64:
        """Row of each device, i64[n]; one that is new gets the next."""
        self._prefix(int(partner.max(initial=0)))
        prefixes, raw = self._prefixes, id_bytes.tobytes()
        spans = zip(partner.tolist(), pairwise([0, *id_end.tolist()]), strict=True)
        return self._rows_of_keys([prefixes[index] + raw[start:end] for index, (start, end) in spans])

    def rows_of_names(self, partner: int, device_ids: Iterable[str]) -> I64:
        """Row of each of one partner's devices, i64[n]."""
        prefix = self._prefix(partner)
        return self._rows_of_keys([prefix + device_id.encode() for device_id in device_ids])

    def name(self, row: int) -> tuple[int, str]:
        """Partner index and id of a device."""
        key = self._keys[row]
        return int.from_bytes(key[:2], "little"), key[2:].decode()

    def partners(self, start: int = 0) -> U16:
        """Partner of each row from `start` on, u16[n]."""
        return np.frombuffer(b"".join(key[:2] for key in self._keys[start:]), "<u2")

    def _prefix(self, partner: int) -> bytes:
        while len(self._prefixes) <= partner:
            self._prefixes.append(len(self._prefixes).to_bytes(2, "little"))
        return self._prefixes[partner]

    def _rows_of_keys(self, keys: list[bytes]) -> I64:
        rows = np.fromiter(map(self._rows.get, keys, repeat(-1)), np.int64, len(keys))
        for position in np.flatnonzero(rows < 0).tolist():
            key = keys[position]
            row = self._rows.setdefault(key, len(self._keys))
            if row == len(self._keys):
                self._keys.append(key)
            rows[position] = row
        return rows


class _OpenAlerts:
    """Open alerts as columns by slot. A slot is a bit of `told`, given at the publishing and freed at the close."""

    def __init__(self) -> None:
        self.by_id: dict[str, _Open] = {}
        self.in_slot: dict[int, _Open] = {}
        self._free: list[int] = []
        self._count = 0
        self.lat = np.zeros(0)
        self.lng = np.zeros(0)
        self.radius_km = np.zeros(0)
        self.expires_at_ms = np.zeros(0, np.int64)
        self.audience = np.zeros((0, 0), np.bool_)
        """[slot, partner]"""
        self.due_ms = NEVER_DUE

    def add(self, alert: Alert) -> _Open:
        if not self._free:
            more = range(self._count, self._count + WORD_ALERTS)
            self._free = list(reversed(more))
            self._count += WORD_ALERTS
            self.lat, self.lng, self.radius_km = (
                np.concatenate([column, np.zeros(WORD_ALERTS)]) for column in (self.lat, self.lng, self.radius_km)
            )
            self.expires_at_ms = np.concatenate([self.expires_at_ms, np.full(WORD_ALERTS, NEVER_SEEN)])
            self.audience = np.concatenate([self.audience, np.zeros((WORD_ALERTS, self.audience.shape[1]), np.bool_)])
        opened = _Open(alert, self._free.pop())
        self.by_id[alert.alert_id] = self.in_slot[opened.slot] = opened
        return opened

    def remove(self, opened: _Open) -> None:
        del self.by_id[opened.alert.alert_id], self.in_slot[opened.slot]
        self.expires_at_ms[opened.slot] = NEVER_SEEN
        self._free.append(opened.slot)

    def place(self, opened: _Open, at_ms: int, partners: Sequence[str]) -> None:
        """Bring a slot's columns, and what is due next, up to date."""
        alert, slot = opened.alert, opened.slot
        opened.due_ms = min(_moments(alert, at_ms))
        self.lat[slot], self.lng[slot], self.expires_at_ms[slot] = alert.lat, alert.lng, alert.expires_at_ms
        self.radius_km[slot] = _radius_km(alert, at_ms)
        self.set_partners(partners)
        self.audience[slot] = [alert.audience is None or name in alert.audience for name in partners]
        self.note_due()

    def set_partners(self, partners: Sequence[str]) -> None:
        """The list has only ever grown: those that are new belong to alerts that name them, or name nobody."""
        known = self.audience.shape[1]
        if len(partners) == known:
            return
        audience = np.zeros((self._count, len(partners)), np.bool_)
        for opened in self.by_id.values():
            named = opened.alert.audience
            audience[opened.slot] = [named is None or name in named for name in partners]
        self.audience = audience

    def note_due(self) -> None:
        self.due_ms = min((opened.due_ms for opened in self.by_id.values()), default=NEVER_DUE)

    def matching(self, at_ms: int) -> I64:
        """Slots of the alerts that match somebody now, i64[n]."""
        return np.flatnonzero(self.expires_at_ms >= at_ms)


@dataclass(slots=True)
class _Open:
    alert: Alert
    slot: int
    due_ms: int = NEVER_DUE


class OwedPushes:
    """Apply the entries of one shard's log in order; `owed` and `pushes` say who was owed what, and when."""

    def __init__(self, given: StartingFacts | None = None) -> None:
        """`given`: what is known of the log's past, if it is not read from its beginning."""
        self.owed: list[Owed] = []
        self.roll = Roll()
        self.closed: set[str] = set()
        self.pings = 0
        self._settings = Settings()
        self._partner = np.zeros(ROWS_MIN, np.int64)
        self._lat = np.zeros(ROWS_MIN)
        self._lng = np.zeros(ROWS_MIN)
        self._observed_at_ms = np.full(ROWS_MIN, NEVER_SEEN)
        self._told = np.zeros((0, ROWS_MIN), np.uint64)
        """[slot // 64, row], bit slot % 64"""
        self._first = np.zeros(ROWS_MIN, np.int64)
        """Scratch: position of a row's first ping in a batch."""
        self._known = 0
        """Rows of the roll that have columns here: it also learns of devices from the queues."""
        self._open = _OpenAlerts()
        self._desk_id = (0, 0)
        self._log_id = (0, 0)
        if given is not None:
            self._begin(given)

    @property
    def pushes(self) -> list[OwedPush]:
        """All that was owed, one device each."""
        return [self.push(owed, row) for owed in self.owed for row in owed.rows.tolist()]

    @property
    def partners(self) -> tuple[str, ...]:
        """Names by partner index."""
        return self._settings.partners

    def push(self, owed: Owed, row: int) -> OwedPush:
        """One device's share of what is owed."""
        partner, device_id = self.roll.name(row)
        return OwedPush(owed.kind, owed.alert_id, owed.revision, self._settings.partners[partner], device_id)

    def told(self) -> Iterator[tuple[str, I64]]:
        """Open alerts and the rows of whom they told."""
        for alert_id, opened in self._open.by_id.items():
            yield alert_id, self._rows_told(opened.slot)

    def apply(self, at_ms: int, entry: LogEntry, seq: int = 0) -> None:
        """One log entry, with time and sequence number of its id."""
        if isinstance(entry, PingBatch) and entry.at_ms is not None:
            raise ValueError("an audit reads live logs: a ping batch must not carry a clock of its own")
        self._log_id = at_ms, seq
        self._make_room()
        while self._open.due_ms <= at_ms:
            self._run_due()
        if isinstance(entry, Settings):
            self._change_settings(at_ms, entry)
        elif isinstance(entry, PingBatch):
            self._pings(at_ms, entry)
        elif isinstance(entry, AlertRevision | AlertClose) and entry.desk_id > self._desk_id:
            self._desk_id = entry.desk_id
            if isinstance(entry, AlertRevision):
                self._revision(at_ms, entry)
            elif entry.alert_id not in self._open.by_id:
                self.closed.add(entry.alert_id)
            else:
                opened = self._open.by_id[entry.alert_id]
                if entry.revision is None or entry.revision > opened.alert.revision:
                    self._close(opened, entry.revision or opened.alert.revision)

    def _begin(self, given: StartingFacts) -> None:
        rows = self.roll.rows_of(given.partner, given.id_bytes, given.id_end)
        assert len(self.roll) == len(rows), "a device is given once"
        self._make_room()
        self._settings = given.settings
        self._desk_id, self.closed = given.desk_id, set(given.closed)
        self._lat[rows], self._lng[rows] = given.lat_e7 / E7, given.lng_e7 / E7
        self._observed_at_ms[rows] = given.observed_at_ms
        for alert, told in given.open:
            opened = self._open.add(alert)
            self._open.place(opened, given.clock_ms, given.settings.partners)
            self._set_told(opened.slot, rows[told])

    # --- devices ----------------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Columns for every row of the roll."""
        needed = len(self.roll)
        if needed == self._known:
            return
        size = len(self._partner)
        if needed > size:
            more = max(needed - size, size)
            self._partner, self._first = (_longer(column, more) for column in (self._partner, self._first))
            self._lat, self._lng = (_longer(column, more) for column in (self._lat, self._lng))
            self._observed_at_ms = np.concatenate([self._observed_at_ms, np.full(more, NEVER_SEEN)])
            told = np.zeros((len(self._told), size + more), np.uint64)
            told[:, :size] = self._told
            self._told = told
        self._partner[self._known : needed] = self.roll.partners(self._known)
        self._known = needed

    def _pings(self, at_ms: int, batch: PingBatch) -> None:
        self.pings += len(batch)
        accepted = (batch.observed_at_ms <= at_ms + self._settings.future_tolerance_ms) & (
            batch.observed_at_ms >= at_ms - self._settings.live_window_ms
        )
        rows = self.roll.rows_of(batch.partner, batch.id_bytes, batch.id_end)
        self._make_room()
        matching = self._open.matching(at_ms)
        pending = np.flatnonzero(accepted)
        while len(pending):
            # One ping of each device at a time, in order: a device may ping twice in a batch.
            now, pending = self._firsts(rows, pending)
            newer = now[batch.observed_at_ms[now] >= self._observed_at_ms[rows[now]]]
            moved = rows[newer]
            self._lat[moved] = batch.lat_e7[newer] / E7
            self._lng[moved] = batch.lng_e7[newer] / E7
            self._observed_at_ms[moved] = batch.observed_at_ms[newer]
            self._meet(matching, rows[now])

    def _firsts(self, rows: I64, pending: I64) -> tuple[I64, I64]:
        """The first of the pending pings of each device, and the others; both in order."""
        of = rows[pending]
        self._first[of[::-1]] = pending[::-1]  # of several values for one place, the last is kept
        is_first = self._first[of] == pending
        if is_first.all():
            return pending, pending[:0]
        return pending[is_first], pending[~is_first]

    def _change_settings(self, at_ms: int, settings: Settings) -> None:
        # What has expired stays expired, also when the live window gets longer.
        expired = self._observed_at_ms < at_ms - self._settings.live_window_ms
        self._observed_at_ms[expired] = NEVER_SEEN
        self._settings = settings
        self._open.set_partners(settings.partners)

    # --- alerts -----------------------------------------------------------------------------------------------------

    def _run_due(self) -> None:
        """What an open alert does by itself, the earliest first."""
        opened = min(self._open.by_id.values(), key=lambda opened: (opened.due_ms, opened.alert.alert_id))
        due_ms = opened.due_ms
        if due_ms >= opened.alert.expires_at_ms + AUTO_CLOSE_MS:
            self._close(opened, opened.alert.revision)
            return
        self._open.place(opened, due_ms, self._settings.partners)
        self._meet_everyone(opened, due_ms)

    def _revision(self, at_ms: int, event: AlertRevision) -> None:
        alert = event.alert
        opened = self._open.by_id.get(alert.alert_id)
        if alert.alert_id in self.closed or (alert.status == "exercise" and not alert.audience):
            return
        if opened is None:
            if event.event == "update":
                return
            opened = self._open.add(alert)
        else:
            if alert.revision <= opened.alert.revision or alert.status != opened.alert.status:
                return
            opened.alert = alert
            self._owe("update", alert.alert_id, alert.revision, self._rows_told(opened.slot))
        self._open.place(opened, at_ms, self._settings.partners)
        if at_ms <= alert.expires_at_ms:
            self._meet_everyone(opened, at_ms)

    def _close(self, opened: _Open, revision: int) -> None:
        self._owe("resolved", opened.alert.alert_id, revision, self._rows_told(opened.slot))
        if opened.slot // WORD_ALERTS < len(self._told):
            self._told[opened.slot // WORD_ALERTS] &= ~_bit(opened.slot)
        self._open.remove(opened)
        self._open.note_due()
        self.closed.add(opened.alert.alert_id)

    def _meet_everyone(self, opened: _Open, at_ms: int) -> None:
        live = self._observed_at_ms[: self._known] >= at_ms - self._settings.live_window_ms
        self._meet(np.array([opened.slot]), np.flatnonzero(live))

    def _meet(self, slots: I64, rows: I64) -> None:
        """Tell these alerts to those of `rows`, each named once, that are of the audience, inside, and not told yet."""
        if not len(slots) or not len(rows):
            return
        step = max(1, PAIRS_MAX // len(slots))
        for start in range(0, len(rows), step):
            self._meet_some(slots, rows[start : start + step])

    def _meet_some(self, slots: I64, rows: I64) -> None:
        alerts, lats = self._open, self._lat[rows]
        # No great circle is shorter than its difference of latitudes.
        band_deg = np.degrees(alerts.radius_km[slots] / EARTH_RADIUS_KM) + BAND_SPARE_DEG
        near: Bool = np.abs(lats[None, :] - alerts.lat[slots][:, None]) <= band_deg[:, None]
        which, position = np.nonzero(near)
        if not len(which):
            return
        slot, row = slots[which], rows[position]
        asked = alerts.audience[slot, self._partner[row]] & ~self._is_told(slot, row)
        slot, row = slot[asked], row[asked]
        if not len(slot):
            return
        distance_km = _distance_km(alerts.lat[slot], alerts.lng[slot], self._lat[row], self._lng[row])
        inside = distance_km <= alerts.radius_km[slot]
        slot, row = slot[inside], row[inside]
        for told in np.unique(slot).tolist():
            opened, found = alerts.in_slot[told], row[slot == told]
            self._owe("alert", opened.alert.alert_id, opened.alert.revision, found)
            self._set_told(opened.slot, found)

    def _owe(self, kind: str, alert_id: str, revision: int, rows: I64) -> None:
        if len(rows):
            self.owed.append(Owed(self._log_id, kind, alert_id, revision, rows))

    # --- who was told -----------------------------------------------------------------------------------------------

    def _is_told(self, slot: I64, row: I64) -> Bool:
        if not len(self._told):
            return np.zeros(len(row), np.bool_)
        word = slot // WORD_ALERTS
        known = word < len(self._told)
        bits = self._told[np.where(known, word, 0), row] >> (slot % WORD_ALERTS).astype(np.uint64)
        told: Bool = known & ((bits & np.uint64(1)) == 1)
        return told

    def _set_told(self, slot: int, rows: I64) -> None:
        word = slot // WORD_ALERTS
        while word >= len(self._told):
            self._told = np.concatenate([self._told, np.zeros((1, len(self._partner)), np.uint64)])
        self._told[word, rows] |= _bit(slot)

    def _rows_told(self, slot: int) -> I64:
        word = slot // WORD_ALERTS
        if word >= len(self._told):
            return np.zeros(0, np.int64)
        return np.flatnonzero(self._told[word, : self._known] & _bit(slot))


def _bit(slot: int) -> np.uint64:
    return np.uint64(1 << slot % WORD_ALERTS)


def _longer(column: npt.NDArray[Any], more: int) -> npt.NDArray[Any]:
    return np.concatenate([column, np.zeros(more, column.dtype)])


def _distance_km(lat: F64, lng: F64, lats: F64, lngs: F64) -> F64:
    """Great-circle distances by the haversine formula (Sinnott, Sky and Telescope 68, 1984)."""
    phi, phis = np.radians(lat), np.radians(lats)
    half_chord2 = np.sin((phis - phi) / 2) ** 2 + np.cos(phi) * np.cos(phis) * np.sin(np.radians(lngs - lng) / 2) ** 2
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
