"""The gateway as a whole: it starts, answers, and says when it cannot."""

from __future__ import annotations

import redis
from fastapi import FastAPI

from flows.metrics import STATS_KEY, read_stats
from gateway.identity import PartnerDep
from tests.flows.waiting import eventually
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


def test_the_description_says_that_errors_are_problems(http: Http) -> None:
    described = http.get("/openapi.json").json()
    schemas = described["components"]["schemas"]
    assert "ProblemBody" in schemas and "HTTPValidationError" not in schemas
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            for status, answer in operation["responses"].items():
                assert answer["description"], (method, path, status)
                if status.isdigit() and int(status) >= 400 and path != "/readyz":
                    problem = {"schema": {"$ref": "#/components/schemas/ProblemBody"}}
                    assert answer["content"] == {"application/problem+json": problem}, (method, path, status)


def test_endpoints_for_callers_say_how_to_come(app: FastAPI, http: Http) -> None:
    @app.get("/t/partner", summary="Test")
    async def partner(caller: PartnerDep) -> dict[str, str]:
        return {"name": caller.name}

    operation = http.get("/openapi.json").json()["paths"]["/t/partner"]["get"]
    assert operation["security"] == [{"key": []}, {"signature": []}]
    assert "parameters" not in operation


def test_no_page_of_scripts_from_elsewhere_is_offered(http: Http) -> None:
    assert http.get("/docs").status_code == http.get("/redoc").status_code == 404


def test_a_gateway_does_not_pass_for_a_flow(http: Http, client: redis.Redis) -> None:
    """Else a deployment whose flow has died would be called healthy."""
    eventually(lambda: client.zcard(STATS_KEY) == 1)
    assert read_stats(client).process_count == 0
