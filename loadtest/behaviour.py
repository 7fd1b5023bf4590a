"""How the apps, phones, clocks and crowds of `loadtest.life` behave: what a load test may set, and what it is else."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loadtest.journey_kernels import LIFE_DAY_OFFSET_MS
from loadtest.places import Place
from loadtest.world import ID_STYLES

DATUMS = ("wgs84", "gcj02", "bd09")
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
YEAR_MS = 365 * DAY_MS

STEADY = (1.0,) * 24
WAKING = (
    0.4,
    0.3,
    0.25,
    0.25,
    0.3,
    0.5,
    0.8,
    1.1,
    1.2,
    1.1,
    1.1,
    1.2,
    1.3,
    1.2,
    1.1,
    1.1,
    1.2,
    1.3,
    1.4,
    1.5,
    1.6,
    1.5,
    1.2,
    0.8,
)
COMMUTING = (
    0.3,
    0.2,
    0.15,
    0.15,
    0.2,
    0.5,
    1.2,
    2.2,
    2.2,
    1.3,
    1.0,
    1.1,
    1.2,
    1.1,
    1.0,
    1.0,
    1.2,
    1.9,
    2.1,
    1.4,
    1.1,
    1.0,
    0.8,
    0.5,
)
EVENING = (
    0.6,
    0.35,
    0.2,
    0.15,
    0.15,
    0.3,
    0.8,
    1.3,
    1.2,
    0.9,
    0.8,
    1.0,
    1.4,
    1.1,
    0.8,
    0.8,
    0.9,
    1.2,
    1.4,
    1.7,
    2.0,
    2.1,
    1.8,
    1.1,
)
"""How often an app pings by hour of the day, Beijing time, beside its mean: the hour's own value at its middle."""


@dataclass(frozen=True, slots=True)
class LifePartner:
    """An app partner, and how its app behaves.

    `share` of the phones, relative to the others' shares. `id_style`: a key of `world.ID_STYLES`. `ping_interval_s`:
    mean over the day between two pings of a phone; `rhythm`: how often it pings by hour, beside that mean (24 numbers,
    their scale does not matter). `datum`: of the coordinates in its HTTP bodies. `delay_ms_median`: from the phone to
    the gateway, lognormal; a share `late_share` of its pings is up to `late_ms_max` late instead (evenly).
    """

    name: str
    share: float
    id_style: str
    ping_interval_s: float
    datum: str = "wgs84"
    delay_ms_median: float = 800.0
    late_share: float = 0.01
    late_ms_max: int = 10 * MINUTE_MS
    rhythm: tuple[float, ...] = WAKING

    def __post_init__(self) -> None:
        def require(good: bool, what: str, got: object) -> None:
            if not good:
                raise ValueError(f"partner {self.name!r}: {what}, got {got!r}")

        require(bool(self.name), "name must not be empty", self.name)
        require(self.id_style in ID_STYLES, f"id_style must be one of {', '.join(ID_STYLES)}", self.id_style)
        require(self.datum in DATUMS, f"datum must be one of {', '.join(DATUMS)}", self.datum)
        require(self.share > 0 and math.isfinite(self.share), "share must be positive", self.share)
        require(0.1 <= self.ping_interval_s <= 86_400, "ping_interval_s must be 0.1 to 86400", self.ping_interval_s)
        require(0 <= self.delay_ms_median <= HOUR_MS, f"delay_ms_median must be 0 to {HOUR_MS}", self.delay_ms_median)
        require(0 <= self.late_share <= 1, "late_share must be 0 to 1", self.late_share)
        require(0 <= self.late_ms_max <= DAY_MS, f"late_ms_max must be 0 to {DAY_MS}", self.late_ms_max)
        good = len(self.rhythm) == 24 and all(value >= 0 and math.isfinite(value) for value in self.rhythm)
        require(good and sum(self.rhythm) > 0, "rhythm must be 24 numbers, none negative, not all 0", self.rhythm)


DEFAULT_LIFE_PARTNERS = (
    LifePartner("amap", 0.30, "hex32", 60.0, "gcj02", 500.0, 0.005, 5 * MINUTE_MS, COMMUTING),
    LifePartner("ditu", 0.20, "uuid36", 90.0, "bd09", 700.0, 0.01, 10 * MINUTE_MS, WAKING),
    LifePartner("chuxing", 0.16, "hex16", 30.0, "gcj02", 300.0, 0.002, 2 * MINUTE_MS, COMMUTING),
    LifePartner("xinwen", 0.14, "base32_26", 600.0, "gcj02", 1_500.0, 0.03, 30 * MINUTE_MS, EVENING),
    LifePartner("zhifu", 0.12, "decimal21", 300.0, "gcj02", 900.0, 0.01, 10 * MINUTE_MS, WAKING),
    LifePartner("dianxin", 0.08, "hex16", 120.0, "wgs84", 2_500.0, 0.05, 60 * MINUTE_MS, STEADY),
)
"""Six kinds: navigation, maps, ride hailing, news, payment, and a carrier that sees phones day and night."""


