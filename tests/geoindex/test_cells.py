"""Cells equal the h3 library's; clearances never promise too much."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import h3
import numpy as np
import pytest
from h3ronpy import change_resolution
from h3ronpy.vector import cells_to_coordinates, coordinates_to_cells

from geoindex import cell_kernels
from geoindex.cell_kernels import BLOCK_POINTS
from geoindex.cells import (
    CELL_INDEX_COUNT,
    ZONE_INDEX_COUNT,
    cell_tables,
    cells_of,
    cells_to_h3,
    h3_to_cells,
    zones_to_h3,
)
from geoindex.columns import F64, I32, U32, U64
from geoindex.numba_typing import kernel

RADIUS_M = 6_371_008.8
CHUNK = 1_000_000

# Place, latitude, longitude, H3 index at resolution 7, base cell, digits; from the h3 library, typed in.
PINNED = [
    ("Beijing", 39.9087, 116.3975, 0x8731AA428FFFFFF, 24, "6522050"),
    ("Shanghai", 31.2304, 121.4737, 0x87309959DFFFFFF, 24, "2312635"),
    ("Kashgar", 39.4704, 75.9898, 0x8720F2512FFFFFF, 16, "3622422"),
    ("San Francisco", 37.7759387, -122.4179506, 0x872830828FFFFFF, 20, "0604050"),
    ("Suva", -17.7134, 178.065, 0x879B4C896FFFFFF, 77, "5144226"),
    ("null island", 0.0, 0.0, 0x87754E64DFFFFFF, 58, "5163115"),
    ("antimeridian, east", 0.0, 180.0, 0x877EB5722FFFFFF, 63, "2653442"),
    ("antimeridian, west", 0.0, -180.0, 0x877EB5722FFFFFF, 63, "2653442"),
    ("north pole", 90.0, 0.0, 0x870326233FFFFFF, 1, "4461063"),
    ("north pole by another meridian", 90.0, 123.4, 0x870326233FFFFFF, 1, "4461063"),
    ("south pole", -90.0, 0.0, 0x87F29380EFFFFFF, 121, "2234016"),
    ("pentagon near Dalian", 39.1, 122.3000004, 0x873000000FFFFFF, 24, "0000000"),
]


def _e7(lat: F64, lng: F64) -> tuple[I32, I32]:
    return np.rint(lat * 1e7).astype(np.int32), np.rint(lng * 1e7).astype(np.int32)


def _degrees(vectors: F64) -> tuple[F64, F64]:
    x, y, z = vectors.T
    return np.degrees(np.arctan2(z, np.hypot(x, y))), np.degrees(np.arctan2(y, x))


def _vectors(lat: F64, lng: F64) -> F64:
    lat, lng = np.radians(lat), np.radians(lng)
    return np.stack([np.cos(lat) * np.cos(lng), np.cos(lat) * np.sin(lng), np.sin(lat)], axis=-1)


def _library_cells(lat: F64, lng: F64, resolution: int = 7) -> U64:
    return np.asarray(coordinates_to_cells(lat, lng, resolution)).astype(np.uint64)


def _dense(h3_index: U64, resolution: int) -> U32:
    """The numbering, spelled out: base cell, then the digits."""
    index = (h3_index >> np.uint64(45)) & np.uint64(127)
    for level in range(1, resolution + 1):
        index = index * np.uint64(7) + ((h3_index >> np.uint64(3 * (15 - level))) & np.uint64(7))
    return index.astype(np.uint32)


def _pentagons() -> F64:
    centers = np.array([h3.cell_to_latlng(cell) for cell in h3.get_pentagons(0)])
    return _vectors(centers[:, 0], centers[:, 1])


def _anywhere(source: np.random.Generator, rows: int) -> tuple[F64, F64]:
    return np.degrees(np.arcsin(source.uniform(-1, 1, rows))), source.uniform(-180, 180, rows)


def _china(source: np.random.Generator, rows: int) -> tuple[F64, F64]:
    return source.uniform(18, 54, rows), source.uniform(73, 135, rows)


def _poles_and_antimeridian(source: np.random.Generator, rows: int) -> tuple[F64, F64]:
    half = rows // 2
    near_pole = 90.0 - 10.0 ** source.uniform(-6, 1, half)
    near_line = 180.0 - 10.0 ** source.uniform(-6, 0, rows - half)
    lat = np.concatenate([near_pole, source.uniform(-90, 90, rows - half)])
    lng = np.concatenate([source.uniform(-180, 180, half), near_line])
    sign = source.choice([-1.0, 1.0], rows)
    return np.where(np.arange(rows) < half, lat * sign, lat), np.where(np.arange(rows) < half, lng, lng * sign)


def _around_pentagons(source: np.random.Generator, rows: int) -> tuple[F64, F64]:
    spread = 10.0 ** source.uniform(-6, -1, rows)
    vectors = _pentagons()[source.integers(0, 12, rows)] + source.normal(size=(rows, 3)) * spread[:, None]
    return _degrees(vectors)


def _along_face_edges(source: np.random.Generator, rows: int) -> tuple[F64, F64]:
    """On the 30 great circles between neighbouring pentagons, give or take a few kilometres."""
    pentagons = _pentagons()
    pairs = np.array([(i, j) for i in range(12) for j in range(12) if 0.4 < pentagons[i] @ pentagons[j] < 0.5])
    pair = pairs[source.integers(0, len(pairs), rows)]
    share = source.uniform(0, 1, rows)[:, None]
    vectors = pentagons[pair[:, 0]] * (1 - share) + pentagons[pair[:, 1]] * share
    return _degrees(vectors + source.normal(size=(rows, 3)) * 10.0 ** source.uniform(-9, -3, rows)[:, None])


REGIONS = {
    "anywhere": (_anywhere, 5),
    "China": (_china, 2),
    "poles and antimeridian": (_poles_and_antimeridian, 1),
    "around pentagons": (_around_pentagons, 1),
    "along face edges": (_along_face_edges, 1),
}


def _chunks(region: str, chunk_count: int | None = None, rows: int = CHUNK) -> Iterator[tuple[I32, I32]]:
    draw, chunks = REGIONS[region]
    source = np.random.default_rng(list(region.encode()))
    for _ in range(chunk_count or chunks):
        yield _e7(*draw(source, rows))


# ---------------------------------------------------------------- cells


@pytest.mark.parametrize(("place", "lat", "lng", "h3_index", "base_cell", "digits"), PINNED)
def test_known_places_have_their_known_cell(
    place: str, lat: float, lng: float, h3_index: int, base_cell: int, digits: str
) -> None:
    lat_e7, lng_e7 = _e7(np.array([lat]), np.array([lng]))
    cell = cells_of(lat_e7, lng_e7)
    assert cell.dtype == np.uint32
    assert cell.tolist() == [base_cell * 7**7 + int(digits, 7)]
    assert cells_to_h3(cell).tolist() == [h3_index]
    assert h3_to_cells(np.array([h3_index], dtype=np.uint64)).tolist() == cell.tolist()


@pytest.mark.parametrize("region", REGIONS)
def test_cells_equal_the_h3_librarys_on_ten_million_points_in_all(region: str) -> None:
    for lat_e7, lng_e7 in _chunks(region):
        expected = _library_cells(lat_e7 / 1e7, lng_e7 / 1e7)
        different = np.flatnonzero(cells_of(lat_e7, lng_e7) != _dense(expected, 7))
        assert not len(different), f"{region}: {lat_e7[different[:5]]}, {lng_e7[different[:5]]}"


def test_the_c_library_agrees_on_a_sample() -> None:
    """The bulk reference above is h3o, a port; this is H3 itself."""
    for region in REGIONS:
        ((lat_e7, lng_e7),) = _chunks(region, 1, rows=4000)
        expected = [
            h3.str_to_int(h3.latlng_to_cell(lat / 1e7, lng / 1e7, 7))
            for lat, lng in zip(lat_e7.tolist(), lng_e7.tolist(), strict=True)
        ]
        assert cells_to_h3(cells_of(lat_e7, lng_e7)).tolist() == expected


def test_the_centre_of_every_cell_of_resolution_4_is_in_the_cells_centre_child() -> None:
    base_cells = np.array([h3.str_to_int(cell) for cell in h3.get_res0_cells()], dtype=np.uint64)
    centers = np.asarray(change_resolution(base_cells, 4)).astype(np.uint64)
    assert len(centers) == 288_122
    coordinates = cells_to_coordinates(centers)
    lat_e7, lng_e7 = _e7(np.asarray(coordinates["lat"]), np.asarray(coordinates["lng"]))
    assert np.array_equal(cells_of(lat_e7, lng_e7), _dense(centers, 4) * 343)


def test_every_corner_of_the_coordinate_range_has_a_cell() -> None:
    limits = np.array([-1, 0, 1])
    lat_e7, lng_e7 = (
        grid.ravel().astype(np.int32) for grid in np.meshgrid(limits * 900_000_000, limits * 1_800_000_000)
    )
    assert np.array_equal(cells_of(lat_e7, lng_e7), _dense(_library_cells(lat_e7 / 1e7, lng_e7 / 1e7), 7))


def test_no_points_have_no_cells() -> None:
    nowhere = np.empty(0, dtype=np.int32)
    assert cells_of(nowhere, nowhere).shape == (0,)


def test_every_other_row_of_a_column_is_a_column_too() -> None:
    ((lat_e7, lng_e7),) = _chunks("anywhere", 1, rows=1000)
    assert np.array_equal(cells_of(lat_e7[::2], lng_e7[::2]), cells_of(lat_e7, lng_e7)[::2])


# ---------------------------------------------------------------- numbering


def test_indices_and_h3_indices_translate_both_ways() -> None:
    ((lat_e7, lng_e7),) = _chunks("around pentagons", 1, rows=100_000)
    cell = cells_of(lat_e7, lng_e7)
    h3_index = cells_to_h3(cell)
    assert np.array_equal(h3_to_cells(h3_index), cell)
    assert np.array_equal(_dense(h3_index, 7), cell)
    zones = np.asarray(change_resolution(h3_index, 5)).astype(np.uint64)
    assert np.array_equal(zones_to_h3(cell // 49), zones)


def test_zones_are_every_h3_cell_of_resolution_5_once() -> None:
    base_cells = np.array([h3.str_to_int(cell) for cell in h3.get_res0_cells()], dtype=np.uint64)
    zones = np.asarray(change_resolution(base_cells, 5)).astype(np.uint64)
    zone = np.sort(_dense(zones, 5))
    assert len(np.unique(zone)) == len(zones) == 2_016_842
    assert np.array_equal(np.sort(zones), zones_to_h3(zone))


def test_gaps_of_pentagons_and_indices_beyond_the_last_are_refused() -> None:
    gap = 24 * 7**7 + 1 * 7**4
    for cell in (gap, CELL_INDEX_COUNT, 2**32 - 1):
        message = f"cell: must be indices of cells of resolution 7, got {cell} at row 1"
        with pytest.raises(ValueError, match=re.escape(message)):
            cells_to_h3(np.array([0, cell], dtype=np.uint32))
    message = f"zone: must be indices of cells of resolution 5, got {ZONE_INDEX_COUNT} at row 0"
    with pytest.raises(ValueError, match=re.escape(message)):
        zones_to_h3(np.array([ZONE_INDEX_COUNT], dtype=np.uint32))


@pytest.mark.parametrize(
    "h3_index",
    [
        0,
        0x8631AA42FFFFFFF,  # resolution 6
        0x1731AA428FFFFFF,  # an edge, not a cell
        0x8731AA428FFFFFE,  # an unused digit that is not 7
        0x8731AA438FFFFFF | 7 << 24,  # a used digit that is 7
        0x87F5AA428FFFFFF,  # base cell 122
        0x8730_4000_0FFFFFF,  # a pentagon's missing wedge
        0xFFFFFFFFFFFFFFFF,
    ],
)
def test_what_is_no_cell_of_resolution_7_is_refused(h3_index: int) -> None:
    assert not (h3.is_valid_cell(h3.int_to_str(h3_index)) and h3.get_resolution(h3.int_to_str(h3_index)) == 7)
    message = f"h3_index: must be valid cells of resolution 7, got {h3_index:#x} at row 0"
    with pytest.raises(ValueError, match=re.escape(message)):
        h3_to_cells(np.array([h3_index], dtype=np.uint64))


def test_columns_of_the_wrong_kind_are_refused() -> None:
    good = np.zeros(3, dtype=np.int32)
    with pytest.raises(TypeError, match=re.escape("lat_e7: dtype must be int32, got float64")):
        cells_of(np.zeros(3), good)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=re.escape("lng_e7: dtype must be int32, got list")):
        cells_of(good, [0, 0, 0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("lat_e7: must be one column, got shape (3, 1)")):
        cells_of(good.reshape(3, 1), good)
    with pytest.raises(ValueError, match=re.escape("lat_e7 and lng_e7 must have one length, got 3 and 2")):
        cells_of(good, good[:2])
    with pytest.raises(TypeError, match=re.escape("cell: dtype must be uint32, got int32")):
        cells_to_h3(good)  # type: ignore[arg-type]


def test_coordinates_out_of_range_are_refused() -> None:
    zero = np.zeros(2, dtype=np.int32)
    for name, columns in (
        ("lat_e7", (np.array([0, 900_000_001], dtype=np.int32), zero)),
        ("lng_e7", (zero, np.array([0, -1_800_000_001], dtype=np.int32))),
        ("lng_e7", (zero, np.array([0, -(2**31)], dtype=np.int32))),
    ):
        with pytest.raises(ValueError, match=rf"{name}: must be within \+-\d+, got -?\d+ at row 1"):
            cells_of(*columns)


# ---------------------------------------------------------------- locate


def _locate(lat_e7: I32, lng_e7: I32, at_once: int = BLOCK_POINTS) -> tuple[U32, F64, F64]:
    rows = len(lat_e7)
    cell, vector, clearance_m = np.empty(rows, np.uint32), np.empty((rows, 3)), np.empty(rows)
    points = cell_kernels.point_block()
    real, whole = points.real.reshape(-1, BLOCK_POINTS), points.whole.reshape(-1, BLOCK_POINTS)
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        these = slice(start, start + count)
        whole[cell_kernels.LAT_E7 // BLOCK_POINTS, :count] = lat_e7[these]
        whole[cell_kernels.LNG_E7 // BLOCK_POINTS, :count] = lng_e7[these]
        cell_kernels.locate_block(points, count, cell_tables())
        cell[these] = whole[cell_kernels.CELL // BLOCK_POINTS, :count]
        vector[these] = real[cell_kernels.X // BLOCK_POINTS :][:3, :count].T
        clearance_m[these] = real[cell_kernels.CLEARANCE_M // BLOCK_POINTS, :count]
    return cell, vector, clearance_m


def _step(vectors: F64, bearing: F64, distance_m: F64) -> F64:
    """Points `distance_m` away along great circles."""
    any_other = np.where(np.abs(vectors[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    east = np.cross(any_other, vectors)
    east /= np.linalg.norm(east, axis=1)[:, None]
    direction = np.cos(bearing)[:, None] * east + np.sin(bearing)[:, None] * np.cross(vectors, east)
    angle = (distance_m / RADIUS_M)[:, None]
    moved: F64 = vectors * np.cos(angle) + direction * np.sin(angle)
    return moved


@pytest.mark.parametrize("region", REGIONS)
def test_nobody_leaves_the_cell_by_less_than_the_clearance(region: str) -> None:
    """10^6 points in all."""
    source = np.random.default_rng(7)
    ((lat_e7, lng_e7),) = _chunks(region, 1, rows=CHUNK // len(REGIONS))
    cell, vectors, clearance_m = _locate(lat_e7, lng_e7)
    assert np.array_equal(cell, cells_of(lat_e7, lng_e7))
    share = np.where(source.random(len(cell)) < 0.5, 1.0, source.random(len(cell)))
    moved = _step(vectors, source.uniform(0, 2 * math.pi, len(cell)), clearance_m * share)
    assert np.array_equal(_dense(_library_cells(*_degrees(moved)), 7), cell)


def test_clearance_is_nearly_the_distance_to_the_cells_border() -> None:
    ((lat_e7, lng_e7),) = _chunks("China", 1, rows=500)
    cell, vectors, clearance_m = _locate(lat_e7, lng_e7)
    distance_m = np.empty(len(cell))
    for row, index in enumerate(cells_to_h3(cell).tolist()):
        corners = np.array(h3.cell_to_boundary(h3.int_to_str(index)))
        outline = _vectors(corners[:, 0], corners[:, 1])
        normals = np.cross(outline, np.roll(outline, -1, axis=0))
        normals /= np.linalg.norm(normals, axis=1)[:, None]
        distance_m[row] = np.abs(normals @ vectors[row]).min() * RADIUS_M
    assert (clearance_m <= distance_m).all()
    assert clearance_m.sum() > 0.95 * distance_m.sum()
    assert clearance_m.max() > 1000


def test_unit_vectors_are_right_to_the_last_bits() -> None:
    for region in REGIONS:
        ((lat_e7, lng_e7),) = _chunks(region, 1, rows=20_000)
        lat, lng = (np.radians(angle_e7.astype(np.longdouble) / 10_000_000) for angle_e7 in (lat_e7, lng_e7))
        exact = np.stack([np.cos(lat) * np.cos(lng), np.cos(lat) * np.sin(lng), np.sin(lat)], axis=-1)
        assert np.abs(_locate(lat_e7, lng_e7)[1] - exact).max() < 4e-16


@pytest.mark.parametrize("region", REGIONS)
def test_a_point_is_located_the_same_whatever_stands_beside_it(region: str) -> None:
    ((lat_e7, lng_e7),) = _chunks(region, 1, rows=4000)
    together = _locate(lat_e7, lng_e7)
    for at_once in (1, 7, BLOCK_POINTS - 1):
        alone = _locate(lat_e7, lng_e7, at_once)
        assert all(np.array_equal(alone[column], together[column]) for column in range(3))


@kernel
def _unit_vectors(lat_e7: I32, lng_e7: I32, tables: cell_kernels.CellTables, vector: F64) -> None:
    for row in range(len(lat_e7)):
        vector[row, 0], vector[row, 1], vector[row, 2] = cell_kernels.unit_vector_e7(lat_e7[row], lng_e7[row], tables)


def test_pings_and_scans_measure_from_the_same_unit_vector() -> None:
    """Bit for bit: a phone on a ring's edge is inside for both or for neither."""
    for region in REGIONS:
        ((lat_e7, lng_e7),) = _chunks(region, 1, rows=20_000)
        vector = np.empty((len(lat_e7), 3))
        _unit_vectors(lat_e7, lng_e7, cell_tables(), vector)
        assert np.array_equal(_locate(lat_e7, lng_e7)[1], vector)


def test_tables_cannot_be_changed_and_are_derived_once() -> None:
    tables = cell_tables()
    assert tables is cell_tables()
    assert not any(table.flags.writeable for table in tables)
