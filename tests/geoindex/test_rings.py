"""Ring schedules as rule 4 has them; covers that leave nobody out and promise nobody too much."""

from __future__ import annotations

import math
import re
from typing import Any

import h3
import numpy as np
import pytest
from h3ronpy.vector import coordinates_to_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from geoindex import cell_kernels
from geoindex.cells import cell_tables
from geoindex.columns import F64, U32, Bool
from geoindex.entries import DEFAULT_SCHEDULE, HOUR_MS
from geoindex.rings import (
    Cover,
    check_schedule,
    chord2_max,
    cover_circle,
    growth_times_ms,
    hours_to_ms,
    radius_km,
    ring_clearance_m,
    unit_vector,
)

RADIUS_M = 6_371_008.8
ZONE_COUNT = 122 * 7**5

# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("elapsed_ms", "km"),
    [
        (-1, 100),
        (-(10**15), 100),
        (0, 100),
        (3_599_999, 100),
        (3_600_000, 200),
        (7_199_999, 200),
        (7_200_000, 300),
        (10_799_999, 300),
        (10_800_000, 500),
        (10**15, 500),
    ],
)
def test_the_default_ring_grows_at_the_hour_itself(elapsed_ms: int, km: float) -> None:
    assert radius_km(DEFAULT_SCHEDULE, elapsed_ms) == km


def test_hours_may_be_fractions() -> None:
    schedule = ((0.5, 10.0), (1 / 3 + 1, 20.5), (None, 21.0))
    assert radius_km(schedule, 1_799_999) == 10.0
    assert radius_km(schedule, 1_800_000) == 20.5
    assert radius_km(schedule, 4_799_999) == 20.5
    assert radius_km(schedule, 4_800_000) == 21.0


def test_hours_end_at_the_first_whole_millisecond_not_before_them() -> None:
    assert hours_to_ms(1.1) == 3_960_000
    assert hours_to_ms(2 / 7) == 1_028_572
    assert hours_to_ms(0.0) == 0
    assert hours_to_ms(24) == 86_400_000


def test_growth_times_name_each_moment_and_the_ring_from_then_on() -> None:
    assert growth_times_ms(DEFAULT_SCHEDULE, 1_000) == [(3_601_000, 200.0), (7_201_000, 300.0), (10_801_000, 500.0)]
    assert growth_times_ms(((None, 7.0),), 1_000) == []


@given(
    limits_ms=st.lists(st.integers(1, 10**9), min_size=0, max_size=6, unique=True).map(sorted),
    missing_since_ms=st.integers(0, 2 * 10**12),
)
def test_the_ring_changes_at_growth_times_and_never_between(limits_ms: list[int], missing_since_ms: int) -> None:
    hours: list[float | None] = [limit / HOUR_MS for limit in limits_ms]
    schedule = tuple((limit, 10.0 + step) for step, limit in enumerate([*hours, None]))
    check_schedule(schedule, "test")
    growth = growth_times_ms(schedule, missing_since_ms)
    assert [time_ms - missing_since_ms for time_ms, _ in growth] == limits_ms
    before_km = radius_km(schedule, -1)
    for time_ms, km in growth:
        assert radius_km(schedule, time_ms - missing_since_ms - 1) == before_km
        assert radius_km(schedule, time_ms - missing_since_ms) == km
        before_km = km


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((), "schedule must have a step, got none"),
        (((3, 1), (2, 2), (None, 3)), "schedule hours must rise, got 2 after 3"),
        (((1, 1), (1.0, 2), (None, 3)), "schedule hours must rise, got 1 after 1"),
        (
            ((1, 1), (1 + 1e-10, 2), (None, 3)),
            "schedule hours must rise by a millisecond or more, got 1.0000000001 after 1",
        ),
        (((1e-10, 1), (None, 3)), "schedule hours must rise by a millisecond or more, got 1e-10 after 0"),
        (((0, 1), (None, 3)), "schedule hours must be above 0, got 0"),
        (((-1, 1), (None, 3)), "schedule hours must be above 0, got -1"),
        (((math.nan, 1), (None, 3)), "schedule hours must be finite numbers, got nan"),
        (((True, 1), (None, 3)), "schedule hours must be finite numbers, got True"),
        ((("1", 1), (None, 3)), "schedule hours must be finite numbers, got '1'"),
        (((1e300, 1), (None, 3)), "schedule hours must be at most 1e+06, got 1e+300"),
        (((1, 100), (2, 200)), "schedule's last hours must be null, got 2"),
        (((None, 100), (None, 200)), "schedule hours must be null in the last step only, got null in step 1"),
        (((1, 200), (None, 200)), "schedule km must rise, got 200 after 200"),
        (((1, 300), (None, 200)), "schedule km must rise, got 200 after 300"),
        (((None, 0),), "schedule km must be above 0, got 0"),
        (((None, math.inf),), "schedule km must be finite numbers, got inf"),
        (((None, None),), "schedule km must be finite numbers, got None"),
        (((1, 100), (None, 1000.5)), "schedule km must be at most 1000, got 1000.5"),
    ],
)
def test_a_schedule_that_breaks_rule_4_is_refused_by_name(schedule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"alert 'a17': {message}") + "$"):
        check_schedule(schedule, "alert 'a17'")


