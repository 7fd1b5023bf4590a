"""Short words for writing worked examples.

The child went missing at T0 in HOME (30 N, 114 E). One degree of latitude is 6371.0088 km * pi / 180 = 111.19508 km,
so devices due north of HOME are at distances anyone can check:

    KM_55    30.50 N     55.6 km        KM_201   31.80 N    200.15 km
    KM_99    30.89 N     98.96 km       KM_299   32.69 N    299.11 km
    KM_101   30.90 N    100.08 km       KM_301   32.70 N    300.23 km
    KM_199   31.79 N    199.04 km       KM_499   34.49 N    499.27 km
    FAR      45.00 N   1667.9 km        KM_501   34.50 N    500.38 km
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from geoindex.entries import (
    DEFAULT_EXPIRY_MS,
    DEFAULT_SCHEDULE,
    HOUR_MS,
    Alert,
    AlertClose,
    AlertRevision,
    Schedule,
    Settings,
    Tick,
)
from tests.reference.events import DEGREE_E7, Event, PingEvent
from tests.reference.matcher import DevicePush

T0 = 1_700_000_000_000
SECOND, MINUTE, HOUR, DAY = 1000, 60_000, HOUR_MS, 24 * HOUR_MS
WINDOW, TOLERANCE = 6 * HOUR, 5 * MINUTE
SETTINGS = Settings(shard_count=4, partners=("amap", "baidu"), live_window_ms=WINDOW, future_tolerance_ms=TOLERANCE)

HOME_LAT, HOME_LNG = 30.0, 114.0
KM_55, KM_99, KM_101, KM_199, KM_201 = 30.5, 30.89, 30.9, 31.79, 31.8
KM_299, KM_301, KM_499, KM_501, FAR = 32.69, 32.7, 34.49, 34.5, 45.0

Entry = tuple[int, Event]


@dataclass(frozen=True, slots=True)
class Example:
    """A log and every push it must give. `expected_pushes`: in order for one device and alert, else in any order."""

    name: str
    settings: Settings
    events: tuple[Entry, ...]
    expected_pushes: tuple[DevicePush, ...]
    rule: int


def example(
    rule: int, name: str, events: list[Entry], pushes: list[DevicePush], settings: Settings = SETTINGS
) -> Example:
    """An example; desk ids are made to rise in log order."""
    numbered: list[Entry] = []
    for index, (at_ms, event) in enumerate(events):
        if isinstance(event, AlertRevision | AlertClose):
            event = replace(event, desk_id=(at_ms, index))
        numbered.append((at_ms, event))
    return Example(name, settings, tuple(numbered), tuple(pushes), rule)


def ping(
    at_ms: int, device_id: str, lat: float, lng: float = HOME_LNG, *, observed: int | None = None, partner: str = "amap"
) -> Entry:
    """A ping at a place in degrees, observed when it arrives unless said otherwise."""
    observed_at_ms = at_ms if observed is None else observed
    return at_ms, PingEvent(partner, device_id, round(lat * DEGREE_E7), round(lng * DEGREE_E7), observed_at_ms)


def _alert_event(
    event: str,
    at_ms: int,
    revision: int,
    *,
    alert_id: str = "a1",
    lat: float = HOME_LAT,
    lng: float = HOME_LNG,
    missing_since: int = T0,
    schedule: Schedule = DEFAULT_SCHEDULE,
    expires_at: int | None = None,
    status: str = "actual",
    audience: tuple[str, ...] | None = None,
) -> Entry:
    expires_at_ms = missing_since + DEFAULT_EXPIRY_MS if expires_at is None else expires_at
    alert = Alert(alert_id, revision, lat, lng, missing_since, schedule, expires_at_ms, status, audience)
    return at_ms, AlertRevision(event, alert, (0, 0))


def publish(at_ms: int, revision: int = 1, **what: Any) -> Entry:
    """A publish; the words of `what` are those of `_alert_event`."""
    return _alert_event("publish", at_ms, revision, **what)


def update(at_ms: int, revision: int = 2, **what: Any) -> Entry:
    """An edit; the words of `what` are those of `_alert_event`."""
    return _alert_event("update", at_ms, revision, **what)


def close(at_ms: int, revision: int | None = None, *, alert_id: str = "a1", outcome: str = "found") -> Entry:
    return at_ms, AlertClose(alert_id, revision, outcome, (0, 0))


def tick(at_ms: int) -> Entry:
    return at_ms, Tick()


def told(
    at_ms: int,
    kind: str,
    device_id: str,
    ring_km: float,
    *,
    revision: int = 1,
    alert_id: str = "a1",
    partner: str = "amap",
) -> DevicePush:
    """An expected push."""
    return DevicePush(at_ms, kind, alert_id, revision, partner, device_id, ring_km)
