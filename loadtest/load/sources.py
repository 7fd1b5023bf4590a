"""Where pings come from: a world, one city of it, a recorded file. All answer to `PingSource`.

Each of n workers makes its own share, so that together they make what one alone would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from flows.wire import keep_pings, slice_pings
from geoindex.columns import E7, U32, PingBatch
from loadtest.life import Life
from loadtest.load.spec import RunSpec
from loadtest.places import distance_km, load_places
from loadtest.traces import Replay, Trace
from loadtest.world import World

CITY_KM = 100.0
"""Of `in_one_city`: the first ring."""
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
    def own_per_s(self) -> float | None:
        """Pings a second of all workers, where the source decides; None: as many as it is asked for."""


class WorldSource:
    """`loadtest.world.World`: every phone pings once a round, most stay where they are."""

    own_per_s = None

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

    own_per_s = None

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


class RecordedSource:
    """A file, over and over, `warp` times as fast as it was recorded. It has its own rate."""

    def __init__(self, spec: RunSpec, index: int, count: int, known: Sequence[str] = ()) -> None:
        """`known`: partners of the deployment. One that only the file knows stands for one that nobody else is.

        Raises loadtest.traces.UnreadableTrace; ValueError if the file has more partners than the deployment.
        """
        assert spec.pings_file is not None
        self._trace = Trace.read(Path(spec.pings_file))
        self._warp, self._share = spec.warp, (index, count)
        self._replay: Replay | None = None
        self.partner_names = renamed(self._trace.partner_names, known)
        self.own_per_s = self._trace.replay(0, spec.warp, loop=True).pings_per_s

    def first_sight(self, now_ms: int) -> Iterator[PingBatch]:
        return iter(())

    def pings(self, from_ms: int, until_ms: int, count: int) -> PingBatch:
        if self._replay is None:
            self._replay = self._trace.replay(from_ms, self._warp, loop=True)
        return joined([NOTHING, *self._replay.pings(from_ms, until_ms, self._share)])


def renamed(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """A recording's partners as a deployment calls them: by their names, the others in order. Raises ValueError."""
    free = [name for name in known if name not in names]
    unknown = [name for name in names if name not in known]
    if known and len(unknown) > len(free):
        raise ValueError(
            f"a recording of {len(names)} partners needs as many accounts, got {len(known)}: {', '.join(known)}"
        )
    given = dict(zip(unknown, free, strict=False))
    return tuple(given.get(name, name) for name in names)


class CitySource:
    """A world, seen from its densest place: only the phones within 100 km, so many of them."""

    own_per_s = None

    def __init__(self, spec: RunSpec, index: int, count: int) -> None:
        places = load_places()
        place = places.densest_place(CITY_KM)
        self.share = places.people_within(place.lat, place.lng, CITY_KM) / float(places.people.sum())
        self.lat, self.lng = place.lat, place.lng
        wider = replace(spec, phones=math.ceil(spec.phones / self.share), stepping=None)
        self._inner = WORLDS[spec.world](wider, index, count)

    @property
    def partner_names(self) -> tuple[str, ...]:
        return self._inner.partner_names

    def first_sight(self, now_ms: int) -> Iterator[PingBatch]:
        return (self._inside(batch) for batch in self._inner.first_sight(now_ms))

    def pings(self, from_ms: int, until_ms: int, count: int) -> PingBatch:
        return self._inside(self._inner.pings(from_ms, until_ms, math.ceil(count / self.share)))

    def _inside(self, batch: PingBatch) -> PingBatch:
        outside = distance_km(self.lat, self.lng, batch.lat_e7 / E7, batch.lng_e7 / E7) > CITY_KM
        return keep_pings(batch, outside.astype(np.uint8))


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


def open_source(spec: RunSpec, index: int, count: int, known: Sequence[str] = ()) -> PingSource:
    """Share `index` of `count`. `known`: partners of the deployment. Raises ValueError for what cannot be opened."""
    if spec.pings_file is not None:
        return RecordedSource(spec, index, count, known)
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
