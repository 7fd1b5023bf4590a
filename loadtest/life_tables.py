"""What a `Life` hands to its kernels: behaviour in numbers, and the curve of a day."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from geoindex.columns import F64, I64
from loadtest import journey_kernels as journeys
from loadtest import life_kernels as kernels
from loadtest import world_kernels
from loadtest.behaviour import DAY_MS, ClockFault, Festival, LifePartner
from loadtest.country import PLACE_FESTIVAL, Country
from loadtest.places import distance_km
from loadtest.world import ID_STYLES, directions

DELAY_SIGMA = 0.6
"""Of the logarithm of a delay: the slowest hundredth takes four times the median."""


def first_phones(shares: Sequence[float], phone_count: int) -> I64:
    """Where each partner's range of phones begins, by shares, each with one phone at least: i64[partners + 1]."""
    cumulative = np.rint(np.cumsum(shares) / math.fsum(shares) * (phone_count - len(shares))).astype(np.int64)
    return np.concatenate(([0], cumulative + np.arange(1, len(shares) + 1))).astype(np.int64)


def curve(rhythm: tuple[float, ...]) -> F64:
    """24 hourly values -> which share of a day's pings comes before each quarter of an hour, f64[97], from 0 to 1.

    The value of an hour holds at its middle; between middles a straight line.
    """
    middle = np.arange(kernels.QUARTERS) / 4 + 0.125
    values = np.interp(middle, np.arange(-1, 25) + 0.5, (rhythm[-1], *rhythm, rhythm[0]))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    shares: F64 = np.round(sums / sums[-1], 12)
    return shares


DARK = (
    (kernels.SHORT_DARK_MS, kernels.SHORT_DARK_MS_MIN, kernels.SHORT_DARK_MS_MAX),
    (kernels.LONG_DARK_MS, kernels.LONG_DARK_MS_MIN, kernels.LONG_DARK_MS_MAX),
)


def dark_part(chance: float, period_ms: int, ms_min: int, ms_max: int) -> float:
    """Share of all time that stretches of `ms_min` to `ms_max` take if a period holds one with a chance."""
    return chance * (ms_min + ms_max) / 2 / period_ms


def habits(
    partners: tuple[LifePartner, ...],
    first_phones: I64,
    faults: tuple[ClockFault, ...],
    dark_share: float,
    wifi_share: float,
) -> kernels.Habits:
    """Everything about partners, dark stretches and clocks, as kernels read it."""
    sizes = -(-np.diff(first_phones) // kernels.BLOCKS)
    bits = [(int(size) - 1).bit_length() for size in sizes]
    normal = NormalDist()
    quantiles = [(step + 0.5) / kernels.DELAY_STEPS for step in range(kernels.DELAY_STEPS)]
    short, long = (_q32(dark_share / 2 / dark_part(1.0, *how)) for how in DARK)
    return kernels.Habits(
        first_phone=first_phones,
        block_mask=np.array([(1 << count) - 1 for count in bits], np.uint64),
        block_shift=np.array([max(1, (count + 1) // 2) for count in bits], np.uint64),
        id_bytes=np.array([world_kernels.STYLE_BYTES[ID_STYLES[partner.id_style]] for partner in partners], np.uint32),
        delay_ms=np.array([partner.delay_ms_median for partner in partners], np.float64),
        delay_curve=np.round([math.exp(DELAY_SIGMA * normal.inv_cdf(quantile)) for quantile in quantiles], 9),
        late_q32=np.array([_q32(partner.late_share) for partner in partners], np.uint64),
        late_ms_max=np.array([partner.late_ms_max for partner in partners], np.uint64),
        clock_until_q32=np.array(
            [_q32(min(1.0, math.fsum(f.share for f in faults[: i + 1]))) for i in range(len(faults))], np.uint64
        ),
        clock_ms_min=np.array([fault.ahead_ms_min for fault in faults], np.int64),
        clock_ms_span=np.array([fault.ahead_ms_max - fault.ahead_ms_min + 1 for fault in faults], np.uint64),
        short_dark_q32=short,
        long_dark_q32=long,
        wifi_q32=_q32(wifi_share),
    )


def _q32(share: float) -> np.uint64:
    return np.uint64(round(share * (1 << 32)))


def land(key: np.uint64, country: Country, festival: Festival | None, trip_share: float) -> journeys.Land:
    """The country's tables for one seed, with its festival written into a copy of the places."""
    rows = country.rows
    columns = np.zeros(8, np.float64)
    columns[journeys.FESTIVAL_FIRST_DAY] = -1.0
    if festival is not None:
        day, since_ms = divmod(festival.from_ms + journeys.LIFE_DAY_OFFSET_MS, DAY_MS)
        columns[:] = (
            day,
            festival.every_days,
            since_ms / 1_000,
            (since_ms + festival.until_ms - festival.from_ms) / 1_000,
            festival.lat,
            festival.lng,
            round(1.0 / math.cos(math.radians(festival.lat)), 12),
            festival.radius_m,
        )
        near = distance_km(festival.lat, festival.lng, country.places.lat, country.places.lng) <= festival.catchment_km
        rows = rows.copy()
        rows[near, PLACE_FESTIVAL] = festival.attendance
    return journeys.Land(
        key=key,
        threshold=country.threshold,
        alias=country.alias,
        rows=rows,
        work=country.work,
        hubs=country.hubs,
        trip_keep=country.trip_keep,
        trip_other=country.trip_other,
        direction=directions(),
        trip_q16=np.uint64(round(trip_share * (1 << 16))),
        festival=columns,
    )
