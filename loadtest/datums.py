"""What an app in another datum reports for a place: GCJ-02 and BD-09 term by term, in the direction that is published.

Nothing here is shared with `gateway.datum`, which goes the other way: each is checked by the other.
"""

from __future__ import annotations

import numpy as np

from geoindex.columns import F64, Bool

A, EE = 6378245.0, 0.00669342162296594323
LAT_MIN, LAT_MAX, LNG_MIN, LNG_MAX = 0.8293, 55.8271, 72.004, 137.8347


def outside(lat: F64, lng: F64) -> Bool:
    """Whether a WGS-84 point, in degrees, is outside the formula's rectangle."""
    return (lng < LNG_MIN) | (lng > LNG_MAX) | (lat < LAT_MIN) | (lat > LAT_MAX)


def gcj02(lat: F64, lng: F64) -> tuple[F64, F64]:
    """WGS-84 degrees, f64[n] -> GCJ-02."""
    x, y, pi = lng - 105.0, lat - 35.0, np.pi
    both = (20 * np.sin(6 * x * pi) + 20 * np.sin(2 * x * pi)) * 2 / 3
    north = -100 + 2 * x + 3 * y + 0.2 * y * y + 0.1 * x * y + 0.2 * np.sqrt(np.abs(x)) + both
    north += (20 * np.sin(y * pi) + 40 * np.sin(y / 3 * pi)) * 2 / 3
    north += (160 * np.sin(y / 12 * pi) + 320 * np.sin(y * pi / 30)) * 2 / 3
    east = 300 + x + 2 * y + 0.1 * x * x + 0.1 * x * y + 0.1 * np.sqrt(np.abs(x)) + both
    east += (20 * np.sin(x * pi) + 40 * np.sin(x / 3 * pi)) * 2 / 3
    east += (150 * np.sin(x / 12 * pi) + 300 * np.sin(x / 30 * pi)) * 2 / 3
    lat_radians = lat / 180 * pi
    magic = 1 - EE * np.sin(lat_radians) ** 2
    root = np.sqrt(magic)
    moved_lat = lat + north * 180 / (A * (1 - EE) / (magic * root) * pi)
    moved_lng = lng + east * 180 / (A / root * np.cos(lat_radians) * pi)
    away = outside(lat, lng)
    return np.where(away, lat, moved_lat), np.where(away, lng, moved_lng)


def bd09_of_gcj02(lat: F64, lng: F64) -> tuple[F64, F64]:
    """GCJ-02 degrees, f64[n], of a point in the rectangle -> BD-09."""
    waves = np.pi * 3000 / 180
    radius = np.sqrt(lng * lng + lat * lat) + 0.00002 * np.sin(lat * waves)
    angle = np.arctan2(lat, lng) + 0.000003 * np.cos(lng * waves)
    return radius * np.sin(angle) + 0.006, radius * np.cos(angle) + 0.0065


def bd09(lat: F64, lng: F64) -> tuple[F64, F64]:
    """WGS-84 degrees, f64[n] -> BD-09."""
    moved_lat, moved_lng = bd09_of_gcj02(*gcj02(lat, lng))
    away = outside(lat, lng)
    return np.where(away, lat, moved_lat), np.where(away, lng, moved_lng)
