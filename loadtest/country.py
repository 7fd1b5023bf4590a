"""Where people of China may go: from home to work, to the station or airport of their city, and to other cities.

Tables made once per process out of `loadtest.places`, the same for every seed; `loadtest.journey_kernels` draws
from them. A *hub* is a city of 300,000 or more: it has a station some kilometres and an airport some twenty kilometres
from its centre, and every place goes by the nearest.

    rows          f64[places, 8]      columns PLACE_*: where homes are, its hub
    work          u32[places, 16, 3]  alias table of the places where its people work: keep (1/2^32), place, other place
    hubs          f64[hubs, 14]       columns HUB_*: centre, station, airport; the last two also as unit vectors
    trip_keep     u32[hubs, hubs]     alias tables of the hubs that people of a hub travel to
    trip_other    u32[hubs, hubs]
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from geoindex.columns import F64, I64, U32, U64
from loadtest import country_kernels as kernels
from loadtest.places import EARTH_RADIUS_KM, Places, load_places
from loadtest.world import alias_table, place_rows

COMMUTE_KM_MAX = 50.0
"""Between the centres of two places: about as far as the metro areas of Beijing and Shanghai reach."""
COMMUTE_HALF_KM = 10.0
"""Beyond about this distance workplaces pull with the fourth power of the distance."""
WORKPLACES = 16
"""How many places people of one place work in: a power of two, for a draw's four bits choose one."""
HUB_PEOPLE_MIN = 300_000
TRIP_KM_MIN = 80.0
"""Between hubs: nearer cities are one's own metro area."""
TRIP_HALF_KM = 400.0
"""Beyond about this distance cities pull with the square of the distance."""
STATION_KM = (2.0, 6.0)
AIRPORT_KM = (14.0, 28.0)
"""From the centre of the hub's place. China's: Beijing Capital 25 km, Shanghai Hongqiao 14 km, Xi'an 26 km."""

PLACE_LAT, PLACE_LNG, PLACE_REACH, PLACE_SEC, PLACE_SEC_SLOPE, PLACE_HUB, PLACE_FESTIVAL = 0, 1, 2, 3, 4, 5, 6
"""As in `world_kernels`; index of its hub; chance of somebody who lives there to go to the festival (0 here)."""
HUB_LAT, HUB_LNG, HUB_SEC, HUB_REACH = 0, 1, 2, 3
HUB_STATION, HUB_AIRPORT = 4, 9
"""Five columns each: latitude, longitude (degrees), unit vector x, y, z."""
HUB_COLUMNS = 14


@dataclass(frozen=True, slots=True)
class Country:
    """See the module's page. `threshold`, `alias`: of all places by their people, as `world_kernels.place_of` wants."""

    places: Places
    threshold: U64
    alias: U32
    rows: F64
    work: U32
    hubs: F64
    trip_keep: U32
    trip_other: U32


@functools.cache
def load_country() -> Country:
    """The tables; takes half a second once per process."""
    places = load_places()
    rows = np.zeros((len(places), 8), np.float64)
    rows[:, : PLACE_SEC_SLOPE + 1] = place_rows(places)
    hub_places = np.flatnonzero(np.array([place.population for place in places.all]) >= HUB_PEOPLE_MIN)
    hubs = _hub_rows(rows, hub_places)
    rows[:, PLACE_HUB] = _nearest(_vectors(rows[:, 0], rows[:, 1]), _vectors(hubs[:, 0], hubs[:, 1]))
    trip_keep, trip_other = _trips(hubs, places.people[hub_places])
    threshold, alias = alias_table(places.people)
    work = _work(places, rows[:, PLACE_SEC].copy())
    return Country(places, threshold, alias, rows, work, hubs, trip_keep, trip_other)


def _work(places: Places, sec: F64) -> U32:
    count = len(places)
    chosen = np.empty((count, WORKPLACES), np.uint32)
    weight = np.empty((count, WORKPLACES), np.float64)
    order: I64 = np.argsort(places.lat, kind="stable").astype(np.int64)
    kernels.nearby(places.lat, places.lng, sec, places.people, order, COMMUTE_KM_MAX, COMMUTE_HALF_KM, chosen, weight)
    keep = np.empty_like(chosen)
    other = np.empty_like(chosen)
    kernels.alias_rows(weight, keep, other)
    work = np.empty((count, WORKPLACES, 3), np.uint32)
    work[:, :, 0] = keep
    work[:, :, 1] = chosen
    work[:, :, 2] = np.take_along_axis(chosen, other.astype(np.int64), axis=1)
    return work


def _hub_rows(rows: F64, hub_places: I64) -> F64:
    """Centre, station and airport of every hub: f64[hubs, 14]. Which way they lie is drawn from the hub's index."""
    hubs = np.zeros((len(hub_places), HUB_COLUMNS), np.float64)
    hubs[:, HUB_LAT] = rows[hub_places, PLACE_LAT]
    hubs[:, HUB_LNG] = rows[hub_places, PLACE_LNG]
    hubs[:, HUB_SEC] = rows[hub_places, PLACE_SEC]
    hubs[:, HUB_REACH] = rows[hub_places, PLACE_REACH]
    turn = np.arange(len(hubs)) * 0.6180339887498949
    for first, (nearest_km, farthest_km), offset in ((HUB_STATION, STATION_KM, 0.0), (HUB_AIRPORT, AIRPORT_KM, 0.37)):
        angle = 2.0 * math.pi * np.mod(turn + offset, 1.0)
        away = (nearest_km + (farthest_km - nearest_km) * np.mod(turn * 7.0, 1.0)) / kernels.KM_PER_DEGREE
        hubs[:, first] = hubs[:, HUB_LAT] + away * np.cos(angle)
        hubs[:, first + 1] = hubs[:, HUB_LNG] + away * np.sin(angle) * hubs[:, HUB_SEC]
        hubs[:, first + 2 : first + 5] = _vectors(hubs[:, first], hubs[:, first + 1])
    return np.round(hubs, 14)


def _vectors(lat: F64, lng: F64) -> F64:
    """Unit vectors of points in degrees, f64[n, 3]."""
    lat_radian, lng_radian = np.radians(lat), np.radians(lng)
    return np.stack(
        (np.cos(lat_radian) * np.cos(lng_radian), np.cos(lat_radian) * np.sin(lng_radian), np.sin(lat_radian)), axis=1
    )


def _nearest(points: F64, hubs: F64) -> I64:
    nearest: I64 = np.argmax(points @ hubs.T, axis=1).astype(np.int64)
    return nearest


def _trips(hubs: F64, people: F64) -> tuple[U32, U32]:
    """Gravity between hubs at least `TRIP_KM_MIN` apart, as alias tables: two u32[hubs, hubs]."""
    vectors = _vectors(hubs[:, HUB_LAT], hubs[:, HUB_LNG])
    square_km = np.maximum(0.0, 2.0 - 2.0 * (vectors @ vectors.T)) * EARTH_RADIUS_KM**2
    weight = people[np.newaxis, :] / (1.0 + square_km / TRIP_HALF_KM**2)
    weight[square_km < TRIP_KM_MIN**2] = 0.0
    weight = np.round(weight, 3)
    keep = np.empty(weight.shape, np.uint32)
    other = np.empty(weight.shape, np.uint32)
    kernels.alias_rows(weight, keep, other)
    return keep, other
