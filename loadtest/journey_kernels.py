"""Where a phone is at any moment, computed from (key, phone index, time) and nothing else.

A day of life goes from 4:00 to 4:00 in Beijing, when everybody sleeps: at home, or at the hotel of a trip. Inside it:

    festival day, one who goes   home -- there -- crowd -- back -- home
    working day                  home -- commute -- work (and out for lunch) -- commute -- home -- evening errand
    any other day                home -- morning errand -- afternoon errand -- evening errand
    first day of a trip          home -- way to station or airport -- wait -- train or flight -- way to the hotel
    last day of a trip           the same, back

Ways are straight lines at a pace that grows with their length, trains and flights great circles between the hubs of
`loadtest.country`. Every piece starts where the one before it ended, so a phone never jumps.

Numbers are drawn as in `world_kernels`; homes are those of `World`. All is IEEE arithmetic on tables except square
roots (exact, too) and, in trains and flights, the C library's sines and arcs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from geoindex.columns import E7, F64, I32, I64, U8, U32, U64
from geoindex.numba_typing import inline_kernel, lean_kernel, prefetch
from loadtest.country import (
    HUB_AIRPORT,
    HUB_LAT,
    HUB_LNG,
    HUB_REACH,
    HUB_SEC,
    HUB_STATION,
    PLACE_FESTIVAL,
    PLACE_HUB,
    PLACE_LAT,
    PLACE_LNG,
    PLACE_REACH,
    PLACE_SEC,
    PLACE_SEC_SLOPE,
)
from loadtest.world_kernels import (
    DEGREES_PER_M,
    DIRECTION_COUNT,
    GOLDEN,
    STREAM_EAST,
    STREAM_JITTER,
    STREAM_NORTH,
    bell,
    mix,
    phone_hash,
    place_of,
)

# ---- modes: what a phone's owner is doing ----

AT_HOME, AT_WORK, OUT, WALKING, RIDING, DRIVING, IN_TRAIN, IN_AIR, WAITING, AT_HOTEL, AT_FESTIVAL = range(11)
MODES = (
    "at home",
    "at work",
    "out",
    "walking",
    "riding",
    "driving",
    "in train",
    "in air",
    "waiting",
    "at hotel",
    "at festival",
)
NO_MODE = -1

# ---- a day, in seconds after 4:00 ----

DAY_MS = 86_400_000
LIFE_DAY_OFFSET_MS = 4 * 3_600_000
"""UTC plus this is Beijing time less four hours: days of life are counted in it, from 1970-01-01 4:00 in Beijing."""
FIRST_WEEKDAY = 3
"""1970-01-01 was a Thursday; Monday is 0."""

HOUR_S = 3_600.0
WORKER_SHARE_Q16 = 36_700
"""56 % of the people have a workplace: China's employed, 740 million of 1,410 (National Bureau of Statistics, 2023)."""
SHIFT_SHARE_Q16 = 7_900
"""12 % of these work in shifts that start at any hour from 5:00 to 17:30."""
WORKDAY_SHARE_Q16 = 61_600
WEEKEND_SHARE_Q16 = 13_100
"""94 % and 20 % of the workers work on a weekday, on Saturday or Sunday."""
COMMUTE_M_MAX = 70_000.0
"""Who would live farther from work works at home."""
LUNCH_SHARE_Q16 = 26_200
LUNCH_S = 1_500.0
ERRAND_SHARE_Q16 = (36_000, 32_700, 26_200)
"""Morning, afternoon, evening: 55, 50 and 40 % go out."""
ERRAND_M_MIN = 150.0
ERRAND_M_SPAN = 8_000.0
"""An errand leads 150 m plus the third power of a uniform draw of 8 km away: half of them less than 1.2 km."""
ERRAND_STAY_S_MIN = 600.0
ERRAND_STAY_S_SPAN = 6_000.0
SLEEP_FROM_S = 20.0 * HOUR_S
"""At midnight nobody leaves any more; whoever is out comes back before 4:00."""

# ---- ways ----

