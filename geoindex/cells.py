"""Places as H3 cells: latitude and longitude -> cell of resolution 7, numbered densely.

    cell index  u32   base cell * 7^7 + seven digits in base 7; 0 .. 100,472,553
    zone index  u32   cell index // 49: its ancestor of resolution 5; 0 .. 2,050,453
    H3 index    u64   what the h3 library and every map call a cell

The descendants of a cell are one range of indices. A cell belongs to the zone that its *index* names: resolution-7
cells overhang the hexagon of their zone a little, so a zone is the set of points of its 49 cells.

Nothing here is copied from H3: `cell_tables` puts the icosahedron where the h3 library has its twelve pentagons, works
out the lattice of one face, and asks the library once for each combination of face, position and leading digit.
It does so when first used (milliseconds), not from a stored file that would have to be kept in step with the library.
"""

from __future__ import annotations

import functools
import math
from itertools import combinations, product

import h3
import h3.api.basic_int as h3_int
import numpy as np
import numpy.typing as npt

from geoindex import cell_kernels
from geoindex.cell_kernels import (
    BASE_CELL_COUNT,
    CANDIDATE_COUNT,
    CELL_INDEX_COUNT,
    CELL_RESOLUTION,
    CELLS_PER_ZONE,
    CENTER,
    EARTH_RADIUS_M,
    EDGE_0,
    FACE_COUNT,
    HINT_COLUMNS,
    HINT_ROWS,
    HINT_SHIFT,
    PLANE_COLUMNS,
    POSITION_COUNT,
    ROW_A,
    ROW_B,
    SINE_COUNT,
    STEP_A,
    STEP_B,
    UNIT_RES0,
    ZONE_INDEX_COUNT,
    ZONE_RESOLUTION,
    CellTables,
)
from geoindex.columns import F64, I32, LAT_E7_MAX, LNG_E7_MAX, U8, U32, U64, Bool

__all__ = [
    "CELLS_PER_ZONE",
    "CELL_INDEX_COUNT",
    "CELL_RESOLUTION",
    "EARTH_RADIUS_M",
    "ZONE_INDEX_COUNT",
    "ZONE_RESOLUTION",
    "CellTables",
    "cell_centers",
    "cell_tables",
    "cells_of",
    "cells_to_h3",
    "coarse_to_h3",
    "h3_to_cells",
    "zones_to_h3",
]

C128 = npt.NDArray[np.complex128]


def cells_of(lat_e7: I32, lng_e7: I32) -> U32:
    """Cell index of each point.

    Args: `lat_e7`, `lng_e7` i32[n], 1e-7 degree, within +-90 and +-180 degrees.
    Returns: u32[n], in the same order.
    Raises: TypeError for another dtype, ValueError for another shape or a coordinate out of range.
    """
    check_coordinates("lat_e7", lat_e7, LAT_E7_MAX)
    check_coordinates("lng_e7", lng_e7, LNG_E7_MAX)
    if lat_e7.shape != lng_e7.shape:
        raise ValueError(f"lat_e7 and lng_e7 must have one length, got {len(lat_e7)} and {len(lng_e7)}")
    cell = np.empty(len(lat_e7), dtype=np.uint32)
    points = cell_kernels.point_block()
    cell_kernels.locate_points(np.ascontiguousarray(lat_e7), np.ascontiguousarray(lng_e7), cell_tables(), points, cell)
    return cell


def cells_to_h3(cell: U32) -> U64:
    """Cell indices u32[n] -> H3 indices u64[n] of resolution 7.

    Raises: TypeError for another dtype, ValueError for an index that names no cell.
    """
    return _to_h3("cell", cell, CELL_RESOLUTION)


def zones_to_h3(zone: U32) -> U64:
    """Zone indices u32[n] -> H3 indices u64[n] of resolution 5.

    Raises: TypeError for another dtype, ValueError for an index that names no cell.
    """
    return _to_h3("zone", zone, ZONE_RESOLUTION)


def coarse_to_h3(coarse: U32, resolution: int) -> U64:
    """Dense indices u32[n] of cells of a resolution from 0 to 5 -> H3 indices u64[n].

    That of a zone's ancestor is `zone // 7^(5 - resolution)`.
    Raises: TypeError for another dtype, ValueError for another resolution or an index that names no cell.
    """
    if not 0 <= resolution <= ZONE_RESOLUTION:
        raise ValueError(f"resolution: must be from 0 to {ZONE_RESOLUTION}, got {resolution}")
    return _to_h3("coarse", coarse, resolution)


