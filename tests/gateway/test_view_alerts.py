"""Alerts of the view: what the desk has, sums of what may be shown, and phones told over time."""

from __future__ import annotations

from typing import Any, cast

import msgpack
import pytest
import redis

from flows.desk import Desk
from flows.log import push_key
from flows.tallies import tally_key
from gateway.handover import ACKNOWLEDGED, DELIVERED, GROUP, handed_field, handed_key
from gateway.runtime import Gateway
from gateway.view_alerts import OpenAlerts, read_told, shown_sum, told_key
from gateway.view_hub import ViewHub
from geoindex.entries import Settings
from tests.gateway.conftest import Http, Keys
from tests.gateway.desk import now_ms, published


def tell(client: redis.Redis, shard: int, alert_id: str, told: dict[str, int], resolved: dict[str, int]) -> None:
    fields = {"told": told, "resolved": resolved, "at_ms": 1, "log_id": [1, 1]}
    client.hset(tally_key(shard), alert_id, cast(Any, msgpack.packb(fields)))


@pytest.fixture
def http(http: Http, gateway: Gateway) -> Http:
    """Its own sampler would write beside the test's."""
    gateway.service(ViewHub).stop()
    return http


@pytest.fixture
def alerts(client: redis.Redis) -> OpenAlerts:
    return OpenAlerts(client, Desk(client))


def view(alerts: OpenAlerts) -> dict[str, dict[str, Any]]:
    alerts.look(now_ms())
    return {found["id"]: found for _, found in alerts.views(now_ms())}


@pytest.mark.parametrize(
    ("counts", "shown"),
    [({}, None), ({"a": 19}, None), ({"a": 19, "b": 19}, None), ({"a": 25, "b": 19}, 20), ({"a": 123, "b": 45}, 160)],
)
def test_a_sum_is_made_of_what_may_be_shown(counts: dict[str, int], shown: int | None) -> None:
    assert shown_sum(counts) == shown


def test_the_view_follows_the_desk(http: Http, keys: Keys, alerts: OpenAlerts) -> None:
    assert view(alerts) == {}
    first = published(http, keys.county)
    found = view(alerts)[first]
    assert (found["state"], found["ring_km"], found["next_ring_km"], found["revision"]) == ("open", 100, 200, 1)
    assert found["next_growth_ms"] - now_ms() == pytest.approx(1_800_000, abs=60_000)
    http.patch(f"/v1/alerts/{first}", key=keys.county, json={"schedule": [[None, 50]]})
    changed = view(alerts)[first]
    assert (changed["ring_km"], changed["next_growth_ms"], changed["revision"]) == (50, None, 2)
    second = published(http, keys.ministry)
    assert set(view(alerts)) == {first, second}
    http.post(f"/v1/alerts/{first}/close", key=keys.county, json={"outcome": "found"})
    assert set(view(alerts)) == {second}


def test_nothing_of_the_child_is_in_the_view(http: Http, keys: Keys, alerts: OpenAlerts) -> None:
    published(http, keys.county)
    words = str(view(alerts))
    for of_the_child in ("王小明", "红色外套", "文三路", "公交车", "88001122"):
        assert of_the_child not in words


def test_counts_are_added_over_shards_and_hidden_below_20(
    http: Http, keys: Keys, client: redis.Redis, settings: Settings, alerts: OpenAlerts
) -> None:
    alert_id = published(http, keys.county)
    alerts.look(now_ms())
    tell(client, 0, alert_id, {"amap": 15, "baidu": 3}, {})
    alerts.count(settings, 0.0)
    assert view(alerts)[alert_id]["told"] is None
    tell(client, 1, alert_id, {"amap": 1_100}, {})
    for partner in settings.partners:
        client.xgroup_create(push_key(0, partner), GROUP, mkstream=True)
    for shard, count in ((0, 40), (1, 45)):
        for what, share in ((DELIVERED, 1.0), (ACKNOWLEDGED, 0.5)):
            name = handed_field(alert_id, "amap", "alert", what)
            client.hincrby(handed_key(shard), cast(Any, name), int(count * share))
    alerts.count(settings, 100.0)
    found = view(alerts)[alert_id]
    assert (found["told"], found["delivered"], found["acknowledged"], found["retracted"]) == (1_100, 80, 40, None)


def test_told_over_time_holds_what_was_shown_and_when_it_changed(
    http: Http, keys: Keys, client: redis.Redis, settings: Settings, alerts: OpenAlerts
) -> None:
    alert_id = published(http, keys.county)
    alerts.look(now_ms())
    for step, count in enumerate((0, 19, 25, 26, 29, 31, 4_321, 4_399)):
        tell(client, 0, alert_id, {"amap": count}, {})
        alerts.count(settings, 0.0)
        alerts.record(1_000_000 + 5_000 * step)
    found = read_told(client, alert_id, 300)
    assert found.told == [20, 30, 4_300]
    assert found.at_ms == [1_010_000, 1_025_000, 1_030_000]
    assert found.resolved == [None, None, None]
    again = OpenAlerts(client, Desk(client))  # another gateway, or this one after a restart
    again.look(now_ms())
    again.count(settings, 0.0)
    again.record(1_050_000)
    assert read_told(client, alert_id, 300) == found
    entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(told_key(alert_id)))
    assert {value for _, fields in entries for value in fields.values()} == {b"0", b"20", b"30", b"4300"}


def test_the_end_is_followed_for_a_while(
    http: Http, keys: Keys, client: redis.Redis, settings: Settings, alerts: OpenAlerts
) -> None:
    alert_id = published(http, keys.county)
    tell(client, 0, alert_id, {"amap": 500}, {})
    alerts.look(now_ms())
    alerts.count(settings, 0.0)
    alerts.record(1_000_000)
    http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json={"outcome": "found"})
    tell(client, 0, alert_id, {"amap": 500}, {"amap": 500})
    alerts.look(now_ms())
    alerts.count(settings, 0.0)
    alerts.record(1_005_000)
    assert http.get(f"/v1/view/alerts/{alert_id}/told", key=keys.county).json() == {
        "at_ms": [1_000_000, 1_005_000],
        "told": [500, 500],
        "resolved": [None, 500],
    }
    assert http.get(f"/v1/view/alerts/{alert_id}/cover", key=keys.county).status_code == 404


def test_of_many_points_some_are_given(client: redis.Redis) -> None:
    for index in range(1_000):
        client.xadd("told:{desk}:a1", {"told": 20 + 10 * index, "resolved": 0}, id=f"{1 + index}-1")
    found = read_told(client, "a1", 300)
    assert len(found.at_ms) == 300
    assert (found.at_ms[0], found.at_ms[-1]) == (1, 1_000)
