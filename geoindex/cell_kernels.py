"""The loops behind `cells` and `rings`: from a coordinate to its H3 cell, and from a cell back to its centre.

H3 lays a hexagonal lattice over the 20 faces of an icosahedron (gnomonic projection of each face, lattice refined by
the square root of 7 and turned to and fro from one resolution to the next). How a point finds its cell:

    lat, lng (1e-7 degree) -> unit vector: no libm, so the same bits everywhere
      -> face: a guess from a coarse grid, walked across the edge that is violated
      -> gnomonic plane of the face, in units of the resolution-7 lattice: (a, b) means a + b w, w = exp(120 deg i)
      -> nearest lattice point: round three coordinates that must sum to 0, give up the worst
      -> 7 steps to the parent, each leaving a digit:  (a, b) = (2 - w | 3 + w) * parent + unit
      -> (face, lattice point of resolution 0, first digit that is not 0) -> base cell, turn of all digits

Points go through this in blocks of 64 (`PointBlock`, `locate_block`): loops that look something up alternate with loops
that only compute, in doubles and without a branch, which LLVM turns into vector instructions. Lattice coordinates and
digits are whole numbers in doubles, so exact; rounding a whole number of sevenths meets no tie.

Source: "H3's icosahedral gnomonic projection", https://h3geo.org/docs/core-library/overview and
https://h3geo.org/docs/core-library/h3Indexing, in our own arithmetic; `cells.cell_tables` derives every number.

Cells of one resolution are numbered densely: `base cell * 7^resolution + digits in base 7`. All integers are int64
inside (Numba turns mixed signs into floats).

*Measured* (one core of an AMD EPYC, Zen 5, AVX-512, random points in China): 14.5 ns a point, 34 one by one; the h3
library's scalar call 630 ns, h3ronpy 290-350 ns (Zen 4).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from geoindex.columns import F64, I32, I64, U8, U32, U64
from geoindex.numba_typing import inline_kernel, kernel, lean_kernel, lowest_bit

EARTH_RADIUS_M = 6_371_008.8
"""H3's sphere (mean radius of WGS-84), https://h3geo.org/docs/core-library/restable."""

CELL_RESOLUTION = 7
ZONE_RESOLUTION = 5
BASE_CELL_COUNT = 122
FACE_COUNT = 20
CELLS_PER_BASE = 7**CELL_RESOLUTION
CELLS_PER_ZONE = 7 ** (CELL_RESOLUTION - ZONE_RESOLUTION)
CELL_INDEX_COUNT = BASE_CELL_COUNT * CELLS_PER_BASE
"""Number of cell indices, 100,472,554: gaps for the wedges that pentagons lack included."""
ZONE_INDEX_COUNT = CELL_INDEX_COUNT // CELLS_PER_ZONE
assert CELL_INDEX_COUNT < 1 << 32

UNIT_RES0 = 0.38196601125010515
"""Distance of neighbouring lattice points of resolution 0 in the gnomonic plane: (3 - sqrt 5) / 2."""
UNIT_RES7 = UNIT_RES0 / math.sqrt(7.0) ** 7
ONE_SEVENTH = 1.0 / 7.0
FACE_STEPS_MAX = 8
"""Faces a point may try: the guess is the right one or its neighbour; more only guards the twelve vertices."""

# Columns of a row of `CellTables.planes`.
CENTER, ROW_A, ROW_B, EDGE_0, EDGE_1, EDGE_2, STEP_A, STEP_B, PLANE_COLUMNS = 0, 3, 6, 9, 12, 15, 18, 21, 24

HINT_SHIFT = 23
"""The grid of guesses has squares of 2^23 units = 0.84 degrees. (Twice as wide or half as wide: as fast.)"""
HINT_ROWS = (1_800_000_000 >> HINT_SHIFT) + 1
HINT_COLUMNS = (3_600_000_000 >> HINT_SHIFT) + 1

SINE_SHIFT = 24
"""The table of sines has steps of 2^24 units = 1.68 degrees."""
SINE_COUNT = (1 << 32 >> SINE_SHIFT) + 1
SINE_MASK = (1 << SINE_SHIFT) - 1
SINE_HALF = 1 << SINE_SHIFT >> 1
SINE_RAISE = (1 << 31) + SINE_HALF
"""2^31, and half a step to round."""

POSITION_COUNT = 25
"""Lattice points of resolution 0 around a face: a and b within -2..2."""
CANDIDATE_COUNT = 8
"""Most (face, position, turn) that one base cell and leading digit has."""

RIGHT_ANGLE_E7 = 900_000_000
RADIANS_PER_E7 = math.pi / 1_800_000_000.0

# Adding and subtracting 1.5 * 2^52 rounds a double to the nearest integer (ties to even): two additions, no call.
_ROUND = 6755399441055744.0