WALK_M_MAX = 1_500.0
RIDE_M_MAX = 6_000.0
WALK_MPS, RIDE_MPS, DRIVE_MPS, DRIVE_MPS_MAX = 1.25, 4.5, 9.0, 20.0
QUICK_MIN, QUICK_SPAN = 0.85, 0.3
"""A person's own pace is 0.85 to 1.15 of these."""
TRAIN_MPS, FLIGHT_MPS = 62.0, 217.0
"""Between station and station 223 km/h, between airport and airport 780 km/h, stops and climbs included."""
TRAIN_WAIT_S, FLIGHT_WAIT_S = 1_500.0, 4_500.0
TRAIN_KM_MAX, FLIGHT_KM_MIN = 1_500.0, 300.0
"""Below the latter all go by train, above the former all fly; between, ever more do."""
EARTH_RADIUS_M = 6_371_008.8

# ---- trips ----

TRIP_DAYS = 28
"""A phone travels at most once in so many days."""
TRIP_NIGHTS_MAX = 6
TRIP_FIRST_DAYS = TRIP_DAYS - TRIP_NIGHTS_MAX - 1

FESTIVAL_EARLY_S, FESTIVAL_LATE_S = 2_700.0, 2_400.0
FESTIVAL_M_MAX = 60_000.0
"""From farther away nobody comes."""

STREAM_TRAIT = np.uint64(0x1D8E4E27C47D124F)
STREAM_WORK = np.uint64(0x27D4EB2F165667C5)
STREAM_TODAY = np.uint64(0x369DEA0F31A53F85)
STREAM_OUTING = np.uint64(0x4B7E8D5A6C1F3B91)
STREAM_TRIP = np.uint64(0x5851F42D4C957F2D)
STREAM_FESTIVAL = np.uint64(0x6C62272E07BB0142)
STREAM_LUNCH = np.uint64(0x71D67FFFEDA60000)

_LOW_16 = np.uint64(0xFFFF)
_PER_2_16 = 1.0 / (1 << 16)
_PER_2_32 = 1.0 / (1 << 32)
_DIRECTION_MASK = np.uint64(DIRECTION_COUNT - 1)


Int = int | np.int64
Truth = bool | np.bool_
"""How whole numbers and answers are spelled for the type checker; Numba does not read them."""


class Land(NamedTuple):
    """The tables of `loadtest.country` and what one life adds: who travels, and its festival."""

    key: np.uint64
    threshold: U64
    alias: U32
    rows: F64
    work: U32
    hubs: F64
    trip_keep: U32
    trip_other: U32
    direction: F64
    """Cosine and sine of 1,024 directions, f64[1024, 2]."""
    trip_q16: np.uint64
    """Chance of a trip in `TRIP_DAYS` days, in 1/2^16."""
    festival: F64
    """Columns FESTIVAL_*, f64[8]."""


FESTIVAL_FIRST_DAY, FESTIVAL_EVERY, FESTIVAL_FROM_S, FESTIVAL_UNTIL_S = 0, 1, 2, 3
FESTIVAL_LAT, FESTIVAL_LNG, FESTIVAL_SEC, FESTIVAL_RADIUS_M = 4, 5, 6, 7
"""Day of life, days from one to the next (0: once), seconds after 4:00 twice, degrees twice, 1/cos(lat), metres."""


# ---- pieces ----


@inline_kernel
def part(number: np.uint64, first_bit: Int) -> float:
    """16 bits of a random number as a fraction in [0, 1)."""
    return np.float64((number >> np.uint64(first_bit)) & _LOW_16) * _PER_2_16


@inline_kernel
def metres(lat: float, lng: float, to_lat: float, to_lng: float, sec: float) -> float:
    """Length of a short way, on the plane that touches the sphere at the latitude of `sec`."""
    north = (to_lat - lat) * (1.0 / DEGREES_PER_M)
    east = (to_lng - lng) * (1.0 / DEGREES_PER_M) / sec
    return math.sqrt(north * north + east * east)


@inline_kernel
def way_s(way_m: float, quick: float) -> float:
    """How long a way takes: on foot, by bike or bus, by car or metro, the faster the longer it is."""
    pace = WALK_MPS
    if way_m > WALK_M_MAX:
        pace = RIDE_MPS
    if way_m > RIDE_M_MAX:
        pace = min(DRIVE_MPS + way_m * 0.0002, DRIVE_MPS_MAX)
    return way_m / (pace * quick)


