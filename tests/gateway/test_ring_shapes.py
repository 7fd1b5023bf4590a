"""Rings as polygons: on the sphere, cut at longitude 180, closed over poles."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.ring_shapes import CORNERS, ring_geometry

EARTH_KM = 6371.0088


def distance_km(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Haversine, of (lat, lng)."""
    (lat1, lng1), (lat2, lng2) = first, second
    half = math.sin(math.radians(lat2 - lat1) / 2) ** 2
    half += math.cos(math.radians(lat1)) * math.cos(math.radians(lat2)) * math.sin(math.radians(lng2 - lng1) / 2) ** 2
    return 2 * EARTH_KM * math.asin(math.sqrt(min(1.0, half)))


def parts(geometry: dict[str, Any]) -> list[list[list[float]]]:
    polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    assert all(len(rings) == 1 for rings in polygons)
    return [rings[0] for rings in polygons]


def plane_area(ring: list[list[float]]) -> float:
    """Square degrees; above 0 against the clock."""
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairwise(ring)) / 2


def holds(ring: list[list[float]], lat: float, lng: float) -> bool:
    """Whether a point lies in a ring, on the plane: crossings of a ray to the north."""
    crossings = 0
    for (x1, y1), (x2, y2) in pairwise(ring):
        if (x1 > lng) != (x2 > lng) and y1 + (lng - x1) / (x2 - x1) * (y2 - y1) > lat:
            crossings += 1
    return crossings % 2 == 1


def test_an_ordinary_ring_is_one_polygon_with_its_corners_on_the_circle() -> None:
    geometry: dict[str, Any] = ring_geometry(30.0, 114.0, 100.0)
    assert geometry["type"] == "Polygon"
    (ring,) = parts(geometry)
    assert len(ring) == CORNERS + 1
    assert ring[0] == ring[-1]
    assert [114.0, 30.89932] in ring  # 100 km to the north
    assert plane_area(ring) > 0
    for lng, lat in ring:
        assert distance_km((30.0, 114.0), (lat, lng)) == pytest.approx(100.0, abs=1e-3)


def test_a_ring_across_longitude_180_comes_in_two_parts_that_meet_there() -> None:
    geometry: dict[str, Any] = ring_geometry(0.0, 179.5, 100.0)
    assert geometry["type"] == "MultiPolygon"
    west, east = sorted(parts(geometry), key=lambda ring: min(lng for lng, _ in ring))
    assert (min(west)[0], max(east)[0]) == (-180.0, 180.0)
    assert max(west)[0] == pytest.approx(-179.601, abs=0.001)
    assert min(east)[0] == pytest.approx(178.601, abs=0.001)
    meeting = [sorted(lat for lng, lat in ring if abs(lng) == 180.0) for ring in (west, east)]
    assert sorted(set(meeting[0])) == sorted(set(meeting[1]))


@pytest.mark.parametrize(("lat", "pole"), [(89.0, 90.0), (-89.0, -90.0), (90.0, 90.0), (-90.0, -90.0)])
def test_a_ring_around_a_pole_spans_the_map_and_is_closed_over_the_pole(lat: float, pole: float) -> None:
    (ring,) = parts(ring_geometry(lat, 10.0, 500.0))
    assert {-180.0, 180.0} <= {lng for lng, _ in ring}
    assert [180.0, pole] in ring and [-180.0, pole] in ring
    assert plane_area(ring) > 0
    assert holds(ring, math.copysign(89.9, lat), -123.0)


@given(
    st.floats(-90, 90),
    st.floats(-180, 180),
    st.sampled_from([0.1, 10.0, 100.0, 500.0, 1000.0]),
    st.floats(0, 360),
    st.floats(0, 2).filter(lambda share: abs(share - 1) > 0.01),
)
@example(81.0, 0.0, 1000.0, 0.0, 0.5)
@example(85.503398, 0.0, 500.0, 0.0, 0.9)
@example(0.0, 180.0, 500.0, 90.0, 0.9)
@example(0.0, -180.0, 500.0, 90.0, 0.9)
@example(30.0, 179.0, 96.0, 90.0, 0.9)
def test_the_polygon_holds_what_the_circle_holds(
    lat: float, lng: float, km: float, bearing: float, share: float
) -> None:
    geometry: dict[str, Any] = ring_geometry(lat, lng, km)
    rings = parts(geometry)
    for ring in rings:
        assert ring[0] == ring[-1]
        assert all(abs(x) <= 180 and abs(y) <= 90 for x, y in ring)
        assert len(ring) >= 4
        assert plane_area(ring) >= 0
    # A point at `share` of the radius: inside or outside on the sphere, and so on the map. Near a pole the map's
    # straight edges leave the circle by more than elsewhere.
    angle, reach = math.radians(bearing), share * km / EARTH_KM
    sin_there = math.sin(math.radians(lat)) * math.cos(reach) + math.cos(math.radians(lat)) * math.sin(
        reach
    ) * math.cos(angle)
    there = math.degrees(math.asin(max(-1.0, min(1.0, sin_there))))
    turned = math.atan2(
        math.sin(angle) * math.sin(reach) * math.cos(math.radians(lat)),
        math.cos(reach) - math.sin(math.radians(lat)) * sin_there,
    )
    where = (lng + math.degrees(turned) + 180) % 360 - 180
    if abs(there) > 89.5 or abs(abs(where) - 180) < 1e-6:
        return
    assert sum(holds(ring, there, where) for ring in rings) == (1 if share < 1 else 0)
