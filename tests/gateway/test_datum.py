"""Coordinates of partners come back to where the phones were."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest

from gateway.datum import Datum, pings_in_wgs84, to_wgs84
from geoindex.columns import E7, F64, I32, LNG_E7_MAX
from loadtest import datums as reference
from tests.geoindex.machines import batch_of
from tests.reference.events import PingEvent

FORWARD: dict[Datum, Callable[[F64, F64], tuple[F64, F64]]] = {
    Datum.GCJ02: reference.gcj02,
    Datum.BD09: reference.bd09,
}
SHIFTED = list(FORWARD)
METRES_PER_E7 = 0.0111320
BORDER = (
    (reference.LAT_MIN, reference.LNG_MIN),
    (reference.LAT_MIN, reference.LNG_MAX),
    (reference.LAT_MAX, reference.LNG_MIN),
    (reference.LAT_MAX, reference.LNG_MAX),
)


def e7(*degrees: float) -> I32:
    return cast(I32, np.rint(np.array(degrees) * E7).astype(np.int32))


def turned_back(datum: Datum, lat: float, lng: float) -> tuple[float, float]:
    lat_e7, lng_e7 = to_wgs84(datum, e7(lat), e7(lng))
    return lat_e7[0] / E7, lng_e7[0] / E7


def error_m(datum: Datum, lat_e7: I32, lng_e7: I32) -> float:
    """The largest distance between points and what becomes of them there and back, both ways in our coordinates."""
    sent_lat, sent_lng = FORWARD[datum](lat_e7 / E7, lng_e7 / E7)
    got_lat, got_lng = to_wgs84(datum, e7(*sent_lat), e7(*sent_lng))
    north = (got_lat.astype(np.int64) - lat_e7) * METRES_PER_E7
    east = (got_lng.astype(np.int64) - lng_e7) * METRES_PER_E7 * np.cos(np.radians(lat_e7 / E7))
    return float(np.hypot(north, east).max())


# ---- worked out by hand


def test_at_35_north_105_east_gcj02_moves_100_m_south_and_300_m_east() -> None:
    # x = y = 0: every sine is 0, and what is left of the formula is -100 m and 300 m. A degree there:
    # sin(35)^2 = 0.32898993, w = 1 - 0.00669342162 * 0.32898993 = 0.99779793, w^1.5 = 0.99669872, w^0.5 = 0.99889836
    # north 6378245 * 0.99330657838 / 0.99669872 * pi / 180 = 110942.3 m, east 6378245 / 0.99889836 * cos(35) * pi / 180
    # = 91289.2 m; so -0.000901369 and +0.003286259 degrees.
    got = turned_back(Datum.GCJ02, 35 - 0.000901369, 105 + 0.003286259)
    assert got == pytest.approx((35, 105), abs=3e-7)


def test_at_35_north_135_east_one_sine_is_1_and_all_others_are_0() -> None:
    # x = 30: north -100 + 2 * 30 + 0.2 * sqrt(30) = -38.90455 m; of the sines only sin(30 pi / 12) = 1, so
    # east 300 + 30 + 0.1 * 900 + 0.1 * sqrt(30) + 150 * 2 / 3 = 520.54772 m. Degrees as above.
    got = turned_back(Datum.GCJ02, 35 - 38.90455 / 110942.3, 135 + 520.54772 / 91289.2)
    assert got == pytest.approx((35, 135), abs=3e-7)


def test_where_both_waves_of_bd09_are_0_only_its_constants_are_left() -> None:
    # GCJ-02 36 N, 105.03 E: 36 * 25 / 3 = 300 whole waves, sine 0; 105.03 * 25 / 3 = 875.25, cosine 0.
    assert turned_back(Datum.BD09, 36.006, 105.0365) == turned_back(Datum.GCJ02, 36, 105.03)


def test_where_the_waves_of_bd09_are_1_radius_and_angle_change_by_their_amplitudes() -> None:
    # GCJ-02 39.87 N, 105.00 E: 39.87 * 25 / 3 = 332.25, sine 1; 105 * 25 / 3 = 875 whole waves, cosine 1.
    # radius sqrt(39.87^2 + 105^2) = 112.3151761; stretched by 1 + 0.00002 / 112.3151761 = 1 + 1.780703e-7
    # lat 39.87 + 39.87 * 1.780703e-7 + 105 * 0.000003 + 0.006 = 39.8763221
    # lng 105 + 105 * 1.780703e-7 - 39.87 * 0.000003 + 0.0065 = 105.0063991
    got = turned_back(Datum.BD09, 39.8763221, 105.0063991)
    assert got == pytest.approx(turned_back(Datum.GCJ02, 39.87, 105.00), abs=3e-7)


def test_the_gate_of_heavenly_peace_is_found() -> None:
    # Where AMap draws it, and where GPS finds it.
    assert turned_back(Datum.GCJ02, 39.908741, 116.397131) == pytest.approx((39.907340, 116.390890), abs=1e-6)


def test_beijing_railway_station_of_two_maps_is_one_place() -> None:
    # Published to five digits: BD-09 and GCJ-02.
    got = turned_back(Datum.BD09, 39.90851, 116.43351)
    assert got == pytest.approx(turned_back(Datum.GCJ02, 39.90245, 116.42703), abs=1.5e-5)


# ---- everywhere


@pytest.mark.parametrize("datum", SHIFTED)
def test_a_million_points_come_back_within_2_cm(datum: Datum) -> None:
    random = np.random.default_rng(1)
    lat_e7 = random.integers(e7(reference.LAT_MIN)[0], e7(reference.LAT_MAX)[0], 1_000_000, np.int32, endpoint=True)
    lng_e7 = random.integers(e7(reference.LNG_MIN)[0], e7(reference.LNG_MAX)[0], 1_000_000, np.int32, endpoint=True)
    # A shift moves at least half of them by more than 300 m, or nothing would have been shown.
    assert np.median(np.abs(FORWARD[datum](lat_e7 / E7, lng_e7 / E7)[1] - lng_e7 / E7)) > 0.003
    assert error_m(datum, lat_e7, lng_e7) <= 0.02


@pytest.mark.parametrize("datum", SHIFTED)
def test_the_root_of_the_distance_from_105_east_does_no_harm(datum: Datum) -> None:
    # Its slope has no bound there.
    near = np.concatenate([np.arange(-500, 500), np.arange(-60_000, 60_000, 37)]).astype(np.int32)
    for lat in (1, 20, 35, 55):
        assert error_m(datum, np.full_like(near, lat * E7), near + np.int32(105 * E7)) <= 0.02


@pytest.mark.parametrize("datum", SHIFTED)
def test_points_on_the_border_of_the_rectangle_come_back(datum: Datum) -> None:
    along = np.linspace(0, 1, 5_001)
    for (lat_0, lng_0), (lat_1, lng_1) in zip(BORDER, (BORDER[1], BORDER[3], BORDER[0], BORDER[2]), strict=True):
        lat_e7, lng_e7 = e7(*(lat_0 + along * (lat_1 - lat_0))), e7(*(lng_0 + along * (lng_1 - lng_0)))
        assert error_m(datum, lat_e7, lng_e7) <= 0.02


@pytest.mark.parametrize("datum", SHIFTED)
@pytest.mark.parametrize(
    ("place", "lat", "lng"),
    [
        ("Tokyo", 35.68, 139.69),
        ("Moscow", 55.75, 37.62),
        ("Jakarta", -6.2, 106.8),
        ("Fiji", -17.7, -178.0),
        ("the pole", -90, 180),
    ],
)
def test_outside_the_rectangle_nothing_is_shifted(datum: Datum, place: str, lat: float, lng: float) -> None:
    assert turned_back(datum, lat, lng) == (lat, lng), place


@pytest.mark.parametrize("datum", SHIFTED)
@pytest.mark.parametrize(
    ("place", "lat", "lng"),
    [("Seoul", 37.5665, 126.978), ("Ulaanbaatar", 47.9184, 106.9177), ("Taipei", 25.033, 121.5654)],
)
def test_inside_the_rectangle_the_account_decides_and_not_the_country(
    datum: Datum, place: str, lat: float, lng: float
) -> None:
    sent_lat, sent_lng = FORWARD[datum](np.array([lat]), np.array([lng]))
    assert abs(sent_lng[0] - lng) > 0.001, place
    assert turned_back(datum, sent_lat[0], sent_lng[0]) == pytest.approx((lat, lng), abs=2e-7)
    assert turned_back(Datum.WGS84, lat, lng) == (lat, lng)


@pytest.mark.parametrize("datum", SHIFTED)
def test_whatever_is_sent_becomes_a_place_or_stays_as_it_is(datum: Datum) -> None:
    random = np.random.default_rng(2)
    ends = np.array([-(1 << 31), (1 << 31) - 1, 0, 900_000_000, -900_000_000, LNG_E7_MAX, -LNG_E7_MAX], np.int32)
    lat_e7 = np.concatenate([np.repeat(ends, len(ends)), random.integers(-(1 << 31), 1 << 31, 100_000, np.int32)])
    lng_e7 = np.concatenate([np.tile(ends, len(ends)), random.integers(-(1 << 31), 1 << 31, 100_000, np.int32)])
    got_lat, got_lng = to_wgs84(datum, lat_e7, lng_e7)
    moved = (got_lat != lat_e7) | (got_lng != lng_e7)
    assert 0 < moved.sum() < 5_000
    assert np.abs(got_lat[moved].astype(np.int64) - lat_e7[moved]).max() < 0.02 * E7
    assert np.abs(got_lng[moved].astype(np.int64) - lng_e7[moved]).max() < 0.03 * E7


def test_other_columns_and_other_rows_are_not_touched() -> None:
    pings = batch_of(
        [PingEvent("amap", f"phone-{row}", 399087410 + row, 1163971310, row) for row in range(7)], ("amap",)
    )
    assert pings_in_wgs84(Datum.WGS84, pings) is pings
    alone = [
        pings_in_wgs84(Datum.GCJ02, batch_of([PingEvent("amap", "x", 399087410 + row, 1163971310, 0)], ("amap",)))
        for row in range(7)
    ]
    together = pings_in_wgs84(Datum.GCJ02, pings)
    assert together.lat_e7.tolist() == [int(batch.lat_e7[0]) for batch in alone]
    assert together.id_bytes is pings.id_bytes
    assert together.observed_at_ms is pings.observed_at_ms
    empty = to_wgs84(Datum.BD09, np.empty(0, np.int32), np.empty(0, np.int32))
    assert [len(column) for column in empty] == [0, 0]