def cell_centers(cell: U32) -> tuple[F64, Bool]:
    """Centres of cells u32[n] of resolution 7: unit vectors f64[n, 3], and bool[n], whether there is such a cell.

    Raises: TypeError for another dtype, ValueError for another shape.
    """
    _check_column("cell", cell, np.uint32)
    vector, reach = np.empty((len(cell), 3)), np.empty(len(cell))
    cell_kernels.cell_centers(np.ascontiguousarray(cell), CELL_RESOLUTION, cell_tables(), vector, reach)
    return vector, reach >= 0.0


def h3_to_cells(h3_index: U64) -> U32:
    """H3 indices u64[n] of resolution 7 -> cell indices u32[n].

    Raises: TypeError for another dtype, ValueError for anything but a valid cell of resolution 7.
    """
    _check_column("h3_index", h3_index, np.uint64)
    cell = np.empty(len(h3_index), dtype=np.uint32)
    bad_row = cell_kernels.parse_h3(np.ascontiguousarray(h3_index), CELL_RESOLUTION, cell_tables(), cell)
    if bad_row >= 0:
        found = f"got {int(h3_index[bad_row]):#x} at row {bad_row}"
        raise ValueError(f"h3_index: must be valid cells of resolution {CELL_RESOLUTION}, {found}")
    return cell


def _to_h3(name: str, dense: U32, resolution: int) -> U64:
    _check_column(name, dense, np.uint32)
    h3_index = np.empty(len(dense), dtype=np.uint64)
    bad_row = cell_kernels.format_h3(np.ascontiguousarray(dense), resolution, cell_tables(), h3_index)
    if bad_row >= 0:
        raise ValueError(
            f"{name}: must be indices of cells of resolution {resolution}, got {int(dense[bad_row])} at row {bad_row}"
        )
    return h3_index


def _check_column(name: str, column: npt.NDArray[np.generic], dtype: type[np.generic]) -> None:
    if not isinstance(column, np.ndarray) or column.dtype != dtype:
        raise TypeError(
            f"{name}: dtype must be {np.dtype(dtype)}, got {getattr(column, 'dtype', type(column).__name__)}"
        )
    if column.ndim != 1:
        raise ValueError(f"{name}: must be one column, got shape {column.shape}")


def check_coordinates(name: str, coordinate_e7: I32, limit_e7: int) -> None:
    """Raise TypeError or ValueError unless `coordinate_e7` is i32[n] within +-`limit_e7`."""
    _check_column(name, coordinate_e7, np.int32)
    if len(coordinate_e7) and (int(coordinate_e7.max()) > limit_e7 or int(coordinate_e7.min()) < -limit_e7):
        row = int(np.argmax(np.abs(coordinate_e7.astype(np.int64)) > limit_e7))
        raise ValueError(f"{name}: must be within +-{limit_e7}, got {int(coordinate_e7[row])} at row {row}")


# ---------------------------------------------------------------- deriving the tables

# Lattice points are a + b w. A digit names the unit that leads from a parent's centre to a child's centre: H3's
# digits are the bits of its axes i = 1 (4), j = w (2) and k = w^2 (1).
W = complex(-0.5, math.sqrt(0.75))
DIGIT_TURNED = (0, 5, 3, 1, 6, 4, 2)
"""Each digit after a turn by 60 degrees counterclockwise."""
DELETED_DIGIT = 1
"""The wedge that a pentagon lacks."""
# Centre of a cell = parent's centre * factor, in lattice units of its own resolution. The two turn by 19.1 degrees in
# opposite senses. Which is first was found by comparison: the other way round no table is consistent.
FACTOR_ODD, FACTOR_EVEN = 2 - W, 3 + W


def _turn(digit: int, turns: int) -> int:
    for _ in range(turns):
        digit = DIGIT_TURNED[digit]
    return digit


def _vector(lat: float, lng: float) -> F64:
    lat_rad, lng_rad = math.radians(lat), math.radians(lng)
    return np.array([math.cos(lat_rad) * math.cos(lng_rad), math.cos(lat_rad) * math.sin(lng_rad), math.sin(lat_rad)])


@functools.cache
def cell_tables() -> CellTables:
    """The tables of the kernels, derived on first use. Shared: read-only."""
    planes, neighbours, axes = _faces()
    pentagon = np.zeros(BASE_CELL_COUNT, dtype=np.uint8)
    pentagon[[h3.get_base_cell_number(cell) for cell in h3.get_pentagons(0)]] = 1
    sines = np.empty(2 * SINE_COUNT)
    cell_kernels.fill_sines(sines)
    unknown = CellTables(
        sines=sines,
        planes=planes.reshape(-1),
        neighbours=neighbours.reshape(-1),
        face_hint=_face_hint(planes),
        canonical=np.zeros(FACE_COUNT * POSITION_COUNT * 8, dtype=np.uint32),
        turns=np.array([_turns(count) for count in range(6)], dtype=np.uint32),
        home=np.full((BASE_CELL_COUNT, 7, CANDIDATE_COUNT, 4), -1, dtype=np.int8),
        pentagon=pentagon,
    )
    canonical, home = _learn(unknown, axes)
    tables = unknown._replace(canonical=canonical, home=home)
    for table in tables:
        table.flags.writeable = False
    return tables


