"""The ring of an alert as the matcher covers it: H3 cells wholly inside, and cells that its edge crosses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import h3.api.basic_int as h3
import numpy as np

from geoindex.cells import CELLS_PER_ZONE, ZONE_RESOLUTION, cell_centers, zones_to_h3
from geoindex.columns import U32, U64
from geoindex.rings import cover_circle

__all__ = ["ZONE_RESOLUTION", "CoverShape", "cover_shape"]


@dataclass(frozen=True, slots=True)
class CoverShape:
    """H3 indices as they are written: 15 hexadecimal digits."""

    inside: tuple[str, ...]
    """Compacted: seven cells of one parent, all inside, are written as the parent."""
    edge: tuple[str, ...]
    """Of resolution ZONE_RESOLUTION."""


@lru_cache(maxsize=256)
def cover_shape(lat: float, lng: float, radius_km: float) -> CoverShape:
    """Some ms for a ring of 500 km. Raises ValueError as `cover_circle` does."""
    cover = cover_circle(lat, lng, radius_km)
    inside = h3.compact_cells(_zones(cover.inside).tolist())
    return CoverShape(_written(sorted(inside)), _written(_zones(cover.edge).tolist()))


def _zones(ranges: U32) -> U64:
    """Ranges of zones u32[n, 2] -> H3 indices; numbers between them that name no zone are left out."""
    parts = [np.arange(start, stop, dtype=np.uint32) for start, stop in ranges.tolist()]
    zones = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
    _, exists = cell_centers(zones * np.uint32(CELLS_PER_ZONE))  # the middle cell is there if its zone is
    return zones_to_h3(zones[exists])


def _written(cells: list[int]) -> tuple[str, ...]:
    return tuple(f"{cell:x}" for cell in cells)
