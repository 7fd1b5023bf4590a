"""The loops behind `gateway.datum`: GCJ-02 and BD-09 back to WGS-84, by turning the published formulas around.

Both datums shift a point by a few hundred metres, and the shift hardly changes from one point to the next: by 0.3 % of
the way (GCJ-02) and 2 % (BD-09). So "the point, less the shift of the last guess" closes in on the true point by that
factor each time. Three and four rounds leave less than the 1.1 cm of our coordinates.

Every sine of the formulas has an angle that is a whole multiple of one of two small ones, so two short polynomials and
the rules for doubled, tripled and added angles give all twelve of them. There is no branch and no call in the loop:
LLVM computes several points at once.
"""

from __future__ import annotations

import math

import numpy as np

from geoindex.columns import I32
from geoindex.numba_typing import inline_kernel, kernel

AXIS_M = 6378245.0
"""Semi-major axis of the Krasovsky 1940 ellipsoid, in metres."""
ECCENTRICITY_SQUARED = 0.00669342162296594323
LAT_MIN, LAT_MAX = 0.8293, 55.8271
LNG_MIN, LNG_MAX = 72.004, 137.8347
"""The formula's rectangle, in degrees WGS-84, borders included: outside, both datums are WGS-84."""
BORDER_SLACK = 1e-6
"""Degrees, 0.11 m: a point on the border whose image was rounded to 1e-7 degree is still found inside."""
REACH = 0.1
"""Degrees. No shift reaches so far; the formula is evaluated no further out than this."""
GCJ02_ROUNDS = 3
BD09_ROUNDS = 4

BD_LAT, BD_LNG = 0.006, 0.0065
"""The constant part of Baidu's offset, in degrees."""
BD_TURN = 0.000003
"""Amplitude of its rotation about the origin of the coordinates, in radians."""
BD_STRETCH = 0.00002
"""Amplitude of its radial part, in degrees."""
BD_WAVES = 25.0 / 3.0
"""Waves a degree of both: the published 3000 / 180 * pi radians a degree."""

_RADIANS = math.pi / 180.0
_SIN_35, _COS_35 = math.sin(35 * _RADIANS), math.cos(35 * _RADIANS)
_LAT_DEGREES_PER_M = 180.0 / math.pi / (AXIS_M * (1 - ECCENTRICITY_SQUARED))
_LNG_DEGREES_PER_M = 180.0 / math.pi / AXIS_M


@inline_kernel
def _sine(t: float) -> float:
    """sin t for |t| <= 0.9: Taylor's series to t^17, off by less than 1e-17."""
    q = t * t
    p = 1.0 / 355687428096000.0
    p = p * q - 1.0 / 1307674368000.0
    p = p * q + 1.0 / 6227020800.0
    p = p * q - 1.0 / 39916800.0
    p = p * q + 1.0 / 362880.0
    p = p * q - 1.0 / 5040.0
    p = p * q + 1.0 / 120.0
    p = p * q - 1.0 / 6.0
    return t + t * q * p


@inline_kernel
def _cosine(t: float) -> float:
    """cos t for |t| <= 0.9: Taylor's series to t^18."""
    q = t * t
    p = -1.0 / 6402373705728000.0
    p = p * q + 1.0 / 20922789888000.0
    p = p * q - 1.0 / 87178291200.0
    p = p * q + 1.0 / 479001600.0
    p = p * q - 1.0 / 3628800.0
    p = p * q + 1.0 / 40320.0
    p = p * q - 1.0 / 720.0
    p = p * q + 1.0 / 24.0
    p = p * q - 0.5
    return 1.0 + q * p


@inline_kernel
def gcj02_shift(lat: float, lng: float) -> tuple[float, float]:
    """What GCJ-02 adds to a WGS-84 point inside the rectangle: degrees of latitude, degrees of longitude.

    The formula is the one that is published everywhere (first by "emq" and "coolypf", 2010 and 2013); in metres it is
    a polynomial in x, y, the degrees from 105 E, 35 N, and sines of pi x, pi y, and their multiples and parts.
    """
    lat = min(max(lat, LAT_MIN - REACH), LAT_MAX + REACH)
    lng = min(max(lng, LNG_MIN - REACH), LNG_MAX + REACH)
    x = lng - 105.0
    y = lat - 35.0

    # pi x / 30, / 12, / 3, * 1, * 2, * 6 are 4, 10, 40, 120, 240, 720 times pi x / 120, which is below 0.87.
    s = _sine(x * (math.pi / 120.0))
    c = _cosine(x * (math.pi / 120.0))
    s2, c2 = 2.0 * s * c, 1.0 - 2.0 * s * s
    s4, c4 = 2.0 * s2 * c2, 1.0 - 2.0 * s2 * s2
    s8, c8 = 2.0 * s4 * c4, 1.0 - 2.0 * s4 * s4
    s10, c10 = s8 * c2 + c8 * s2, c8 * c2 - s8 * s2
    s20, c20 = 2.0 * s10 * c10, 1.0 - 2.0 * s10 * s10
    s40, c40 = 2.0 * s20 * c20, 1.0 - 2.0 * s20 * s20
    s120, c120 = s40 * (3.0 - 4.0 * s40 * s40), c40 * (1.0 - 4.0 * s40 * s40)
    s240 = 2.0 * s120 * c120
    s720 = s240 * (3.0 - 4.0 * s240 * s240)

    # pi y / 30, / 12, / 3, * 1 are 6, 15, 60, 180 times pi y / 180: latitude itself, less 35 degrees.
    s_lat = _sine(y * _RADIANS)
    c_lat = _cosine(y * _RADIANS)
    t3, d3 = s_lat * (3.0 - 4.0 * s_lat * s_lat), c_lat * (1.0 - 4.0 * s_lat * s_lat)
    t6, d6 = 2.0 * t3 * d3, 1.0 - 2.0 * t3 * t3
    t12, d12 = 2.0 * t6 * d6, 1.0 - 2.0 * t6 * t6
    t15, d15 = t12 * d3 + d12 * t3, d12 * d3 - t12 * t3
    t30, d30 = 2.0 * t15 * d15, 1.0 - 2.0 * t15 * t15
    t60 = 2.0 * t30 * d30
    t180 = t60 * (3.0 - 4.0 * t60 * t60)

    root = math.sqrt(abs(x))
    common = 20.0 * s720 + 20.0 * s240
    north_m = -100.0 + 2.0 * x + 3.0 * y + 0.2 * y * y + 0.1 * x * y + 0.2 * root
    north_m += (common + 20.0 * t180 + 40.0 * t60 + 160.0 * t15 + 320.0 * t6) * (2.0 / 3.0)
    east_m = 300.0 + x + 2.0 * y + 0.1 * x * x + 0.1 * x * y + 0.1 * root
    east_m += (common + 20.0 * s120 + 40.0 * s40 + 150.0 * s10 + 300.0 * s4) * (2.0 / 3.0)

    sine_lat = s_lat * _COS_35 + c_lat * _SIN_35
    cosine_lat = c_lat * _COS_35 - s_lat * _SIN_35
    squared = 1.0 - ECCENTRICITY_SQUARED * sine_lat * sine_lat
    bend = math.sqrt(squared)
    return north_m * _LAT_DEGREES_PER_M * squared * bend, east_m * _LNG_DEGREES_PER_M * bend / cosine_lat