def test_good_schedules_pass() -> None:
    check_schedule(DEFAULT_SCHEDULE, "default")
    check_schedule(((None, 1000.0),), "one step")
    check_schedule(((0.25, 0.001), (None, 1000)), "smallest and largest")


# ---------------------------------------------------------------- chords


def test_unit_vectors_of_places_are_pinned() -> None:
    assert unit_vector(0.0, 0.0) == (1.0, 0.0, 0.0)
    assert unit_vector(0.0, 90.0) == (0.0, 1.0, 0.0)
    assert unit_vector(0.0, 180.0) == (-1.0, 0.0, 0.0)
    assert unit_vector(0.0, -180.0) == (-1.0, 0.0, 0.0)
    assert unit_vector(90.0, 77.0) == (0.0, 0.0, 1.0)
    assert unit_vector(-90.0, 0.0) == (0.0, 0.0, -1.0)
    assert unit_vector(30.0, 60.0) == pytest.approx((math.sqrt(3) / 4, 0.75, 0.5), abs=2e-16)


@given(st.floats(-90, 90), st.floats(-180, 180))
def test_unit_vectors_are_right_to_the_last_bits(lat: float, lng: float) -> None:
    lat_rad, lng_rad = math.radians(lat), math.radians(lng)
    expected = (math.cos(lat_rad) * math.cos(lng_rad), math.cos(lat_rad) * math.sin(lng_rad), math.sin(lat_rad))
    assert unit_vector(lat, lng) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("lat", "lng"), [(90.1, 0.0), (math.nan, 0.0), (0.0, 180.1), (0.0, math.inf)])
def test_places_out_of_range_are_refused(lat: float, lng: float) -> None:
    with pytest.raises(ValueError, match=r"^l(at|ng): must be within \+-\d+, got "):
        unit_vector(lat, lng)


@pytest.mark.parametrize("km", [0.001, 1.0, 100.0, 500.0, 1000.0])
def test_the_chord_of_a_radius_is_pinned_by_a_place_just_inside_and_one_just_outside(km: float) -> None:
    """Along a meridian the great-circle distance is the difference of latitudes."""
    degrees = math.degrees(km * 1000 / RADIUS_M)
    for start in (-90.0, -45.0, 0.0, 60.0):
        center = np.array(unit_vector(start, 12.0))
        inside = np.array(unit_vector(start + degrees - 1e-9, 12.0)) - center
        outside = np.array(unit_vector(start + degrees + 1e-9, 12.0)) - center
        assert inside @ inside <= chord2_max(km) < outside @ outside