@inline_kernel
def way_mode(way_m: float) -> Int:
    """How one goes a way of that length."""
    return WALKING if way_m <= WALK_M_MAX else RIDING if way_m <= RIDE_M_MAX else DRIVING


@inline_kernel
def away_share(since_s: float, ride_s: float, stay_s: float) -> float:
    """There and back: which share of the way lies behind. 0 before and after, 1 while there."""
    left_s = 2.0 * ride_s + stay_s - since_s
    if since_s <= 0.0 or left_s <= 0.0:
        return 0.0
    nearer_s = min(since_s, left_s)
    return 1.0 if nearer_s >= ride_s else nearer_s / ride_s


# ---- days ----


@inline_kernel
def errand(
    land: Land, own: np.uint64, day: Int, slot: Int, now_s: float, earliest_s: float, span_s: float, quick: float
) -> tuple[float, float, Int]:
    """An errand from where one stays -> degrees north, metres east, mode (`NO_MODE`: not out now)."""
    number = mix(own + STREAM_OUTING + np.uint64(4 * day + slot) * GOLDEN)
    if (number & _LOW_16) >= np.uint64(ERRAND_SHARE_Q16[slot]):
        return 0.0, 0.0, NO_MODE
    depart_s = earliest_s + span_s * part(number, 16)
    if now_s <= depart_s or depart_s > SLEEP_FROM_S:
        return 0.0, 0.0, NO_MODE
    far = part(number, 32)
    way_m = ERRAND_M_MIN + ERRAND_M_SPAN * far * far * far
    more = mix(number)
    long = part(more, 0)
    stay_s = ERRAND_STAY_S_MIN + ERRAND_STAY_S_SPAN * long * long
    share = away_share(now_s - depart_s, way_s(way_m, quick), stay_s)
    if share == 0.0:
        return 0.0, 0.0, NO_MODE
    heading = np.int64((more >> np.uint64(16)) & _DIRECTION_MASK)
    span_m = share * way_m
    return (
        span_m * land.direction[heading, 0],
        span_m * land.direction[heading, 1],
        (OUT if share == 1.0 else way_mode(way_m)),
    )


@inline_kernel
def day_off(
    land: Land, own: np.uint64, day: Int, now_s: float, free_s: float, quick: float
) -> tuple[float, float, Int]:
    """The errands of a day, or of the evening of a working day that ends at `free_s` (0: a day off)."""
    if free_s > 0.0:
        return errand(land, own, day, 2, now_s, max(free_s, 14.5 * HOUR_S), 1.5 * HOUR_S, quick)
    slot = 0 if now_s < 9.5 * HOUR_S else 1 if now_s < 14.5 * HOUR_S else 2
    earliest_s = 4.0 * HOUR_S if slot == 0 else 9.5 * HOUR_S if slot == 1 else 14.5 * HOUR_S
    span_s = 2.5 * HOUR_S if slot == 0 else 2.25 * HOUR_S if slot == 1 else 1.5 * HOUR_S
    return errand(land, own, day, slot, now_s, earliest_s, span_s, quick)


@inline_kernel
def workplace(land: Land, own: np.uint64, place: np.int64) -> tuple[float, float]:
    """Where somebody from a place works: degrees. Jobs are nearer to the centre of a place than homes are."""
    number = mix(own + STREAM_WORK)
    slot = np.int64(number & np.uint64(15))
    keep = np.uint64(land.work[place, slot, 0])
    chosen = np.int64(land.work[place, slot, 1 if (number >> np.uint64(32)) < keep else 2])
    spot = mix(number)
    reach = 0.7 * land.rows[chosen, PLACE_REACH]
    north = bell(spot) * reach
    sec = land.rows[chosen, PLACE_SEC] + land.rows[chosen, PLACE_SEC_SLOPE] * north
    return land.rows[chosen, PLACE_LAT] + north, land.rows[chosen, PLACE_LNG] + bell(mix(spot)) * reach * sec


@inline_kernel
def works_on(own: np.uint64, trait: np.uint64, day: Int) -> Truth:
    """Whether a phone's owner has work and goes there on that day."""
    if ((trait >> np.uint64(16)) & _LOW_16) >= np.uint64(WORKER_SHARE_Q16):
        return False
    weekday = (day + FIRST_WEEKDAY) % 7
    share = np.uint64(WORKDAY_SHARE_Q16 if weekday < 5 else WEEKEND_SHARE_Q16)
    return (mix(own + STREAM_TODAY + np.uint64(day) * GOLDEN) & _LOW_16) < share