@dataclass(frozen=True, slots=True)
class ClockFault:
    """A share of all phones whose clock is off by something in [`ahead_ms_min`, `ahead_ms_max`]; below 0: behind."""

    name: str
    share: float
    ahead_ms_min: int
    ahead_ms_max: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"clock fault {self.name!r}: share must be 0 to 1, got {self.share}")
        if not -40 * YEAR_MS <= self.ahead_ms_min <= self.ahead_ms_max <= 40 * YEAR_MS:
            raise ValueError(
                f"clock fault {self.name!r}: ahead_ms_min must be at most ahead_ms_max, both within 40 years, "
                f"got {self.ahead_ms_min} and {self.ahead_ms_max}"
            )


DEFAULT_CLOCK_FAULTS = (
    ClockFault("minutes ahead", 0.003, 1 * MINUTE_MS, 20 * MINUTE_MS),
    ClockFault("minutes behind", 0.003, -40 * MINUTE_MS, -1 * MINUTE_MS),
    ClockFault("local time taken for UTC", 0.002, 8 * HOUR_MS, 8 * HOUR_MS),
    ClockFault("days behind", 0.001, -30 * DAY_MS, -1 * DAY_MS),
    ClockFault("days ahead", 0.0005, 1 * DAY_MS, 30 * DAY_MS),
    ClockFault("years behind", 0.0003, -20 * YEAR_MS, -1 * YEAR_MS),
    ClockFault("years ahead", 0.0002, 1 * YEAR_MS, 10 * YEAR_MS),
)
"""One phone in a hundred: late, refused as from the future, or refused as too old."""


@dataclass(frozen=True, slots=True)
class Festival:
    """A crowd in one place at one time, every so many days.

    `attendance`: share of the people who live within `catchment_km` of it that come, but for those on a trip.
    `from_ms`, `until_ms`: its first time; people arrive in the 45 minutes before and leave in the 40 after.
    `every_days`: from one time to the next, 0 for once. `radius_m`: of the crowd.
    """

    lat: float
    lng: float
    from_ms: int
    until_ms: int
    every_days: int = 0
    attendance: float = 0.3
    catchment_km: float = 30.0
    radius_m: float = 400.0

    def __post_init__(self) -> None:
        def require(good: bool, what: str, got: object) -> None:
            if not good:
                raise ValueError(f"festival: {what}, got {got!r}")

        require(abs(self.lat) <= 70 and abs(self.lng) < 179, "lat, lng must be degrees", (self.lat, self.lng))
        require(self.every_days >= 0, "every_days must be at least 0", self.every_days)
        require(0 <= self.attendance <= 1, "attendance must be 0 to 1", self.attendance)
        require(0 < self.catchment_km <= 200, "catchment_km must be above 0, at most 200", self.catchment_km)
        require(0 < self.radius_m <= 5_000, "radius_m must be above 0, at most 5000", self.radius_m)
        require(self.from_ms < self.until_ms, "until_ms must be behind from_ms", (self.from_ms, self.until_ms))
        day, since_ms = divmod(self.from_ms + LIFE_DAY_OFFSET_MS, DAY_MS)
        last_ms = self.until_ms + LIFE_DAY_OFFSET_MS - day * DAY_MS
        require(
            since_ms >= 2 * HOUR_MS and last_ms <= 22 * HOUR_MS,
            "must begin at 6:00 or later and end by 2:00 of the next day, Beijing time",
            (self.from_ms, self.until_ms),
        )


# Saturday 2024-01-06, 19:30 in Beijing.
_FIRST_SATURDAY_MS = 1_704_540_600_000
DEFAULT_FESTIVAL = Festival(30.6598, 104.0633, _FIRST_SATURDAY_MS, _FIRST_SATURDAY_MS + 150 * MINUTE_MS, every_days=7)
"""Tianfu Square in Chengdu, Saturdays from 19:30 to 22:00: a seventh of all evenings, so that no test waits long."""


def festival_in(place: Place, from_ms: int, until_ms: int, every_days: int = 0, attendance: float = 0.3) -> Festival:
    """A festival in the middle of a place."""
    return Festival(place.lat, place.lng, from_ms, until_ms, every_days, attendance)
