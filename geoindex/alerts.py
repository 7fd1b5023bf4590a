"""Active alerts as a cover indexed by zone, so that a device's candidates cost one line, whatever their number.

    zone_row   u32[zones]           row of `zone_mask` for a zone, 0: no alert has covered it
    zone_mask  u64[rows, 2, room]   bit a % 64 of word a // 64: alert slot a covers the zone, inside [0] / edge [1]
    audience   u64[partners, words] bit a: alert a is for this partner
    centre     f64[slots, 3]        unit vector of the alert's location
    chord2_max f64[slots]           squared chord on the unit sphere at the ring's radius

An *alert slot* is a bit position, given to an alert when it is published and freed when it is closed. `words` are
those that slots take; `zone_mask` has room for more, so that it is not copied for each of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from geoindex import match_kernels as kernels
from geoindex.cell_kernels import chord2_max
from geoindex.columns import F64, U32, U64, ToldAs
from geoindex.entries import AUTO_CLOSE_MS, Alert
from geoindex.rings import Cover, cover_circle, growth_times_ms, radius_km, unit_vector
from geoindex.snapshot import AlertState

ZONE_COUNT = 122 * 7**5
WORD_ALERTS = 64
ROWS_MIN = 1024
ALERTS_MAX = 1 << 16
"""Slots of one shard: `match_kernels.group_hits` orders pushes by 16 bits of them."""
WORDS_GROWTH = 1.25
"""Room of `zone_mask` when it is full, in words, of what it had. A copy for each word cost a quarter of publishing
5,000 alerts; room that no alert has taken costs every zone its bytes."""

INSIDE, EDGE = 0, 1
NEVER = np.iinfo(np.int64).max


class AlertColumns(NamedTuple):
    """The arrays of a shard's open alerts, as kernels take them."""

    zone_row: U32
    zone_mask: U64
    audience: U64
    centre: F64
    chord2_max: F64


@dataclass(slots=True, eq=False)
class OpenAlert:
    """An alert that has not been closed, and when something is next due for it."""

    alert: Alert
    slot: int
    ring_km: float
    cover: Cover | None = None
    """None while expired: it matches nobody."""
    due_ms: int = NEVER

    @property
    def told_as(self) -> ToldAs:
        """What a push says of it."""
        return self.alert.alert_id, self.alert.revision, self.ring_km

    def next_due_ms(self, now_ms: int) -> int:
        """The first moment after `now_ms` at which the ring grows, expires or closes by itself.

        Expiry is due in the millisecond after `expires_at`, the last in which the alert still matches.
        """
        alert = self.alert
        moments = [max(alert.expires_at_ms + AUTO_CLOSE_MS, now_ms)]
        if now_ms <= alert.expires_at_ms:
            moments.append(alert.expires_at_ms + 1)
            growths = growth_times_ms(alert.schedule, alert.missing_since_ms)
            moments += [time_ms for time_ms, _ in growths if now_ms < time_ms <= alert.expires_at_ms]
        return min(moments)