@given(st.floats(0.001, 1000.0), st.floats(0.0, 20_000.0))
@settings(max_examples=1000)
def test_ring_clearance_never_exceeds_the_way_to_the_ring(ring_km: float, distance_km: float) -> None:
    chord2 = (2 * math.sin(distance_km * 500 / RADIUS_M)) ** 2
    clearance_m = ring_clearance_m(chord2, chord2_max(ring_km))
    exact_m = abs(distance_km - ring_km) * 1000
    assert 0.0 <= clearance_m <= exact_m
    if distance_km <= 2000:
        assert clearance_m >= 0.98 * exact_m - 0.02


# ---------------------------------------------------------------- cover

# Centres where covers could go wrong; latitude, longitude.
PLACES: dict[str, tuple[float, float]] = {
    "north pole": (90.0, 0.0),
    "near the south pole": (-89.5, 33.0),
    "antimeridian": (-17.0, 180.0),
    "just east of the antimeridian": (66.0, -179.99),
    "Beijing": (39.9, 116.4),
    "pentagon near Dalian": (39.1, 122.3000004),
    "pentagon in Africa": h3.cell_to_latlng("8075fffffffffff"),
    "middle of a face": (58.19, 32.9),
    "null island": (0.0, 0.0),
}
RADII_KM = (0.001, 0.05, 1.0, 8.0, 9.0, 20.0, 100.0, 200.0, 500.0, 1000.0)


def _vectors(lat: F64, lng: F64) -> F64:
    lat, lng = np.radians(lat), np.radians(lng)
    return np.stack([np.cos(lat) * np.cos(lng), np.cos(lat) * np.sin(lng), np.sin(lat)], axis=-1)


def _degrees(vectors: F64) -> tuple[F64, F64]:
    x, y, z = vectors.T
    return np.degrees(np.arctan2(z, np.hypot(x, y))), np.degrees(np.arctan2(y, x))


def _ancestors(lat: F64, lng: F64, resolution: int) -> U32:
    """Dense index of the ancestor of each point's resolution-7 cell, read off the library's cells."""
    h3_index = np.asarray(coordinates_to_cells(lat, lng, 7)).astype(np.uint64)
    index = (h3_index >> np.uint64(45)) & np.uint64(127)
    for level in range(1, resolution + 1):
        index = index * np.uint64(7) + ((h3_index >> np.uint64(3 * (15 - level))) & np.uint64(7))
    return index.astype(np.uint32)


def _members(ranges: U32) -> Bool:
    """bool[ZONE_COUNT]: which zones the ranges name."""
    named = np.zeros(ZONE_COUNT, dtype=np.bool_)
    for start, stop in ranges.tolist():
        named[start:stop] = True
    return named


def _points_around(source: np.random.Generator, lat: float, lng: float, km: float, rows: int) -> tuple[F64, F64, F64]:
    """Points by bearing and distance from a centre, many where zones straddle the edge: lat, lng, distance_m."""
    radius_m = km * 1000
    within = radius_m * np.sqrt(source.uniform(0, 1.5, rows))
    straddling = np.abs(radius_m + source.normal(size=rows) * np.minimum(12_000, radius_m))
    grazing = np.abs(radius_m + source.uniform(-1, 1, rows))
    kind = source.integers(0, 5, rows)
    distance_m = np.where(kind < 2, within, np.where(kind < 4, straddling, grazing))
    lat_0, lng_0 = math.radians(lat), math.radians(lng)
    bearing, angle = source.uniform(0, 2 * math.pi, rows), distance_m / RADIUS_M
    north = np.array([-math.sin(lat_0) * math.cos(lng_0), -math.sin(lat_0) * math.sin(lng_0), math.cos(lat_0)])
    east = np.array([-math.sin(lng_0), math.cos(lng_0), 0.0])
    center = np.array([math.cos(lat_0) * math.cos(lng_0), math.cos(lat_0) * math.sin(lng_0), math.sin(lat_0)])
    direction = np.cos(bearing)[:, None] * north + np.sin(bearing)[:, None] * east
    return *_degrees(center * np.cos(angle)[:, None] + direction * np.sin(angle)[:, None]), distance_m