@inline_kernel
def work_hours(own: np.uint64, trait: np.uint64, day: Int) -> tuple[float, float]:
    """When somebody leaves for work that day and how long they are there, in seconds; leaving is after 4:00."""
    today = mix(own + STREAM_TODAY + np.uint64(day) * GOLDEN)
    if ((trait >> np.uint64(32)) & _LOW_16) < np.uint64(SHIFT_SHARE_Q16):
        return (1.0 + 12.5 * part(trait, 48)) * HOUR_S, 8.0 * HOUR_S
    hours = mix(trait)
    leave_s = (3.75 + 1.6 * bell(hours)) * HOUR_S + 900.0 * (part(today, 16) - 0.5)
    return leave_s, (8.75 + 1.2 * bell(mix(hours))) * HOUR_S + 900.0 * (part(today, 32) - 0.5)


@inline_kernel
def ordinary_day(
    land: Land,
    own: np.uint64,
    trait: np.uint64,
    quick: float,
    day: Int,
    now_s: float,
    place: np.int64,
    lat: float,
    lng: float,
    sec: float,
) -> tuple[float, float, Int]:
    """A day that begins and ends at home (`lat`, `lng`) -> degrees, mode."""
    free_s = 0.0
    if now_s > HOUR_S and works_on(own, trait, day):
        leave_s, stay_s = work_hours(own, trait, day)
        if now_s <= leave_s:
            return lat, lng, AT_HOME
        work_lat, work_lng = workplace(land, own, place)
        way_m = metres(lat, lng, work_lat, work_lng, sec)
        ride_s = way_s(way_m, quick)
        free_s = leave_s + 2.0 * ride_s + stay_s
        if now_s < free_s and way_m <= COMMUTE_M_MAX:
            share = away_share(now_s - leave_s, ride_s, stay_s)
            if share < 1.0:
                return lat + share * (work_lat - lat), lng + share * (work_lng - lng), way_mode(way_m)
            return at_work(land, own, trait, quick, day, now_s, work_lat, work_lng, sec)
        if way_m > COMMUTE_M_MAX:
            free_s = 0.0
    north_m, east_m, mode = day_off(land, own, day, now_s, free_s, quick)
    if mode == NO_MODE:
        return lat, lng, AT_HOME
    return lat + north_m * DEGREES_PER_M, lng + east_m * DEGREES_PER_M * sec, mode


@inline_kernel
def at_work(
    land: Land,
    own: np.uint64,
    trait: np.uint64,
    quick: float,
    day: Int,
    now_s: float,
    lat: float,
    lng: float,
    sec: float,
) -> tuple[float, float, Int]:
    """At the workplace, or on foot to lunch and back: 12:00 to 12:20 leaves, before 13:10 returns."""
    if 8.0 * HOUR_S < now_s < 9.2 * HOUR_S and (((trait >> np.uint64(32)) & _LOW_16) >= np.uint64(SHIFT_SHARE_Q16)):
        number = mix(own + STREAM_LUNCH + np.uint64(day) * GOLDEN)
        if (number & _LOW_16) < np.uint64(LUNCH_SHARE_Q16):
            way_m = 100.0 + 600.0 * part(number, 16)
            since_s = now_s - 8.0 * HOUR_S - 1_200.0 * part(number, 32)
            share = away_share(since_s, way_s(way_m, quick), LUNCH_S)
            if share > 0.0:
                heading = np.int64((number >> np.uint64(48)) & _DIRECTION_MASK)
                span = share * way_m * DEGREES_PER_M
                return (
                    lat + span * land.direction[heading, 0],
                    lng + span * land.direction[heading, 1] * sec,
                    OUT if share == 1.0 else WALKING,
                )
    return lat, lng, AT_WORK


# ---- festival ----


@inline_kernel
def is_festival_day(festival: F64, day: Int) -> Truth:
    """Whether the festival is held on that day."""
    first = np.int64(festival[FESTIVAL_FIRST_DAY])
    every = np.int64(festival[FESTIVAL_EVERY])
    if every == 0:
        return day == first
    return day >= first and (day - first) % every == 0


