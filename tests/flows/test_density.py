"""Phones by zone: counted between entries, published, added up, and asked by circle and by cell of a map."""

from __future__ import annotations

import math

import h3
import msgpack
import numpy as np
import pytest
import redis

from flows import density as density_module
from flows.clock import Clock
from flows.density import (
    EXPIRY_S,
    Density,
    DensityCounter,
    ShardDensity,
    coarse_cells,
    density_key,
    encode_density,
    phones_in_circle,
    read_density,
)
from flows.log import RawEntry
from flows.metrics import Metrics
from geoindex.cells import cells_of
from geoindex.columns import I32
from geoindex.entries import HOUR_MS, Settings, Tick
from geoindex.phones import PhoneColumns
from geoindex.rings import chord2_max, cover_circle, unit_vector
from geoindex.shard import ShardMachine
from loadtest.world import World
from tests.geoindex.machines import batch_of
from tests.reference.events import PingEvent

PARTNERS = ("amap", "ditu")
T0_MS = 1_700_000_000_000 - 1_700_000_000_000 % 60_000
HOME = 39.9, 116.4


class SetClock(Clock):
    """A clock that a test sets."""

    def __init__(self, now_ms: float) -> None:
        self.set_ms = now_ms

    def now_ms(self) -> float:
        return self.set_ms


class Shard:
    """A machine and its counter, entry by entry."""

    def __init__(self, live_window_ms: int = 6 * HOUR_MS) -> None:
        self.machine = ShardMachine()
        self.clock = SetClock(T0_MS)
        self.metrics = Metrics()
        self.counter = DensityCounter(self.metrics, self.clock)
        self.counter.begin(3)
        self.apply(T0_MS, Settings(shard_count=4, partners=PARTNERS, live_window_ms=live_window_ms))

    def apply(self, at_ms: int, entry: object, lag_ms: int = 0) -> list[ShardDensity]:
        """What has been counted behind this entry."""
        self.machine.apply(at_ms, entry)  # type: ignore[arg-type]
        self.clock.set_ms = at_ms + lag_ms
        self.counter.after_entry(RawEntry(3, at_ms, 7, b"", b"", "run"), self.machine)
        return self.counter.take()

    def ping(self, at_ms: int, count: int, first: int = 0, lag_ms: int = 0) -> list[ShardDensity]:
        """Phones of amap and ditu in turns, all at home."""
        lat_e7, lng_e7 = (round(degrees * 1e7) for degrees in HOME)
        pings = [
            PingEvent(PARTNERS[number % 2], f"p{number}", lat_e7, lng_e7, at_ms)
            for number in range(first, first + count)
        ]
        return self.apply(at_ms, batch_of(pings, PARTNERS), lag_ms)


def total(density: ShardDensity) -> int:
    return int(density.phones.count.sum())


def test_phones_are_counted_once_a_minute_of_shard_clock() -> None:
    shard = Shard()
    shard.ping(T0_MS, 100)
    assert shard.ping(T0_MS + 30_000, 1, first=100) == []
    assert shard.apply(T0_MS + 59_999, Tick()) == []
    (counted,) = shard.apply(T0_MS + 60_000, Tick())
    assert (counted.shard, counted.at_ms, counted.log_id) == (3, T0_MS + 60_000, (T0_MS + 60_000, 7))
    zone = int(cells_of(*(np.array([degrees * 1e7], np.int32) for degrees in HOME))[0]) // 49
    assert (counted.phones.zone.tolist(), counted.phones.partner.tolist()) == ([zone, zone], [0, 1])
    assert counted.phones.count.tolist() == [51, 50]
    assert shard.apply(T0_MS + 60_001, Tick()) == []


def test_a_table_that_doubles_is_counted_again_within_the_minute() -> None:
    shard = Shard()
    counted = [total(density) for size in (10, 10, 10, 90) for density in shard.ping(T0_MS, size, shard_rows(shard))]
    assert counted == [10, 30, 120]


def shard_rows(shard: Shard) -> int:
    return shard.machine.device_table.row_count