def _faces() -> tuple[F64, U8, C128]:
    """Planes and neighbours as `CellTables` has them; and each face's axes: (i + j 1i) of the plane, c128[20, 3]."""
    vertices = np.array([_vector(*h3.cell_to_latlng(cell)) for cell in sorted(h3.get_pentagons(0))])
    vertices /= np.linalg.norm(vertices, axis=1)[:, None]
    near = vertices @ vertices.T > 0.4
    triples = [t for t in combinations(range(12), 3) if all(near[i, j] for i, j in combinations(t, 2))]
    assert len(triples) == FACE_COUNT, f"an icosahedron has {FACE_COUNT} faces, got {len(triples)}"
    # Resolution 7 is odd: its lattice is turned by one odd factor against resolution 0, and 7^3 finer.
    to_lattice = FACTOR_ODD**4 * FACTOR_EVEN**3 / UNIT_RES0
    planes = np.zeros((FACE_COUNT, PLANE_COLUMNS))
    axes = np.zeros((FACE_COUNT, 3), dtype=np.complex128)
    neighbours = np.zeros((FACE_COUNT, 3), dtype=np.uint8)
    for face, triple in enumerate(triples):
        center = vertices[list(triple)].sum(axis=0)
        center /= np.linalg.norm(center)
        i_axis = vertices[triple[0]] - center * (center @ vertices[triple[0]])
        i_axis /= np.linalg.norm(i_axis)
        axes[face] = i_axis + 1j * np.cross(center, i_axis)
        lattice = axes[face] * to_lattice
        row_b = lattice.imag / W.imag
        planes[face, CENTER : CENTER + 3] = center
        planes[face, ROW_A : ROW_A + 3] = lattice.real + row_b / 2
        planes[face, ROW_B : ROW_B + 3] = row_b
        planes[face, STEP_A : STEP_A + 3] = (np.conj(1 / to_lattice) * axes[face]).real
        planes[face, STEP_B : STEP_B + 3] = (np.conj(W / to_lattice) * axes[face]).real
    for face, triple in enumerate(triples):
        for side, (start, end) in enumerate(combinations(triple, 2)):
            (across,) = [g for g, other in enumerate(triples) if g != face and start in other and end in other]
            # start < end for both faces of an edge, so that the two normals differ by their sign alone.
            normal = np.cross(vertices[start], vertices[end])
            normal /= np.linalg.norm(normal)
            column = EDGE_0 + 3 * side
            planes[face, column : column + 3] = normal if normal @ planes[face, CENTER : CENTER + 3] > 0 else -normal
            neighbours[face, side] = across
    return planes, neighbours, axes


def _face_hint(planes: F64) -> U8:
    lat = ((np.arange(HINT_ROWS) + 0.5) * (1 << HINT_SHIFT) / 1e7 - 90.0) * (math.pi / 180)
    lng = ((np.arange(HINT_COLUMNS) + 0.5) * (1 << HINT_SHIFT) / 1e7 - 180.0) * (math.pi / 180)
    lat_grid, lng_grid = np.meshgrid(lat, lng, indexing="ij")
    points = np.stack(
        [np.cos(lat_grid) * np.cos(lng_grid), np.cos(lat_grid) * np.sin(lng_grid), np.sin(lat_grid)], axis=-1
    )
    nearest: U8 = np.argmax(points @ planes[:, CENTER : CENTER + 3].T, axis=-1).astype(np.uint8)
    return nearest.reshape(-1)


def _turns(count: int) -> int:
    """Every digit after so many turns, digit d's at 3 d bits."""
    return sum(_turn(digit, count) << 3 * digit for digit in range(7))


def _sample_face() -> C128:
    """Points of one face in its gnomonic plane (units of resolution 0) that meet every position and leading digit.

    The overhang of hexagons across an edge is met only close to the edges, and at every scale near the corners.
    """
    corners = np.array([2, 2 * W, 2 * W * W])
    along = np.concatenate([np.linspace(0.0005, 0.9995, 2000), np.geomspace(1e-4, 0.05, 200)])
    edges = np.concatenate([p + (q - p) * along for p in corners for q in corners if p != q])
    steps = np.linspace(0.01, 0.99, 60)
    inside = np.array(
        [p * s + corners[2] * (1 - s) for s in steps for p in corners[0] + (corners[1] - corners[0]) * steps]
    )
    return np.concatenate([edges * (1 - 1e-6), inside])