@inline_kernel
def festival_day(
    land: Land, own: np.uint64, quick: float, day: Int, now_s: float, lat: float, lng: float, sec: float
) -> tuple[float, float, Int]:
    """The day of somebody who goes to the festival -> degrees, mode; `NO_MODE` if it is too far after all."""
    festival = land.festival
    number = mix(own + STREAM_FESTIVAL + np.uint64(day) * GOLDEN)
    spot = mix(number)
    span = math.sqrt(part(spot, 0)) * festival[FESTIVAL_RADIUS_M] * DEGREES_PER_M
    heading = np.int64((spot >> np.uint64(16)) & _DIRECTION_MASK)
    to_lat = festival[FESTIVAL_LAT] + span * land.direction[heading, 0]
    to_lng = festival[FESTIVAL_LNG] + span * land.direction[heading, 1] * festival[FESTIVAL_SEC]
    way_m = metres(lat, lng, to_lat, to_lng, sec)
    if way_m > FESTIVAL_M_MAX:
        return lat, lng, NO_MODE
    ride_s = way_s(way_m, quick)
    arrive_s = festival[FESTIVAL_FROM_S] - FESTIVAL_EARLY_S * part(number, 16)
    stay_s = festival[FESTIVAL_UNTIL_S] + FESTIVAL_LATE_S * part(number, 32) - arrive_s
    share = away_share(now_s - arrive_s + ride_s, ride_s, stay_s)
    if share == 0.0:
        return lat, lng, AT_HOME
    return (
        lat + share * (to_lat - lat),
        lng + share * (to_lng - lng),
        AT_FESTIVAL if share == 1.0 else way_mode(way_m),
    )


# ---- trips ----

NO_TRIP, SETS_OUT, AWAY, COMES_BACK = 0, 1, 2, 3


@inline_kernel
def trip_on(own: np.uint64, trip_q16: np.uint64, day: Int) -> tuple[Int, np.uint64]:
    """Which part of a trip that day is -> (NO_TRIP, SETS_OUT, AWAY, COMES_BACK), random number of the trip."""
    shifted = np.uint64(day) + (((own >> np.uint64(40)) * np.uint64(TRIP_DAYS)) >> np.uint64(24))
    period = shifted // np.uint64(TRIP_DAYS)
    number = mix(own + STREAM_TRIP + period * GOLDEN)
    if (number & _LOW_16) >= trip_q16:
        return NO_TRIP, number
    nights = 1 + np.int64((((number >> np.uint64(16)) & _LOW_16) * np.uint64(TRIP_NIGHTS_MAX)) >> np.uint64(16))
    first = np.int64((((number >> np.uint64(32)) & _LOW_16) * np.uint64(TRIP_FIRST_DAYS)) >> np.uint64(16))
    since = np.int64(shifted - period * np.uint64(TRIP_DAYS)) - first
    if since < 0 or since > nights:
        return NO_TRIP, number
    return (SETS_OUT if since == 0 else COMES_BACK if since == nights else AWAY), number


@inline_kernel
def between_hubs(land: Land, start: np.int64, end: np.int64, column: Int) -> float:
    """Great-circle distance between two stations (`HUB_STATION`) or airports (`HUB_AIRPORT`), in metres."""
    x = land.hubs[end, column + 2] - land.hubs[start, column + 2]
    y = land.hubs[end, column + 3] - land.hubs[start, column + 3]
    z = land.hubs[end, column + 4] - land.hubs[start, column + 4]
    return 2.0 * EARTH_RADIUS_M * math.asin(min(1.0, 0.5 * math.sqrt(x * x + y * y + z * z)))


