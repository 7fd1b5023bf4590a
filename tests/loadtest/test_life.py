"""The world of the load tests is what it promises: the same pings however they are cut, from people who live."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.datum import Datum, to_wgs84
from geoindex.columns import F64, I64, U8, U64, PingBatch
from geoindex.entries import Settings
from geoindex.shard import ShardMachine
from loadtest import datums
from loadtest import journey_kernels as journeys
from loadtest.behaviour import DATUMS, DAY_MS, HOUR_MS, MINUTE_MS, STEADY
from loadtest.life import (
    DEFAULT_CLOCK_FAULTS,
    DEFAULT_FESTIVAL,
    DEFAULT_LIFE_PARTNERS,
    FUTURE_TOLERANCE_MS,
    LIVE_WINDOW_MS,
    ClockFault,
    Festival,
    Life,
    LifePartner,
    festival_in,
    refusals,
)
from loadtest.places import distance_km, load_places
from loadtest.world import World
from tests.reference import life as reference

SATURDAY_MS = DEFAULT_FESTIVAL.from_ms + 90 * 7 * DAY_MS - int(15.5 * HOUR_MS)
"""4:00 in Beijing on a day with a festival in the evening."""
TUESDAY_MS = SATURDAY_MS + 3 * DAY_MS
MILLION = 1_000_000
Row = tuple[int, str, int, int, int, int]


def rows_of(batches: Iterable[PingBatch]) -> list[Row]:
    found = []
    for batch in batches:
        assert batch.at_ms is not None
        found += [
            (
                int(batch.partner[i]),
                batch.device_id(i),
                int(batch.lat_e7[i]),
                int(batch.lng_e7[i]),
                int(batch.observed_at_ms[i]),
                int(batch.at_ms[i]),
            )
            for i in range(len(batch))
        ]
    return found


def column(batches: list[PingBatch], name: str) -> I64:
    return np.concatenate([getattr(batch, name) for batch in batches]).astype(np.int64)


@pytest.fixture(scope="module")
def life() -> Life:
    return Life(7, 200_000)


@pytest.fixture(scope="module")
def week() -> tuple[F64, F64, U8]:
    """1,500 phones every minute from Saturday 4:00 on for a week: two f64[minutes, phones] in degrees, modes."""
    world, phones = Life(3, 1_500), np.arange(1_500)
    minutes = [world.whereabouts(phones, SATURDAY_MS + at * MINUTE_MS) for at in range(7 * 24 * 60)]
    lat, lng, mode = (np.stack(columns) for columns in zip(*minutes, strict=True))
    return lat / 1e7, lng / 1e7, mode


# ---- exact ----


def test_kernel_and_reference_agree_on_where_a_phone_is_all_day_long(life: Life) -> None:
    seen = Counter[int]()
    for phone in range(0, 200_000, 3_300):
        moments = [TUESDAY_MS - 3 * DAY_MS + at * 6 * HOUR_MS + phone * 7_919 % (6 * HOUR_MS) for at in range(24)]
        lat, lng, mode = life.whereabouts(np.full(len(moments), phone), moments)
        for at, moment in enumerate(moments):
            expected = reference.whereabouts(life, phone, moment)
            assert expected[2] == mode[at], (phone, moment)
            assert expected[:2] == pytest.approx((lat[at] / 1e7, lng[at] / 1e7), abs=1.1e-7), (phone, moment)
            seen[expected[2]] += 1
    assert len(seen) >= 6


@pytest.mark.parametrize("mode", range(len(journeys.MODES)))
def test_kernel_and_reference_agree_on_everything_people_do(life: Life, mode: int) -> None:
    """Phones found doing it, and what the reference says of that moment."""
    phones = np.arange(life.phone_count)
    at_ms = {journeys.AT_FESTIVAL: SATURDAY_MS + 17 * HOUR_MS}.get(mode, TUESDAY_MS + 4 * HOUR_MS + 15 * MINUTE_MS)
    lat, lng, modes = life.whereabouts(phones, at_ms)
    found = np.flatnonzero(modes == mode)[:60]
    assert len(found) >= 20, journeys.MODES[mode]
    for phone in found.tolist():
        expected_lat, expected_lng, expected_mode = reference.whereabouts(life, phone, at_ms)
        assert expected_mode == mode, phone
        assert (expected_lat, expected_lng) == pytest.approx((lat[phone] / 1e7, lng[phone] / 1e7), abs=1.1e-7), phone


FEW = tuple(replace(partner, ping_interval_s=partner.ping_interval_s / 10) for partner in DEFAULT_LIFE_PARTNERS)
MANY_FAULTS = tuple(replace(fault, share=fault.share * 60) for fault in DEFAULT_CLOCK_FAULTS)


@pytest.mark.parametrize(("seed", "phones", "dark"), [(1, 6, 0.0), (2, 400, 0.2), (2**64 - 1, 5_000, 0.05)])
def test_pings_are_those_of_the_reference(seed: int, phones: int, dark: float) -> None:
    world = Life(seed, phones, FEW, clock_faults=MANY_FAULTS, dark_share=dark, trip_share=1.0)
    # Across 8:00 in Beijing: a knot of the curve, and a commute.
    from_ms = TUESDAY_MS + 4 * HOUR_MS - 300
    scale = 300.0 / phones
    expected = reference.pings(world, from_ms, from_ms + 1_500, scale)
    got = rows_of(world.pings(from_ms, from_ms + 1_500, rate_scale=scale, batch_size=7, timed=True))
    assert len(got) > 50
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours[:2] + ours[4:] == (theirs.partner, theirs.device_id, theirs.observed_at_ms, theirs.at_ms)
        assert abs(ours[2] - theirs.lat_e7) <= 1
        assert abs(ours[3] - theirs.lng_e7) <= 1


slices = st.lists(st.integers(0, 4_000), max_size=6).map(lambda cuts: [0, *sorted(cuts), 4_000])


@settings(max_examples=60)
@given(st.integers(0, 2**64 - 1), st.integers(6, 3_000), slices, st.integers(1, 5), st.sampled_from([1, 64, 8_192]))
def test_slices_and_workers_give_the_same_pings_however_they_are_cut(
    seed: int, phones: int, cuts: list[int], workers: int, batch_size: int
) -> None:
    world = Life(seed, phones, FEW, dark_share=0.1)
    start_ms = TUESDAY_MS + 20 * HOUR_MS - 2_000  # midnight in Beijing
    whole = rows_of(world.pings(start_ms, start_ms + 4_000, rate_scale=5.0, timed=True))
    parts = []
    for from_ms, until_ms in itertools.pairwise(cuts):
        for worker in range(workers):
            span = (start_ms + from_ms, start_ms + until_ms)
            part = rows_of(world.pings(*span, (worker, workers), 5.0, batch_size, timed=True))
            assert all(span[0] <= row[5] < span[1] for row in part)
            assert [row[5] for row in part] == sorted(row[5] for row in part)
            parts += part
    assert Counter(parts) == Counter(whole)
    if workers == 1:
        assert parts == whole


def test_a_rate_is_kept_to_a_ping_a_partner_day_and_night() -> None:
    world = Life(5, MILLION, dark_share=0.2)
    for start_ms in (TUESDAY_MS, TUESDAY_MS + 4 * HOUR_MS):
        for second in range(3):
            span = (start_ms + second * 1_000, start_ms + second * 1_000 + 1_000)
            workers = [list(world.pings_at_rate(200_000, *span, (k, 3))) for k in range(3)]
            counts = [sum(map(len, batches)) for batches in workers]
            assert sum(counts) == pytest.approx(200_000, abs=len(world.partners))
            assert max(counts) - min(counts) <= len(world.partners)
            assert all(len(batch) == 8_192 for batches in workers for batch in batches[:-1])


def test_a_rate_may_be_of_one_partner_alone(life: Life) -> None:
    batches = list(life.pings_at_rate(5_000, TUESDAY_MS, TUESDAY_MS + 1_000, partners=["zhifu"]))
    assert sum(map(len, batches)) == pytest.approx(5_000, abs=1)
    assert set(column(batches, "partner").tolist()) == {4}


def test_at_a_rate_no_dark_phone_sends(life: Life) -> None:
    world = Life(5, 3_000, (replace(FEW[0], late_share=0.0, delay_ms_median=0.0),), clock_faults=(), dark_share=0.25)
    (batch,) = world.pings_at_rate(2_000, TUESDAY_MS, TUESDAY_MS + 1_000, timed=True)
    phones = np.arange(3_000)
    _, id_bytes, _ = world.phone_ids(phones)
    index = {bytes(name): i for i, name in enumerate(id_bytes.reshape(-1, 32))}
    senders = np.array([index[batch.device_id(i).encode()] for i in range(len(batch))])
    assert world.online(senders, batch.observed_at_ms).all()
    assert world.online(phones, TUESDAY_MS).mean() == pytest.approx(1 - world.dark_share, abs=0.03)


# ---- people ----


def test_provinces_have_their_share_of_homes_and_of_the_pings_at_night_within_2_percent() -> None:
    partner = LifePartner("one", 1.0, "hex16", 60.0, delay_ms_median=0.0, late_share=0.0, rhythm=STEADY)
    world = Life(11, 2 * MILLION, (partner,), clock_faults=(), trip_share=0.0)
    places = world.country.places
    provinces = sorted({place.admin_code for place in places.all})
    province_of_place = np.array([provinces.index(place.admin_code) for place in places.all])
    people = np.bincount(province_of_place, [place.population for place in places.all], len(provinces))
    expected = people / people.sum()

    home = world.home_places(np.arange(world.phone_count))
    at_home = np.bincount(province_of_place[home], minlength=len(provinces)) / world.phone_count
    assert np.abs(at_home / expected - 1).max() < 0.02

    batches = list(world.pings(TUESDAY_MS, TUESDAY_MS + MINUTE_MS))
    sender = senders(world, batches)
    assert len(sender) == pytest.approx(world.phone_count * (1 - world.dark_share), rel=0.005)
    by_pings = np.bincount(province_of_place[home[sender]], minlength=len(provinces)) / len(sender)
    assert np.abs(by_pings / expected - 1).max() < 0.02
    # Whoever is at home is less than a city's reach from its centre.
    lat, lng = column(batches, "lat_e7") / 1e7, column(batches, "lng_e7") / 1e7
    away = np.hypot(lat - places.lat[home[sender]], (lng - places.lng[home[sender]]) * np.cos(np.radians(lat)))
    assert np.quantile(away, 0.99) < 0.4


def senders(world: Life, batches: list[PingBatch]) -> npt.NDArray[np.intp]:
    """Phone of each ping of a world with one partner and 16 digits an id, by its id."""
    _, id_bytes, _ = world.phone_ids(np.arange(world.phone_count))
    known = words(id_bytes)
    order = np.argsort(known)
    found = words(np.concatenate([batch.id_bytes for batch in batches]))
    places = np.searchsorted(known, found, sorter=order)
    assert (known[order[places]] == found).all()
    return order[places]


def words(id_bytes: U8) -> U64:
    """16 hex digits each -> u64."""
    digits = np.where(id_bytes < 97, id_bytes - 48, id_bytes - 87).reshape(-1, 16).astype(np.uint64)
    found: U64 = (digits << (np.arange(15, -1, -1, dtype=np.uint64) * np.uint64(4))).sum(axis=1, dtype=np.uint64)
    return found


def test_homes_are_those_of_the_other_world(life: Life) -> None:
    phones = np.arange(1_000)
    assert (life.home_places(phones) == World(7, 200_000).home_places(phones)).all()


SPEEDS_MPS = {
    journeys.AT_HOME: (0.0, 0.0),
    journeys.AT_WORK: (0.0, 0.0),
    journeys.AT_HOTEL: (0.0, 0.0),
    journeys.OUT: (0.0, 0.0),
    journeys.WAITING: (0.0, 0.0),
    journeys.AT_FESTIVAL: (0.0, 0.0),
    journeys.WALKING: (1.0, 1.5),
    journeys.RIDING: (3.8, 5.3),
    journeys.DRIVING: (8.6, 23.1),
    journeys.IN_TRAIN: (60.0, 350 / 3.6),
    journeys.IN_AIR: (200.0, 900 / 3.6),
}
"""Least and greatest, of two looks a minute apart: 5.4 km/h on foot, 83 km/h by car, 350 in trains, 900 in the air."""


def test_nobody_is_faster_than_their_way_of_travel_allows(week: tuple[F64, F64, U8]) -> None:
    lat, lng, mode = week
    north = np.diff(lat, axis=0) * 111_195.0
    east = np.diff(lng, axis=0) * 111_195.0 * np.cos(np.radians(lat[1:]))
    speed = np.hypot(north, east) / 60.0
    assert speed.max() < 900 / 3.6
    steady = mode[1:] == mode[:-1]
    for kind, (least, greatest) in SPEEDS_MPS.items():
        found = speed[steady & (mode[1:] == kind)]
        # A minute may hold the end of one way and the start of another; rounding makes a centimetre.
        assert found.max(initial=0.0) <= greatest + 0.01, journeys.MODES[kind]
        if kind in (journeys.WALKING, journeys.RIDING, journeys.DRIVING, journeys.IN_TRAIN, journeys.IN_AIR):
            assert len(found) > 100, journeys.MODES[kind]
            assert np.quantile(found, 0.05) >= least, journeys.MODES[kind]


def stays_min(mode: U8, kind: int) -> npt.NDArray[np.intp]:
    """Lengths in minutes of everybody's stays of a kind that begin and end within the week."""
    lengths = []
    for phone in range(mode.shape[1]):
        edges = np.flatnonzero(np.diff((mode[:, phone] == kind).astype(np.int8), prepend=0, append=0))
        lengths += [stop - start for start, stop in edges.reshape(-1, 2) if start > 0 and stop < len(mode)]
    return np.array(lengths)


