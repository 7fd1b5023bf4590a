"""Covers as they are drawn: what the matcher has, cell by cell, at any place."""

from __future__ import annotations

import h3
import numpy as np
import pytest

from gateway.view_cover import ZONE_RESOLUTION, cover_shape
from geoindex.cells import zones_to_h3
from geoindex.rings import cover_circle

PLACES = [(30.2741, 120.1551), (0.0, 180.0), (89.9, 0.0), (-89.9, 10.0), (58.16, 11.2)]
"""Hangzhou, the antimeridian, both poles, beside one of H3's pentagons."""


@pytest.mark.parametrize(("lat", "lng"), PLACES)
@pytest.mark.parametrize("km", [30.0, 100.0, 500.0])
def test_inside_and_edge_are_disjoint_and_hold_every_cell_of_the_circle(lat: float, lng: float, km: float) -> None:
    shape = cover_shape(lat, lng, km)
    inside = set(h3.uncompact_cells(list(shape.inside), ZONE_RESOLUTION))
    edge = set(shape.edge)
    assert all(h3.is_valid_cell(cell) for cell in inside | edge)
    assert not inside & edge
    assert h3.latlng_to_cell(lat, lng, ZONE_RESOLUTION) in inside | edge
    for cell in inside:
        assert h3.great_circle_distance((lat, lng), h3.cell_to_latlng(cell)) <= km
    near = set(h3.grid_disk(h3.latlng_to_cell(lat, lng, ZONE_RESOLUTION), 12))
    within = {cell for cell in near if h3.great_circle_distance((lat, lng), h3.cell_to_latlng(cell)) <= km - 15}
    assert within <= inside | edge


def test_the_cells_are_the_matchers_own() -> None:
    lat, lng, km = 30.2741, 120.1551, 100.0
    shape, cover = cover_shape(lat, lng, km), cover_circle(lat, lng, km)
    zones = np.concatenate([np.arange(start, stop, dtype=np.uint32) for start, stop in cover.edge.tolist()])
    assert list(shape.edge) == [f"{cell:x}" for cell in zones_to_h3(zones).tolist()]
    assert len(shape.inside) < len(h3.uncompact_cells(list(shape.inside), ZONE_RESOLUTION))
