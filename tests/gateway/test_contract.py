"""Every endpoint against its own description, by whatever may come: no 5xx, and no answer that the description forbids.

`CONTRACT_EXAMPLES=200 pytest tests/gateway/test_contract.py` asks longer.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, cast

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway.config import GatewayConfig
from tests.gateway.conftest import Http, Keys

EXAMPLES = int(os.environ.get("CONTRACT_EXAMPLES", "6"))
PARTNERS_PATHS = ("/v1/pings", "/v1/pushes", "/v1/webhook")
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
"""That whatever its schema allows is accepted is not asked: compression and times have rules that no schema says."""
NOBODY = "https://localhost:1/"
"""Instead of receivers that somebody might be: it is refused for its address."""


@pytest.fixture
def config(config: GatewayConfig) -> GatewayConfig:
    return replace(config, requests_per_s=1e6, address_requests_per_s=1e6, preview_budget=10_000)


def _kept_here(case: Any) -> None:
    """Neither a long wait nor a request to somebody else."""
    if case.path == "/v1/pushes" and isinstance(case.query, dict) and "wait" in case.query:
        case.query["wait"] = 0
    if case.path == "/v1/view/stream":
        case.query = {"seconds": 0}  # else it would not end
    if case.path.startswith("/v1/webhook") and isinstance(case.body, dict) and isinstance(case.body.get("url"), str):
        case.body["url"] = NOBODY


def test_no_answer_is_a_fault_and_none_contradicts_the_description(app: FastAPI, http: Http, keys: Keys) -> None:
    schema = schemathesis.openapi.from_dict(app.openapi())
    asked = 0
    for found in schema.get_all_operations():

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cast(Any, found).ok().as_strategy())
        def ask(case: Any) -> None:
            nonlocal asked
            _kept_here(case)
            key = keys.amap if case.path.startswith(PARTNERS_PATHS) else keys.ministry
            key = keys.operator if case.path == "/metrics" else key
            kwargs = case.as_transport_kwargs(base_url="http://gateway.test")
            response = http.request(
                kwargs["method"],
                kwargs["url"],
                key=key,
                headers=dict(kwargs.get("headers") or {}),
                params=kwargs.get("params"),
                content=kwargs.get("data"),
                json=kwargs.get("json"),
            )
            assert response.status_code < 500 or response.status_code == 503, (case.method, case.path, response.text)
            case.validate_response(response, checks=CHECKS)
            asked += 1

        ask()
    assert asked > 20 * EXAMPLES
