"""The shard machine: a deterministic function of one shard's log.

    entry (settings | pings | publish | update | close | tick), with the time in its id
      -> everything due up to that time, in time order, each at its own clock: growth, expiry, automatic close
      -> the minute's sweep
      -> the entry itself
      => pushes, in the order in which they go into the queues

No wall clock, no random numbers, no I/O. Cutting the same pings into other batches changes no push, only how
pushes are grouped into queue entries. The rules are those of design section 3; each is named where it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from geoindex import match_kernels as kernels
from geoindex.alerts import NEVER, AlertIndex, OpenAlert
from geoindex.cells import cell_tables
from geoindex.columns import I64, ID_BYTES_MAX, U8, U32, PingBatch, Push, PushColumns, Pushes, ToldAs
from geoindex.devices import DeviceTable, TableSize
from geoindex.entries import (
    EMISSION_VERSION,
    FORMAT_VERSION,
    HASH_NAME,
    HOUR_MS,
    AlertClose,
    AlertRevision,
    LogEntry,
    Settings,
    Tick,
)
from geoindex.kernels import hash_secrets
from geoindex.match_kernels import ACCEPTED, FROM_THE_FUTURE, HITS, PING_COUNTS, SLOW, TOO_OLD
from geoindex.rings import radius_km
from geoindex.shares import in_shares
from geoindex.snapshot import Columns, EndedAlert, Fill, MachineState, Snapshot, copied, room_bytes

MINUTE_MS = 60_000
ENDED_KEPT_MS = 24 * HOUR_MS
"""How long the numbers of a closed alert stay in the machine: longer than it takes whoever publishes them."""
HITS_MIN = 1 << 16
SCAN_SHARE_ROWS_MIN = 1 << 20
"""A core looks at as many rows in 3 to 7 ms; a thread for a share takes 0.6 ms to begin and end (measured, AMD)."""
ALERTS_AHEAD = 16
"""Open alerts beyond those there are for which memory is made while nobody waits for it."""


class SettingsRefused(ValueError):
    """The log's settings are not those that this program can follow: it must not start."""


@dataclass(slots=True)
class ShardCounters:
    """What the machine has done so far. Refused pings by reason; nothing is dropped uncounted."""

    pings_accepted: int = 0
    pings_looked_at_closely: int = 0
    pings_refused: dict[str, int] = field(default_factory=lambda: {"from_the_future": 0, "too_old": 0})
    devices_pushed: dict[str, int] = field(default_factory=lambda: {"alert": 0, "update": 0, "resolved": 0})
    alert_events_ignored: int = 0

    def copied(self) -> ShardCounters:
        return replace(self, pings_refused=dict(self.pings_refused), devices_pushed=dict(self.devices_pushed))


@dataclass(frozen=True, slots=True)
class AlertView:
    """An open alert as an operator sees it."""

    alert_id: str
    revision: int
    ring_km: float
    next_due_ms: int
    matching: bool


