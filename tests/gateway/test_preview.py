"""The dry run: about right for crowds, and of no use for finding one phone."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.density import Density, ShardDensity, density_key, encode_density, read_density
from gateway.alert_models import moment
from gateway.audit_log import last_rows
from gateway.config import GatewayConfig
from gateway.phone_counts import shown_count
from gateway.preview import Covered, CrowdTable, crowd_table, phones_within
from gateway.runtime import Gateway
from geoindex.cells import CELLS_PER_ZONE, cells_of
from geoindex.entries import HOUR_MS
from geoindex.phones import PhoneColumns
from tests.gateway.conftest import Http, Keys
from tests.gateway.desk import audited, desk_events, now_ms

LAT, LNG = 30.2741, 120.1551
KM = 1 / 111.195
Place = tuple[float, float]


def zones_of(places: list[Place]) -> np.ndarray:
    lat, lng = (np.array([round(place[axis] * 1e7) for place in places], np.int32) for axis in (0, 1))
    return cells_of(lat, lng) // np.uint32(CELLS_PER_ZONE)


def density_of(places: list[Place], partners: list[int] | None = None) -> Density:
    """Phones at these places; of `amap` unless said otherwise."""
    pairs: dict[tuple[int, int], int] = {}
    for zone, partner in zip(zones_of(places).tolist(), partners or [0] * len(places), strict=True):
        pairs[zone, partner] = pairs.get((zone, partner), 0) + 1
    rows = sorted(pairs)
    return Density(
        zone=np.array([zone for zone, _ in rows], np.uint32),
        partner=np.array([partner for _, partner in rows], np.uint16),
        count=np.array([pairs[row] for row in rows], np.int64),
        partners=("amap", "baidu"),
        at_ms=1,
        missing=(),
        left_out=0,
    )


def scattered(seed: int, count: int, km: float) -> list[Place]:
    """Evenly over a circle around LAT, LNG."""
    chance = random.Random(seed)
    places = []
    for _ in range(count):
        distance, angle = km * math.sqrt(chance.random()), chance.uniform(0, 2 * math.pi)
        lat = LAT + distance * KM * math.cos(angle)
        places.append((lat, LNG + distance * KM * math.sin(angle) / math.cos(math.radians(lat))))
    return places


def distance_km(place: Place) -> float:
    lat, lng, lat0, lng0 = map(math.radians, (*place, LAT, LNG))
    cosine = math.sin(lat) * math.sin(lat0) + math.cos(lat) * math.cos(lat0) * math.cos(lng - lng0)
    return 6371.0088 * math.acos(min(1.0, cosine))


def same(first: CrowdTable, second: CrowdTable) -> bool:
    names = ("partner", "level", "cell", "count")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


# --- about right for crowds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "spread_km", "ring_km", "within"),
    [
        (20_000, 80, 30, 0.06),
        (9_000, 60, 100, 0.02),
        (4_000, 150, 100, 0.06),
        (600, 150, 100, 0.2),
        (300, 300, 400, 0.3),
    ],
)
def test_estimate_is_near_the_count_whether_phones_are_many_or_few(
    count: int, spread_km: float, ring_km: float, within: float
) -> None:
    places = scattered(1, count, spread_km)
    exact = sum(distance_km(place) <= ring_km for place in places)
    estimate = phones_within(crowd_table(density_of(places)), Covered(LAT, LNG, ring_km), None)
    assert abs(estimate - exact) <= within * exact


def test_one_zone_inside_a_ring_counts_whole_and_one_outside_not_at_all() -> None:
    table = crowd_table(density_of([(LAT, LNG)] * 123 + [(LAT + 2, LNG)] * 456))
    assert table.count.tolist() == [120, 460] or table.count.tolist() == [460, 120]
    assert phones_within(table, Covered(LAT, LNG, 60), None) == 120
    assert phones_within(table, Covered(LAT + 2, LNG, 60), None) == 460
    assert phones_within(table, Covered(LAT + 1, LNG, 300), None) == 580


def test_partners_are_counted_apart_and_add_up() -> None:
    places = scattered(2, 8_000, 60)
    table = crowd_table(density_of(places, [number % 4 // 3 for number in range(8_000)]))
    covered = Covered(LAT, LNG, 40)
    amap, baidu, both = (phones_within(table, covered, names) for names in (["amap"], ["baidu"], None))
    assert amap + baidu == pytest.approx(both)
    assert 2.5 < amap / baidu < 3.5
    assert phones_within(table, covered, []) == 0


def test_pooled_area_is_spread_over_its_thin_zones_and_not_over_the_crowded_one_among_them() -> None:
    zone = int(zones_of([(LAT, LNG)])[0])
    first = zone // 7 * 7
    siblings = [other for other in range(first, first + 7) if other != zone]
    density = Density(
        zone=np.arange(first, first + 7, dtype=np.uint32),
        partner=np.zeros(7, np.uint16),
        count=np.array([500 if other == zone else 10 for other in range(first, first + 7)], np.int64),
        partners=("amap",),
        at_ms=1,
        missing=(),
        left_out=0,
    )
    covered = Covered(LAT, LNG, 12)

    def share(other: int) -> float:
        return float(covered.between(np.array([other]), np.array([other + 1]))[0])

    expected = 500 * share(zone) + 60 * sum(map(share, siblings)) / 6
    assert 0 < sum(map(share, siblings)) < 5
    assert phones_within(crowd_table(density), covered, None) == pytest.approx(expected)


# --- of no use for finding one ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 400), st.sampled_from([5.0, 30.0, 200.0, 2000.0]), st.integers(1, 60))
def test_no_area_of_the_table_holds_fewer_than_20_phones_and_none_is_counted_twice(
    seed: int, count: int, km: float, clump: int
) -> None:
    places = [place for place in scattered(seed, count, km) for _ in range(1 + (seed + count) % clump)]
    table = crowd_table(density_of(places, [number % 2 for number in range(len(places))]))
    assert all(number >= 20 and number % 10 == 0 for number in table.count.tolist())
    areas = len(table.count)
    assert abs(int(table.count.sum()) - len(places)) <= 5 * areas + 19 * 2 * 122
    assert len(set(zip(table.partner.tolist(), table.level.tolist(), table.cell.tolist(), strict=True))) == areas


def test_lone_phone_in_the_wilderness_is_never_seen_however_the_ring_is_moved() -> None:
    table = crowd_table(density_of([(LAT, LNG)] * 19))
    for step in range(-30, 30):
        for km in (10, 25):
            assert shown_count(phones_within(table, Covered(LAT + step * KM, LNG, km), None)) == "<20"
    assert len(table.count) == 0


def test_phone_that_moves_between_thin_zones_changes_no_answer() -> None:
    crowd = scattered(3, 3_000, 15) + scattered(4, 900, 120)
    zones = zones_of(crowd).tolist()
    thin = [place for place, zone in zip(crowd, zones, strict=True) if zones.count(zone) < 15]
    pairs = [
        (one, other)
        for one in thin[:60]
        for other in thin[:60]
        if (a := int(zones_of([one])[0])) // 7 == (b := int(zones_of([other])[0])) // 7 and a != b
    ]
    assert len(pairs) > 5
    for one, other in pairs[:10]:
        there = crowd_table(density_of([*crowd, one]))
        elsewhere = crowd_table(density_of([*crowd, other]))
        assert same(there, elsewhere)


def test_empty_zones_are_pooled_with_thin_ones_so_that_an_area_does_not_tell_where_its_phones_are() -> None:
    zone = int(zones_of([(LAT, LNG)])[0])
    first = zone // 7 * 7
    thin = Density(
        zone=np.array([first, first + 1], np.uint32),
        partner=np.zeros(2, np.uint16),
        count=np.array([15, 15], np.int64),
        partners=("amap",),
        at_ms=1,
        missing=(),
        left_out=0,
    )
    other = Density(
        zone=np.array([first + 4, first + 5, first + 6], np.uint32),
        partner=np.zeros(3, np.uint16),
        count=np.array([10, 10, 10], np.int64),
        partners=("amap",),
        at_ms=1,
        missing=(),
        left_out=0,
    )
    tables = crowd_table(thin), crowd_table(other)
    assert same(*tables)
    assert (tables[0].level.tolist(), tables[0].cell.tolist(), tables[0].count.tolist()) == ([1], [zone // 7], [30])


def test_thin_zone_beside_a_crowd_is_not_laid_open_by_the_difference_of_two_rings() -> None:
    zone = int(zones_of([(LAT, LNG)])[0]) // 7 * 7

    def table(thin: int) -> CrowdTable:
        return crowd_table(
            Density(
                zone=np.array([zone, zone + 1], np.uint32),
                partner=np.zeros(2, np.uint16),
                count=np.array([500, thin], np.int64),
                partners=("amap",),
                at_ms=1,
                missing=(),
                left_out=0,
            )
        )

    assert all(same(table(1), table(thin)) for thin in range(2, 20))


# --- by HTTP ----------------------------------------------------------------------------------------------------------


def publish_density(client: redis.Redis, places: list[Place], at_ms: int, shards: range = range(2)) -> None:
    """All phones are amap's, of shard 0; the other shards have none."""
    density = density_of(places)
    for shard in shards:
        chosen = slice(None) if shard == 0 else slice(0)
        phones = PhoneColumns(density.zone[chosen], density.partner[chosen], density.count[chosen].astype(np.uint32))
        counted = ShardDensity(shard, at_ms + shard, (at_ms, 0), ("amap", "baidu"), phones)
        client.set(density_key(shard), encode_density(counted))