@lean_kernel
def on_the_way(
    land: Land,
    since_s: float,
    lat: float,
    lng: float,
    sec: float,
    start: np.int64,
    end: np.int64,
    column: Int,
    to_lat: float,
    to_lng: float,
    to_sec: float,
    quick: float,
) -> tuple[float, float, Int]:
    """From a door by hub `start` and hub `end` to another door, `since_s` after leaving -> degrees, mode.

    `NO_MODE` before and after, at the door then. On the chord between the hubs one moves evenly and is lifted to the
    sphere: a great circle, faster in its middle, by 10 % on the longest flight.
    """
    if since_s <= 0.0:
        return lat, lng, NO_MODE
    hub_lat, hub_lng = land.hubs[start, column], land.hubs[start, column + 1]
    way_m = metres(lat, lng, hub_lat, hub_lng, sec)
    ride_s = way_s(way_m, quick)
    if since_s < ride_s:
        share = since_s / ride_s
        return lat + share * (hub_lat - lat), lng + share * (hub_lng - lng), way_mode(way_m)
    since_s -= ride_s
    wait_s = TRAIN_WAIT_S if column == HUB_STATION else FLIGHT_WAIT_S
    if since_s < wait_s:
        return hub_lat, hub_lng, WAITING
    since_s -= wait_s
    ride_s = between_hubs(land, start, end, column) / (TRAIN_MPS if column == HUB_STATION else FLIGHT_MPS)
    if since_s < ride_s:
        share = since_s / ride_s
        x = land.hubs[start, column + 2] * (1.0 - share) + land.hubs[end, column + 2] * share
        y = land.hubs[start, column + 3] * (1.0 - share) + land.hubs[end, column + 3] * share
        z = land.hubs[start, column + 4] * (1.0 - share) + land.hubs[end, column + 4] * share
        return (
            math.atan2(z, math.sqrt(x * x + y * y)) * (180.0 / math.pi),
            math.atan2(y, x) * (180.0 / math.pi),
            IN_TRAIN if column == HUB_STATION else IN_AIR,
        )
    since_s -= ride_s
    hub_lat, hub_lng = land.hubs[end, column], land.hubs[end, column + 1]
    way_m = metres(to_lat, to_lng, hub_lat, hub_lng, to_sec)
    ride_s = way_s(way_m, quick)
    if since_s < ride_s:
        share = since_s / ride_s
        return hub_lat + share * (to_lat - hub_lat), hub_lng + share * (to_lng - hub_lng), way_mode(way_m)
    return to_lat, to_lng, NO_MODE


@lean_kernel
def trip_day(
    land: Land,
    own: np.uint64,
    quick: float,
    day: Int,
    now_s: float,
    kind: Int,
    number: np.uint64,
    place: np.int64,
    lat: float,
    lng: float,
    sec: float,
) -> tuple[float, float, Int]:
    """A day of a trip, from a home or back to it -> degrees, mode."""
    hub = np.int64(land.rows[place, PLACE_HUB])
    more = mix(number)
    slot = np.int64(((more & np.uint64(0xFFFFFFFF)) * np.uint64(land.hubs.shape[0])) >> np.uint64(32))
    kept = (more >> np.uint64(32)) < np.uint64(land.trip_keep[hub, slot])
    other = slot if kept else np.int64(land.trip_other[hub, slot])

    spot = mix(more)
    north = 0.5 * bell(spot) * land.hubs[other, HUB_REACH]
    east = 0.5 * bell(mix(spot)) * land.hubs[other, HUB_REACH]
    hotel_sec = land.hubs[other, HUB_SEC]
    hotel_lat, hotel_lng = land.hubs[other, HUB_LAT] + north, land.hubs[other, HUB_LNG] + east * hotel_sec

    if kind == AWAY:
        north_m, east_m, mode = day_off(land, own, day, now_s, 0.0, quick)
        if mode == NO_MODE:
            return hotel_lat, hotel_lng, AT_HOTEL
        return hotel_lat + north_m * DEGREES_PER_M, hotel_lng + east_m * DEGREES_PER_M * hotel_sec, mode

    ride_km = between_hubs(land, hub, other, HUB_STATION) * 0.001
    flies = ride_km > FLIGHT_KM_MIN + (TRAIN_KM_MAX - FLIGHT_KM_MIN) * part(number, 48)
    column = HUB_AIRPORT if flies else HUB_STATION
    leaving = mix(spot + np.uint64(kind))
    since_s = now_s - (2.0 + 6.0 * part(leaving, 0)) * HOUR_S
    if kind == SETS_OUT:
        now_lat, now_lng, mode = on_the_way(
            land, since_s, lat, lng, sec, hub, other, column, hotel_lat, hotel_lng, hotel_sec, quick
        )
        stay = AT_HOME if since_s <= 0.0 else AT_HOTEL
    else:
        now_lat, now_lng, mode = on_the_way(
            land, since_s, hotel_lat, hotel_lng, hotel_sec, other, hub, column, lat, lng, sec, quick
        )
        stay = AT_HOTEL if since_s <= 0.0 else AT_HOME
    return now_lat, now_lng, stay if mode == NO_MODE else mode


