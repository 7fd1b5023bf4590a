"""Where pings come from: a world, one city of it, a recorded file. All answer to `PingSource`.

Each of n workers makes its own share, so that together they make what one alone would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from flows.wire import keep_pings, slice_pings
from geoindex.columns import E7, U32, PingBatch
from loadtest.life import Life
from loadtest.load.spec import RunSpec
from loadtest.places import load_places
from loadtest.world import World

CITY_KM = 100.0
"""Of `in_one_city`: the first ring."""
EARTH_KM = 6371.0088
FILL_BATCH_PINGS = 100_000


class PingSource(Protocol):
    """Pings on demand."""

    @property
    def partner_names(self) -> tuple[str, ...]:
        """As the batches' partner column counts."""

    def first_sight(self, now_ms: int) -> Iterator[PingBatch]:
        """Every phone of this share once: what a deployment knows before the load begins."""

    def pings(self, from_ms: int, until_ms: int, count: int) -> PingBatch:
        """About `count` pings (a file: as many as it has), observed before `until_ms`, mostly after `from_ms`."""

    @property
    def exhausted(self) -> bool:
        """There will be no more."""


class WorldSource:
    """`loadtest.world.World`: every phone pings once a round, most stay where they are."""

    exhausted = False

    def __init__(self, spec: RunSpec, index: int, count: int) -> None:
        self.world = World(spec.seed, spec.phones)
        self._index, self._count = index, count
        self._base = 0

    @property
    def partner_names(self) -> tuple[str, ...]:
        return self.world.partner_names

    def first_sight(self, now_ms: int) -> Iterator[PingBatch]:
        for number, batch in enumerate(self.world.first_sight(now_ms, FILL_BATCH_PINGS)):
            if number % self._count == self._index:
                yield batch

    def pings(self, from_ms: int, until_ms: int, count: int) -> PingBatch:
        # All workers follow one plan, so their counts are the same, and the rounds of phones fit together.
        self.world.ping_count = self._base + self._index * count
        self._base += self._count * count
        return self.world.batch(count, until_ms)


class LifeSource:
    """`loadtest.life.Life`: phones that commute, travel, gather, go dark and have wrong clocks; apps that differ."""

    exhausted = False

    def __init__(self, spec: RunSpec, index: int, count: int) -> None:
        self.life = Life(spec.seed, spec.phones)
        self._index, self._count = index, count

    @property
    def partner_names(self) -> tuple[str, ...]:
        return self.life.partner_names

    def first_sight(self, now_ms: int) -> Iterator[PingBatch]:
        for number, batch in enumerate(self.life.first_sight(now_ms, FILL_BATCH_PINGS)):
            if number % self._count == self._index:
                yield batch

    def pings(self, from_ms: int, until_ms: int, count: int) -> PingBatch:
        rate = count * self._count / max(1, until_ms - from_ms) * 1000
        share = self._index, self._count
        return joined([NOTHING, *self.life.pings_at_rate(rate, from_ms, until_ms, share, FILL_BATCH_PINGS)])


class CitySource:
    """A world, seen from its densest place: only the phones within 100 km, so many of them."""

    exhausted = False

    def __init__(self, spec: RunSpec, index: int, count: int) -> None:
        places = load_places()
        place = places.densest_place(CITY_KM)
        self.share = places.people_within(place.lat, place.lng, CITY_KM) / float(places.people.sum())
        self.lat, self.lng = place.lat, place.lng
        self._inner = WORLDS[spec.world](_with_phones(spec, math.ceil(spec.phones / self.share)), index, count)

    @property
    def partner_names(self) -> tuple[str, ...]:
        return self._inner.partner_names

    def first_sight(self, now_ms: int) -> Iterator[PingBatch]:
        return (self._inside(batch) for batch in self._inner.first_sight(now_ms))

    def pings(self, from_ms: int, until_ms: int, count: int) -> PingBatch:
        return self._inside(self._inner.pings(from_ms, until_ms, math.ceil(count / self.share)))

    def _inside(self, batch: PingBatch) -> PingBatch:
        outside = distance_km(batch, self.lat, self.lng) > CITY_KM
        return keep_pings(batch, outside.astype(np.uint8))


def distance_km(batch: PingBatch, lat: float, lng: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Of every ping from a point: the haversine formula."""
    ping_lat, ping_lng = np.radians(batch.lat_e7 / E7), np.radians(batch.lng_e7 / E7)
    half = np.sin((ping_lat - math.radians(lat)) / 2) ** 2
    half += math.cos(math.radians(lat)) * np.cos(ping_lat) * np.sin((ping_lng - math.radians(lng)) / 2) ** 2
    found: np.ndarray[tuple[int], np.dtype[np.float64]] = 2 * EARTH_KM * np.arcsin(np.sqrt(half))
    return found


def _with_phones(spec: RunSpec, phones: int) -> RunSpec:
    return RunSpec.from_json({**spec.to_json(), "phones": phones, "stepping": None})


NOTHING = PingBatch(
    np.zeros(0, np.uint16),
    np.zeros(0, np.uint8),
    np.zeros(0, np.uint32),
    np.zeros(0, np.int32),
    np.zeros(0, np.int32),
    np.zeros(0, np.int64),
)
WORLDS: dict[str, Callable[[RunSpec, int, int], PingSource]] = {"life": LifeSource, "world": WorldSource}
"""By the name that `--world` takes."""


def open_source(spec: RunSpec, index: int, count: int) -> PingSource:
    """Share `index` of `count`. Raises ValueError for what cannot be opened."""
    make = WORLDS.get(spec.world)
    if make is None:
        raise ValueError(f"world must be one of {', '.join(WORLDS)}, got {spec.world!r}")
    if spec.plays.in_one_city:
        return CitySource(spec, index, count)
    return make(spec, index, count)


def joined(batches: list[PingBatch]) -> PingBatch:
    """One after the other. At least one."""
    if len(batches) == 1:
        return batches[0]
    shift = np.cumsum([0, *(len(batch.id_bytes) for batch in batches[:-1])]).astype(np.uint32)
    id_end: U32 = np.concatenate([batch.id_end + offset for batch, offset in zip(batches, shift, strict=True)])
    return PingBatch(
        np.concatenate([batch.partner for batch in batches]),
        np.concatenate([batch.id_bytes for batch in batches]),
        id_end,
        np.concatenate([batch.lat_e7 for batch in batches]),
        np.concatenate([batch.lng_e7 for batch in batches]),
        np.concatenate([batch.observed_at_ms for batch in batches]),
    )


def one_ping(partner: int, device_id: str, lat: float, lng: float, observed_at_ms: int) -> PingBatch:
    """A batch of one."""
    id_bytes = np.frombuffer(device_id.encode(), np.uint8)
    return PingBatch(
        np.array([partner], np.uint16),
        id_bytes,
        np.array([len(id_bytes)], np.uint32),
        np.array([round(lat * E7)], np.int32),
        np.array([round(lng * E7)], np.int32),
        np.array([observed_at_ms], np.int64),
    )


def parts(batch: PingBatch, most: int) -> Iterator[PingBatch]:
    """Rows in order, at most so many each."""
    for start in range(0, len(batch), most):
        yield slice_pings(batch, start, min(start + most, len(batch)))