CLEARANCE_SHARE = 1.0 - 1e-6
CLEARANCE_SHAVED_M = 0.01
"""What rounding could have added to a clearance is far below these (1e-9 m); they keep the bound a bound."""


class CellTables(NamedTuple):
    """Everything the kernels know about H3, derived once by `cells.cell_tables`. Pass it on, never change it.

    sines       f64[2 * 257]      sine and cosine of k * 2^24 - 2^31 (1e-7 degree)
    planes      f64[20 * 24]      per face: centre c; rows A and B with a = A.v / c.v, b = B.v / c.v (resolution-7
                                  lattice); inward unit normals of its three edges; steps p and q with
                                  a p + b q + c in the direction of lattice point (a, b)
    neighbours  u8[20 * 3]        face across each edge
    face_hint   u8[215 * 430]     face at the middle of each square of the grid
    canonical   u32[20 * 25 * 8]  base cell | its `turns` << 7, at (face * 25 + (a + 2) * 5 + b + 2) * 8 + leading digit
    turns       u32[6]            every digit after so many turns by 60 degrees ccw, digit d's at 3 d bits
    home        i8[122, 7, 8, 4]  (face, a, b, turn) that lead to a base cell and leading digit; face -1: no more
    pentagon    u8[122]           1: the base cell is a pentagon, and no cell of it has leading digit 1
    """

    sines: F64
    planes: F64
    neighbours: U8
    face_hint: U8
    canonical: U32
    turns: U32
    home: npt.NDArray[np.int8]
    pentagon: U8


@inline_kernel
def signed(value: Any) -> int:
    """Any integer as int64. (Numba's `int` leaves unsigned integers so, and unsigned with signed makes a float.)"""
    return np.int64(value)  # type: ignore[return-value]


@inline_kernel
def at(index: int) -> int:
    """An index that is not negative: spares the machine the test for counting from the end."""
    return np.uint64(index)  # type: ignore[return-value]


# ---------------------------------------------------------------- angles and vectors


@inline_kernel
def sin_cos(x: float) -> tuple[float, float]:
    """Sine and cosine of `x` radians, |x| <= pi/4 (a little beyond does no harm), to about 1 ulp.

    Taylor series: the first term left out is below 5e-17 there. Summed in pairs (Estrin), which shortens the chain.
    """
    z = x * x
    z2 = z * z
    z4 = z2 * z2
    sine = (
        (-1.0 / 6.0 + z * (1.0 / 120.0))
        + z2 * (-1.0 / 5040.0 + z * (1.0 / 362880.0))
        + z4 * ((-1.0 / 39916800.0 + z * (1.0 / 6227020800.0)) + z2 * (-1.0 / 1307674368000.0))
    )
    cosine = (
        (1.0 / 24.0 + z * (-1.0 / 720.0))
        + z2 * (1.0 / 40320.0 + z * (-1.0 / 3628800.0))
        + z4 * ((1.0 / 479001600.0 + z * (-1.0 / 87178291200.0)) + z2 * (1.0 / 20922789888000.0))
    )
    return x + x * (z * sine), (1.0 - 0.5 * z) + z2 * cosine


@inline_kernel
def sin_cos_quarters(quarters: int, x: float) -> tuple[float, float]:
    """Sine and cosine of `quarters` right angles plus `x` radians, |x| <= pi/4."""
    s, c = sin_cos(x)
    sine = c if quarters & 1 else s
    cosine = s if quarters & 1 else c
    return (-sine if quarters & 2 else sine), (-cosine if (quarters + 1) & 2 else cosine)


@inline_kernel
def turned_by(sine: float, cosine: float, x: float) -> tuple[float, float]:
    """Sine and cosine of an angle, given those of one that is `x` radians less, |x| < 0.015: three terms are enough.

    (A polynomial for an eighth of a turn in place of a table costs twice the instructions.)
    """
    z = x * x
    small_sine = x + x * (z * (-1.0 / 6.0 + z * (1.0 / 120.0)))
    small_versine = z * (-0.5 + z * (1.0 / 24.0 + z * (-1.0 / 720.0)))
    return (
        sine + (sine * small_versine + cosine * small_sine),
        cosine + (cosine * small_versine - sine * small_sine),
    )


@inline_kernel
def nearest_sine(angle_e7: int) -> tuple[int, int]:
    """Number of the nearest angle in the table of sines, and what is left, in 1e-7 degree: exactly.

    angle_e7: 1e-7 degree, |angle| <= 2^31.
    """
    raised = angle_e7 + SINE_RAISE
    return raised >> SINE_SHIFT, (raised & SINE_MASK) - SINE_HALF


