"""Rings: how far an alert reaches after how many hours, and which zones its circle covers.

    schedule   ((1, 100), (2, 200), (3, 300), (None, 500))
               elapsed   < 1 h: 100 km   < 2 h: 200 km   < 3 h: 300 km   from 3 h: 500 km

    cover      inside   ranges of zones of which every point is in the circle
               edge     ranges of zones that the circle's edge may cross: the exact distance decides

A zone is the set of points whose cell of resolution 7 has that ancestor of resolution 5 by index (`cells`), not the
geometric hexagon: cells overhang. Both promises of a cover are kept for that set, at poles, antimeridian and
pentagons as anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from geoindex import cell_kernels
from geoindex.cell_kernels import EARTH_RADIUS_M, ZONE_INDEX_COUNT, chord2_max, ring_clearance_m, unit_vector_degrees
from geoindex.cells import cell_tables
from geoindex.columns import U32
from geoindex.entries import HOUR_MS, RING_KM_MAX, Schedule

__all__ = [
    "Cover",
    "check_schedule",
    "chord2_max",
    "cover_circle",
    "growth_times_ms",
    "hours_to_ms",
    "radius_km",
    "ring_clearance_m",
    "unit_vector",
]

HOURS_MAX = 1_000_000.0
"""114 years: keeps every time within an int64 of milliseconds."""

_RANGES_MAX = 8192
"""Ranges of one cover: 1,000 km give some 500. Doubled on demand."""


# ---------------------------------------------------------------- schedule


def radius_km(schedule: Schedule, elapsed_ms: int) -> float:
    """Radius of the ring `elapsed_ms` after the child went missing (matching rule 4); negative counts as 0."""
    for hours, km in schedule:
        if hours is None or elapsed_ms < hours_to_ms(hours):
            return km
    raise AssertionError(f"schedule: the last hours must be None, got {schedule}")


def growth_times_ms(schedule: Schedule, missing_since_ms: int) -> list[tuple[int, float]]:
    """Every moment at which the ring grows, in time order, with its radius from then on: [(time_ms, radius_km)]."""
    limits = [hours for hours, _ in schedule if hours is not None]
    return [(missing_since_ms + hours_to_ms(hours), km) for hours, (_, km) in zip(limits, schedule[1:], strict=True)]


def check_schedule(schedule: Schedule, where: str) -> None:
    """Raise ValueError, naming `where`, unless the schedule is one that rule 4 allows.

    Hours: finite, above 0, strictly rising (by a millisecond at least), None in the last step and nowhere else.
    Kilometres: finite, above 0, strictly rising, at most 1,000.
    """
    if not schedule:
        raise ValueError(f"{where}: schedule must have a step, got none")
    hours_before, km_before = 0.0, 0.0
    for step, (hours, km) in enumerate(schedule):
        is_last = step == len(schedule) - 1
        if is_last and hours is not None:
            raise ValueError(f"{where}: schedule's last hours must be null, got {hours!r}")
        if hours is not None:
            _check_rising(f"{where}: schedule hours", hours, hours_before, HOURS_MAX)
            if hours_to_ms(hours) <= hours_to_ms(hours_before):
                found = f"got {hours:.12g} after {hours_before:.12g}"
                raise ValueError(f"{where}: schedule hours must rise by a millisecond or more, {found}")
            hours_before = hours
        elif not is_last:
            raise ValueError(f"{where}: schedule hours must be null in the last step only, got null in step {step + 1}")
        _check_rising(f"{where}: schedule km", km, km_before, RING_KM_MAX)
        km_before = km


def _check_rising(name: str, number: float, before: float, limit: float) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{name} must be finite numbers, got {number!r}")
    if number <= 0:
        raise ValueError(f"{name} must be above 0, got {number:.12g}")
    if number <= before:
        raise ValueError(f"{name} must rise, got {number:.12g} after {before:.12g}")
    if number > limit:
        raise ValueError(f"{name} must be at most {limit:g}, got {number:.12g}")


def hours_to_ms(hours: float) -> int:
    """The first whole millisecond not before `hours`, these read to the microsecond.

    1.1 h, in binary a little more, is 3,960,000 ms; 2/7 h is 1,028,572 ms.
    """
    return -(-round(hours * HOUR_MS * 1000) // 1000)


# ---------------------------------------------------------------- cover


@dataclass(frozen=True, slots=True)
class Cover:
    """Zones that a circle meets. Half-open ranges [start, stop) of zone indices, sorted, disjoint, none adjacent.

    Every point in the circle lies in an inside or an edge zone; every point of an inside zone lies in the circle. For
    one centre, inside and inside + edge only grow with the radius. A range may name gaps of the numbering.
    """

    inside: U32
    """u32[n, 2]"""
    edge: U32
    """u32[m, 2]"""

    def __post_init__(self) -> None:
        for name, ranges in (("inside", self.inside), ("edge", self.edge)):
            assert ranges.dtype == np.uint32, f"{name}: dtype must be uint32, got {ranges.dtype}"
            assert ranges.ndim == 2 and ranges.shape[1] == 2, f"{name}: shape must be (n, 2), got {ranges.shape}"


def cover_circle(lat: float, lng: float, radius_km: float) -> Cover:
    """Cover of the circle of `radius_km` around (`lat`, `lng`) in degrees, on H3's sphere.

    Raises: ValueError for coordinates out of range or a radius not within (0, 1000] km.
    """
    return _cover_circle(float(lat), float(lng), float(radius_km))


@lru_cache(maxsize=64)
def _cover_circle(lat: float, lng: float, radius_km: float) -> Cover:
    """Kept, for every shard of a process draws the same circle. Whoever gets it must not write to it."""
    x, y, z = unit_vector(lat, lng)
    if not 0.0 < radius_km <= RING_KM_MAX:
        raise ValueError(f"radius_km: must be above 0 and at most {RING_KM_MAX:g}, got {radius_km}")
    tables = cell_tables()
    radius_rad = radius_km * 1000.0 / EARTH_RADIUS_M
    capacity = _RANGES_MAX
    while True:
        inside = np.empty((capacity, 2), dtype=np.uint32)
        edge = np.empty((capacity, 2), dtype=np.uint32)
        inside_count, edge_count = cell_kernels.cover_circle(x, y, z, radius_rad, tables, inside, edge)
        if max(inside_count, edge_count) < capacity:
            return Cover(inside=inside[:inside_count].copy(), edge=edge[:edge_count].copy())
        assert capacity < ZONE_INDEX_COUNT
        capacity *= 2


def unit_vector(lat: float, lng: float) -> tuple[float, float, float]:
    """Unit vector (float64) of a place in degrees, without libm: the same bits on every machine.

    Raises: ValueError for coordinates that are not finite or out of range.
    """
    if not abs(lat) <= 90.0:
        raise ValueError(f"lat: must be within +-90, got {lat}")
    if not abs(lng) <= 180.0:
        raise ValueError(f"lng: must be within +-180, got {lng}")
    return unit_vector_degrees(float(lat), float(lng))
