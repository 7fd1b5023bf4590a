"""The gateway as a whole: it starts, answers, and says when it cannot."""

from __future__ import annotations

from tests.gateway.conftest import Http, Keys


def test_a_gateway_that_started_is_alive_and_ready(http: Http) -> None:
    assert http.get("/healthz").json() == {"status": "alive"}
    answer = http.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready", "reasons": []})


def test_an_unknown_path_is_a_problem_with_the_request_id(http: Http, keys: Keys) -> None:
    answer = http.get("/v1/nothing", key=keys.amap, headers={"X-Request-Id": "mine-1"})
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "mine-1"