def test_stays_are_as_long_as_promised(week: tuple[F64, F64, U8]) -> None:
    _, _, mode = week
    errands = stays_min(mode, journeys.OUT)
    assert len(errands) > 5_000
    assert errands.min() >= 9
    assert errands.max() <= 111
    # 10 minutes and the square of a draw of 100: a median of 35, and lunches of 25.
    assert 25 <= np.median(errands) <= 35
    work = stays_min(mode, journeys.AT_WORK)
    whole = work[work > 7 * 60]
    assert 8 * 60 <= np.median(whole) <= 9 * 60
    assert whole.max() <= 10.2 * 60
    nights = stays_min(mode, journeys.AT_HOME)
    assert np.median(nights[nights > 5 * 60]) > 9 * 60


def test_people_move_at_the_hours_when_people_move(life: Life) -> None:
    phones = np.arange(50_000)
    moving = (journeys.WALKING, journeys.RIDING, journeys.DRIVING)

    def share(day_ms: int, hour: float) -> float:
        mode = life.whereabouts(phones, day_ms + round((hour - 4) * HOUR_MS))[2]
        return float(np.isin(mode, moving).mean())

    assert share(TUESDAY_MS, 4) == 0.0
    assert 0.08 < share(TUESDAY_MS, 8) < 0.16
    assert 0.05 < share(TUESDAY_MS, 17.25) < 0.14
    assert 0.005 < share(TUESDAY_MS, 14.5) < 0.05
    assert share(TUESDAY_MS, 26) < 0.005
    assert share(SATURDAY_MS, 8) < 0.5 * share(TUESDAY_MS, 8)
    at_work = life.whereabouts(phones, TUESDAY_MS + 7 * HOUR_MS)[2] == journeys.AT_WORK
    assert 0.4 < at_work.mean() < 0.56


