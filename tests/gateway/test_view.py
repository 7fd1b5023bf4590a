"""The operator's view over HTTP: who may see it, what its stream says, and that it ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis

from gateway.runtime import Gateway
from gateway.view_hub import ViewHub
from gateway.view_models import AlertsEvent, FiguresEvent, Hello
from tests.flows.waiting import eventually
from tests.gateway.conftest import Http, Keys
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


def test_officers_see_alerts_of_their_jurisdiction_and_operators_all(http: Http, keys: Keys, hub: ViewHub) -> None:
    here = published(http, keys.county)
    elsewhere = published(http, keys.ministry, division="110101")
    hub.step()
    hub._alerts_due_s = float("-inf")
    seen = {}
    for name in ("operator", "ministry", "prefecture", "county"):
        body = http.get("/v1/view/stream?seconds=1", key=getattr(keys, name)).text
        found = [AlertsEvent.model_validate_json(json.dumps(data)) for kind, data in events(body) if kind == "alerts"]
        seen[name] = {alert.id for alert in found[-1].alerts}
    assert seen == {
        "operator": {here, elsewhere},
        "ministry": {here, elsewhere},
        "prefecture": {here},
        "county": {here},
    }
    assert http.get(f"/v1/view/alerts/{elsewhere}/cover", key=keys.county).status_code == 403
    assert http.get(f"/v1/view/alerts/{elsewhere}/cover", key=keys.operator).status_code == 200
