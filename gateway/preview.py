"""How many phones an alert would reach, without telling anybody: a dry run that cannot be used to look for one phone.

    density:{s} ──> Density: phones by partner and zone (resolution 5, 253 km2), exact, never shown
                       │ pooled
                    CrowdTable: areas with 20 phones of one partner or more, in tens       for all previews
                       │ areas inside the ring whole, at its edge by their share
                    estimate ──> rounded down, "<20" below 20

Why moving a ring a little at a time tells nothing about few phones. Every answer is a function of the ring asked for
and of the crowd table, and of nothing else; so whoever asked for all rings there are would know that table, and no more
than it. In it a zone with fewer than 20 phones of a partner does not stand by itself: it is pooled with the other such
zones of its parent cell (7 zones), if those are still fewer than 20 with the parent's likewise (49), and so on; what
stays below 20 in a whole base cell is left out. Empty zones are pooled as well, so an area does not tell which of its
zones has the phones. Counts are in tens, so one phone more or less seldom shows; what does show is that an area has
come to 20, or to 20 no more. Partners are pooled apart from each other, so an audience with one more of them adds
whole areas of that one, of 20 or more as well. On top of it: rings from 10 km on, answers rounded to two digits, counts
up to a minute old, a budget per officer and hour, and every preview in the audit log.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import numpy as np
from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field

from flows.density import Density, read_density
from gateway.accounts import Caller, OfficerAccount
from gateway.alert_models import Audience, Location, PhoneCount, ScheduleSteps, Strict, Time
from gateway.audit_log import DONE
from gateway.desk_service import PUBLIC_RING_KM_MIN, DeskService, schedule_from
from gateway.errors import Problem, responses
from gateway.identity import OfficerDep
from gateway.phone_counts import SHOWN_MIN, ShownCount, shown_count
from gateway.runtime import Gateway, gateway_of
from geoindex.cells import CELLS_PER_ZONE, ZONE_RESOLUTION, cell_centers
from geoindex.columns import F64, I64, U16, U32
from geoindex.entries import DEFAULT_EXPIRY_MS, HOUR_MS
from geoindex.rings import check_schedule, chord2_max, cover_circle, growth_times_ms, radius_km, unit_vector

TABLE_FRESH_S = 5.0
"""A crowd table is made anew so often at most: counts change once a minute."""
COUNT_STEP = 10
CHILDREN = 7
"""Cells of a parent cell, by number."""


# --- the crowd table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CrowdTable:
    """Areas that hold a crowd, by partner, ascending by partner, level and cell.

    An area of level 0 is a zone; of level k, a cell of resolution 5 - k without the zones of it that stand by
    themselves or in an area of a lower level.
    """

    partners: tuple[str, ...]
    partner: U16
    """u16[n]: index into `partners`."""
    level: I64
    """i64[n], 0 to 5."""
    cell: I64
    """i64[n]: dense number of the cell, of resolution 5 - level."""
    count: I64
    """i64[n]: phones, in tens, 20 or more."""
    at_ms: int
    """Shard clock of the oldest count in it."""


def crowd_table(density: Density) -> CrowdTable:
    """Pool exact counts into areas that each hold at least SHOWN_MIN phones of one partner."""
    assert density.at_ms is not None, "there is something to pool"
    found: list[tuple[int, int, int, int]] = []
    for partner in range(len(density.partners)):
        chosen = density.partner == partner
        cell, count = density.zone[chosen].astype(np.int64), density.count[chosen]
        for level in range(ZONE_RESOLUTION + 1):
            crowded = count >= SHOWN_MIN
            tens = (count[crowded] + COUNT_STEP // 2) // COUNT_STEP * COUNT_STEP
            found += [(partner, level, *area) for area in zip(cell[crowded].tolist(), tens.tolist(), strict=True)]
            cell, count = _pooled(cell[~crowded] // CHILDREN, count[~crowded])
    areas = np.array(found, np.int64).reshape(-1, 4)
    return CrowdTable(
        partners=density.partners,
        partner=areas[:, 0].astype(np.uint16),
        level=areas[:, 1],
        cell=areas[:, 2],
        count=areas[:, 3],
        at_ms=density.at_ms,
    )


def _pooled(cell: I64, count: I64) -> tuple[I64, I64]:
    cells, cell_of = np.unique(cell, return_inverse=True)
    return cells, np.bincount(cell_of, count, len(cells)).astype(np.int64)


class Covered:
    """How much of any range of zones lies in a circle, in zones."""

    def __init__(self, lat: float, lng: float, radius_km: float) -> None:
        """Raises ValueError for a place that is none or a radius not within (0, 1000] km."""
        cover = cover_circle(lat, lng, radius_km)
        edge = _in_ranges(cover.edge)
        inside = _in_ranges(cover.inside)
        shares = _covered_shares(edge, unit_vector(lat, lng), chord2_max(radius_km))
        zones = np.concatenate([inside, edge])
        order = np.argsort(zones)
        self._zone = zones[order].astype(np.int64)
        share = np.concatenate([np.ones(len(inside)), shares])[order]
        self._below = np.concatenate([np.zeros(1), np.cumsum(share)])

    def between(self, start: I64, stop: I64) -> F64:
        """Zones covered from `start` up to below `stop`, each i64[n]: f64[n]."""
        first, last = np.searchsorted(self._zone, start), np.searchsorted(self._zone, stop)
        covered: F64 = self._below[last] - self._below[first]
        return covered


def _in_ranges(ranges: U32) -> U32:
    parts = [np.arange(start, stop, dtype=np.uint32) for start, stop in ranges.tolist()]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def _covered_shares(zone: U32, centre: tuple[float, float, float], chord2_limit: float) -> F64:
    """Share of each zone's cells whose centre is in the circle; 0 for a number that names no zone."""
    cells = (zone[:, None] * np.uint32(CELLS_PER_ZONE) + np.arange(CELLS_PER_ZONE, dtype=np.uint32)).reshape(-1)
    vector, exists = cell_centers(cells)
    is_inside = exists & (((vector - np.array(centre)) ** 2).sum(axis=1) <= chord2_limit)
    cell_counts = exists.reshape(len(zone), CELLS_PER_ZONE).sum(axis=1)
    share: F64 = is_inside.reshape(len(zone), CELLS_PER_ZONE).sum(axis=1) / np.maximum(cell_counts, 1)
    return share