def test_some_travel_between_cities_and_come_home_again() -> None:
    world, phones = Life(9, 20_000, trip_share=1.0), np.arange(20_000)
    home_lat, home_lng = (degrees / 1e7 for degrees in Life(9, 20_000, trip_share=0.0).where(phones, TUESDAY_MS))
    days = range(28)
    away = np.stack([world.whereabouts(phones, TUESDAY_MS + day * DAY_MS)[2] == journeys.AT_HOTEL for day in days])
    # One trip of 1 to 6 nights in four weeks of their own, so at most two of ours.
    assert away.sum(axis=0).min() >= 0
    assert away.sum(axis=0).max() <= 12
    assert away.mean() == pytest.approx(3.5 / 28, rel=0.03)
    lat, lng = (degrees / 1e7 for degrees in world.where(phones, TUESDAY_MS))
    gone_km = np.hypot(lat - home_lat, (lng - home_lng) * np.cos(np.radians(lat))) * 111.195
    assert (gone_km[away[0]] > 5).all()
    assert 300 < np.median(gone_km[away[0]]) < 1_500
    assert (gone_km[~away[0]] < 0.001).all()
    modes = np.concatenate([world.whereabouts(phones, TUESDAY_MS + hour * HOUR_MS)[2] for hour in range(3, 14)])
    trains, flights = (modes == journeys.IN_TRAIN).sum(), (modes == journeys.IN_AIR).sum()
    assert 0.1 < flights / trains < 1.0


