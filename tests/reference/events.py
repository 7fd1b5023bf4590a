"""What a log holds, for tests: as `geoindex.entries`, but one ping at a time instead of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from geoindex.entries import AlertClose, AlertRevision, Settings, Tick

__all__ = ["AlertClose", "AlertRevision", "Event", "Log", "PingEvent", "Settings", "Tick"]

DEGREE_E7 = 10_000_000


@dataclass(frozen=True, slots=True)
class PingEvent:
    """One ping, valid or not. Location: int32 in 1e-7 degree, or the same in degrees."""

    partner_name: str
    device_id: str
    lat_e7: int
    lng_e7: int
    observed_at_ms: int

    @property
    def lat(self) -> float:
        return self.lat_e7 / DEGREE_E7

    @property
    def lng(self) -> float:
        return self.lng_e7 / DEGREE_E7


Event = PingEvent | AlertRevision | AlertClose | Settings | Tick


@dataclass(frozen=True, slots=True)
class Log:
    """A log: the settings it starts with, and (clock in ms, event) with a clock that never falls."""

    settings: Settings
    events: tuple[tuple[int, Event], ...]