def phones_within(table: CrowdTable, covered: Covered, audience: Collection[str] | None) -> float:
    """About how many phones lie in a circle; of these partners alone, unless it is None."""
    total = 0.0
    for partner, name in enumerate(table.partners):
        if audience is not None and name not in audience:
            continue
        rows = table.partner == partner
        level, cell, count = table.level[rows], table.cell[rows], table.count[rows]
        size = CHILDREN**level
        start = cell * size
        # Of each area: its zones, less those that stand in areas of a lower level.
        zones = size.astype(np.float64)
        within = covered.between(start, start + size)
        own_zones, own_within = zones.copy(), within.copy()
        for lower in range(int(level.max(initial=0))):
            at = np.flatnonzero(level == lower)
            for higher in range(lower + 1, int(level.max(initial=0)) + 1):
                above = np.flatnonzero(level == higher)
                place = np.searchsorted(cell[above], cell[at] // CHILDREN ** (higher - lower))
                held = place < len(above)
                held[held] = cell[above][place[held]] == cell[at][held] // CHILDREN ** (higher - lower)
                target = above[place[held]]
                np.subtract.at(own_zones, target, own_zones[at][held])
                np.subtract.at(own_within, target, own_within[at][held])
        share = np.divide(own_within, own_zones, out=np.zeros(len(zones)), where=own_zones > 0)
        total += float((count * np.clip(share, 0.0, 1.0)).sum())
    return total


# --- asking -----------------------------------------------------------------------------------------------------------

router = APIRouter(tags=["alert desk"])


class PreviewRequest(Strict):
    """The alert that might be published."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"location": {"lat": 30.2741, "lng": 120.1551}, "missing_since": "2026-05-01T14:30:00+08:00"}]
        }
    )

    location: Location
    missing_since: Time
    schedule: ScheduleSteps | None = None
    audience: Audience | None = None


class PreviewStep(Strict):
    """One ring."""

    at: Time = Field(description="From when on; the first step is now.")
    ring_km: float = Field(gt=0, examples=[100.0])
    phones: PhoneCount = Field(
        description='About how many live phones are in it, rounded down to two digits, or "<20".'
    )


class Preview(Strict):
    """About how many phones an alert would reach, as they are now."""

    steps: list[PreviewStep]
    counted_at: Time = Field(description="When the oldest of the counts behind it began.")
    counts_age_s: float = Field(ge=0, description="How old that is.", examples=[41.0])
    previews_left: int = Field(ge=0, description="Of the officer's budget of an hour.", examples=[29])


class Crowds:
    """The crowd table of a process, made anew when it is asked for and old. Thread-safe."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._lock = threading.Lock()
        self._made: tuple[float, CrowdTable] | None = None

    def table(self) -> CrowdTable:
        """Raises Problem 503 if a shard has not counted lately; redis.RedisError."""
        with self._lock:  # one makes it, the others wait for that
            now_s = self._gateway.clock.monotonic_s()
            if self._made is not None and now_s - self._made[0] < TABLE_FRESH_S:
                return self._made[1]
            density = read_density(self._gateway.client, self._gateway.settings().shard_count)
            if density.missing or density.at_ms is None:
                raise Problem(
                    503,
                    "no-counts",
                    f"{len(density.missing)} of the shards have not counted their phones lately, as each does once a "
                    "minute: is every flow running?",
                    headers={"Retry-After": "30"},
                )
            table = crowd_table(density)
            self._made = now_s, table
            return table

    def stop(self) -> None:
        """Nothing runs here."""


def start(gateway: Gateway) -> Crowds:
    """One table for all previews of a process."""
    return Crowds(gateway)


def take_from_budget(gateway: Gateway, caller: Caller[OfficerAccount], now_ms: int) -> int:
    """Count one preview of an officer; how many are left within the hour. Raises Problem 429."""
    key, budget = f"previews:{{desk}}:{caller.name}", gateway.config.preview_budget
    number = gateway.client.incr("preview-number:{desk}")
    with gateway.client.pipeline(transaction=True) as pipeline:
        pipeline.zremrangebyscore(key, "-inf", now_ms - HOUR_MS)
        pipeline.zadd(key, {str(number): now_ms})
        pipeline.zrank(key, str(number))
        pipeline.zrange(key, 0, 0, withscores=True)
        pipeline.pexpire(key, HOUR_MS)
        _, _, rank, oldest, _ = pipeline.execute()
    if cast(int, rank) >= budget:
        gateway.client.zrem(key, str(number))
        wait_s = max(1, round((oldest[0][1] + HOUR_MS - now_ms) / 1000))
        raise Problem(
            429,
            "preview-budget",
            f"at most {budget} previews of one officer within an hour: come again in {wait_s} s",
            headers={"Retry-After": str(wait_s)},
        )
    return budget - cast(int, rank) - 1


@router.post(
    "/v1/alerts:preview",
    summary="How many phones would it reach?",
    responses=responses(400, 401, 403, 422, 429, 503),
)
def preview(request: Request, caller: OfficerDep, asked: PreviewRequest) -> Preview:
    """The ring now and at each later growth, with about how many live phones are in it. Nobody is told anything.

    Counts are of the last minute and rounded down; fewer than 20 are never told. Every preview counts against a budget
    and stands in the audit log.
    """
    gateway = gateway_of(request)
    DeskService(gateway).check_desk(caller, "alert.preview")
    settings, now_ms = gateway.settings(), gateway.desk.now_ms()
    schedule = settings.default_schedule if asked.schedule is None else schedule_from(asked.schedule)
    try:
        check_schedule(schedule, "preview")
    except ValueError as error:
        raise Problem(422, "does-not-fit", str(error)) from None
    if schedule[0][1] < PUBLIC_RING_KM_MIN:
        raise Problem(
            422,
            "ring-too-small",
            f"a ring of a preview is at least {PUBLIC_RING_KM_MIN:g} km, got {schedule[0][1]:g} km",
        )
    unknown = [name for name in asked.audience or () if name not in settings.partners]
    if unknown:
        raise Problem(
            422,
            "does-not-fit",
            f"audience must name partners of this deployment, got {', '.join(map(repr, unknown[:5]))}",
        )
    left = take_from_budget(gateway, caller, now_ms)
    details = {
        "lat": asked.location.lat,
        "lng": asked.location.lng,
        "km": [km for _, km in schedule[:16]],
        "audience": None if asked.audience is None else asked.audience[:16],
    }
    gateway.audit.append(caller.actor, "alert.preview", "-", DONE, details)
    table = gateway.service(Crowds).table()
    until_ms = max(now_ms, asked.missing_since + DEFAULT_EXPIRY_MS)
    moments = [(now_ms, radius_km(schedule, now_ms - asked.missing_since))]
    moments += [step for step in growth_times_ms(schedule, asked.missing_since) if now_ms < step[0] <= until_ms]
    steps = []
    for at_ms, km in moments:
        covered = Covered(asked.location.lat, asked.location.lng, km)
        phones: ShownCount = shown_count(phones_within(table, covered, asked.audience))
        steps.append(PreviewStep.model_construct(at=at_ms, ring_km=km, phones=phones))
    return Preview.model_construct(
        steps=steps,
        counted_at=table.at_ms,
        counts_age_s=round(max(0, now_ms - table.at_ms) / 1000, 1),
        previews_left=left,
    )