class ShardMachine:
    """One shard's devices and alerts. Feed it every entry of the shard's log, in order, from the first."""

    def __init__(self, devices: DeviceTable | None = None, alerts: AlertIndex | None = None) -> None:
        """`devices`, `alerts`: those of a machine that is being restored."""
        self.clock_ms = 0
        self.counters = ShardCounters()
        self._settings: Settings | None = None
        self._secrets = hash_secrets(0)
        self._devices = devices or DeviceTable()
        self._alerts = alerts or AlertIndex()
        self._closed: set[str] = set()
        self._ended: dict[str, EndedAlert] = {}
        self._last_desk_id = (0, 0)
        self._sweep_due_ms = 0
        self._due_ms = NEVER
        self._hit_row = np.empty(0, np.uint32)
        self._hit_slot = np.empty(0, np.uint32)
        self._hit_ping = np.empty(0, np.uint32)
        self._scratch = kernels.ping_scratch()
        self._told_as: tuple[ToldAs | None, ...] | None = None
        """What pushes of pings say of their alert, by slot; None: not known, something has changed."""
        self.accepted_by_partner: I64 = np.zeros(0, np.int64)
        """Of the last batch of pings: how many were accepted, by partner index. No state: nothing rests on it."""

    @property
    def settings(self) -> Settings:
        """Raises SettingsRefused before the log's first entry."""
        if self._settings is None:
            raise SettingsRefused("a shard log must begin with a settings entry")
        return self._settings

    @property
    def size(self) -> TableSize:
        return self._devices.size

    @property
    def device_table(self) -> DeviceTable:
        """The devices themselves, to look at only while no entry is applied."""
        return self._devices

    def open_alerts(self) -> list[AlertView]:
        return [
            AlertView(
                opened.alert.alert_id, opened.alert.revision, opened.ring_km, opened.due_ms, opened.cover is not None
            )
            for opened in self._alerts.open.values()
        ]

    def told_counts(self) -> dict[str, I64]:
        """Devices told of each open alert, by partner index; only while no entry is applied."""
        partner_count = 0 if self._settings is None else len(self._settings.partners)
        counts = self._devices.told_counts(partner_count)
        return {alert_id: counts[opened.slot] for alert_id, opened in self._alerts.open.items()}

    def ended_alerts(self) -> tuple[EndedAlert, ...]:
        """Alerts that told somebody and were closed within the last day."""
        return tuple(self._ended.values())

    def apply(self, at_ms: int, entry: LogEntry) -> Pushes:
        """Apply one log entry with the time in its id; returns what it causes, in queue order.

        Raises SettingsRefused (before any change) for settings that this program does not follow.
        """
        if isinstance(entry, Settings):
            self._check_settings(entry)
        elif self._settings is None:
            raise SettingsRefused("a shard log must begin with a settings entry")
        assert at_ms >= self.clock_ms, f"a log's time never runs backwards, got {at_ms} after {self.clock_ms}"
        if isinstance(entry, PingBatch):
            return Pushes(list(self._apply_pings(at_ms, entry)))
        pushes = list(self._advance(at_ms))
        match entry:
            case Settings():
                self._apply_settings(entry)
            case AlertRevision() | AlertClose():
                pushes += self._apply_alert_event(entry)
            case Tick():
                pass
        self._due_ms = self._alerts.next_due_ms()
        return Pushes(pushes)

    # --- state ------------------------------------------------------------------------------------------------------

    @property
    def snapshot_bytes(self) -> int:
        """How much room a snapshot's columns need. May be asked from another thread, which then learns about it."""
        return room_bytes(self._devices.columns_in_use())

    def snapshot(self, room: U8 | None = None) -> Snapshot:
        """A copy of the machine's state between two entries; of its columns in `room`, if they fit there."""
        return Snapshot(self.state(), copied(self._devices.columns_in_use(), room))

    def state(self) -> MachineState:
        """Everything but the columns."""
        return MachineState(
            settings=self._settings,
            clock_ms=self.clock_ms,
            sweep_due_ms=self._sweep_due_ms,
            last_desk_id=self._last_desk_id,
            closed=frozenset(self._closed),
            alerts=self._alerts.states(),
            alert_slot_count=self._alerts.slot_count,
            told_words=self._devices.told_words,
            table_counts=tuple(self._devices.columns.counts.tolist()),
            counters=self.counters.copied(),
            ended=self.ended_alerts(),
        )

    def columns(self) -> Columns:
        """The columns themselves, not a copy: only while no entry is applied."""
        return self._devices.columns_in_use()

    @classmethod
    def restored(cls, state: MachineState, fill: Fill) -> ShardMachine:
        """A machine that goes on where another was: what it pushes from there on is the same, entry by entry.

        Raises SettingsRefused if this program does not follow its settings, ValueError or MemoryError if its table is
        not one of ours; whatever `fill` raises.
        """
        if state.settings is not None:
            _check_program(state.settings)
        partners = () if state.settings is None else state.settings.partners
        machine = cls(
            DeviceTable.restored(state.table_counts, state.told_words, fill),
            AlertIndex.restored(partners, state.alerts, state.alert_slot_count),
        )
        if state.settings is not None:
            machine._settings = state.settings
            machine._secrets = hash_secrets(state.settings.hash_key)
        machine._closed = set(state.closed)
        machine._ended = {ended.alert_id: ended for ended in state.ended}
        machine._last_desk_id = state.last_desk_id
        machine._sweep_due_ms = state.sweep_due_ms
        machine._due_ms = machine._alerts.next_due_ms()
        machine.clock_ms = state.clock_ms
        machine.counters = state.counters.copied()
        return machine

    # --- time -------------------------------------------------------------------------------------------------------

    def _advance(self, at_ms: int) -> Iterator[Push]:
        """Run what is due up to `at_ms` (rule 11), then the minute's sweep, and set the clock."""
        while self._due_ms <= at_ms:
            opened = self._alerts.next_due()
            assert opened is not None, "an alert is due that is not open"
            self.clock_ms = max(self.clock_ms, opened.due_ms)
            yield from self._run_due(opened)
            self._due_ms = self._alerts.next_due_ms()
        if at_ms >= self._sweep_due_ms:
            minute_ms = at_ms - at_ms % MINUTE_MS
            if self._settings is not None:
                self._devices.sweep(minute_ms - self._settings.live_window_ms)
            self._sweep_due_ms = minute_ms + MINUTE_MS
            kept_from_ms = minute_ms - ENDED_KEPT_MS
            self._ended = {name: ended for name, ended in self._ended.items() if ended.closed_ms >= kept_from_ms}
        self.clock_ms = at_ms

    def _run_due(self, opened: OpenAlert) -> Iterator[Push]:
        alert = opened.alert
        self._told_as = None
        if self.clock_ms <= alert.expires_at_ms:
            yield from self._meet_table(opened)
        elif opened.cover is not None:
            self._alerts.uncover(opened)
        else:
            yield from self._close(opened, alert.revision)
            return
        self._alerts.schedule(opened, self.clock_ms)

    # --- settings ---------------------------------------------------------------------------------------------------

    def _check_settings(self, settings: Settings) -> None:
        _check_program(settings)
        if self._settings is None:
            return
        before = self._settings
        for name, stays in (
            ("shard count", before.shard_count == settings.shard_count),
            ("hash key", before.hash_key == settings.hash_key),
            ("partners so far", before.partners == settings.partners[: len(before.partners)]),
        ):
            if not stays:
                raise SettingsRefused(f"{name} must stay as the log began with it")

    def _apply_settings(self, settings: Settings) -> None:
        if self._settings is not None:
            # What has expired stays expired, also when the live window gets longer.
            self._devices.sweep(self.clock_ms - self._settings.live_window_ms)
        self._settings = settings
        self._secrets = hash_secrets(settings.hash_key)
        self._alerts.set_partners(settings.partners)

    # --- alerts -----------------------------------------------------------------------------------------------------

    def _apply_alert_event(self, event: AlertRevision | AlertClose) -> Iterator[Push]:
        if event.desk_id <= self._last_desk_id:
            self.counters.alert_events_ignored += 1
            return
        self._last_desk_id = event.desk_id
        self._told_as = None
        if isinstance(event, AlertClose):
            yield from self._apply_close(event)
            return
        alert = event.alert
        opened = self._alerts.open.get(alert.alert_id)
        known = opened.alert.revision if opened else 0
        if (
            alert.alert_id in self._closed
            or alert.revision <= known
            or (opened is None and event.event == "update")
            or (opened is not None and opened.alert.status != alert.status)  # rule 13
            or (alert.status == "exercise" and not alert.audience)
        ):
            self.counters.alert_events_ignored += 1
            return
        if opened is None:
            opened = self._alerts.add(alert, self.clock_ms)
            self._devices.make_alert_room(self._alerts.slot_count)
            self._devices.expect_alerts(len(self._alerts.open) + ALERTS_AHEAD)
        else:
            # Rule 8: everyone told hears of the edit first.
            self._alerts.revise(opened, alert, self.clock_ms)
            yield from self._tell(opened, "update", alert.revision, self._devices.rows_told(opened.slot))
        if self.clock_ms <= alert.expires_at_ms:
            yield from self._meet_table(opened)
        self._alerts.schedule(opened, self.clock_ms)

    def _apply_close(self, event: AlertClose) -> Iterator[Push]:
        opened = self._alerts.open.get(event.alert_id)
        if opened is None:
            self._closed.add(event.alert_id)
            return
        if event.revision is not None and event.revision <= opened.alert.revision:
            self.counters.alert_events_ignored += 1
            return
        yield from self._close(opened, event.revision or opened.alert.revision)

    def _close(self, opened: OpenAlert, revision: int) -> Iterator[Push]:
        """Rule 9: everyone told hears of the end; then nothing more, ever."""
        alert = opened.alert
        opened.ring_km = radius_km(alert.schedule, self.clock_ms - alert.missing_since_ms)
        told = self._devices.rows_told(opened.slot)
        yield from self._tell(opened, "resolved", revision, told)
        if len(told):
            counts = np.bincount(self._devices.partners_of(told))
            self._ended[alert.alert_id] = EndedAlert(alert.alert_id, self.clock_ms, tuple(counts.tolist()))
            self._devices.forget_told(opened.slot)
        self._alerts.remove(opened)
        self._closed.add(alert.alert_id)

    def _meet_table(self, opened: OpenAlert) -> Iterator[Push]:
        """Rule 6: the ring of this moment meets every live device."""
        self._alerts.cover_ring(opened, self.clock_ms)
        live_from_ms = self.clock_ms - self.settings.live_window_ms
        rows = np.empty(self._devices.row_count, np.uint32)

        def scan(first: int, stop: int) -> U32:
            of_share = rows[first:stop]
            found = kernels.scan_ring(
                self._devices.columns,
                self._alerts.columns,
                cell_tables(),
                opened.slot,
                live_from_ms,
                first,
                stop,
                of_share,
            )
            return of_share[:found]

        found = in_shares(scan, len(rows), SCAN_SHARE_ROWS_MIN)
        yield from self._tell(
            opened, "alert", opened.alert.revision, found[0] if len(found) == 1 else np.concatenate(found)
        )

    def _tell(self, opened: OpenAlert, kind: str, revision: int, rows: U32) -> Iterator[Push]:
        """Pushes to `rows`, of one kind and one moment: by partner, in row order, so many ids at a time."""
        if not len(rows):
            return
        partners = self._devices.partners_of(rows)
        rows = rows[np.argsort(partners, kind="stable")]
        counts = np.bincount(partners)
        for partner, stop in zip(np.flatnonzero(counts), np.cumsum(counts)[counts != 0], strict=True):
            of_partner = rows[stop - counts[partner] : stop]
            for start in range(0, len(of_partner), self.settings.push_ids_max):
                id_bytes, id_end = self._devices.ids_of(of_partner[start : start + self.settings.push_ids_max])
                self.counters.devices_pushed[kind] += len(id_end)
                yield Push(
                    int(partner), opened.alert.alert_id, revision, kind, opened.ring_km, self.clock_ms, id_bytes, id_end
                )

    # --- pings ------------------------------------------------------------------------------------------------------

    def _apply_pings(self, entry_at_ms: int, batch: PingBatch) -> Iterator[Push | PushColumns]:
        """Rules 1, 2, 6 and 7, row by row. A recording's rows carry their own clock: what is due runs between them."""
        # A copy: Numba compiles a kernel anew for a read-only column.
        at_ms = np.array([entry_at_ms], np.int64) if batch.at_ms is None else batch.at_ms.copy()
        at_step = 0 if batch.at_ms is None else 1
        counts = np.zeros(PING_COUNTS + len(self.settings.partners), np.int64)
        row = 0
        if not len(batch):
            yield from self._advance(entry_at_ms)
        while row < len(batch):
            yield from self._advance(int(at_ms[row * at_step]))
            due_ms = min(self._due_ms, self._sweep_due_ms)
            stop = len(batch) if at_step == 0 else max(int(np.searchsorted(at_ms, due_ms)), row + 1)
            while row < stop:
                row = self._apply_some(batch, at_ms, at_step, row, stop, counts)
                if counts[HITS]:
                    yield self._push_hits(at_ms, at_step, int(counts[HITS]))
            self.clock_ms = int(at_ms[(stop - 1) * at_step])
        self._count(counts)

    def _apply_some(self, batch: PingBatch, at_ms: I64, at_step: int, row: int, stop: int, counts: I64) -> int:
        hits_room = max(HITS_MIN, 2 * kernels.SLOW_PINGS * self._alerts.slot_count)
        if len(self._hit_row) < hits_room:
            self._hit_row, self._hit_slot, self._hit_ping = (np.empty(hits_room, np.uint32) for _ in range(3))
        self._devices.make_room(stop - row)
        counts[HITS] = 0
        return kernels.apply_pings(
            self._devices.columns,
            self._alerts.columns,
            cell_tables(),
            self._secrets,
            batch.partner,
            batch.id_bytes,
            batch.id_end,
            batch.lat_e7,
            batch.lng_e7,
            batch.observed_at_ms,
            at_ms,
            at_step,
            row,
            stop,
            self.settings.live_window_ms,
            self.settings.future_tolerance_ms,
            self._hit_row,
            self._hit_slot,
            self._hit_ping,
            counts,
            self._scratch,
        )

    def _push_hits(self, at_ms: I64, at_step: int, hits: int) -> PushColumns:
        """Pushes of pings that met a ring: by moment, alert slot and partner; within these in the pings' order."""
        alert, id_stop, id_end = (np.empty(hits, np.uint32) for _ in range(3))
        partner = np.empty(hits, np.uint16)
        moments = np.empty(hits, np.int64)
        id_bytes = np.empty(hits * ID_BYTES_MAX, np.uint8)
        pushes = kernels.group_hits(
            self._devices.columns,
            self._hit_row[:hits],
            self._hit_slot,
            self._hit_ping,
            at_ms,
            at_step,
            self.settings.push_ids_max,
            alert,
            partner,
            moments,
            id_stop,
            id_bytes,
            id_end,
        )
        self.counters.devices_pushed["alert"] += hits
        if self._told_as is None:
            self._told_as = self._alerts.told_as()
        return PushColumns(
            self._told_as,
            alert[:pushes],
            partner[:pushes],
            moments[:pushes],
            id_stop[:pushes],
            id_bytes[: int(id_end[-1])],
            id_end,
        )

    def _count(self, counts: I64) -> None:
        self.counters.pings_accepted += int(counts[ACCEPTED])
        self.accepted_by_partner = counts[PING_COUNTS:]
        self.counters.pings_looked_at_closely += int(counts[SLOW])
        self.counters.pings_refused["from_the_future"] += int(counts[FROM_THE_FUTURE])
        self.counters.pings_refused["too_old"] += int(counts[TOO_OLD])


def _check_program(settings: Settings) -> None:
    """Raises SettingsRefused for settings that this program does not follow."""
    for name, required, got in (
        ("format version", FORMAT_VERSION, settings.format_version),
        ("emission version", EMISSION_VERSION, settings.emission_version),
        ("hash function", HASH_NAME, settings.hash_name),
    ):
        if required != got:
            raise SettingsRefused(f"{name} must be {required!r} for this program, the log says {got!r}")
