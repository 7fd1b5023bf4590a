"""Coordinates of partners -> WGS-84, by what each partner's account says, and never by what the coordinates look like.

    wgs84   as it comes
    gcj02   the datum of maps in mainland China (AMap, Tencent, telecoms): WGS-84 shifted by 100 to 700 m
    bd09    Baidu's: GCJ-02 with an offset of about 0.9 km more

A shift of that size, on a ring of 100 km, tells some phones that should not be told, and misses some that should. The
inverse here is exact to the rounding of our coordinates (`datum_kernels`), not the usual "subtract the shift once".

**Where it applies.** Every ping of a partner with such an account is turned back, wherever it is, except where the
published formula itself does nothing: outside the rectangle 0.8293 to 55.8271 N, 72.004 to 137.8347 E, borders
included, taken of the WGS-84 point. The rectangle is no map of China: Seoul, Ulaanbaatar, Taipei, Hanoi and Delhi lie
inside, and the formula shifts them like Beijing. Whether a *feed* is shifted there is a question about the feed: an app
that returns WGS-84 abroad (Baidu's and AMap's kits do) and GCJ-02 at home is no feed in one datum, and must be turned
into one by its owner, or come through two accounts. Guessing by coordinates would be wrong for one kind of feed or the
other; the account says which it is.

**At the rectangle's border** the formula jumps, so that some images just outside belong to two points: one inside that
was shifted out, and one outside that is its own image. The one inside is taken, because an account in that datum says
that it shifts. Some images just inside belong to nobody, and stay as they are. Both strips are at most 1.2 km wide, and
run through sea, Borneo, Sumatra, Central Asia and Siberia.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum

import numpy as np

from gateway import datum_kernels as kernels
from geoindex.columns import I32, PingBatch


class Datum(StrEnum):
    """In which coordinates a partner sends."""

    WGS84 = "wgs84"
    GCJ02 = "gcj02"
    BD09 = "bd09"


_KERNELS: dict[Datum, Callable[[I32, I32, I32, I32], None]] = {
    Datum.GCJ02: kernels.wgs84_of_gcj02,
    Datum.BD09: kernels.wgs84_of_bd09,
}


def to_wgs84(datum: Datum, lat_e7: I32, lng_e7: I32) -> tuple[I32, I32]:
    """Columns of one datum, i32[n] in 1e-7 degree, any values -> the same in WGS-84; for WGS-84 the columns themselves.

    Exact to 2 cm wherever the datum shifts (rounding included); 22 ns a point for GCJ-02, 43 ns for BD-09.
    """
    turn_back = _KERNELS.get(datum)
    if turn_back is None:
        return lat_e7, lng_e7
    lat_out, lng_out = np.empty(len(lat_e7), np.int32), np.empty(len(lng_e7), np.int32)
    turn_back(lat_e7, lng_e7, lat_out, lng_out)
    return lat_out, lng_out


def pings_in_wgs84(datum: Datum, pings: PingBatch) -> PingBatch:
    """The same pings, located in WGS-84. Ids and times are not copied."""
    lat_e7, lng_e7 = to_wgs84(datum, pings.lat_e7, pings.lng_e7)
    return pings if lat_e7 is pings.lat_e7 else replace(pings, lat_e7=lat_e7, lng_e7=lng_e7)
