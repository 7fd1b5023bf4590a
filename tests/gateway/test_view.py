"""The operator's view over HTTP: who may see it, what its stream says, and that it ends."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import redis
from anyio.from_thread import BlockingPortal

from flows.alarms import Alarm
from flows.density import ShardDensity, density_key, encode_density
from flows.metrics import Metrics, StatsPublisher
from flows.view_figures import ViewFigures
from gateway import view, view_hub
from gateway.runtime import Gateway
from gateway.view import Viewer, _events
from gateway.view_hub import (
    LISTENERS_MAX,
    LISTENERS_OF_ONE_MAX,
    Latest,
    ViewHub,
    figures_json,
    without_alerts,
)
from gateway.view_models import AlertCover, AlertsEvent, DensityMap, FiguresEvent, Hello, HistoryAnswer
from geoindex.cells import cells_of
from geoindex.phones import PhoneColumns
from tests.flows.waiting import eventually
from tests.gateway.conftest import Http, Keys, TurnableClock
from tests.gateway.desk import audited, published

PATHS = (
    "/v1/view/stream?seconds=0",
    "/v1/view/history",
    "/v1/view/map",
    "/v1/view/alerts/a1/cover",
    "/v1/view/alerts/a1/told",
)


@pytest.fixture
def hub(http: Http, gateway: Gateway) -> ViewHub:
    """Of the running gateway; its first look has been made."""
    found = gateway.service(ViewHub)
    eventually(lambda: found.latest.figures_number > 0)
    return found


@pytest.fixture
def still(hub: ViewHub) -> ViewHub:
    """It looks when the test says so."""
    hub.stop()
    return hub


def events(body: str) -> list[tuple[str, Any]]:
    """Name and content of each event."""
    found = []
    for block in body.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


# --- who may ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_partners_and_strangers_see_nothing_of_the_view(http: Http, keys: Keys, path: str, client: redis.Redis) -> None:
    assert http.get(path).status_code == 401
    assert http.get(path, key="ty_wrong").status_code == 401
    refused = http.get(path, key=keys.amap)
    assert (refused.status_code, refused.json()["detail"]) == (
        403,
        "this is for officers and operators; the key is that of one of the partners",
    )
    assert audited(client)[-1][2] == "refused"
    assert http.get(path, key=keys.station).status_code == 403  # no desk


def test_metrics_are_for_operators_alone(http: Http, keys: Keys) -> None:
    assert http.get("/metrics").status_code == 401
    assert http.get("/metrics", key=keys.amap).status_code == 403
    assert http.get("/metrics", key=keys.ministry).status_code == 403
    assert http.get("/metrics", key=keys.operator).status_code == 200


def test_an_unknown_alert_is_not_found(http: Http, keys: Keys) -> None:
    for key in (keys.operator, keys.ministry):
        for what in ("cover", "told"):
            assert http.get(f"/v1/view/alerts/nothing/{what}", key=key).status_code == 404


# --- the stream -------------------------------------------------------------------------------------------------------


def test_stream_begins_with_hello_and_what_is_known(http: Http, keys: Keys, hub: ViewHub) -> None:
    answer = http.get("/v1/view/stream?seconds=0", key=keys.operator)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert answer.headers["cache-control"] == "no-store"
    named = events(answer.text)
    assert [name for name, _ in named][:2] == ["hello", "figures"]
    hello = Hello.model_validate(named[0][1])
    assert (hello.step_s, hello.scope) == (1, "")
    figures = FiguresEvent.model_validate(named[1][1])
    assert figures.figures["flow_processes"] == 0
    assert figures.figures["gateway_processes"] in (0, 1)


def test_officers_see_alerts_of_their_jurisdiction_and_operators_all(http: Http, keys: Keys, still: ViewHub) -> None:
    here = published(http, keys.county)
    elsewhere = published(http, keys.ministry, division="110101")
    still._step_ms = 0
    still.step()
    seen = {}
    for name in ("operator", "ministry", "prefecture", "county"):
        body = http.get("/v1/view/stream?seconds=0", key=getattr(keys, name)).text
        found = [AlertsEvent.model_validate_json(json.dumps(data)) for kind, data in events(body) if kind == "alerts"]
        seen[name] = {alert.id for alert in found[-1].alerts}
    everything = {here, elsewhere}
    assert seen == {"operator": everything, "ministry": everything, "prefecture": {here}, "county": {here}}
    assert http.get(f"/v1/view/alerts/{elsewhere}/cover", key=keys.county).status_code == 403
    assert http.get(f"/v1/view/alerts/{elsewhere}/cover", key=keys.operator).status_code == 200


def test_alerts_are_sent_when_they_changed_and_every_ten_seconds(
    http: Http, keys: Keys, still: ViewHub, clock: TurnableClock, portal: BlockingPortal
) -> None:
    listener = still.listen("operator:operator", portal.call(_running_loop))
    clock.ahead_s += 3
    still.step()
    number = still.latest.alerts_number
    clock.ahead_s += 3
    still.step()
    assert still.latest.alerts_number == number
    published(http, keys.county)
    clock.ahead_s += 3
    still.step()
    assert (still.latest.alerts_number, len(still.latest.alerts)) == (number + 1, 1)
    clock.ahead_s += 9
    still.step()
    assert still.latest.alerts_number == number + 1
    clock.ahead_s += 2
    still.step()
    assert still.latest.alerts_number == number + 2
    still.leave(listener)


def test_while_nobody_looks_only_the_history_is_kept_going(
    still: ViewHub, clock: TurnableClock, monkeypatch: pytest.MonkeyPatch, gateway: Gateway
) -> None:
    still.step()
    still._step_ms = 1 << 60  # no step of the history is due
    monkeypatch.setattr(still._alerts, "look", lambda _now_ms: pytest.fail("nobody looks"))
    clock.ahead_s += 3
    still.step()


def test_too_many_streams_are_refused_and_an_ended_one_makes_room(
    http: Http, keys: Keys, hub: ViewHub, portal: BlockingPortal, metrics: Metrics
) -> None:
    loop = portal.call(_running_loop)
    mine = [hub.listen("operator:operator", loop) for _ in range(LISTENERS_OF_ONE_MAX)]
    refused = http.get("/v1/view/stream?seconds=0", key=keys.operator)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    hub.leave(mine.pop())
    assert http.get("/v1/view/stream?seconds=0", key=keys.operator).status_code == 200
    others = [hub.listen(f"officer:{index}", loop) for index in range(LISTENERS_MAX - len(mine))]
    assert http.get("/v1/view/stream?seconds=0", key=keys.ministry).status_code == 503
    assert metrics.value("view_listeners") == LISTENERS_MAX
    for listener in mine + others:
        hub.leave(listener)
    assert metrics.value("view_listeners") == 0


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_a_stream_ends_when_its_key_is_disabled(
    http: Http, keys: Keys, gateway: Gateway, hub: ViewHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "KEY_CHECKED_EVERY_S", 0.0)
    ended = threading.Event()

    def listen() -> None:
        assert http.get("/v1/view/stream", key=keys.operator).status_code == 200
        ended.set()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    eventually(lambda: len(hub._listeners) == 1)
    gateway.accounts.disable("operator", "operator")
    assert ended.wait(10)
    eventually(lambda: not hub._listeners)


def test_a_stream_ends_promptly_when_the_gateway_stops(http: Http, keys: Keys, gateway: Gateway, hub: ViewHub) -> None:
    bodies: list[str] = []
    thread = threading.Thread(
        target=lambda: bodies.append(http.get("/v1/view/stream", key=keys.operator).text), daemon=True
    )
    thread.start()
    eventually(lambda: len(hub._listeners) == 1)
    gateway.stopping.set()
    thread.join(5)
    assert not thread.is_alive()
    assert bodies[0].startswith("event: hello")
    gateway.stopping.clear()


def test_while_the_server_is_away_the_stream_beats_and_its_figures_stand_still(
    http: Http, keys: Keys, hub: ViewHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_client: redis.Redis) -> Any:
        raise redis.ConnectionError("away")

    before = hub.latest.figures_number
    monkeypatch.setattr(view_hub, "read_stats_at", away)
    body = http.get("/v1/view/stream?seconds=2", key=keys.operator).text
    assert ": beat" in body
    assert hub.latest.figures_number <= before + 1
    monkeypatch.undo()
    hub._wake.set()  # it would look again by itself, a second later
    eventually(lambda: hub.latest.figures_number > before + 1)


# --- what is fetched --------------------------------------------------------------------------------------------------


def test_history_is_given_for_the_spans_that_were_promised(http: Http, keys: Keys, hub: ViewHub) -> None:
    for minutes, points in ((15, 181), (1_440, 298)):
        answer = http.get(f"/v1/view/history?minutes={minutes}", key=keys.operator)
        found = HistoryAnswer.model_validate_json(answer.text)
        assert len(found.at_ms) in (points, points + 1)
        assert all(len(values) == len(found.at_ms) for values in found.series.values())
    assert http.get("/v1/view/history?minutes=14", key=keys.operator).status_code == 422
    assert http.get("/v1/view/history?minutes=1441", key=keys.operator).status_code == 422


def test_map_is_a_minute_late_and_has_a_tag(
    http: Http, keys: Keys, still: ViewHub, client: redis.Redis, gateway: Gateway
) -> None:
    now_ms = gateway.desk.now_ms()
    zone = cells_of(np.array([302_741_000], np.int32), np.array([1_201_551_000], np.int32)) // np.uint32(49)
    for shard, age_ms in ((0, 90_000), (1, 61_000)):
        phones = PhoneColumns(zone, np.zeros(1, np.uint16), np.array([50], np.uint32))
        counted = ShardDensity(shard, now_ms - age_ms, (1, 1), ("amap",), phones)
        client.set(density_key(shard), encode_density(counted))
    still._density_due_s = float("-inf")
    still.step()
    answer = http.get("/v1/view/map", key=keys.county)
    found = DensityMap.model_validate_json(answer.text)
    assert (found.at_ms, found.resolution, found.shards_missing) == (now_ms - 90_000, 4, [])
    assert [phones for _, phones in found.cells] == [100]
    same = http.get("/v1/view/map", key=keys.county, headers={"If-None-Match": answer.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    named = events(http.get("/v1/view/stream?seconds=0", key=keys.county).text)
    assert ("map", {"at_ms": now_ms - 90_000}) in named


def test_cover_is_given_with_the_next_step(http: Http, keys: Keys) -> None:
    alert_id = published(http, keys.county)
    answer = http.get(f"/v1/view/alerts/{alert_id}/cover", key=keys.county)
    found = AlertCover.model_validate_json(answer.text)
    assert (found.ring_km, found.resolution, found.revision) == (100, 5, 1)
    assert found.next is not None and found.next.ring_km == 200
    assert len(found.next.edge) > len(found.edge) > 50
    again = http.get(
        f"/v1/view/alerts/{alert_id}/cover", key=keys.county, headers={"If-None-Match": answer.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")


def test_metrics_tell_what_processes_publish(http: Http, keys: Keys, client: redis.Redis) -> None:
    flow = Metrics()
    flow.count("pings_accepted_total", 7, partner="amap")
    publisher = StatsPublisher(client, flow)
    publisher._name = "elsewhere:1"  # the gateway of this test publishes under this process's name
    publisher.publish()
    answer = http.get("/metrics", key=keys.operator)
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'tuanyuan_pings_accepted_total{partner="amap"} 7.0' in answer.text
    assert "# HELP tuanyuan_lag_seconds " in answer.text
    for secret in (keys.operator, keys.amap):
        assert secret not in answer.text


def first_events(figures_at_ms: int, scope: str = "") -> list[bytes]:
    """What somebody who connects is sent at once, ten seconds into the server's time."""
    figures = ViewFigures(figures_at_ms, {}, (Alarm("alert_moved", "a17", "again"), Alarm("disk", "", "full")))
    latest = Latest(
        figures_json(figures), figures_json(without_alerts(figures)), figures_at_ms, figures_number=3, map_number=0
    )
    hub = cast(ViewHub, SimpleNamespace(latest=latest, now_ms=lambda: 10_000))
    caller = cast(Viewer, SimpleNamespace(kind="officer", name="desk"))
    gateway = cast(Gateway, SimpleNamespace(stopping=threading.Event()))

    async def first() -> bytes:
        return await anext(_events(gateway, hub, asyncio.Event(), caller, scope, None))

    return [block.split(b"\n")[1] for block in asyncio.run(first()).split(b"\n\n") if b"event: figures" in block]


def test_old_figures_do_not_pass_for_a_server_that_is_there() -> None:
    assert first_events(figures_at_ms=7_000) == []
    assert len(first_events(figures_at_ms=8_000)) == 1


def test_alarms_that_name_an_alert_are_for_those_who_may_see_every_alert() -> None:
    (all_of_it,), (part,) = first_events(8_000), first_events(8_000, scope="33")
    assert [alarm["source"] for alarm in json.loads(all_of_it[6:])["alarms"]] == ["a17", ""]
    assert [alarm["kind"] for alarm in json.loads(part[6:])["alarms"]] == ["disk"]