def _check_cover(source: np.random.Generator, lat: float, lng: float, km: float, rows: int) -> None:
    cover = cover_circle(lat, lng, km)
    inside, edge = _members(cover.inside), _members(cover.edge)
    point_lat, point_lng, distance_m = _points_around(source, lat, lng, km, rows)
    zone = _ancestors(point_lat, point_lng, 5)
    covered = inside[zone] | edge[zone]
    where = f"circle of {km} km around {lat}, {lng}"
    assert covered[distance_m <= km * 1000 - 1e-6].all(), f"{where}: a point inside is not covered"
    assert (distance_m[inside[zone]] <= km * 1000).all(), f"{where}: a point of an inside zone is outside"


@pytest.mark.parametrize("place", PLACES)
def test_covers_leave_nobody_out_and_promise_nobody_too_much(place: str) -> None:
    """450,000 points here, and as many again around random centres below."""
    source = np.random.default_rng(list(place.encode()))
    for km in RADII_KM:
        _check_cover(source, *PLACES[place], km, 5000)


def test_covers_anywhere_leave_nobody_out_and_promise_nobody_too_much() -> None:
    source = np.random.default_rng(5)
    pentagons = [h3.cell_to_latlng(cell) for cell in h3.get_pentagons(5)]
    for circle in range(220):
        if circle % 2:
            lat, lng = math.degrees(math.asin(source.uniform(-1, 1))), source.uniform(-180, 180)
        else:
            near = pentagons[circle // 2 % 12]
            lat = min(90.0, max(-90.0, near[0] + source.normal() * 2))
            lng = min(180.0, max(-180.0, near[1] + source.normal() * 2))
        _check_cover(source, lat, lng, 10 ** source.uniform(-3, 3), 2500)


@pytest.mark.parametrize("place", PLACES)
def test_ranges_are_sorted_disjoint_and_merged(place: str) -> None:
    for km in RADII_KM:
        cover = cover_circle(*PLACES[place], km)
        for ranges in (cover.inside.astype(np.int64), cover.edge.astype(np.int64)):
            assert (ranges[:, 0] < ranges[:, 1]).all()
            assert (ranges[1:, 0] > ranges[:-1, 1]).all()
            assert not len(ranges) or (ranges[0, 0] >= 0 and ranges[-1, 1] <= ZONE_COUNT)
        assert not (_members(cover.inside) & _members(cover.edge)).any()


@pytest.mark.parametrize("place", PLACES)
def test_a_cover_only_grows_with_the_radius(place: str) -> None:
    """Step by step through the hours, and by a little at a time."""
    radii = sorted({*RADII_KM, *np.linspace(95, 105, 12).tolist(), *np.linspace(499, 500, 5).tolist()})
    inside, covered = np.zeros(ZONE_COUNT, dtype=np.bool_), np.zeros(ZONE_COUNT, dtype=np.bool_)
    for km in radii:
        cover = cover_circle(*PLACES[place], km)
        inside_now, edge_now = _members(cover.inside), _members(cover.edge)
        covered_now = inside_now | edge_now
        assert not (inside & ~inside_now).any()
        assert not (covered & ~covered_now).any()
        inside, covered = inside_now, covered_now


def test_most_of_a_large_cover_is_inside_and_few_zones_are_edge() -> None:
    for place in PLACES.values():
        cover = cover_circle(*place, 500.0)
        inside, edge = int(_members(cover.inside).sum()), int(_members(cover.edge).sum())
        assert 0 < edge < 450
        # The circle has 785,000 km2, a zone 253 km2 on average, twice as much in the middle of a face as at a corner.
        assert 2000 < inside < 5500


def test_a_circle_of_a_metre_has_a_cover_of_a_few_edge_zones() -> None:
    for place in PLACES.values():
        cover = cover_circle(*place, 0.001)
        assert len(cover.inside) == 0
        assert 1 <= int(_members(cover.edge).sum()) <= 4


@pytest.mark.parametrize("km", [0.0, -1.0, 1000.001, math.nan, math.inf])
def test_radii_out_of_range_are_refused(km: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"radius_km: must be above 0 and at most 1000, got {km}")):
        cover_circle(0.0, 0.0, km)