def test_locations_that_are_older_than_the_live_window_are_not_counted() -> None:
    """Also those that the sweep has not met yet: it came at the minute, this count half a minute later."""
    shard = Shard(live_window_ms=HOUR_MS)
    shard.ping(T0_MS, 8)
    shard.apply(T0_MS + HOUR_MS, Tick())
    (counted,) = shard.ping(T0_MS + HOUR_MS + 30_000, 20, first=8)
    assert total(counted) == 20
    assert shard.machine.size.located_count == 28


def test_a_shard_that_lags_does_not_count_until_it_has_caught_up() -> None:
    shard = Shard()
    assert shard.ping(T0_MS + 60_000, 50, lag_ms=60_001) == []
    assert shard.apply(T0_MS + 120_000, Tick(), lag_ms=3_600_000) == []
    (counted,) = shard.apply(T0_MS + 120_001, Tick(), lag_ms=60_000)
    assert total(counted) == 50


def test_a_count_goes_on_behind_the_next_entries_so_many_rows_each(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard()
    shard.ping(T0_MS, 100)
    monkeypatch.setattr(density_module, "ROWS_AT_ONCE", 40)
    assert shard.apply(T0_MS + 60_000, Tick()) == []
    assert shard.apply(T0_MS + 60_001, Tick()) == []
    # A phone that is new meanwhile is counted, too; the time is that of the beginning.
    (counted,) = shard.ping(T0_MS + 60_002, 15, first=100)
    assert (total(counted), counted.at_ms) == (115, T0_MS + 60_000)
    monkeypatch.setattr(density_module, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(density_module, "SLICES_MAX", 10)
    entries = [shard.apply(T0_MS + 120_000 + step, Tick()) for step in range(10)]
    assert [len(counted) for counted in entries] == [0] * 9 + [1]
    assert shard.metrics.snapshot()["histograms"]["density_stop_ms"]["sum_ms"] > 0


def test_a_shard_that_starts_anew_gives_up_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard()
    shard.ping(T0_MS, 100)
    monkeypatch.setattr(density_module, "ROWS_AT_ONCE", 40)
    assert shard.apply(T0_MS + 60_000, Tick()) == []
    shard.machine = ShardMachine()
    shard.counter.begin(3)
    shard.apply(T0_MS + 60_000, Settings(shard_count=4, partners=PARTNERS))
    assert [total(density) for density in shard.ping(T0_MS + 120_000, 5)] == [5]


# ---- on the server


def shard_density(shard: int, at_ms: int, rows: list[tuple[int, int, int]], partners: tuple[str, ...]) -> ShardDensity:
    """`rows`: zone, partner, count."""
    zone, partner, count = zip(*rows, strict=True) if rows else ((), (), ())
    phones = PhoneColumns(np.array(zone, np.uint32), np.array(partner, np.uint16), np.array(count, np.uint32))
    return ShardDensity(shard, at_ms, (at_ms, 0), partners, phones)


def publish(client: redis.Redis, density: ShardDensity) -> None:
    client.set(density_key(density.shard), encode_density(density), ex=EXPIRY_S)


def test_shards_are_added_up_and_missing_ones_named(client: redis.Redis) -> None:
    publish(client, shard_density(0, 2_000, [(5, 0, 1), (5, 1, 2), (9, 0, 3)], ("amap",)))
    publish(client, shard_density(2, 1_000, [(5, 1, 10), (7, 2, 20)], ("amap", "ditu", "zhifu")))
    client.set(density_key(3), msgpack.packb({"v": 99}))
    found = read_density(client, 4)
    rows = list(zip(found.zone.tolist(), found.partner.tolist(), found.count.tolist(), strict=True))
    assert rows == [(5, 0, 1), (5, 1, 12), (7, 2, 20), (9, 0, 3)]
    assert (found.at_ms, found.missing, found.partners) == (1_000, (1, 3), ("amap", "ditu", "zhifu"))
    assert (found.phone_count, found.left_out) == (36, 0)
    assert density_key(2) == "density:{s2}"


def test_without_any_count_there_are_no_phones_and_no_time(client: redis.Redis) -> None:
    found = read_density(client, 2)
    assert (found.at_ms, found.missing, found.phone_count, found.partners) == (None, (0, 1), 0, ())
    assert phones_in_circle(found, *HOME, 100) == 0
    assert len(coarse_cells(found, 4).h3_index) == 0


def test_of_too_many_pairs_those_with_few_phones_are_left_out_and_counted(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(density_module, "PAIRS_MAX", 3)
    publish(client, shard_density(0, 0, [(1, 0, 5), (2, 0, 9), (3, 0, 1), (4, 0, 7), (5, 0, 2)], ("amap",)))
    found = read_density(client, 1)
    assert (found.zone.tolist(), found.count.tolist()) == ([1, 2, 4], [5, 9, 7])
    assert (found.left_out, found.phone_count) == (3, 24)


# ---- circles


def density_of(lat_e7: I32, lng_e7: I32, partner: np.ndarray[tuple[int], np.dtype[np.uint16]]) -> Density:
    zone = cells_of(lat_e7, lng_e7) // np.uint32(49)
    keys, counts = np.unique(zone.astype(np.uint64) << np.uint64(16) | partner, return_counts=True)
    partners = tuple(f"partner {number}" for number in range(int(partner.max()) + 1))
    return Density(
        zone=(keys >> np.uint64(16)).astype(np.uint32),
        partner=(keys & np.uint64(0xFFFF)).astype(np.uint16),
        count=counts.astype(np.int64),
        partners=partners,
        at_ms=0,
        missing=(),
        left_out=0,
    )


def vectors(lat_e7: I32, lng_e7: I32) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    lat, lng = np.radians(lat_e7 / 1e7), np.radians(lng_e7 / 1e7)
    return np.stack([np.cos(lat) * np.cos(lng), np.cos(lat) * np.sin(lng), np.sin(lat)], axis=1)


def relative_errors(lat_e7: I32, lng_e7: I32, centres: list[tuple[float, float]], radius_km: float) -> list[float]:
    """Of circles with 20 phones or more."""
    density = density_of(lat_e7, lng_e7, np.zeros(len(lat_e7), np.uint16))
    places = vectors(lat_e7, lng_e7)
    errors: list[float] = []
    for lat, lng in centres:
        distances = ((places - np.array(unit_vector(lat, lng))) ** 2).sum(axis=1)
        true_count = int((distances <= chord2_max(radius_km)).sum())
        if true_count >= 20:
            errors.append(abs(phones_in_circle(density, lat, lng, radius_km) - true_count) / true_count)
    return errors


@pytest.mark.parametrize(("radius_km", "error_max"), [(10.0, 0.06), (100.0, 0.003)])
def test_phones_spread_evenly_are_estimated_closely(radius_km: float, error_max: float) -> None:
    rng = np.random.default_rng(2)
    lat_e7, lng_e7 = (
        rng.uniform(low, high, 1_000_000).astype(np.int32) for low, high in ((38e7, 42e7), (114e7, 118e7))
    )
    centres = [(rng.uniform(39.5, 40.5), rng.uniform(115.5, 116.5)) for _ in range(10)]
    errors = relative_errors(lat_e7, lng_e7, centres, radius_km)
    assert len(errors) == 10
    assert max(errors) < error_max


@pytest.mark.parametrize(("radius_km", "median_max", "error_max"), [(100.0, 0.015, 0.15), (500.0, 0.004, 0.02)])
def test_phones_in_towns_are_estimated_well_enough(radius_km: float, median_max: float, error_max: float) -> None:
    lat_e7, lng_e7 = World(1, 300_000).positions()
    rng = np.random.default_rng(1)
    homes = rng.integers(300_000, size=20)
    centres = [(lat_e7[home] / 1e7 + rng.normal() * 0.05, lng_e7[home] / 1e7) for home in homes]
    errors = relative_errors(lat_e7, lng_e7, centres, radius_km)
    assert len(errors) == 20
    assert np.median(errors) < median_max
    assert max(errors) < error_max


def test_a_circle_counts_the_named_partners_alone() -> None:
    lat_e7, lng_e7 = (np.full(10, round(degrees * 1e7), np.int32) for degrees in HOME)
    density = density_of(lat_e7, lng_e7, np.array([0] * 5 + [1] * 3 + [2] * 2, np.uint16))
    assert phones_in_circle(density, *HOME, 100) == 10
    assert phones_in_circle(density, *HOME, 100, ["partner 1"]) == 3
    assert phones_in_circle(density, *HOME, 100, {"partner 0", "partner 2", "nobody"}) == 7
    assert phones_in_circle(density, *HOME, 100, []) == 0
    assert phones_in_circle(density, -HOME[0], HOME[1], 100) == 0


PENTAGON = 39.10000003, 122.30000041


@pytest.mark.parametrize("centre", [(89.95, 10.0), (-89.95, 10.0), (0.0, 180.0), PENTAGON, (40.449, 122.3)])
def test_circles_at_poles_antimeridian_and_pentagons_hold_whom_they_should(centre: tuple[float, float]) -> None:
    """The last has a pentagon at its edge."""
    rng = np.random.default_rng(3)
    middle = np.array(unit_vector(*centre))
    near = middle + rng.normal(size=(40_000, 3)) * 0.02
    near /= np.linalg.norm(near, axis=1)[:, None]
    lat_e7 = np.round(np.degrees(np.arcsin(near[:, 2])) * 1e7).astype(np.int32)
    lng_e7 = np.round(np.degrees(np.arctan2(near[:, 1], near[:, 0])) * 1e7).astype(np.int32)
    (error,) = relative_errors(lat_e7, lng_e7, [centre], 150.0)
    assert error < 0.02


def test_of_a_pentagon_only_the_cells_that_exist_count() -> None:
    """Of its zone's 49 numbers 41 name cells, all of them with their centres in this circle, whose edge meets it."""
    lat_e7, lng_e7 = (np.full(100, round(degrees * 1e7), np.int32) for degrees in PENTAGON)
    density = density_of(lat_e7, lng_e7, np.zeros(100, np.uint16))
    cover = cover_circle(*PENTAGON, 8.0)
    assert len(cover.inside) == 0 and (cover.edge[:, 0] <= density.zone[0]).any()
    assert phones_in_circle(density, *PENTAGON, 8.0) == 100


def test_a_circle_that_is_none_is_refused() -> None:
    density = density_of(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.uint16))
    with pytest.raises(ValueError, match="radius_km: must be above 0 and at most 1000, got 1001"):
        phones_in_circle(density, 0, 0, 1001)
    with pytest.raises(ValueError, match=r"lat: must be within \+-90, got 91"):
        phones_in_circle(density, 91, 0, 10)


# ---- cells of a map


@pytest.mark.parametrize("resolution", [3, 4, 5])
def test_cells_of_a_map_are_h3_cells_with_twenty_phones_or_more(resolution: int) -> None:
    lat_e7, lng_e7 = World(4, 20_000).positions()
    density = density_of(lat_e7, lng_e7, np.arange(20_000, dtype=np.uint16) % 3)
    expected: dict[int, int] = {}
    for lat, lng in zip(lat_e7.tolist(), lng_e7.tolist(), strict=True):
        # A zone is a set of cells of resolution 7; its ancestors are those of the numbering.
        cell = h3.str_to_int(h3.cell_to_parent(h3.latlng_to_cell(lat / 1e7, lng / 1e7, 7), resolution))
        expected[cell] = expected.get(cell, 0) + 1
    shown = {cell: math.floor(count / 10 + 0.5) * 10 for cell, count in expected.items() if count >= 20}
    found = coarse_cells(density, resolution)
    assert dict(zip(found.h3_index.tolist(), found.phones.tolist(), strict=True)) == shown
    assert 10 < len(shown) < len(expected)


def test_a_cell_with_nineteen_phones_is_hidden_and_counts_are_rounded() -> None:
    places = {(39.9, 116.4): 19, (31.2, 121.5): 20, (22.5, 114.1): 24, (30.6, 104.1): 25}
    lat_e7 = np.array([round(lat * 1e7) for (lat, _), count in places.items() for _ in range(count)], np.int32)
    lng_e7 = np.array([round(lng * 1e7) for (_, lng), count in places.items() for _ in range(count)], np.int32)
    found = coarse_cells(density_of(lat_e7, lng_e7, np.zeros(len(lat_e7), np.uint16)), 5)
    assert sorted(found.phones.tolist()) == [20, 20, 30]


@pytest.mark.parametrize("resolution", [2, 6])
def test_another_resolution_of_a_map_is_refused(resolution: int) -> None:
    with pytest.raises(ValueError, match=f"resolution: must be from 3 to 5, got {resolution}"):
        coarse_cells(density_of(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.uint16)), resolution)