def asked(**changes: Any) -> dict[str, Any]:
    return {"location": {"lat": LAT, "lng": LNG}, "missing_since": moment(now_ms() - HOUR_MS * 3 // 2)} | changes


def test_preview_tells_the_ring_now_and_at_each_growth_and_tells_nobody(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    at_ms = now_ms() - 42_000
    publish_density(client, scattered(5, 5_000, 280), at_ms)
    assert read_density(client, 2).phone_count == 5_000
    answer = http.post("/v1/alerts:preview", key=keys.county, json=asked()).json()
    assert [step["ring_km"] for step in answer["steps"]] == [200, 300, 500]
    first, second, third = (step["phones"] for step in answer["steps"])
    assert 2_300 <= first <= 2_700 and 4_700 <= second <= third <= 5_100
    assert all(phones % 100 == 0 for phones in (first, second, third))
    assert 42 <= answer["counts_age_s"] < 120
    assert answer["counted_at"] == moment(at_ms)
    assert answer["previews_left"] == 29
    assert desk_events(client) == []
    nobody = http.post("/v1/alerts:preview", key=keys.county, json=asked(audience=["baidu"])).json()
    assert [step["phones"] for step in nobody["steps"]] == ["<20"] * 3


def test_preview_is_written_down_before_it_is_answered(http: Http, keys: Keys, client: redis.Redis) -> None:
    publish_density(client, [], now_ms())
    assert http.post("/v1/alerts:preview", key=keys.county, json=asked()).status_code == 200
    (row,) = last_rows(client, 10)
    assert (row.actor, row.action, row.outcome) == ("officer:西湖 值班", "alert.preview", "done")
    assert row.details == {"lat": LAT, "lng": LNG, "km": [100, 200, 300, 500], "audience": None}


def test_preview_without_fresh_counts_of_every_shard_says_so(http: Http, keys: Keys, client: redis.Redis) -> None:
    for shards in (range(0), range(1)):
        publish_density(client, [], now_ms(), shards)
        answer = http.post("/v1/alerts:preview", key=keys.county, json=asked())
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:tuanyuan:problem:no-counts")
        assert answer.headers["retry-after"] == "30"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": [[1, 9.9], [None, 100]]}, "at least 10 km, got 9.9 km"),
        ({"schedule": [[None, 5]]}, "at least 10 km, got 5 km"),
        ({"audience": ["nobody"]}, "partners of this deployment"),
        ({"location": {"lat": 91, "lng": 0}}, "less than or equal to 90"),
        ({"schedule": [[2, 100], [1, 200], [None, 300]]}, "hours must rise"),
    ],
)
def test_preview_that_cannot_be_is_refused(
    http: Http, keys: Keys, client: redis.Redis, changes: dict[str, Any], expected: str
) -> None:
    publish_density(client, [], now_ms())
    answer = http.post("/v1/alerts:preview", key=keys.county, json=asked(**changes))
    assert answer.status_code == 422 and expected in answer.text


def test_preview_is_for_officers_with_a_desk(http: Http, keys: Keys, client: redis.Redis) -> None:
    publish_density(client, [], now_ms())
    answers = [http.post("/v1/alerts:preview", key=key, json=asked()) for key in (keys.station, keys.amap, None)]
    assert [answer.status_code for answer in answers] == [403, 403, 401]
    assert [outcome for _, _, outcome in audited(client)] == ["refused", "refused"]


class TestBudget:
    """Of three previews an hour."""

    @pytest.fixture
    def config(self, config: GatewayConfig) -> GatewayConfig:
        return GatewayConfig(valkey=config.valkey, var=config.var, public_url=config.public_url, preview_budget=3)

    def test_budget_of_an_officer_ends_and_comes_back_within_the_hour(
        self, http: Http, keys: Keys, client: redis.Redis, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish_density(client, [], now_ms())
        start_ms = now_ms()

        def preview(after_ms: int, key: str = keys.county) -> Any:
            monkeypatch.setattr(gateway.desk, "now_ms", lambda: start_ms + after_ms)
            return http.post("/v1/alerts:preview", key=key, json=asked())

        left = [preview(after_ms).json().get("previews_left") for after_ms in (0, 600_000, 1_200_000)]
        assert left == [2, 1, 0]
        refused = preview(1_800_000)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1800")
        assert preview(1_800_000, keys.prefecture).status_code == 200
        assert preview(HOUR_MS + 1).json()["previews_left"] == 0
        assert preview(HOUR_MS + 2).status_code == 429
        assert client.zcard("previews:{desk}:西湖 值班") == 3


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "<20"),
        (19, "<20"),
        (19.99, "<20"),
        (20, 20),
        (29, 20),
        (99, 90),
        (100, 100),
        (119, 110),
        (1999, 1900),
        (123_456, 120_000),
    ],
)
def test_count_is_shown_in_two_digits_or_tens_and_never_below_20(count: float, shown: int | str) -> None:
    assert shown_count(count) == shown
