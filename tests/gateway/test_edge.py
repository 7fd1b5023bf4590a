"""What every request passes: limits before parsing, ids, headers, log lines, and an answer to whatever goes wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import redis
from anyio.from_thread import BlockingPortal
from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Message, Receive, Scope, Send

from flows.embedded import EmbeddedServer
from flows.guards import PingsRefused
from flows.metrics import Metrics
from gateway.config import GatewayConfig
from gateway.edge import JSON_DEPTH_MAX, JSON_MEMBERS_MAX, SECURITY_HEADERS, BodyLimits, check_json, json_depth
from gateway.errors import Problem
from gateway.log_json import JsonFormatter
from gateway.runtime import Gateway
from tests.gateway.conftest import Http, Keys, TurnableClock


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")

    lat: float = Field(le=90, ge=-90, allow_inf_nan=False)
    name: str = Field(max_length=10)


class Alert(BaseModel):
    model_config = ConfigDict(extra="forbid")

    place: Place
    tags: list[str] = []


@pytest.fixture
def config(server: EmbeddedServer, tmp_path: Path) -> GatewayConfig:
    return GatewayConfig(
        valkey=server.url,
        var=tmp_path / "var",
        body_bytes_max=4096,
        trusted_proxies="127.0.0.0/8,10.0.0.0/8",
        public_url="https://alerts.example.org",
    )


@pytest.fixture
def http(app: FastAPI, http: Http) -> Http:
    """With an endpoint that takes JSON, one that takes anything, and some that raise."""

    @app.post("/t/json")
    def take(alert: Alert) -> dict[str, str]:
        return {"name": alert.place.name}

    @app.post("/t/raw")
    async def raw(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @app.get("/t/raise/{what}")
    def fail(what: str) -> None:
        raise {
            "bug": RuntimeError("a secret ty_abcdefghijklmnop_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"),
            "away": redis.ConnectionError("no route"),
            "full": redis.OutOfMemoryError("OOM"),
            "held": PingsRefused("no pings are taken now: memory"),
            "problem": Problem(409, "conflict", "somebody \ud800 was faster", known_revision=3),
        }[what]

    return http


def type_of(answer: httpx.Response) -> str:
    assert answer.headers["content-type"] == "application/problem+json"
    return str(answer.json()["type"]).removeprefix("urn:tuanyuan:problem:")


# --- ids, headers, lines ----------------------------------------------------------------------------------------------


def test_a_well_formed_request_id_is_taken_and_another_one_is_replaced(http: Http) -> None:
    assert http.get("/healthz", headers={"X-Request-Id": "Mine_1.2-3"}).headers["x-request-id"] == "Mine_1.2-3"
    made = [
        http.get("/healthz", headers={"X-Request-Id": given}).headers["x-request-id"]
        for given in ("", "a b", "x" * 65, "<script>", "a\tb")
    ]
    assert all(len(request_id) == 32 and request_id.isalnum() for request_id in made)
    assert len(set(made)) == len(made)


def test_every_answer_has_the_security_headers(http: Http, keys: Keys) -> None:
    for answer in (http.get("/healthz"), http.get("/nothing"), http.post("/t/raw"), http.get("/t/raise/bug")):
        for name, value in SECURITY_HEADERS.items():
            assert answer.headers[name] == value
        assert answer.headers["strict-transport-security"].startswith("max-age=31536000")
        assert "server" not in answer.headers


def test_a_request_leaves_one_line_without_secret_query_or_body(
    http: Http, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gateway.access"):
        http.post("/t/raw?device=13800138000", key=keys.amap, content=b"phone-17", headers={"X-Request-Id": "r-1"})
    (record,) = [record for record in caplog.records if record.name == "gateway.access"]
    text = JsonFormatter().format(record)
    line = json.loads(text)
    assert {name: line[name] for name in ("request_id", "caller", "method", "route", "status", "bytes_in")} == {
        "request_id": "r-1",
        "caller": "partner:amap",
        "method": "POST",
        "route": "/t/raw",
        "status": 200,
        "bytes_in": 8,
    }
    for secret in (keys.amap[-43:], "13800138000", "phone-17"):
        assert secret not in text


def test_a_fault_of_ours_is_logged_with_its_id_and_not_told(
    http: Http, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    answer = http.get("/t/raise/bug", headers={"X-Request-Id": "r-2"})
    assert (answer.status_code, type_of(answer), answer.json()["request_id"]) == (500, "fault", "r-2")
    assert "secret" not in answer.text
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    text = JsonFormatter().format(record)
    assert "r-2" in text and "RuntimeError" in text and "ty_abcdefghijklmnop_***" in text and "AAECAwQ" not in text
    assert metrics.value("gateway_faults_total") == 1
    assert metrics.value("gateway_requests_total", route="/t/raise/{what}", status="500") == 1


@pytest.mark.parametrize(
    ("what", "status", "type"),
    [
        ("away", 503, "server-away"),
        ("full", 503, "server-full"),
        ("held", 503, "pings-held"),
        ("problem", 409, "conflict"),
    ],
)
def test_what_goes_by_itself_says_when_to_come_again(http: Http, what: str, status: int, type: str) -> None:
    answer = http.get(f"/t/raise/{what}")
    assert (answer.status_code, type_of(answer)) == (status, type)
    assert ("retry-after" in answer.headers) == (status == 503)
    if what == "problem":
        assert answer.json()["known_revision"] == 3
        assert answer.json()["detail"] == "somebody ? was faster"


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        (None, "127.0.0.1"),
        ("203.0.113.7", "203.0.113.7"),
        ("198.51.100.1, 203.0.113.7", "203.0.113.7"),  # what stands further left is the client's own word
        ("203.0.113.7, 10.1.2.3", "203.0.113.7"),  # two proxies of ours
        ("2001:db8::1", "2001:db8::1"),
        ("unknown", "127.0.0.1"),
        ("203.0.113.7, unknown", "127.0.0.1"),
    ],
)
def test_a_trusted_proxy_tells_the_clients_address(
    http: Http, caplog: pytest.LogCaptureFixture, forwarded: str | None, address: str
) -> None:
    headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
    with caplog.at_level(logging.INFO, "gateway.access"):
        http.get("/healthz", headers=headers)
    (record,) = [record for record in caplog.records if record.name == "gateway.access"]
    assert json.loads(JsonFormatter().format(record))["address"] == address


def test_nobody_elses_word_for_its_address_counts(
    app: FastAPI, http: Http, portal: BlockingPortal, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("192.0.2.9", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://g") as client:
            return await client.get("/healthz", headers={"X-Forwarded-For": "203.0.113.7"})

    with caplog.at_level(logging.INFO, "gateway.access"):
        portal.call(ask)
    (record,) = [record for record in caplog.records if record.name == "gateway.access"]
    assert json.loads(JsonFormatter().format(record))["address"] == "192.0.2.9"


def test_an_address_has_a_limit_of_its_own(
    http: Http, gateway: Gateway, clock: TurnableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = clock.monotonic_s()
    monkeypatch.setattr(clock, "monotonic_s", lambda: now_s)  # a request's worth comes back every 2 ms
    config = gateway.config
    burst = config.address_requests_per_s * config.burst_s
    gateway.buckets.take("address:203.0.113.7", config.address_requests_per_s, burst, cost=burst)
    refused = http.get("/healthz", headers={"X-Forwarded-For": "203.0.113.7"})
    assert (refused.status_code, type_of(refused)) == (429, "rate-limit")
    assert "retry-after" in refused.headers and "ratelimit" in refused.headers
    assert http.get("/healthz", headers={"X-Forwarded-For": "203.0.113.8"}).status_code == 200


# --- bodies -----------------------------------------------------------------------------------------------------------


async def chunks(count: int, size: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * size


def test_a_body_that_is_too_long_is_refused_by_its_declared_length(http: Http, keys: Keys) -> None:
    assert http.post("/t/raw", key=keys.amap, content=b"x" * 4096).json() == {"bytes": 4096}
    answer = http.post("/t/raw", key=keys.amap, content=b"x" * 4097)
    assert (answer.status_code, type_of(answer), answer.json()["bytes_max"]) == (413, "too-large", 4096)


@pytest.mark.parametrize("length", ["-1", "x", "1e9", "9" * 40, "²"])
def test_a_length_that_is_no_number_is_not_understood(http: Http, keys: Keys, length: str) -> None:
    headers = [(b"Content-Length", length.encode())]
    answer = http.post("/t/raw", headers=[*headers, (b"Authorization", f"Bearer {keys.amap}".encode())])
    assert (answer.status_code, type_of(answer)) == (400, "malformed-length")


@pytest.mark.parametrize("path", ["/t/raw", "/t/json"])
def test_a_body_that_is_too_long_is_refused_while_it_comes(http: Http, keys: Keys, path: str) -> None:
    headers = {"Content-Type": "application/json"} if path == "/t/json" else {}
    answer = http.post(path, key=keys.amap, content=chunks(100, 1000), headers=headers)
    assert (answer.status_code, type_of(answer)) == (413, "too-large")
    assert http.post("/t/raw", key=keys.amap, content=chunks(4, 1000)).json() == {"bytes": 4000}


def asked(portal: BlockingPortal, app: BodyLimits, path: str, sent: list[Message], headers: dict[bytes, bytes]) -> int:
    """Bytes that arrive behind the limits. Raises what they raise."""

    async def receive() -> Message:
        return sent.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError("nothing is answered here")

    scope: Scope = {"type": "http", "path": path, "method": "POST", "headers": list(headers.items())}
    portal.call(app, scope, receive, send)
    return int(scope["seen"])


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    del send
    scope["seen"], scope["chunks"] = 0, []
    while True:
        message = await receive()
        scope["seen"] += len(message["body"])
        scope["chunks"].append(message["body"])
        if not message.get("more_body"):
            break


def test_a_path_may_have_a_limit_of_its_own_and_its_body_is_passed_on_as_it_comes(portal: BlockingPortal) -> None:
    app = BodyLimits(count, 10, {"/v1/pings": 1000, "/v1/alerts/{alert_id}/photo": 50})
    json_type = {b"content-type": b"application/json"}
    first = b"[" * 400
    sent: list[Message] = [{"type": "http.request", "body": first, "more_body": True}]
    sent.append({"type": "http.request", "body": b"x" * 600, "more_body": False})
    assert asked(portal, app, "/v1/pings", sent, json_type) == 1000
    for path, size, fits in (
        ("/v1/pings", 1001, False),
        ("/v1/pings/", 11, False),
        ("/v1/alerts/a17/photo", 50, True),
        ("/v1/alerts/a17/photo", 51, False),
        ("/v1/alerts/a/b/photo", 11, False),
        ("/v1/alerts", 10, True),
    ):
        sent = [{"type": "http.request", "body": b"1" * size, "more_body": False}]
        if fits:
            assert asked(portal, app, path, sent, {}) == size
        else:
            with pytest.raises(Problem, match="the body must have at most"):
                asked(portal, app, path, sent, {})


def test_large_bodies_are_handed_on_without_a_copy(portal: BlockingPortal) -> None:
    body = b"x" * 700_000
    seen: list[bytes] = []

    async def keep(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, send
        seen.append((await receive())["body"])

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        raise AssertionError

    scope: Scope = {"type": "http", "path": "/v1/pings", "method": "POST", "headers": []}
    portal.call(BodyLimits(keep, 10, {"/v1/pings": 1_000_000}), scope, receive, send)
    assert seen[0] is body


@pytest.mark.parametrize(
    ("body", "type"),
    [
        (b"[" * 33 + b"]" * 33, "too-deep"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "too-deep"),
        (b"[" * 4000, "too-deep"),
        (b"{", "malformed-json"),
        (b"", "does-not-fit"),
        (b"nope", "malformed-json"),
        (b'{"place": {"lat": NaN, "name": "x"}}', "malformed-json"),
        (b'{"place": {"lat": 1, "name": "\\ud800"}}', "malformed-json"),
        (b'{"place": {"lat": 1, "name": "\xff"}}', "malformed-json"),
        (b'\xef\xbb\xbf{"place": {"lat": 1, "name": "x"}}', "malformed-json"),
        (b'{"place": {"lat": 1e999, "name": "x"}}', "malformed-json"),
    ],
)
def test_json_that_is_none_or_too_deep_is_refused_before_it_is_parsed(
    http: Http, keys: Keys, body: bytes, type: str
) -> None:
    answer = http.post("/t/json", key=keys.amap, content=body, headers={"Content-Type": "application/json"})
    assert type_of(answer) == type
    assert answer.status_code == (422 if type == "does-not-fit" else 400)


def test_brackets_in_strings_are_not_depth() -> None:
    check_json(json.dumps({"words": "[" * 500, "more": '\\"[[[{"' * 100}).encode())
    check_json(b"[" * JSON_DEPTH_MAX + b"]" * JSON_DEPTH_MAX)


def test_a_body_may_have_many_members_and_not_more() -> None:
    check_json(json.dumps([0] * JSON_MEMBERS_MAX).encode())
    check_json(json.dumps("," * 20_000).encode())
    with pytest.raises(Problem, match="at most 10,000 members, got 10,001"):
        check_json(json.dumps([0] * (JSON_MEMBERS_MAX + 1)).encode())


@pytest.mark.parametrize(
    ("bare", "depth"), [(b"", 0), (b"[]", 1), (b"[[],[{}]]", 3), (b"]]]", 0), (b"[[[", 3), (b"1,2", 0)]
)
def test_depth_is_the_deepest_nesting(bare: bytes, depth: int) -> None:
    assert json_depth(bare) == depth


# --- errors of what was sent ------------------------------------------------------------------------------------------


def test_what_does_not_fit_says_what_was_expected_what_came_and_where(http: Http, keys: Keys) -> None:
    body = {"place": {"lat": 95.2, "name": "x" * 200, "a~/b": 1}, "tags": [1]}
    answer = http.post("/t/json", key=keys.amap, json=body)
    assert (answer.status_code, type_of(answer)) == (422, "does-not-fit")
    faults = {fault["where"]: (fault["expected"], fault["got"]) for fault in answer.json()["errors"]}
    assert faults["/body/place/lat"] == ("Input should be less than or equal to 90", "95.2")
    assert faults["/body/place/name"][0] == "String should have at most 10 characters"
    assert faults["/body/place/name"][1] == "'" + "x" * 98 + "…"
    assert faults["/body/place/a~0~1b"] == ("Extra inputs are not permitted", "1")
    assert faults["/body/tags/0"] == ("Input should be a valid string", "1")
    assert answer.json()["detail"].endswith("; and 3 more")
    missing = http.post("/t/json", key=keys.amap, json={"place": {"lat": 1}}).json()["errors"]
    assert missing == [{"where": "/body/place/name", "expected": "must be given", "got": "nothing"}]


def test_a_body_that_is_no_json_is_a_fault_of_its_type(http: Http, keys: Keys) -> None:
    answer = http.post("/t/json", key=keys.amap, content=b"x", headers={"Content-Type": "text/plain"})
    assert (answer.status_code, type_of(answer)) == (422, "does-not-fit")


def test_a_wrong_method_is_a_problem_too(http: Http, keys: Keys) -> None:
    answer = http.request("DELETE", "/t/json", key=keys.amap)
    assert (answer.status_code, type_of(answer)) == (405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"