def _learn(tables: CellTables, axes: C128) -> tuple[U32, npt.NDArray[np.int8]]:
    """Ask the h3 library once for every (face, position, leading digit) a point can have: (`canonical`, `home`).

    All faces have one lattice, so one face's sample serves all. On a hexagon the turn is that of its base cell as a
    whole; on a pentagon it depends on the leading digit, because of the wedge that is not there.
    """
    sample = _sample_face()
    lattice = sample * FACTOR_ODD**4 * FACTOR_EVEN**3
    lattice_b = lattice.imag / W.imag
    position = np.empty(len(sample), dtype=np.int32)
    leading = np.empty(len(sample), dtype=np.int32)
    depth = np.empty(len(sample))
    cell_kernels.raw_positions(lattice.real + lattice_b / 2, lattice_b, position, leading, depth)
    # Of each combination, the point deepest inside its hexagon.
    witness = {(int(position[i]), int(leading[i])): int(i) for i in np.argsort(depth)}
    found: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
    for face, ((place, raw), i) in product(range(FACE_COUNT), witness.items()):
        center = tables.planes[face * PLANE_COLUMNS + CENTER :][:3]
        point = center + UNIT_RES0 * (np.conj(sample[i]) * axes[face]).real
        base_cell, digit = _ask_h3(point)
        assert (digit == 0) == (raw == 0), f"face {face}: leading digit must stay 0 or not 0, got {digit} for {raw}"
        turns = next(t for t in range(6) if _turn(raw, t) == digit)
        found.setdefault((face, place), {})[raw] = base_cell, turns

    assert len(found) == FACE_COUNT * 16, f"a face meets 16 base cells, got {len(found)} in all"
    canonical = np.zeros((FACE_COUNT, POSITION_COUNT, 8), dtype=np.uint32)
    home = np.full((BASE_CELL_COUNT, 7, CANDIDATE_COUNT, 4), -1, dtype=np.int8)
    home_count = np.zeros((BASE_CELL_COUNT, 7), dtype=np.int64)
    for (face, place), answers in found.items():
        (base_cell,) = {base for base, _ in answers.values()}
        turn_of = {raw: turns for raw, (_, turns) in answers.items() if raw}
        if tables.pentagon[base_cell]:
            leads = {raw: turns for raw, (_, turns) in answers.items()}
            turn_of = _around_pentagon(turn_of)
        else:
            (turns,) = set(turn_of.values())
            leads = turn_of = dict.fromkeys(range(7), turns)
        for raw in range(7):
            canonical[face, place, raw] = base_cell | _turns(turn_of.get(raw, 0)) << 7
        for raw, turns in leads.items():
            digit = _turn(raw, turns)
            home[base_cell, digit, home_count[base_cell, digit]] = face, place // 5 - 2, place % 5 - 2, turns
            home_count[base_cell, digit] += 1
    no_home = home_count == 0
    assert not no_home[tables.pentagon == 0].any() and not no_home[:, [0, 2, 3, 4, 5, 6]].any()
    return canonical.reshape(-1), home


def _ask_h3(point: F64) -> tuple[int, int]:
    """Base cell and leading digit that the h3 library gives a point of space."""
    x, y, z = (float(coordinate) for coordinate in point)
    lat, lng = math.degrees(math.atan2(z, math.hypot(x, y))), math.degrees(math.atan2(y, x))
    index = h3_int.latlng_to_cell(lat, lng, CELL_RESOLUTION)
    digits = [index >> (3 * (15 - resolution)) & 7 for resolution in range(1, CELL_RESOLUTION + 1)]
    return index >> 45 & 127, next((digit for digit in digits if digit), 0)


def _around_pentagon(turn_of: dict[int, int]) -> dict[int, int]:
    """Turns of all six leading digits of a pentagon on one face, from those that were met.

    Going around the pentagon, the digits of the face's lattice and H3's own advance together, H3's leaping over the
    wedge that is not there. A point in the lattice's other wedges lies on another face; they are filled in only so
    that a point exactly on an edge, rounded across, still gets a cell that exists.
    """
    assert len(turn_of) == 3, f"one corner of a face meets 3 leading digits, got {sorted(turn_of)}"
    (raw,) = [raw for raw in turn_of if _turn(raw, 5) not in turn_of]
    digit = _turn(raw, turn_of[raw])
    around: dict[int, int] = {}
    for _ in range(6):
        around[raw] = next(turns for turns in range(6) if _turn(raw, turns) == digit)
        raw, digit = DIGIT_TURNED[raw], DIGIT_TURNED[digit]
        if digit == DELETED_DIGIT:
            digit = DIGIT_TURNED[digit]
    assert around | turn_of == around, f"digits must advance together, got turns {turn_of}"
    return around
