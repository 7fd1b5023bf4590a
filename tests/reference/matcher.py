"""The 15 matching rules (design, section 3), written to be read and not to be fast.

All devices are in one dict, every question is answered by looking at every device and every alert. There are no
shards, batches, cells or covers. Nothing here is imported from the product but its plain data types.

    matcher = ReferenceMatcher(Settings(partners=("amap",)))
    matcher.publish_or_update(at_ms, alert, "publish")
    matcher.ping(at_ms, "amap", "phone-1", 39.9, 116.4, observed_at_ms)
    matcher.pushes   # [DevicePush(at_ms, "alert", "a1", 1, "amap", "phone-1", 100.0)]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from geoindex.entries import AUTO_CLOSE_MS, HOUR_MS, Alert, AlertClose, AlertRevision, Settings, Tick
from tests.reference.events import Event, Log, PingEvent

EARTH_RADIUS_KM = 6371.0088
"""Rule 5: the mean radius of IUGG. Not that of `h3.great_circle_distance`, which is 6371.007180918475 km."""
CLOCK_UNSET_MS = -(1 << 62)

BAD_ID = "bad_id"
BAD_COORDINATES = "bad_coordinates"
FROM_FUTURE = "from_future"
TOO_OLD = "too_old"
UNKNOWN_PARTNER = "unknown_partner"

Device = tuple[str, str]
"""(partner, device id): one phone known to two partners is two devices."""


class DevicePush(NamedTuple):
    """One device told one thing; equal to the plain tuple."""

    at_ms: int
    kind: str
    alert_id: str
    revision: int
    partner: str
    device_id: str
    ring_km: float


@dataclass
class Location:
    lat: float
    lng: float
    observed_at_ms: int


@dataclass
class OpenAlert:
    alert: Alert
    told: dict[Device, None] = field(default_factory=dict)
    """A set that keeps its order."""


def great_circle_km(lat_a: float, lng_a: float, lat_b: float, lng_b: float) -> float:
    """Haversine formula (R. W. Sinnott, "Virtues of the Haversine", 1984); degrees in, km out."""
    north = math.radians(lat_b - lat_a)
    east = math.radians(lng_b - lng_a)
    h = math.sin(north / 2) ** 2 + math.cos(math.radians(lat_a)) * math.cos(math.radians(lat_b)) * (
        math.sin(east / 2) ** 2
    )
    return 2 * EARTH_RADIUS_KM * math.asin(math.sqrt(min(1.0, h)))


def step_end_ms(hours: float) -> int:
    """The first whole millisecond that is not before `hours`, read to the microsecond.

    In floats 1.1 h is 3960000.0000000005 ms, and five seconds are 0.001388888888888889 h.
    """
    microseconds = round(Fraction(hours) * HOUR_MS * 1000)
    return math.ceil(Fraction(microseconds, 1000))


def growth_moments_ms(alert: Alert) -> list[int]:
    """When the ring of an alert grows, in time order."""
    return [alert.missing_since_ms + step_end_ms(hours) for hours, _ in alert.schedule if hours is not None]


def ring_km(alert: Alert, at_ms: int) -> float:
    """Rule 4. A child who goes missing only in the future has the first ring."""
    for hours, km in alert.schedule:
        if hours is None or at_ms - alert.missing_since_ms < step_end_ms(hours):
            return km
    raise AssertionError(f"alert {alert.alert_id!r}: the last hours of a schedule must be None")


class ReferenceMatcher:
    """All rules, for all devices, one event at a time.

    `pushes` grows; `refused` counts refused pings by reason. Each event carries the shard clock, which never falls.
    """

    def __init__(self, settings: Settings) -> None:
        self.current_settings = settings
        self.clock_ms = CLOCK_UNSET_MS
        self.locations: dict[Device, Location] = {}
        self.open_alerts: dict[str, OpenAlert] = {}
        self.closed_ids: set[str] = set()
        self.pushes: list[DevicePush] = []
        self.refused: Counter[str] = Counter()

    # ---- what a log can hold

    def ping(self, at_ms: int, partner_name: str, device_id: str, lat: float, lng: float, observed_at_ms: int) -> None:
        """One ping (rules 1, 2, 6). Degrees."""
        self._advance(at_ms)
        reason = self._why_refused(partner_name, device_id, lat, lng, observed_at_ms)
        if reason is not None:
            self.refused[reason] += 1
            return
        device = (partner_name, device_id)
        stored = self.locations.get(device)
        if stored is None or observed_at_ms >= stored.observed_at_ms:
            self.locations[device] = Location(lat, lng, observed_at_ms)
        for state in self.open_alerts.values():
            self._tell_if_inside(state, device)

    def publish_or_update(self, at_ms: int, alert: Alert, event: str) -> None:
        """A new alert or a new revision, complete (rules 6, 8, 12, 13, 15)."""
        self._advance(at_ms)
        if alert.alert_id in self.closed_ids or (alert.status == "exercise" and not alert.audience):
            return
        state = self.open_alerts.get(alert.alert_id)
        if state is None:
            if event == "publish" and alert.revision >= 1:
                self.open_alerts[alert.alert_id] = OpenAlert(alert)
                self._tell_everyone_inside(self.open_alerts[alert.alert_id])
        elif alert.revision > state.alert.revision and alert.status == state.alert.status:
            state.alert = alert
            self._tell_the_told(state, "update", alert.revision)
            self._tell_everyone_inside(state)

    def close(self, at_ms: int, alert_id: str, revision: int | None, outcome: str) -> None:
        """The end of an alert (rule 9). The outcome changes nothing that is pushed."""
        self._advance(at_ms)
        state = self.open_alerts.get(alert_id)
        if state is None:
            self.closed_ids.add(alert_id)
        elif revision is None or revision > state.alert.revision:
            self._close(state, state.alert.revision if revision is None else revision)

    def tick(self, at_ms: int) -> None:
        """Time passed and nothing happened."""
        self._advance(at_ms)

    def settings(self, at_ms: int, new_settings: Settings) -> None:
        """Other settings from here on; what was due before ran under the old ones."""
        self._advance(at_ms)
        self.current_settings = new_settings

    def feed(self, at_ms: int, event: Event) -> None:
        """Any event."""
        match event:
            case PingEvent():
                self.ping(at_ms, event.partner_name, event.device_id, event.lat, event.lng, event.observed_at_ms)
            case AlertRevision():
                self.publish_or_update(at_ms, event.alert, event.event)
            case AlertClose():
                self.close(at_ms, event.alert_id, event.revision, event.outcome)
            case Settings():
                self.settings(at_ms, event)
            case Tick():
                self.tick(at_ms)

    # ---- time

    def _advance(self, at_ms: int) -> None:
        """Do what fell due up to `at_ms`, in time order, each with the clock at its own moment (rules 11, 12)."""
        assert at_ms >= self.clock_ms, f"the shard clock never runs backwards: {at_ms} after {self.clock_ms}"
        due: list[tuple[int, str, str]] = []
        for alert_id, state in self.open_alerts.items():
            for moment_ms in growth_moments_ms(state.alert):
                if self.clock_ms < moment_ms <= at_ms:
                    due.append((moment_ms, "growth", alert_id))
            # An edit may set an expiry so long past that the automatic close is overdue: time still does not run back.
            close_ms = max(state.alert.expires_at_ms + AUTO_CLOSE_MS, self.clock_ms)
            if close_ms <= at_ms:
                due.append((close_ms, "close", alert_id))
        for moment_ms, what, alert_id in sorted(due):
            self.clock_ms = moment_ms
            if alert_id in self.open_alerts:
                state = self.open_alerts[alert_id]
                if what == "growth":
                    self._tell_everyone_inside(state)
                else:
                    self._close(state, state.alert.revision)
        self.clock_ms = at_ms
        self.locations = {device: where for device, where in self.locations.items() if self._is_live(where)}

    def _is_live(self, location: Location) -> bool:
        """Rule 3. What is not live any more is wiped (rule 14)."""
        return location.observed_at_ms >= self.clock_ms - self.current_settings.live_window_ms

    # ---- pings

    def _why_refused(
        self, partner_name: str, device_id: str, lat: float, lng: float, observed_at_ms: int
    ) -> str | None:
        """Rule 2: the first reason that applies, or None for an accepted ping."""
        if partner_name not in self.current_settings.partners:
            return UNKNOWN_PARTNER
        try:
            id_bytes = len(device_id.encode("utf-8"))
        except UnicodeEncodeError:
            return BAD_ID
        if not 1 <= id_bytes <= 64:
            return BAD_ID
        if not (math.isfinite(lat) and math.isfinite(lng) and abs(lat) <= 90 and abs(lng) <= 180):
            return BAD_COORDINATES
        if observed_at_ms > self.clock_ms + self.current_settings.future_tolerance_ms:
            return FROM_FUTURE
        if observed_at_ms < self.clock_ms - self.current_settings.live_window_ms:
            return TOO_OLD
        return None

    # ---- telling

    def _tell_everyone_inside(self, state: OpenAlert) -> None:
        for device in self.locations:
            self._tell_if_inside(state, device)

    def _tell_if_inside(self, state: OpenAlert, device: Device) -> None:
        """`alert` to a device that is live, inside, in the audience and not told yet (rules 3, 5, 7, 12, 13)."""
        alert, location = state.alert, self.locations[device]
        if device in state.told or self.clock_ms > alert.expires_at_ms or not self._is_live(location):
            return
        if alert.audience is not None and device[0] not in alert.audience:
            return
        distance_km = great_circle_km(alert.lat, alert.lng, location.lat, location.lng)
        if distance_km <= ring_km(alert, self.clock_ms):
            state.told[device] = None
            self._push("alert", alert, alert.revision, device)

    def _tell_the_told(self, state: OpenAlert, kind: str, revision: int) -> None:
        for device in state.told:
            self._push(kind, state.alert, revision, device)

    def _close(self, state: OpenAlert, revision: int) -> None:
        self._tell_the_told(state, "resolved", revision)
        del self.open_alerts[state.alert.alert_id]
        self.closed_ids.add(state.alert.alert_id)

    def _push(self, kind: str, alert: Alert, revision: int, device: Device) -> None:
        self.pushes.append(
            DevicePush(self.clock_ms, kind, alert.alert_id, revision, *device, ring_km(alert, self.clock_ms))
        )


def run_reference(log: Log) -> ReferenceMatcher:
    """A matcher that has seen the whole log."""
    matcher = ReferenceMatcher(log.settings)
    for at_ms, event in log.events:
        matcher.feed(at_ms, event)
    return matcher


def by_device_and_alert(
    pushes: Iterable[tuple[int, str, str, int, str, str, float]],
) -> dict[tuple[str, str, str], list[DevicePush]]:
    """(partner, device id, alert id) -> its pushes in order: equal for two correct runs.

    Across devices the order of equal `at` is free (rule 15); for one device and alert it is not (rule 10).
    """
    told: dict[tuple[str, str, str], list[DevicePush]] = {}
    for push in map(DevicePush._make, pushes):
        told.setdefault((push.partner, push.device_id, push.alert_id), []).append(push)
    return told