def test_a_crowd_is_at_the_festival_at_its_time_and_at_no_other(life: Life) -> None:
    places, phones = load_places(), np.arange(life.phone_count)
    near = distance_km(DEFAULT_FESTIVAL.lat, DEFAULT_FESTIVAL.lng, places.lat, places.lng) <= 30.0
    expected = 0.3 * places.people[near].sum() / places.people.sum() * life.phone_count

    def crowd(at_ms: int) -> int:
        lat, lng = (degrees / 1e7 for degrees in life.where(phones, at_ms))
        return int((distance_km(DEFAULT_FESTIVAL.lat, DEFAULT_FESTIVAL.lng, lat, lng) <= 0.41).sum())

    evening_ms = SATURDAY_MS + 17 * HOUR_MS
    everyday = crowd(evening_ms - DAY_MS)
    assert crowd(evening_ms) - everyday == pytest.approx(expected * 0.98, rel=0.1)
    assert everyday < 0.1 * expected
    assert crowd(SATURDAY_MS) < 0.1 * expected
    assert crowd(SATURDAY_MS + 20 * HOUR_MS) < 0.1 * expected
    assert crowd(evening_ms + 7 * DAY_MS) == pytest.approx(crowd(evening_ms), rel=0.1)


def test_a_festival_may_be_held_once_or_never() -> None:
    place = load_places().place("Wuhan")
    from_ms = TUESDAY_MS + 15 * HOUR_MS
    phones = np.arange(50_000)
    once = Life(1, 50_000, festival=festival_in(place, from_ms, from_ms + HOUR_MS))
    never = Life(1, 50_000, festival=None)

    def visitors(world: Life, at_ms: int) -> int:
        return int((world.whereabouts(phones, at_ms)[2] == journeys.AT_FESTIVAL).sum())

    assert visitors(once, from_ms + HOUR_MS // 2) > 100
    assert visitors(once, from_ms + HOUR_MS // 2 + 7 * DAY_MS) == 0
    assert visitors(never, from_ms + HOUR_MS // 2) == 0


# ---- phones ----


def test_phones_go_dark_for_minutes_or_days_and_come_back() -> None:
    world, phones = Life(4, 4_000, dark_share=0.2, trip_share=0.0), np.arange(4_000)
    online = np.stack([world.online(phones, TUESDAY_MS + at * 5 * MINUTE_MS) for at in range(30 * 288)])
    assert online.mean() == pytest.approx(1 - world.dark_share, abs=0.01)
    assert world.dark_share == pytest.approx(0.2, abs=0.011)
    assert online.any(axis=0).all()
    edges = np.diff(online[:, 0].astype(np.int8))
    assert (edges == -1).sum() > 3
    longest = max(int(np.diff(np.flatnonzero(online[:, phone])).max()) for phone in range(500))
    # A long stretch, and a short one before and one after it.
    assert DAY_MS < longest * 5 * MINUTE_MS <= 5 * DAY_MS + 7 * HOUR_MS


def test_a_dark_phone_sends_nothing_until_it_is_back() -> None:
    partner = LifePartner("one", 1.0, "hex16", 20.0, delay_ms_median=0.0, late_share=0.0, rhythm=STEADY)
    world = Life(6, 3_000, (partner,), clock_faults=(), dark_share=0.25)
    batches = list(world.pings(TUESDAY_MS, TUESDAY_MS + 2 * HOUR_MS))
    phone, seen_ms = senders(world, batches), column(batches, "observed_at_ms")
    assert world.online(phone, seen_ms).all()
    last, gone, back = 2 * HOUR_MS // 20_000, 0, 0
    for one in range(900):
        times_ms = np.sort(seen_ms[phone == one])
        gaps = np.flatnonzero(np.diff(times_ms) > 2 * MINUTE_MS)
        gone += len(times_ms) < last - 6
        back += len(gaps)
        for gap in gaps.tolist():
            assert not world.online([one], [int(times_ms[gap]) + MINUTE_MS])[0]
    assert gone > 180
    assert back > 20


def test_a_phone_pings_at_its_partners_interval() -> None:
    partner = LifePartner("one", 1.0, "hex16", 45.0, delay_ms_median=0.0, late_share=0.0, rhythm=STEADY)
    world = Life(6, 5_000, (partner,), clock_faults=(), dark_share=0.0, trip_share=0.0)
    batches = list(world.pings(TUESDAY_MS, TUESDAY_MS + 15 * MINUTE_MS))
    phone, seen_ms = senders(world, batches), column(batches, "observed_at_ms")
    order = np.lexsort((seen_ms, phone))
    gaps = np.diff(seen_ms[order])[np.diff(phone[order]) == 0]
    assert len(gaps) == 5_000 * 19
    assert gaps.mean() == pytest.approx(45_000, rel=0.01)
    assert gaps.min() >= 45_000 * 15 / 16 - 20
    assert gaps.max() <= 45_000 * 17 / 16 + 20
    assert gaps.std() > 500


@pytest.mark.parametrize("hour", [0, 4, 15])
def test_partners_ping_as_often_as_they_are_expected_to(life: Life, hour: int) -> None:
    start_ms = TUESDAY_MS + hour * HOUR_MS
    batches = list(life.pings(start_ms, start_ms + 5 * MINUTE_MS))
    counts = np.bincount(column(batches, "partner"), minlength=len(life.partners))
    expected = life.expected_pings_per_s(start_ms + MINUTE_MS) * 300
    assert counts == pytest.approx(expected, rel=0.02)
    assert life.expected_pings_per_s(TUESDAY_MS)[5] == pytest.approx(
        life.expected_pings_per_s(TUESDAY_MS + 15 * HOUR_MS)[5]
    )
    assert life.expected_pings_per_s(TUESDAY_MS)[0] < 0.2 * life.expected_pings_per_s(TUESDAY_MS + 15 * HOUR_MS)[0]


def test_intervals_of_a_day_are_those_of_the_partner(life: Life) -> None:
    quarters = [life.expected_pings_per_s(TUESDAY_MS + quarter * 15 * MINUTE_MS) for quarter in range(96)]
    daily_mean = np.mean(quarters, axis=0) / (1 - life.dark_share)
    phones = np.diff(life.first_phones)
    assert phones / daily_mean == pytest.approx([p.ping_interval_s for p in life.partners], rel=0.001)
    shares = np.array([partner.share for partner in life.partners])
    assert phones / life.phone_count == pytest.approx(shares / shares.sum(), abs=1e-4)


def test_delays_are_those_of_the_partner() -> None:
    world = Life(2, 100_000, clock_faults=())
    batches = list(world.pings(TUESDAY_MS + 5 * HOUR_MS, TUESDAY_MS + 5 * HOUR_MS + 5 * MINUTE_MS, timed=True))
    delay_ms = column(batches, "at_ms") - column(batches, "observed_at_ms")
    partner = column(batches, "partner")
    assert delay_ms.min() >= 0
    for i, behaviour in enumerate(world.partners):
        of_partner = delay_ms[partner == i]
        assert np.median(of_partner) == pytest.approx(behaviour.delay_ms_median, rel=0.1)
        slow_ms = behaviour.delay_ms_median * 8
        assert (of_partner > slow_ms).mean() == pytest.approx(
            behaviour.late_share * (1 - slow_ms / behaviour.late_ms_max), rel=0.25
        )
        assert of_partner.max() <= behaviour.late_ms_max


def test_coordinates_in_bodies_are_in_the_partners_datum_and_those_in_batches_in_wgs84(life: Life) -> None:
    batch = next(life.pings(TUESDAY_MS, TUESDAY_MS + MINUTE_MS))
    lat, lng = life.in_datum(batch)
    seen = set()
    for i, partner in enumerate(life.partners):
        rows = np.flatnonzero(batch.partner == i)
        true_lat, true_lng = batch.lat_e7[rows] / 1e7, batch.lng_e7[rows] / 1e7
        if partner.datum == "wgs84":
            assert (lat[rows] == true_lat).all()
            assert (lng[rows] == true_lng).all()
        else:
            convert = {"gcj02": datums.gcj02, "bd09": datums.bd09}[partner.datum]
            assert np.array_equal(convert(true_lat, true_lng), (lat[rows], lng[rows]))
            moved_m = np.hypot(lat[rows] - true_lat, lng[rows] - true_lng) * 111_195
            assert moved_m.min() > 50
            given_e7 = (np.rint(degrees[rows] * 1e7).astype(np.int32) for degrees in (lat, lng))
            back = to_wgs84(Datum(partner.datum), *given_e7)
            assert np.abs(back[0] - batch.lat_e7[rows]).max() <= 10
            assert np.abs(back[1] - batch.lng_e7[rows]).max() <= 10
        seen.add(partner.datum)
    assert seen == set(DATUMS)


def test_pings_are_where_their_phones_are_but_for_24_metres() -> None:
    partner = LifePartner("one", 1.0, "hex16", 10.0, rhythm=STEADY)
    world = Life(8, 20_000, (partner,), clock_faults=())
    batches = list(world.pings(TUESDAY_MS + 4 * HOUR_MS, TUESDAY_MS + 4 * HOUR_MS + 10_000))
    lat, lng = world.where(senders(world, batches), column(batches, "observed_at_ms"))
    north_m = (lat - column(batches, "lat_e7")) / 1e7 * 111_195.0
    east_m = (lng - column(batches, "lng_e7")) / 1e7 * 111_195.0 * np.cos(np.radians(lat / 1e7))
    off_m = np.hypot(north_m, east_m)
    assert off_m.max() < 24.2
    assert off_m.mean() == pytest.approx(12.0, rel=0.03)


# ---- clocks ----


def test_refusals_of_bad_clocks_are_those_of_the_shard_machine_and_of_the_reference() -> None:
    world = Life(3, 3_000, FEW, clock_faults=MANY_FAULTS)
    from_ms = TUESDAY_MS + 5 * HOUR_MS
    batches = list(world.pings(from_ms, from_ms + 1_500, timed=True))
    counted = Counter[str]()
    machine = ShardMachine()
    machine.apply(from_ms, Settings(shard_count=1, partners=world.partner_names))
    for batch in batches:
        assert batch.at_ms is not None
        counted.update(refusals(batch))
        machine.apply(int(batch.at_ms[-1]), batch)
    assert machine.counters.pings_refused == dict(counted)
    assert machine.counters.pings_accepted == sum(map(len, batches)) - counted.total()
    slow = reference.pings(world, from_ms, from_ms + 1_500, 1.0)
    assert counted["from_the_future"] == sum(p.observed_at_ms > p.at_ms + FUTURE_TOLERANCE_MS for p in slow) > 20
    assert counted["too_old"] == sum(p.observed_at_ms < p.at_ms - LIVE_WINDOW_MS for p in slow) > 10


def test_clocks_are_as_wrong_as_their_fault_says() -> None:
    faults = (ClockFault("ahead", 0.1, 1_000, 2_000), ClockFault("behind", 0.2, -9_000, -9_000))
    offset_ms = Life(1, 50_000, clock_faults=faults).clock_offset_ms(np.arange(50_000))
    assert (offset_ms > 0).mean() == pytest.approx(0.1, abs=0.006)
    assert set(offset_ms[offset_ms < 0].tolist()) == {-9_000}
    assert (offset_ms < 0).mean() == pytest.approx(0.2, abs=0.008)
    assert offset_ms.max() == 2_000
    assert offset_ms[offset_ms > 0].min() == 1_000
    assert not Life(1, 1_000, clock_faults=()).clock_offset_ms(np.arange(1_000)).any()


# ---- a device table ----


def test_first_sight_is_each_live_phone_once_and_a_shard_accepts_all(life: Life) -> None:
    at_ms = TUESDAY_MS + 5 * HOUR_MS
    batches = list(life.first_sight(at_ms, 50_000))
    machine = ShardMachine()
    machine.apply(at_ms, Settings(shard_count=1, partners=life.partner_names))
    for batch in batches:
        machine.apply(at_ms, batch)
    total = sum(map(len, batches))
    assert sum(machine.counters.pings_refused.values()) == 0
    assert machine.counters.pings_accepted == total
    ids = {(partner, batch.device_id(i)) for batch in batches for i, partner in enumerate(batch.partner.tolist())}
    assert len(ids) == total
    # Dark for days 2.5 %, clocks refused about 0.6 %; the short stretches were shorter than what is looked back.
    assert 0.955 < total / life.phone_count < 0.985
    again = list(life.first_sight(at_ms, 50_000))
    assert all((one.id_bytes == other.id_bytes).all() for one, other in zip(batches, again, strict=True))


@pytest.mark.parametrize("phones", [10_000, 100 * MILLION])
def test_worlds_of_ten_thousand_and_of_a_hundred_million_phones_are_made_alike(phones: int) -> None:
    world = Life(1, phones)
    batches = list(world.pings_at_rate(20_000, TUESDAY_MS, TUESDAY_MS + 500))
    assert sum(map(len, batches)) == pytest.approx(10_000, abs=6)
    names = {batch.device_id(i) for batch in batches for i in range(len(batch))}
    assert len(names) > (9_990 if phones > MILLION else 2_000)


# ---- what makes no world ----

ONE = LifePartner("one", 1.0, "hex16", 60.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Life(-1, 10), "seed: required 0 <= seed < 2^64, got -1"),
        (lambda: Life(1, 5), "phone_count: required a phone for each of 6 partners, got 5"),
        (lambda: Life(1, 0), "phone_count: required 1 to 4294967295, got 0"),
        (lambda: Life(1, 10, (ONE, ONE)), "partners: names must differ, got ['one', 'one']"),
        (lambda: Life(1, 10, ()), "partners: required 1 to 65536, got 0"),
        (lambda: Life(1, 10, dark_share=0.3), "dark_share: required 0 to 0.25, got 0.3"),
        (lambda: Life(1, 10, trip_share=1.5), "trip_share: required 0 to 1, got 1.5"),
        (lambda: Life(1, 10, clock_faults=[ClockFault("a", 0.6, 0, 1)] * 2), "clock_faults: shares must sum to 1"),
        (lambda: ClockFault("a", 0.1, 5, 4), "clock fault 'a': ahead_ms_min must be at most ahead_ms_max"),
        (lambda: ClockFault("a", 1.1, 5, 6), "clock fault 'a': share must be 0 to 1, got 1.1"),
        (lambda: replace(ONE, datum="utm"), "partner 'one': datum must be one of wgs84, gcj02, bd09, got 'utm'"),
        (lambda: replace(ONE, id_style="x"), "partner 'one': id_style must be one of hex16"),
        (lambda: replace(ONE, ping_interval_s=0.0), "partner 'one': ping_interval_s must be 0.1 to 86400, got 0.0"),
        (lambda: replace(ONE, share=math.inf), "partner 'one': share must be positive, got inf"),
        (lambda: replace(ONE, rhythm=(1.0,)), "partner 'one': rhythm must be 24 numbers"),
        (lambda: replace(ONE, late_share=2.0), "partner 'one': late_share must be 0 to 1, got 2.0"),
        (lambda: Festival(30.0, 104.0, 10, 5), "festival: until_ms must be behind from_ms, got (10, 5)"),
        (
            lambda: Festival(30.0, 104.0, SATURDAY_MS, SATURDAY_MS + HOUR_MS),
            "festival: must begin at 6:00 or later and end by 2:00 of the next day, Beijing time",
        ),
        (lambda: Life(1, 10).pings(0, 1, (2, 2)), "share: required (k, n) with 0 <= k < n, got (2, 2)"),
        (lambda: Life(1, 10).pings(2, 1), "required 0 <= from_ms <= until_ms, got 2 and 1"),
        (lambda: Life(1, 10).pings(0, 1, rate_scale=0.0), "rate_scale: required more than 0, got 0.0"),
        (lambda: Life(1, 10).pings(0, 1, batch_size=0), "batch_size: required 1 to 2^24, got 0"),
        (lambda: Life(1, 10).pings(0, 1, partners=["x"]), "partners: 'x' is none of amap, ditu"),
        (lambda: Life(1, 10).pings_at_rate(0, 0, 1), "pings_per_s: required more than 0, at most 1e9, got 0"),
        (lambda: Life(1, 10).where([10], 0), "phones: required 0 to 9, got 10 to 10"),
    ],
)
def test_what_makes_no_world_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        make()  # type: ignore[operator]
    assert message in str(refused.value)