# ---- all of it ----


@inline_kernel
def whereabouts(land: Land, phone: Int, place: np.int64, at_ms: Int) -> tuple[float, float, float, Int]:
    """Where a phone from a place is -> latitude, longitude (degrees), 1/cos(latitude), mode."""
    own = phone_hash(land.key, phone)
    north = bell(mix(own + STREAM_NORTH)) * land.rows[place, PLACE_REACH]
    sec = land.rows[place, PLACE_SEC] + land.rows[place, PLACE_SEC_SLOPE] * north
    east = bell(mix(own + STREAM_EAST)) * land.rows[place, PLACE_REACH]
    lat = land.rows[place, PLACE_LAT] + north
    lng = land.rows[place, PLACE_LNG] + east * sec

    life_ms = at_ms + LIFE_DAY_OFFSET_MS
    day = life_ms // DAY_MS
    now_s = np.float64(life_ms - day * DAY_MS) * 0.001
    trait = mix(own + STREAM_TRAIT)
    quick = QUICK_MIN + QUICK_SPAN * part(trait, 0)

    kind, number = trip_on(own, land.trip_q16, day)
    if kind != NO_TRIP:
        now_lat, now_lng, mode = trip_day(land, own, quick, day, now_s, kind, number, place, lat, lng, sec)
        return now_lat, now_lng, 1.0 / math.cos(now_lat * (math.pi / 180.0)), mode
    chance = land.rows[place, PLACE_FESTIVAL]
    if chance > 0.0 and is_festival_day(land.festival, day):
        goes = mix(own + STREAM_FESTIVAL + np.uint64(day) * GOLDEN)
        if part(goes, 0) < chance:
            now_lat, now_lng, mode = festival_day(land, own, quick, day, now_s, lat, lng, sec)
            if mode != NO_MODE:
                return now_lat, now_lng, sec, mode
    now_lat, now_lng, mode = ordinary_day(land, own, trait, quick, day, now_s, place, lat, lng, sec)
    return now_lat, now_lng, sec, mode


@lean_kernel
def mode_of(land: Land, phone: Int, at_ms: Int) -> Int:
    """As `whereabouts`, the mode alone: for the few phones whose being online depends on it."""
    return whereabouts(land, phone, place_of(land.key, phone, land.threshold, land.alias), at_ms)[3]


@lean_kernel
def locate(
    land: Land,
    phone: U32,
    at_ms: I64,
    number: I64,
    jitter_m: float,
    place: I64,
    lat_e7: I32,
    lng_e7: I32,
    mode: U8,
) -> None:
    """Where each phone is at its moment -> `lat_e7`, `lng_e7` i32[n], `mode` u8[n].

    Off by up to `jitter_m` in a direction drawn from the ping's `number`: 24 m as in `World` for pings, else 0.
    `place` i64[n]: scratch. Places are drawn first, so that their rows are fetched before they are needed.
    """
    for row in range(len(phone)):
        place[row] = place_of(land.key, phone[row], land.threshold, land.alias)
    for row in range(len(phone)):
        prefetch(land.rows, place[min(row + 12, len(phone) - 1)])
        now_lat, now_lng, sec, now_mode = whereabouts(land, phone[row], place[row], at_ms[row])
        noise = mix(phone_hash(land.key, phone[row]) + STREAM_JITTER + np.uint64(number[row]) * GOLDEN)
        drift = jitter_m * (np.float64(noise >> np.uint64(32)) * _PER_2_32) * DEGREES_PER_M
        turn = np.int64(noise & _DIRECTION_MASK)
        lat_e7[row] = np.int32(math.floor((now_lat + drift * land.direction[turn, 0]) * E7 + 0.5))
        lng_e7[row] = np.int32(math.floor((now_lng + drift * land.direction[turn, 1] * sec) * E7 + 0.5))
        mode[row] = now_mode
