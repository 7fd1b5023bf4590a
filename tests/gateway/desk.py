"""What the tests of the desk have in common: requests, and what came of them."""

from __future__ import annotations

import time
from typing import Any, cast

import redis

from flows.desk import DESK_KEY
from flows.wire import decode_entry
from gateway.alert_models import moment
from gateway.audit_log import last_rows
from geoindex.entries import AlertClose, AlertRevision
from tests.gateway.conftest import Http

HOUR_MS = 3_600_000


def now_ms() -> int:
    return round(time.time() * 1000)


def wanted(**changes: Any) -> dict[str, Any]:
    """The body of a publication."""
    body: dict[str, Any] = {
        "location": {"lat": 30.2741, "lng": 120.1551},
        "missing_since": moment(now_ms() - HOUR_MS // 2),
        "child": {"name": "王小明", "sex": "male", "age": 6, "clothes": "红色外套"},
        "place": "文三路",
        "text": "孩子可能乘坐公交车离开。",
        "contact": "0571-88001122",
    }
    return body | changes


def published(http: Http, key: str, **changes: Any) -> str:
    """Publish an alert; its id."""
    answer = http.post("/v1/alerts", key=key, json=wanted(**changes))
    assert answer.status_code == 201, answer.text
    return cast(str, answer.json()["alert_id"])


def desk_events(client: redis.Redis) -> list[AlertRevision | AlertClose]:
    """All events on the desk, in order."""
    entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(DESK_KEY))
    return [cast("AlertRevision | AlertClose", decode_entry(*next(iter(fields.items())))) for _, fields in entries]


def audited(client: redis.Redis) -> list[tuple[str, str, str]]:
    """Action, target and outcome of every row of the audit log, in order."""
    return [(row.action, row.target, row.outcome) for row in last_rows(client, 100)]