@inline_kernel
def bd09_offset(lat: float, lng: float) -> tuple[float, float]:
    """What BD-09 adds to a GCJ-02 point: degrees of latitude, degrees of longitude.

    As published: in polar coordinates about the origin of degrees the radius changes by `BD_STRETCH * sin(waves of
    lat)` and the angle by `BD_TURN * cos(waves of lng)`; then the constant part. The angle is so small that its cosine
    and sine are 1 - angle^2 / 2 and the angle itself.
    """
    lat = min(max(lat, LAT_MIN - REACH), LAT_MAX + REACH)
    lng = min(max(lng, LNG_MIN - REACH), LNG_MAX + REACH)
    wave = lat * BD_WAVES
    wave -= np.rint(wave)
    stretch = BD_STRETCH * _full_sine(wave)
    wave = lng * BD_WAVES + 0.25  # a cosine is the sine a quarter of a wave ahead
    wave -= np.rint(wave)
    turn = BD_TURN * _full_sine(wave)
    scale = 1.0 + stretch / math.sqrt(lat * lat + lng * lng)
    along = 1.0 - 0.5 * turn * turn
    return scale * (lat * along + lng * turn) - lat + BD_LAT, scale * (lng * along - lat * turn) - lng + BD_LNG


@inline_kernel
def _full_sine(wave: float) -> float:
    """sin(2 pi wave) for a wave of -0.5 to 0.5: by a quarter of its angle."""
    s = _sine(wave * (math.pi / 2.0))
    c = _cosine(wave * (math.pi / 2.0))
    return 4.0 * s * c * (1.0 - 2.0 * s * s)


@inline_kernel
def _inside(lat: float, lng: float) -> bool:
    return (
        (lat >= LAT_MIN - BORDER_SLACK)
        & (lat <= LAT_MAX + BORDER_SLACK)
        & (lng >= LNG_MIN - BORDER_SLACK)
        & (lng <= LNG_MAX + BORDER_SLACK)
    )


@kernel
def wgs84_of_gcj02(lat_e7: I32, lng_e7: I32, lat_e7_out: I32, lng_e7_out: I32) -> None:
    """GCJ-02 -> WGS-84: `lat_e7`, `lng_e7` i32[n], any values, 1e-7 degree; outputs likewise.

    A point with no WGS-84 point inside the rectangle behind it stays as it is.
    """
    for row in range(lat_e7.shape[0]):
        given_lat = lat_e7[row] * 1e-7
        given_lng = lng_e7[row] * 1e-7
        lat, lng = given_lat, given_lng
        for _ in range(GCJ02_ROUNDS):
            north, east = gcj02_shift(lat, lng)
            lat, lng = given_lat - north, given_lng - east
        known = _inside(lat, lng)
        lat_e7_out[row] = np.int32(np.rint(lat * 1e7)) if known else lat_e7[row]
        lng_e7_out[row] = np.int32(np.rint(lng * 1e7)) if known else lng_e7[row]


@kernel
def wgs84_of_bd09(lat_e7: I32, lng_e7: I32, lat_e7_out: I32, lng_e7_out: I32) -> None:
    """BD-09 -> WGS-84, as `wgs84_of_gcj02`; first back to GCJ-02."""
    for row in range(lat_e7.shape[0]):
        given_lat = lat_e7[row] * 1e-7
        given_lng = lng_e7[row] * 1e-7
        lat, lng = given_lat - BD_LAT, given_lng - BD_LNG
        for _ in range(BD09_ROUNDS):
            north, east = bd09_offset(lat, lng)
            lat, lng = given_lat - north, given_lng - east
        gcj_lat, gcj_lng = lat, lng
        for _ in range(GCJ02_ROUNDS):
            north, east = gcj02_shift(lat, lng)
            lat, lng = gcj_lat - north, gcj_lng - east
        known = _inside(lat, lng)
        lat_e7_out[row] = np.int32(np.rint(lat * 1e7)) if known else lat_e7[row]
        lng_e7_out[row] = np.int32(np.rint(lng * 1e7)) if known else lng_e7[row]