@inline_kernel
def sin_cos_e7(angle_e7: int, sines: F64) -> tuple[float, float]:
    """Sine and cosine of an angle in 1e-7 degree, |angle| <= 2^31, to about 1 ulp."""
    step, rest = nearest_sine(angle_e7)
    return turned_by(sines[at(2 * step)], sines[at(2 * step + 1)], rest * RADIANS_PER_E7)


@inline_kernel
def unit_vector_e7(lat_e7: int, lng_e7: int, tables: CellTables) -> tuple[float, float, float]:
    """Unit vector of a point in 1e-7 degree."""
    lat_sin, lat_cos = sin_cos_e7(lat_e7, tables.sines)
    lng_sin, lng_cos = sin_cos_e7(lng_e7, tables.sines)
    return lat_cos * lng_cos, lat_cos * lng_sin, lat_sin


@kernel
def fill_sines(sines: F64) -> None:
    """`sines` f64[2 * 257]: sine and cosine of every angle k * 2^24 - 2^31 (1e-7 degree), without libm."""
    for step in range(len(sines) // 2):
        angle_e7 = (step << SINE_SHIFT) - 2_147_483_648
        quarters = (angle_e7 + 4_050_000_000) // RIGHT_ANGLE_E7 - 4
        sine, cosine = sin_cos_quarters(quarters, (angle_e7 - quarters * RIGHT_ANGLE_E7) * RADIANS_PER_E7)
        sines[2 * step] = sine
        sines[2 * step + 1] = cosine


@kernel
def unit_vector_degrees(lat: float, lng: float) -> tuple[float, float, float]:
    """As `unit_vector_e7`, from float64 degrees: taking off whole right angles is exact here too."""
    lat_quarters = int(math.floor(lat / 90.0 + 0.5))
    lng_quarters = int(math.floor(lng / 90.0 + 0.5))
    lat_sin, lat_cos = sin_cos_quarters(lat_quarters, (lat - lat_quarters * 90.0) * (math.pi / 180.0))
    lng_sin, lng_cos = sin_cos_quarters(lng_quarters, (lng - lng_quarters * 90.0) * (math.pi / 180.0))
    return lat_cos * lng_cos, lat_cos * lng_sin, lat_sin


# ---------------------------------------------------------------- point -> cell


@inline_kernel
def rounded(x: float) -> float:
    """The nearest whole number (ties to even), |x| < 2^51."""
    return (x + _ROUND) - _ROUND


@inline_kernel
def nearest_lattice_point(a: float, b: float) -> tuple[float, float, float]:
    """Lattice point (a, b) nearest to a + b w, and the distance to the border of its hexagon, in lattice units.

    With q = a, r = b - a, s = -b (sum 0) the six neighbours differ by 1 in two of the three, and the projection on a
    neighbour's direction is half the difference of the two; the border lies where it reaches a half.
    """
    r = b - a
    q_round, r_round, b_round = rounded(a), rounded(r), rounded(b)
    q_off = abs(a - q_round)
    r_off = abs(r - r_round)
    b_off = abs(b - b_round)
    # -1, 0 or 1, taken back from the coordinate that was rounded worst.
    excess = q_round + r_round - b_round
    q_worst = (q_off > r_off) & (q_off > b_off)
    b_worst = (b_off > r_off) & (not q_worst)
    a_nearest = q_round - (excess if q_worst else 0.0)
    b_nearest = b_round + (excess if b_worst else 0.0)
    q_rest = a - a_nearest
    s_rest = b_nearest - b
    r_rest = -q_rest - s_rest
    reach = max(abs(q_rest - r_rest), max(abs(r_rest - s_rest), abs(s_rest - q_rest)))
    return a_nearest, b_nearest, 0.5 - 0.5 * reach


@inline_kernel
def digit_of_unit(a: float, b: float) -> float:
    """Digit of unit (a, b), each within -1..1: with (a, b) = (i - k, j - k) of H3's axes, it is 4 i + 2 j + k."""
    k = max(0.0, max(-a, -b))
    return 4.0 * a + 2.0 * b + 7.0 * k


@inline_kernel
def parent_of_odd(a: float, b: float) -> tuple[float, float, float]:
    """From a lattice point of an odd resolution to its parent's, which is 2 - w times coarser, and its digit."""
    up_a = rounded((3.0 * a - b) * ONE_SEVENTH)
    up_b = rounded((a + 2.0 * b) * ONE_SEVENTH)
    return up_a, up_b, digit_of_unit(a - (2.0 * up_a + up_b), b - (3.0 * up_b - up_a))


@inline_kernel
def parent_of_even(a: float, b: float) -> tuple[float, float, float]:
    """From a lattice point of an even resolution to its parent's, which is 3 + w times coarser, and its digit."""
    up_a = rounded((2.0 * a + b) * ONE_SEVENTH)
    up_b = rounded((3.0 * b - a) * ONE_SEVENTH)
    return up_a, up_b, digit_of_unit(a - (3.0 * up_a - up_b), b - (up_a + 2.0 * up_b))


@inline_kernel
def lattice_digits(a: float, b: float) -> tuple[float, float, float]:
    """Seven steps up from resolution 7: (position of resolution 0, 0..24; leading digit; all seven, three bits each).

    The leading digit is the first that is not 0, or 0; among the seven, digit 7 has the lowest bits.
    """
    a, b, digit = parent_of_odd(a, b)
    leading, digits = digit, digit
    a, b, digit = parent_of_even(a, b)
    leading, digits = digit if digit != 0.0 else leading, digits + digit * 8.0
    a, b, digit = parent_of_odd(a, b)
    leading, digits = digit if digit != 0.0 else leading, digits + digit * 64.0
    a, b, digit = parent_of_even(a, b)
    leading, digits = digit if digit != 0.0 else leading, digits + digit * 512.0
    a, b, digit = parent_of_odd(a, b)
    leading, digits = digit if digit != 0.0 else leading, digits + digit * 4096.0
    a, b, digit = parent_of_even(a, b)
    leading, digits = digit if digit != 0.0 else leading, digits + digit * 32768.0
    a, b, digit = parent_of_odd(a, b)
    leading, digits = digit if digit != 0.0 else leading, digits + digit * 262144.0
    return (a + 2.0) * 5.0 + (b + 2.0), leading, digits


BLOCK_POINTS = 64
"""Points that are located together."""

# Rows of `PointBlock.real`, 64 points each.
LAT_SINE, LAT_COSINE, LAT_REST, LNG_SINE, LNG_COSINE, LNG_REST = (row * BLOCK_POINTS for row in range(6))
X, Y, Z, BORDER, COSINE, NUMERATOR_A, NUMERATOR_B = (row * BLOCK_POINTS for row in range(6, 13))
CLEARANCE_M, CANONICAL_AT, DIGITS, REAL_NUMBERS = (row * BLOCK_POINTS for row in range(13, 17))
# Rows of `PointBlock.whole`.
LAT_E7, LNG_E7, FACE, ENTRY, CELL, WHOLE_NUMBERS = (row * BLOCK_POINTS for row in range(6))


class PointBlock(NamedTuple):
    """Up to 64 points on their way from a coordinate to a cell. Who locates them writes LAT_E7 and LNG_E7.

    real   f64   of each point its unit vector (X, Y, Z), CLEARANCE_M, and what leads to them
    whole  i64   of each point LAT_E7, LNG_E7 (1e-7 degree), CELL (dense), and what leads to it

    Number i of a row stands at `row + i`. Loops that compute take all 64, whether they are points or what was there
    before: so both begin with zeros.
    """

    real: F64
    whole: I64


def point_block() -> PointBlock:
    """Room for `locate_block`, at a multiple of 64 bytes."""
    return PointBlock(aligned(np.zeros(REAL_NUMBERS + 8)), aligned(np.zeros(WHOLE_NUMBERS + 8, np.int64)))


def aligned(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """All but eight of these numbers of 8 bytes, from a multiple of 64 on."""
    first = -numbers.ctypes.data // 8 % 8
    return numbers[first : first + len(numbers) - 8]


@lean_kernel
def _look_up(points: PointBlock, count: int, tables: CellTables) -> int:
    """The nearest angles of the table of sines, what is left, a guess of the face. Returns the set of faces guessed."""
    real, whole = points
    sines = tables.sines
    faces = 0
    for i in range(count):
        lat = whole[at(LAT_E7 + i)]
        lng = whole[at(LNG_E7 + i)]
        lat_step, lat_rest = nearest_sine(lat)
        lng_step, lng_rest = nearest_sine(lng)
        real[at(LAT_SINE + i)] = sines[at(2 * lat_step)]
        real[at(LAT_COSINE + i)] = sines[at(2 * lat_step + 1)]
        real[at(LAT_REST + i)] = lat_rest
        real[at(LNG_SINE + i)] = sines[at(2 * lng_step)]
        real[at(LNG_COSINE + i)] = sines[at(2 * lng_step + 1)]
        real[at(LNG_REST + i)] = lng_rest
        square = ((lat + 900_000_000) >> HINT_SHIFT) * HINT_COLUMNS + ((lng + 1_800_000_000) >> HINT_SHIFT)
        face = signed(tables.face_hint[at(square)])
        whole[at(FACE + i)] = face
        faces |= 1 << face
    return faces


@lean_kernel
def _unit_vectors(real: F64) -> None:
    for i in range(BLOCK_POINTS):
        lat_sin, lat_cos = turned_by(
            real[at(LAT_SINE + i)], real[at(LAT_COSINE + i)], real[at(LAT_REST + i)] * RADIANS_PER_E7
        )
        lng_sin, lng_cos = turned_by(
            real[at(LNG_SINE + i)], real[at(LNG_COSINE + i)], real[at(LNG_REST + i)] * RADIANS_PER_E7
        )
        real[at(X + i)] = lat_cos * lng_cos
        real[at(Y + i)] = lat_cos * lng_sin
        real[at(Z + i)] = lat_sin


@lean_kernel
def _project(points: PointBlock, face: int, tables: CellTables) -> None:
    """Points of a face: how far inside of its nearest edge (BORDER, sine of the angle), and their lattice coordinates.

    Those are NUMERATOR_A / COSINE and NUMERATOR_B / COSINE, COSINE being that of the angle from the face's centre.
    """
    real, whole = points
    planes = tables.planes
    row = face * PLANE_COLUMNS
    cx, cy, cz = planes[at(row + CENTER)], planes[at(row + CENTER + 1)], planes[at(row + CENTER + 2)]
    ax, ay, az = planes[at(row + ROW_A)], planes[at(row + ROW_A + 1)], planes[at(row + ROW_A + 2)]
    bx, by, bz = planes[at(row + ROW_B)], planes[at(row + ROW_B + 1)], planes[at(row + ROW_B + 2)]
    x_0, y_0, z_0 = planes[at(row + EDGE_0)], planes[at(row + EDGE_0 + 1)], planes[at(row + EDGE_0 + 2)]
    x_1, y_1, z_1 = planes[at(row + EDGE_1)], planes[at(row + EDGE_1 + 1)], planes[at(row + EDGE_1 + 2)]
    x_2, y_2, z_2 = planes[at(row + EDGE_2)], planes[at(row + EDGE_2 + 1)], planes[at(row + EDGE_2 + 2)]
    for i in range(BLOCK_POINTS):
        here = whole[at(FACE + i)] == face
        x, y, z = real[at(X + i)], real[at(Y + i)], real[at(Z + i)]
        border = min(x * x_0 + y * y_0 + z * z_0, min(x * x_1 + y * y_1 + z * z_1, x * x_2 + y * y_2 + z * z_2))
        cosine = x * cx + y * cy + z * cz
        numerator_a = x * ax + y * ay + z * az
        numerator_b = x * bx + y * by + z * bz
        real[at(BORDER + i)] = border if here else real[at(BORDER + i)]
        real[at(COSINE + i)] = cosine if here else real[at(COSINE + i)]
        real[at(NUMERATOR_A + i)] = numerator_a if here else real[at(NUMERATOR_A + i)]
        real[at(NUMERATOR_B + i)] = numerator_b if here else real[at(NUMERATOR_B + i)]


@lean_kernel
def _cross_edges(points: PointBlock, count: int, tables: CellTables) -> int:
    """Points outside of their face go on to the one across the edge they violate most. Returns the set of those faces.

    Edge normals of two neighbours are each other's exact negatives, so a point on an edge is taken by both and the
    walk cannot swing between them.
    """
    real, whole = points
    planes = tables.planes
    faces = 0
    for i in range(count):
        border = real[at(BORDER + i)]
        if border < 0.0:
            face = whole[at(FACE + i)]
            row = face * PLANE_COLUMNS
            x, y, z = real[at(X + i)], real[at(Y + i)], real[at(Z + i)]
            edge_0 = x * planes[at(row + EDGE_0)] + y * planes[at(row + EDGE_0 + 1)] + z * planes[at(row + EDGE_0 + 2)]
            edge_1 = x * planes[at(row + EDGE_1)] + y * planes[at(row + EDGE_1 + 1)] + z * planes[at(row + EDGE_1 + 2)]
            side = 0 if edge_0 == border else (1 if edge_1 == border else 2)
            face = signed(tables.neighbours[at(3 * face + side)])
            whole[at(FACE + i)] = face
            faces |= 1 << face
    return faces


@lean_kernel
def _find_lattice_points(real: F64) -> None:
    """Clearance, digits, and where in `canonical` (but for the face) the base cell stands."""
    for i in range(BLOCK_POINTS):
        cosine = real[at(COSINE + i)]
        stretch = 1.0 / cosine
        a, b, hexagon_border = nearest_lattice_point(
            real[at(NUMERATOR_A + i)] * stretch, real[at(NUMERATOR_B + i)] * stretch
        )
        planar = hexagon_border * UNIT_RES7
        angle = planar * (cosine * cosine - planar)
        real[at(CLEARANCE_M + i)] = max(0.0, angle * (EARTH_RADIUS_M * CLEARANCE_SHARE) - CLEARANCE_SHAVED_M)
        position, leading, digits = lattice_digits(a, b)
        real[at(CANONICAL_AT + i)] = position * 8.0 + leading
        real[at(DIGITS + i)] = digits


@lean_kernel
def _number_cells(points: PointBlock, count: int, tables: CellTables) -> None:
    real, whole = points
    for i in range(count):
        place = signed(real[at(CANONICAL_AT + i)]) + whole[at(FACE + i)] * (POSITION_COUNT * 8)
        whole[at(ENTRY + i)] = signed(tables.canonical[at(place)])
    for i in range(BLOCK_POINTS):
        entry = whole[at(ENTRY + i)]
        turns = entry >> 7
        digits = signed(np.int32(real[at(DIGITS + i)]))
        cell = entry & 127
        for shift in (18, 15, 12, 9, 6, 3, 0):
            cell = cell * 7 + (turns >> (3 * (digits >> shift & 7)) & 7)
        whole[at(CELL + i)] = cell


@lean_kernel
def locate_block(points: PointBlock, count: int, tables: CellTables) -> None:
    """Cells of `count` points and how far away the next cell is: LAT_E7, LNG_E7 -> CELL, X, Y, Z, CLEARANCE_M.

    LAT_E7, LNG_E7: 1e-7 degree, within +-90 and +-180 degrees (not checked). (X, Y, Z): the unit vector, the same bits
    as of `unit_vector_e7`. CLEARANCE_M: a lower bound of the great-circle distance to any point that has another cell
    of resolution 7; 0 if that is a centimetre or less.

    Why it is a bound: a path of length s (radians) that starts at angle t from the face's centre moves by at most
    s / cos^2(t + s) in the gnomonic plane, and cos^2(t + s) >= cos^2 t - s. So with d the planar distance to the
    hexagon's border, s = d (cos^2 t - d) cannot leave the hexagon. That holds across an edge too: unfolded, the next
    face carries on the same lattice, and the point's mirror image is as far from that face's centre as the point
    from its own. (Tried: ending the bound at the face's edge. Safe, not needed, and boxes there shrink to nothing.)
    """
    faces = _look_up(points, count, tables)
    _unit_vectors(points.real)
    for step in range(FACE_STEPS_MAX):
        while faces != 0:
            _project(points, lowest_bit(np.uint64(faces)), tables)
            faces &= faces - 1
        if step + 1 < FACE_STEPS_MAX:
            faces = _cross_edges(points, count, tables)
    _find_lattice_points(points.real)
    _number_cells(points, count, tables)


@kernel
def locate_points(lat_e7: I32, lng_e7: I32, tables: CellTables, points: PointBlock, cell: U32) -> None:
    """`lat_e7`, `lng_e7` i32[n] -> `cell` u32[n]."""
    for start in range(0, len(lat_e7), BLOCK_POINTS):
        count = min(BLOCK_POINTS, len(lat_e7) - start)
        for i in range(count):
            points.whole[LAT_E7 + i] = lat_e7[start + i]
            points.whole[LNG_E7 + i] = lng_e7[start + i]
        locate_block(points, count, tables)
        for i in range(count):
            cell[start + i] = points.whole[CELL + i]


@kernel
def raw_positions(lattice_a: F64, lattice_b: F64, position: I32, leading: I32, depth: F64) -> None:
    """Lattice coordinates f64[n] (resolution 7) -> position, leading digit i32[n], distance to the border f64[n]."""
    for i in range(len(lattice_a)):
        a, b, border = nearest_lattice_point(lattice_a[i], lattice_b[i])
        position[i], leading[i], _ = lattice_digits(a, b)
        depth[i] = border


# ---------------------------------------------------------------- H3's own numbers

_H3_MODE_CELL = 1 << 59


@kernel
def format_h3(dense: U32, resolution: int, tables: CellTables, h3_index: U64) -> int:
    """Dense indices u32[n] of `resolution` -> H3 indices u64[n]. Returns the first row that names no cell, or -1.

    Bits of an H3 index: mode 1 (59..62), resolution (52..55), base cell (45..51), 15 digits of 3 bits, unused ones 7.
    https://h3geo.org/docs/core-library/h3Indexing
    """
    blank = _H3_MODE_CELL | resolution << 52 | ((1 << 3 * (15 - resolution)) - 1)
    for i in range(len(dense)):
        rest = signed(dense[i])
        bits = blank
        leading = 0
        for level in range(resolution, 0, -1):
            digit = rest % 7
            rest //= 7
            bits |= digit << 3 * (15 - level)
            leading = digit if digit else leading
        if rest >= BASE_CELL_COUNT or (leading == 1 and tables.pentagon[rest]):
            return i
        h3_index[i] = bits | rest << 45
    return -1


@kernel
def parse_h3(h3_index: U64, resolution: int, tables: CellTables, dense: U32) -> int:
    """H3 indices u64[n] -> dense indices u32[n] of `resolution`. Returns the first row that is no such cell, or -1."""
    blank = (1 << 3 * (15 - resolution)) - 1
    header = 1 << 7 | resolution
    for i in range(len(h3_index)):
        bits = signed(h3_index[i])
        base_cell = bits >> 45 & 127
        if bits >> 52 != header or bits & blank != blank or base_cell >= BASE_CELL_COUNT:
            return i
        index = base_cell
        leading = 0
        for level in range(1, resolution + 1):
            digit = bits >> 3 * (15 - level) & 7
            if digit == 7:
                return i
            index = index * 7 + digit
            leading = leading if leading else digit
        if leading == 1 and tables.pentagon[base_cell]:
            return i
        dense[i] = index
    return -1


# ---------------------------------------------------------------- cell -> centre


@inline_kernel
def cell_center(dense: int, resolution: int, tables: CellTables) -> tuple[float, float, float, float]:
    """Centre of a cell: its unit vector, and its distance from the face's centre in the gnomonic plane.

    The lattice path from the base cell down is walked on every face the base cell touches, and the face on which it
    ends most inside is the one that holds the centre. Unused digits of a pentagon give no answer (0, 0, 0, -1).
    """
    planes = tables.planes
    home = tables.home
    size = 7**resolution
    base_cell = dense // size
    digits = dense - base_cell * size
    leading = 0
    rest = digits
    for _ in range(resolution):
        digit = rest % 7
        rest //= 7
        leading = digit if digit else leading
    best_x, best_y, best_z, best_border, best_radius = 0.0, 0.0, 0.0, -9.0, -1.0
    for candidate in range(CANDIDATE_COUNT):
        face = signed(home[base_cell, leading, candidate, 0])
        if face < 0:
            break
        a = signed(home[base_cell, leading, candidate, 1])
        b = signed(home[base_cell, leading, candidate, 2])
        back = signed(tables.turns[(6 - signed(home[base_cell, leading, candidate, 3])) % 6])
        divisor = size
        for level in range(1, CELL_RESOLUTION + 1):
            digit = 0
            if level <= resolution:
                divisor //= 7
                digit = back >> 3 * (digits // divisor % 7) & 7
            # A digit's unit (a, b), plus 1, four bits a digit.
            unit_a = (0x2120101 >> 4 * digit & 15) - 1
            unit_b = (0x2011201 >> 4 * digit & 15) - 1
            if level & 1:
                a, b = 2 * a + b + unit_a, 3 * b - a + unit_b
            else:
                a, b = 3 * a - b + unit_a, a + 2 * b + unit_b
        plane = planes[face * PLANE_COLUMNS : (face + 1) * PLANE_COLUMNS]
        x = plane[CENTER] + a * plane[STEP_A] + b * plane[STEP_B]
        y = plane[CENTER + 1] + a * plane[STEP_A + 1] + b * plane[STEP_B + 1]
        z = plane[CENTER + 2] + a * plane[STEP_A + 2] + b * plane[STEP_B + 2]
        radius = math.sqrt(float(a * a - a * b + b * b)) * UNIT_RES7
        shrink = 1.0 / math.sqrt(1.0 + radius * radius)
        x, y, z = x * shrink, y * shrink, z * shrink
        edge_0 = x * plane[EDGE_0] + y * plane[EDGE_0 + 1] + z * plane[EDGE_0 + 2]
        edge_1 = x * plane[EDGE_1] + y * plane[EDGE_1 + 1] + z * plane[EDGE_1 + 2]
        edge_2 = x * plane[EDGE_2] + y * plane[EDGE_2 + 1] + z * plane[EDGE_2 + 2]
        border = min(edge_0, min(edge_1, edge_2))
        if border > best_border:
            best_x, best_y, best_z, best_border, best_radius = x, y, z, border, radius
    return best_x, best_y, best_z, best_radius


@kernel
def cell_centers(dense: U32, resolution: int, tables: CellTables, unit_vector: F64, reach: F64) -> None:
    """Dense indices u32[n] of `resolution` -> centres f64[n, 3] and reach f64[n] in radians (-1: no such cell)."""
    for i in range(len(dense)):
        x, y, z, radius = cell_center(signed(dense[i]), resolution, tables)
        unit_vector[i, 0] = x
        unit_vector[i, 1] = y
        unit_vector[i, 2] = z
        reach[i] = cell_reach(radius, resolution) if radius >= 0.0 else -1.0


# ---------------------------------------------------------------- circles


@inline_kernel
def chord2_max(radius_km: float) -> float:
    """Squared chord (unit sphere) that spans `radius_km` of the sphere: inside <=> |u - v|^2 <= chord2_max.

    4 sin^2(angle / 2). For radii up to a quarter of the way round (10,000 km).
    """
    half_sine, _ = sin_cos(radius_km * (500.0 / EARTH_RADIUS_M))
    return 4.0 * half_sine * half_sine


@inline_kernel
def ring_clearance_m(chord2: float, chord2_limit: float) -> float:
    """Lower bound (metres) of |great-circle distance - radius|, from both squared chords; 0 when that is centimetres.

    An arc grows at least as fast as its chord, so the chords differ by no more than the arcs.
    """
    difference = abs(math.sqrt(chord2) - math.sqrt(chord2_limit))
    return max(0.0, difference * (EARTH_RADIUS_M * CLEARANCE_SHARE) - CLEARANCE_SHAVED_M)


def _planar_reach(resolution: int) -> float:
    """Radius in the gnomonic plane around a cell's centre that holds all its descendants of resolution 7, overhang too.

    A child's centre lies one unit of its own lattice from its parent's, each lattice is finer by sqrt 7, and at the end
    stands a hexagon of circumradius 1 / sqrt 3: a sum of lengths, so a bound whichever way the steps turn.
    """
    steps = sum(math.sqrt(7.0) ** -level for level in range(resolution + 1, CELL_RESOLUTION + 1))
    reach: float = UNIT_RES0 * (steps + math.sqrt(7.0) ** -CELL_RESOLUTION / math.sqrt(3.0))
    return reach


_PLANAR_REACH = np.array([_planar_reach(resolution) for resolution in range(CELL_RESOLUTION + 1)])

_REACH_MARGIN_RAD = 1e-8
"""6 cm: far more than rounding in centres, distances and arcsines."""


@inline_kernel
def cell_reach(radius: float, resolution: int) -> float:
    """Upper bound (radians) of the distance from a cell's centre to any point of any of its resolution-7 descendants.

    radius: the centre's distance from its face's centre in the gnomonic plane. A line of length d in that plane that
    stays beyond t from the face's centre is at most d cos(atan t) long on the sphere. Where the line runs on into the
    next face, unfolded, the same holds: the mirror image of the cell's centre in the edge is as far from that face's
    centre, and nearer to everything beyond the edge. Only a pentagon's own descendants reach around a vertex.
    """
    planar = float(_PLANAR_REACH[resolution])
    nearest = max(0.0, radius - planar)
    return planar / math.sqrt(1.0 + nearest * nearest) + _REACH_MARGIN_RAD


@kernel
def cover_circle(
    x: float, y: float, z: float, radius_rad: float, tables: CellTables, inside: U32, edge: U32
) -> tuple[int, int]:
    """Zones that meet the circle around unit vector (x, y, z), as ranges; returns how many of each were written.

    `inside` u32[n, 2], `edge` u32[m, 2]: half-open, rising, adjacent ones merged. A count equal to the capacity means
    that the ranges may not have fitted.

    Goes down from the base cells in the order of indices: a cell wholly inside is one range of zones, one wholly
    outside is passed over, and what is still undecided at the zones' resolution is edge.
    """
    inside_count, edge_count = 0, 0
    stack_cell = np.empty(64, dtype=np.int64)
    stack_resolution = np.empty(64, dtype=np.int64)
    for base_cell in range(BASE_CELL_COUNT):
        stack_cell[0] = base_cell
        stack_resolution[0] = 0
        height = 1
        while height > 0:
            height -= 1
            cell = stack_cell[height]
            resolution = stack_resolution[height]
            center_x, center_y, center_z, plane_radius = cell_center(cell, resolution, tables)
            if plane_radius < 0.0:
                continue
            reach = cell_reach(plane_radius, resolution)
            chord = math.sqrt((center_x - x) ** 2 + (center_y - y) ** 2 + (center_z - z) ** 2)
            distance = 2.0 * math.asin(min(1.0, 0.5 * chord))
            if distance - reach > radius_rad:
                continue
            is_inside = distance + reach <= radius_rad
            if not is_inside and resolution < ZONE_RESOLUTION:
                for digit in range(6, -1, -1):
                    stack_cell[height] = cell * 7 + digit
                    stack_resolution[height] = resolution + 1
                    height += 1
                continue
            size = 7 ** (ZONE_RESOLUTION - resolution)
            start, stop = cell * size, (cell + 1) * size
            if is_inside:
                if inside_count > 0 and inside[inside_count - 1, 1] == start:
                    inside[inside_count - 1, 1] = stop
                elif inside_count < len(inside):
                    inside[inside_count, 0] = start
                    inside[inside_count, 1] = stop
                    inside_count += 1
            elif edge_count > 0 and edge[edge_count - 1, 1] == start:
                edge[edge_count - 1, 1] = stop
            elif edge_count < len(edge):
                edge[edge_count, 0] = start
                edge[edge_count, 1] = stop
                edge_count += 1
    return inside_count, edge_count