class AlertIndex:
    """The open alerts of one shard. `partners`: names in the order of their indices."""

    def __init__(self) -> None:
        self.open: dict[str, OpenAlert] = {}
        self._partners: tuple[str, ...] = ()
        self._by_slot: list[OpenAlert | None] = [None] * WORD_ALERTS
        self._due: list[tuple[int, int]] = []
        """A heap of (due_ms, slot): of every open alert, and of moments that no alert waits for any more."""
        self._zone_rows_used = 1
        self.columns = AlertColumns(
            zone_row=np.zeros(ZONE_COUNT, np.uint32),
            zone_mask=np.zeros((ROWS_MIN, 2, 1), np.uint64),
            audience=np.zeros((0, 1), np.uint64),
            centre=np.zeros((WORD_ALERTS, 3), np.float64),
            chord2_max=np.zeros(WORD_ALERTS, np.float64),
        )

    @property
    def slot_count(self) -> int:
        """Slots there are bits for: a multiple of 64."""
        return len(self._by_slot)

    @property
    def words(self) -> int:
        return self.slot_count // WORD_ALERTS

    def told_as(self) -> tuple[ToldAs | None, ...]:
        """What a push says of its alert, by slot; None: the slot is free."""
        return tuple(None if opened is None else opened.told_as for opened in self._by_slot)

    def set_partners(self, partners: tuple[str, ...]) -> None:
        """Take the settings' list of partners (it only ever grows) and resolve every audience anew."""
        self._partners = partners
        self.columns = self.columns._replace(audience=np.zeros((len(partners), self.words), np.uint64))
        for alert in self.open.values():
            self._set_audience(alert)

    @classmethod
    def restored(cls, partners: tuple[str, ...], alerts: Iterable[AlertState], slot_count: int) -> AlertIndex:
        """An index with the open alerts of another, in its slots, their covers drawn anew."""
        index = cls()
        while index.slot_count < slot_count:
            index._add_word()
        index.set_partners(partners)
        for state in alerts:
            opened = OpenAlert(state.alert, state.slot, state.ring_km)
            assert index._by_slot[state.slot] is None, f"alert slot {state.slot} is taken"
            index._by_slot[state.slot] = opened
            index.open[state.alert.alert_id] = opened
            index._place(opened)
            index._wait(opened, state.due_ms)
            if state.covered:
                index._cover(opened)
        return index

    def states(self) -> tuple[AlertState, ...]:
        """The open alerts, as `restored` takes them."""
        return tuple(
            AlertState(opened.alert, opened.slot, opened.ring_km, opened.cover is not None, opened.due_ms)
            for opened in self.open.values()
        )

    def add(self, alert: Alert, now_ms: int) -> OpenAlert:
        """Give a slot to an alert that is not open yet. It covers nothing until `cover_ring`.

        Raises MemoryError if `ALERTS_MAX` are open.
        """
        if None not in self._by_slot:
            if self.slot_count == ALERTS_MAX:
                raise MemoryError(f"alerts: at most {ALERTS_MAX:,} open at once, got one more: {alert.alert_id!r}")
            self._add_word()
        slot = self._by_slot.index(None)
        opened = OpenAlert(alert, slot, radius_km(alert.schedule, now_ms - alert.missing_since_ms))
        self._by_slot[slot] = opened
        self.open[alert.alert_id] = opened
        self._place(opened)
        return opened

    def revise(self, opened: OpenAlert, alert: Alert, now_ms: int) -> None:
        """Put a new revision in the place of the one before. It covers nothing until `cover_ring`."""
        self.uncover(opened)
        opened.alert = alert
        opened.ring_km = radius_km(alert.schedule, now_ms - alert.missing_since_ms)
        self._place(opened)

    def cover_ring(self, opened: OpenAlert, now_ms: int) -> None:
        """Make the alert's ring at that time the one that devices meet."""
        self.uncover(opened)
        opened.ring_km = radius_km(opened.alert.schedule, now_ms - opened.alert.missing_since_ms)
        self._cover(opened)

    def _cover(self, opened: OpenAlert) -> None:
        opened.cover = cover_circle(opened.alert.lat, opened.alert.lng, opened.ring_km)
        self.columns.chord2_max[opened.slot] = chord2_max(opened.ring_km)
        self._mark(opened.cover, opened.slot, True)

    def uncover(self, opened: OpenAlert) -> None:
        """Take the alert's ring away: it matches nobody new."""
        if opened.cover is not None:
            self._mark(opened.cover, opened.slot, False)
            opened.cover = None

    def remove(self, opened: OpenAlert) -> None:
        """Close: free the slot. The caller has forgotten whom the alert told."""
        self.uncover(opened)
        self._by_slot[opened.slot] = None
        del self.open[opened.alert.alert_id]

    def schedule(self, opened: OpenAlert, now_ms: int) -> None:
        """Have the alert wait for what is next due for it after `now_ms`."""
        self._wait(opened, opened.next_due_ms(now_ms))

    def _wait(self, opened: OpenAlert, due_ms: int) -> None:
        opened.due_ms = due_ms
        heapq.heappush(self._due, (due_ms, opened.slot))

    def next_due(self) -> OpenAlert | None:
        """The open alert for which something is due first; of several the one with the lowest slot."""
        while self._due:
            due_ms, slot = self._due[0]
            opened = self._by_slot[slot]
            if opened is not None and opened.due_ms == due_ms:
                return opened
            heapq.heappop(self._due)
        return None

    def next_due_ms(self) -> int:
        opened = self.next_due()
        return NEVER if opened is None else opened.due_ms

    def _place(self, opened: OpenAlert) -> None:
        self.columns.centre[opened.slot] = unit_vector(opened.alert.lat, opened.alert.lng)
        self._set_audience(opened)

    def _set_audience(self, opened: OpenAlert) -> None:
        word, bit = divmod(opened.slot, WORD_ALERTS)
        mask = np.uint64(1 << bit)
        audience = opened.alert.audience
        for index, partner in enumerate(self._partners):
            if audience is None or partner in audience:
                self.columns.audience[index, word] |= mask
            else:
                self.columns.audience[index, word] &= ~mask

    def _mark(self, cover: Cover, slot: int, covered: bool) -> None:
        columns = self.columns
        for kind, ranges in ((INSIDE, cover.inside), (EDGE, cover.edge)):
            if covered:
                zones = int((ranges[:, 1].astype(np.int64) - ranges[:, 0]).sum())
                columns = self._make_zone_room(self._zone_rows_used + zones)
            self._zone_rows_used = kernels.mark_zones(
                columns.zone_row, columns.zone_mask, ranges, kind, slot, covered, self._zone_rows_used
            )

    def _make_zone_room(self, needed: int) -> AlertColumns:
        """Columns with so many rows of `zone_mask`."""
        columns = self.columns
        if needed > len(columns.zone_mask):
            grown = np.zeros((max(needed, 2 * len(columns.zone_mask)), *columns.zone_mask.shape[1:]), np.uint64)
            grown[: self._zone_rows_used] = columns.zone_mask[: self._zone_rows_used]
            self.columns = columns = columns._replace(zone_mask=grown)
        return columns

    def _add_word(self) -> None:
        """Make bits for 64 more alerts."""
        columns = self.columns
        self._by_slot += [None] * WORD_ALERTS
        zone_mask = columns.zone_mask
        if self.words > zone_mask.shape[2]:
            zone_mask = np.zeros((len(zone_mask), 2, max(self.words, int(self.words * WORDS_GROWTH))), np.uint64)
            zone_mask[: self._zone_rows_used, :, : columns.zone_mask.shape[2]] = columns.zone_mask[
                : self._zone_rows_used
            ]
        self.columns = AlertColumns(
            zone_row=columns.zone_row,
            zone_mask=zone_mask,
            audience=np.concatenate([columns.audience, np.zeros_like(columns.audience[:, :1])], axis=1),
            centre=np.concatenate([columns.centre, np.zeros((WORD_ALERTS, 3))]),
            chord2_max=np.concatenate([columns.chord2_max, np.zeros(WORD_ALERTS)]),
        )
