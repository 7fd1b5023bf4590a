"""The loops that `loadtest.country` makes its tables with: who commutes where, and alias tables row by row."""

from __future__ import annotations

import numpy as np

from geoindex.columns import F64, I64, U32
from geoindex.numba_typing import kernel

KM_PER_DEGREE = 6_371.0088 * np.pi / 180.0
"""Along a meridian of the sphere of the matching rules."""


@kernel
def nearby(
    lat: F64, lng: F64, sec: F64, people: F64, order: I64, reach_km: float, half_km: float, chosen: U32, weight: F64
) -> None:
    """The places that most people of each place would commute to -> `chosen` u32[n, k], `weight` f64[n, k].

    A place pulls by its people and the distance d: people / (1 + (d / half_km)^2)^2, not beyond `reach_km`. The k that
    pull most are kept, heaviest first; a place is always among its own, and where there are fewer, the rest weigh 0.
    `order` i64[n]: places by latitude. Distances are those of a plane: only multiplications, the same on every machine.
    """
    count, kept = len(lat), chosen.shape[1]
    reach_degrees = reach_km / KM_PER_DEGREE
    for rank in range(count):
        home = order[rank]
        for slot in range(kept):
            chosen[home, slot] = home
            weight[home, slot] = 0.0
        for direction in (-1, 1):
            other_rank = rank if direction == 1 else rank - 1
            while 0 <= other_rank < count:
                other = order[other_rank]
                north = (lat[other] - lat[home]) * KM_PER_DEGREE
                if abs(lat[other] - lat[home]) > reach_degrees:
                    break
                east = (lng[other] - lng[home]) / sec[home] * KM_PER_DEGREE
                square = north * north + east * east
                other_rank += direction
                if square > reach_km * reach_km:
                    continue
                spread = 1.0 + square / (half_km * half_km)
                pull = people[other] / (spread * spread)
                slot = kept
                while slot > 0 and pull > weight[home, slot - 1]:
                    slot -= 1
                if slot == kept:
                    continue
                for later in range(kept - 1, slot, -1):
                    chosen[home, later] = chosen[home, later - 1]
                    weight[home, later] = weight[home, later - 1]
                chosen[home, slot] = other
                weight[home, slot] = pull


@kernel
def alias_rows(weight: F64, keep_q32: U32, other: U32) -> None:
    """Walker's alias table of each row of weights f64[n, k], not all 0 -> `keep_q32`, `other` u32[n, k].

    Column i keeps a draw with probability `keep_q32[i]` / 2^32 and passes it to `other[i]` otherwise (Vose, IEEE TSE
    17(9), 1991). A weight of 0 keeps nothing.
    """
    count, size = weight.shape
    scaled = np.empty(size, np.float64)
    poor = np.empty(size, np.int64)
    rich = np.empty(size, np.int64)
    for row in range(count):
        total = 0.0
        for column in range(size):
            total += weight[row, column]
        poor_count = 0
        rich_count = 0
        for column in range(size):
            scaled[column] = weight[row, column] * (size / total)
            keep_q32[row, column] = 0xFFFFFFFF
            other[row, column] = column
            if scaled[column] < 1.0:
                poor[poor_count] = column
                poor_count += 1
            else:
                rich[rich_count] = column
                rich_count += 1
        while poor_count and rich_count:
            poor_count -= 1
            taker = poor[poor_count]
            giver = rich[rich_count - 1]
            keep_q32[row, taker] = np.uint32(scaled[taker] * 4_294_967_295.0)
            other[row, taker] = giver
            scaled[giver] -= 1.0 - scaled[taker]
            if scaled[giver] < 1.0:
                rich_count -= 1
                poor[poor_count] = giver
                poor_count += 1