def test_a_cover_of_the_wrong_shape_is_refused() -> None:
    good = np.zeros((0, 2), dtype=np.uint32)
    with pytest.raises(AssertionError, match=r"edge: shape must be \(n, 2\), got \(0,\)"):
        Cover(inside=good, edge=np.zeros(0, dtype=np.uint32))
    with pytest.raises(AssertionError, match="inside: dtype must be uint32, got int64"):
        Cover(inside=good.astype(np.int64), edge=good)


# ---------------------------------------------------------------- what covers rest on


def _cell_points(rows: int) -> tuple[F64, F64]:
    """Anywhere, and crowded around pentagons and the edges of the icosahedron's faces."""
    source = np.random.default_rng(11)
    pentagons = np.array([h3.cell_to_latlng(cell) for cell in h3.get_pentagons(0)])
    corners = _vectors(pentagons[:, 0], pentagons[:, 1])
    first, second = source.integers(0, 12, rows), source.integers(0, 12, rows)
    share = source.uniform(0, 1, rows)[:, None]
    on_edge = np.where((corners[first] * corners[second]).sum(axis=1)[:, None] > 0.4, share, 0.0)
    crowded = corners[first] * (1 - on_edge) + corners[second] * on_edge
    anywhere = source.normal(size=(rows, 3))
    vectors = np.where(source.random(rows)[:, None] < 0.3, anywhere, crowded)
    return _degrees(vectors + source.normal(size=(rows, 3)) * 10.0 ** source.uniform(-6, -1, rows)[:, None])


def _centers(index: U32, resolution: int) -> tuple[F64, F64]:
    centers, reach_rad = np.empty((len(index), 3)), np.empty(len(index))
    cell_kernels.cell_centers(index, resolution, cell_tables(), centers, reach_rad)
    return centers, reach_rad


@pytest.mark.parametrize("resolution", range(8))
def test_no_descendant_lies_beyond_the_reach_of_its_ancestor(resolution: int) -> None:
    """The cover's proof, at 10^6 points in all; and the bound is not a loose one."""
    lat, lng = _cell_points(125_000)
    index = _ancestors(lat, lng, resolution)
    centers, reach_rad = _centers(index, resolution)
    distance_rad = 2 * np.arcsin(0.5 * np.linalg.norm(_vectors(lat, lng) - centers, axis=1))
    assert (distance_rad <= reach_rad).all()
    assert (distance_rad / reach_rad).max() > 0.9


@pytest.mark.parametrize("resolution", range(6))
def test_centres_equal_the_h3_librarys(resolution: int) -> None:
    lat, lng = _cell_points(1000)
    cells = [h3.latlng_to_cell(*place, resolution) for place in zip(lat.tolist(), lng.tolist(), strict=True)]
    cells += h3.get_pentagons(resolution)
    index = np.array(
        [h3.get_base_cell_number(cell) * 7**resolution + _digits(cell, resolution) for cell in cells],
        dtype=np.uint32,
    )
    expected = np.array([h3.cell_to_latlng(cell) for cell in cells])
    centers, _ = _centers(index, resolution)
    assert np.abs(centers - _vectors(expected[:, 0], expected[:, 1])).max() * RADIUS_M < 1e-6


def _digits(cell: str, resolution: int) -> int:
    digits = 0
    for level in range(1, resolution + 1):
        digits = digits * 7 + (h3.str_to_int(cell) >> 3 * (15 - level) & 7)
    return digits


def test_gaps_of_the_numbering_have_no_centre() -> None:
    gap = np.array([24 * 7 + 1, 4 * 7 + 1], dtype=np.uint32)
    assert _centers(gap, 1)[1].tolist() == [-1.0, -1.0]
