"""The client of partners against a real gateway on the loopback, and against gateways in trouble."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import httpx
import msgpack
import numpy as np
import pytest
import redis
import zstandard
from fastapi import FastAPI

from flows.embedded import EmbeddedServer
from flows.log import log_key
from flows.wire import PINGS, decode_pings
from gateway.client import (
    NOWHERE_E7,
    BufferFull,
    Client,
    ClientClosed,
    ClientError,
    NotGenuine,
    Push,
    RefusedPing,
    RequestRefused,
    verify_webhook,
)
from gateway.config import GatewayConfig
from gateway.webhook_settings import new_secret, signed_headers
from tests.flows.waiting import eventually
from tests.gateway.conftest import Keys
from tests.gateway.queues import name, put
from tests.gateway.receivers import serving

PATIENCE_S = 30.0


@pytest.fixture
def config(server: EmbeddedServer, tmp_path: Path) -> GatewayConfig:
    return GatewayConfig(valkey=server.url, var=tmp_path / "var", flow_lag_s_max=0)


@pytest.fixture
def url(app: FastAPI, keys: Keys) -> Iterator[str]:
    """Of a running gateway."""
    with serving(app) as port:
        yield f"http://127.0.0.1:{port}"


def logged(client: redis.Redis) -> dict[str, tuple[int, int, int, int]]:
    """Pings in the logs: partner index, lat_e7, lng_e7, observed_at_ms by device."""
    found: dict[str, tuple[int, int, int, int]] = {}
    for shard in (0, 1):
        for _, fields in cast(Any, client.xrange(log_key(shard))):
            if PINGS not in fields:
                continue
            pings = decode_pings(fields[PINGS])
            ends = pings.id_end.tolist()
            raw = pings.id_bytes.tobytes()
            for row, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                found[raw[start:stop].decode()] = (
                    int(pings.partner[row]),
                    int(pings.lat_e7[row]),
                    int(pings.lng_e7[row]),
                    int(pings.observed_at_ms[row]),
                )
    return found


def now_ms() -> int:
    return round(time.time() * 1000)


# --- against a real gateway -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [False, True])
def test_pings_reach_the_logs_and_refused_ones_are_reported(
    url: str, keys: Keys, client: redis.Redis, sign: bool
) -> None:
    refused: list[RefusedPing] = []
    at_ms = now_ms()
    with Client(url, keys.amap, sign=sign) as partner:
        pings = partner.pings(on_refused=refused.extend)
        pings.add("phone-1", 30.2592, 120.1304, at_ms)
        pings.add("nowhere", 95.0, 120.0, at_ms)
        pings.add("no number", float("nan"), float("inf"), at_ms)
        pings.add("", 30.0, 120.0, at_ms)
        pings.add("手机", -30.5, -120.25)
        pings.add("long ago", 30.0, 120.0, at_ms - 48 * 3_600_000)
        assert pings.flush(PATIENCE_S)
        assert (pings.accepted, pings.refused, pings.unsent) == (2, 4, 0)
    found = logged(client)
    assert found["phone-1"] == (0, 302_592_000, 1_201_304_000, at_ms)
    assert found["手机"][:3] == (0, -305_000_000, -1_202_500_000)
    assert set(found) == {"phone-1", "手机"}
    assert {one.device_id: one.reason for one in refused} == {
        "nowhere": "latitude",
        "no number": "latitude",
        "": "id_length",
        "long ago": "too_old",
    }


def test_pings_go_out_by_age_and_by_size(url: str, keys: Keys, client: redis.Redis) -> None:
    with Client(url, keys.amap) as partner:
        by_age = partner.pings(age_s=0.05)
        by_age.add("old", 30.0, 120.0)
        eventually(lambda: by_age.accepted == 1, PATIENCE_S)
        by_size = partner.pings(age_s=3_600.0, batch_pings=3)
        for number in range(7):
            by_size.add(f"many-{number}", 30.0, 120.0)
        eventually(lambda: by_size.accepted == 6, PATIENCE_S)
        assert by_size.unsent == 1
    assert len(logged(client)) == 8


def test_columns_of_pings_are_as_good_as_single_ones(url: str, keys: Keys, client: redis.Redis) -> None:
    at_ms = now_ms()
    lat = np.array([30.12345678, -89.99999999, np.nan, 90.1])
    with Client(url, keys.amap) as partner:
        pings = partner.pings(batch_pings=2)
        pings.add_columns(["a", "b", "c", "d"], lat, [120.0, -180.0, 1.0, 1.0], [at_ms] * 4)
        assert pings.flush(PATIENCE_S)
        assert (pings.accepted, pings.refused) == (2, 2)
        with pytest.raises(ValueError, match="one length, got 1, 1, 2, 1"):
            pings.add_columns(["a"], [1.0], [1.0, 2.0], [1])
    assert logged(client) == {
        "a": (0, 301_234_568, 1_200_000_000, at_ms),
        "b": (0, -900_000_000, -1_800_000_000, at_ms),
    }


def receive_until(partner: Client, count: int, **options: Any) -> list[Push]:
    found: list[Push] = []
    for push in partner.receive(**options):
        found.append(push)
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("sign", [False, True])
def test_pushes_are_received_as_they_come_and_acknowledged_when_the_next_is_asked_for(
    url: str, keys: Keys, client: redis.Redis, sign: bool
) -> None:
    first = put(client, 0, 7, ["a", "b"])
    with Client(url, keys.amap, sign=sign) as partner:
        pushes = partner.receive(wait_s=20)
        assert next(pushes) == Push(name(0, first), "a17", 1, "alert", 100.0, 1_764_000_000_000, ("a", "b"), 1)
        assert partner.acknowledge([name(0, first)]).count == 1  # it was not yet
        threading.Timer(0.1, put, (client, 1, 8, ["late"])).start()
        assert next(pushes).device_ids == ("late",)
        pushes.close()  # type: ignore[attr-defined]


def test_push_whose_handling_failed_is_not_acknowledged_and_those_before_it_are(
    url: str, keys: Keys, client: redis.Redis
) -> None:
    for log_ms in range(1, 6):
        put(client, 0, log_ms, [f"{log_ms}"])
    with Client(url, keys.amap) as partner:

        def fail_at_the_third() -> None:
            for push in partner.receive():
                if push.device_ids == ("3",):
                    raise KeyError("handler")

        with pytest.raises(KeyError):
            fail_at_the_third()
        names = [name(0, (log_ms, 1)) for log_ms in range(1, 6)]
        eventually(lambda: client.xpending("push:{s0}:amap", "api")["pending"] == 3, PATIENCE_S)
        acknowledged = partner.acknowledge(names)
        assert (acknowledged.count, acknowledged.refused) == (3, dict.fromkeys(names[:2], "unknown"))


def test_a_client_without_a_good_key_is_told_so(url: str, keys: Keys) -> None:
    good, wrong = keys.amap, keys.amap[:-4] + "AAAA"
    assert good != wrong
    with Client(url, wrong) as partner:
        with pytest.raises(RequestRefused) as refused:
            next(partner.receive())
        assert refused.value.status == 401
        pings = partner.pings()
        pings.add("a", 30.0, 120.0)
        with pytest.raises(RequestRefused, match="401"):
            pings.flush(PATIENCE_S)
        with pytest.raises(RequestRefused):
            pings.add("b", 30.0, 120.0)


# --- against gateways in trouble --------------------------------------------------------------------------------------

Answer = Callable[[httpx.Request], httpx.Response]
TAKEN = {"refused_total": 0, "refused": []}


def accepted_of(request: httpx.Request) -> int:
    body = zstandard.ZstdDecompressor().decompress(request.content)
    return len(decode_pings(body))


class Gateway:
    """A gateway that answers what it is told to, one answer after the other, and then as a good one does."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.troubles: list[str] = []
        self.pushes: list[list[Push]] = []
        self.acknowledged: list[str] = []
        self.claim_after_s = 60.0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        if request.url.path == "/v1/pings":
            return httpx.Response(200, json={"accepted": accepted_of(request), **TAKEN})
        if request.url.path == "/v1/pushes/ack":
            ids = json.loads(request.content)["ids"]
            self.acknowledged += ids
            return httpx.Response(200, json={"acknowledged": len(ids), "refused": []})
        found = self.pushes.pop(0) if self.pushes else []
        fields = [
            {
                "id": push.id,
                "alert_id": push.alert_id,
                "revision": push.revision,
                "kind": push.kind,
                "ring_km": push.ring_km,
                "at": push.at_ms,
                "device_ids": push.device_ids,
            }
            for push in found[: int(request.url.params["max"])]
        ]
        return httpx.Response(200, content=msgpack.packb({"pushes": fields, "claim_after_s": self.claim_after_s}))

    def client(self, **options: Any) -> Client:
        return Client(
            "http://gateway.test",
            "ty_key",
            transport=httpx.MockTransport(self),
            on_trouble=self.troubles.append,
            **options,
        )


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.client.RETRY_FIRST_S", 0.001)
    monkeypatch.setattr("gateway.client.RETRY_S_MAX", 0.01)


def test_pings_are_sent_again_until_they_are_answered() -> None:
    gateway = Gateway(
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("lost answer"),
        httpx.Response(503, headers={"Retry-After": "0"}, json={"detail": "behind"}),
        httpx.Response(429),
        httpx.Response(500),
    )
    with gateway.client() as partner:
        pings = partner.pings()
        pings.add("a", 1.0, 2.0, 3)
        assert pings.flush(PATIENCE_S)
        assert pings.accepted == 1
    assert len(gateway.requests) == 6
    assert len({request.content for request in gateway.requests}) == 1
    assert [trouble.split("; again")[0] for trouble in gateway.troubles] == [
        "POST /v1/pings: no answer: ConnectError: refused",
        "POST /v1/pings: no answer: ReadTimeout: lost answer",
        "POST /v1/pings: answered 503: behind",
        "POST /v1/pings: answered 429: Too Many Requests",
        "POST /v1/pings: answered 500: Internal Server Error",
    ]


def test_time_that_the_gateway_asks_for_is_given() -> None:
    gateway = Gateway(httpx.Response(503, headers={"Retry-After": "100"}))
    partner = gateway.client()
    pings = partner.pings()
    pings.add("a", 1.0, 2.0, 3)
    assert not pings.flush(0.2)
    assert len(gateway.requests) == 1
    assert 100 <= float(gateway.troubles[0].rpartition("again in ")[2].removesuffix(" s")) <= 110
    assert pings.close(0.01) == 1
    partner.close()


def test_a_body_that_is_too_large_is_cut() -> None:
    gateway = Gateway(httpx.Response(413), httpx.Response(413))
    with gateway.client() as partner:
        pings = partner.pings()
        pings.add_columns([f"{n}" for n in range(8)], [1.0] * 8, [2.0] * 8, range(8))
        assert pings.flush(PATIENCE_S)
        assert pings.accepted == 8
    assert [accepted_of(request) for request in gateway.requests] == [8, 4, 2, 2, 4]


def test_a_full_buffer_raises_or_blocks_as_was_asked_for() -> None:
    held = threading.Event()

    class Slow(Gateway):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            held.wait(PATIENCE_S)
            return super().__call__(request)

    gateway = Slow()
    with gateway.client() as partner:
        raising = partner.pings(batch_pings=2, buffer_pings=4, when_full="raise")
        for number in range(4):
            raising.add(f"{number}", 1.0, 2.0)
        with pytest.raises(BufferFull, match="4 pings wait"):
            raising.add("too many", 1.0, 2.0)
        blocking = partner.pings(batch_pings=2, buffer_pings=4)
        added: list[int] = []

        def add_ten() -> None:
            for number in range(10):
                blocking.add(f"{number}", 1.0, 2.0)
                added.append(number)

        adding = threading.Thread(target=add_ten)
        adding.start()
        eventually(lambda: len(added) == 4, PATIENCE_S)
        assert adding.is_alive()
        held.set()
        adding.join(PATIENCE_S)
        assert blocking.flush(PATIENCE_S)
        assert raising.flush(PATIENCE_S)
        assert (blocking.accepted, raising.accepted) == (10, 4)


def test_a_callback_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    refusal = {"position": 0, "reason": "latitude", "detail": "no"}
    gateway = Gateway(httpx.Response(200, json={"accepted": 0, "refused_total": 1, "refused": [refusal]}))

    def fail(refused: Sequence[RefusedPing]) -> None:
        raise KeyError("callback")

    with gateway.client() as partner:
        pings = partner.pings(on_refused=fail)
        pings.add("a", 99.0, 2.0)
        assert pings.flush(PATIENCE_S)
        pings.add("b", 1.0, 2.0)
        assert pings.flush(PATIENCE_S)
        assert (pings.accepted, pings.refused) == (1, 1)
    assert "on_refused failed" in caplog.text


def test_coordinates_that_are_none_are_left_to_the_gateway() -> None:
    gateway = Gateway()
    with gateway.client() as partner:
        pings = partner.pings()
        pings.add("a", 90.00000001, 180.0, 1)
        pings.add("b", -1e300, float("-inf"), 1)
        pings.flush(PATIENCE_S)
    sent = decode_pings(zstandard.ZstdDecompressor().decompress(gateway.requests[0].content))
    assert sent.lat_e7.tolist() == [900_000_000, NOWHERE_E7]
    assert sent.lng_e7.tolist() == [1_800_000_000, NOWHERE_E7]


def test_closing_sends_what_waits_and_then_takes_no_more() -> None:
    gateway = Gateway()
    partner = gateway.client()
    pings = partner.pings(age_s=3_600.0)
    pings.add("a", 1.0, 2.0)
    partner.close()
    assert pings.accepted == 1
    with pytest.raises(ClientClosed):
        pings.add("b", 1.0, 2.0)
    with pytest.raises(ClientClosed):
        partner.poll()
    assert list(partner.receive()) == []


def pushes(*numbers: int) -> list[Push]:
    return [Push(f"s0:p0:{number}-1", "a17", 1, "alert", 100.0, 5, (f"{number}",)) for number in numbers]


def test_push_that_comes_again_is_acknowledged_and_not_handled_again() -> None:
    gateway = Gateway()
    gateway.pushes = [pushes(1, 2), pushes(2, 3), pushes(1, 4)]
    with gateway.client() as partner:
        found = receive_until(partner, 4)
    assert [push.device_ids for push in found] == [("1",), ("2",), ("3",), ("4",)]
    assert [one.split(":")[2] for one in gateway.acknowledged] == ["1-1", "2-1", "2-1", "3-1", "1-1"]


def test_poll_that_fails_is_made_again() -> None:
    gateway = Gateway(httpx.ReadError("broken"), httpx.Response(503), httpx.Response(502))
    gateway.pushes = [[], pushes(1)]
    with gateway.client() as partner:
        assert [push.device_ids for push in receive_until(partner, 1)] == [("1",)]
    assert len(gateway.requests) == 5


def test_acknowledgement_that_cannot_be_made_is_said_and_the_pushes_come_again() -> None:
    gateway = Gateway()
    gateway.pushes = [pushes(1)]
    with gateway.client() as partner:
        received = partner.receive()
        assert next(received).device_ids == ("1",)
        gateway.answers = [httpx.Response(503, headers={"Retry-After": "0"})] * 5
        gateway.pushes = [pushes(1, 2)]
        assert next(received).device_ids == ("2",)
    assert any("are not acknowledged and will come again" in trouble for trouble in gateway.troubles)


def test_who_is_slow_is_given_less_and_leaves_what_others_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1_000.0
    monkeypatch.setattr("gateway.client.time.monotonic", lambda: now_s)
    gateway = Gateway()
    gateway.pushes = [pushes(*range(1, 11)), pushes(*range(11, 21)), pushes(21, 22)]
    handled = []
    with gateway.client() as partner:
        for push in partner.receive(entries_max=10):
            handled.append(push.device_ids[0])
            now_s += 12.5
            if len(handled) == 6:
                break
    assert handled == ["1", "2", "3", "4", "11", "12"]
    assert [request.url.params["max"] for request in gateway.requests if request.method == "GET"] == ["10", "2"]
    assert not any("5-1" in one for one in gateway.acknowledged)


# --- webhooks ---------------------------------------------------------------------------------------------------------


def event(**changes: Any) -> bytes:
    data = {
        "id": "s0:p0:7-1",
        "alert_id": "a17",
        "revision": 1,
        "kind": "alert",
        "ring_km": 100.0,
        "at": 5,
        "device_ids": ["a", "手机"],
    }
    return json.dumps({"type": "push.alert", "timestamp": "2026-01-01T00:00:00Z", "data": data} | changes).encode()


def test_webhook_that_one_of_the_secrets_signed_is_a_push() -> None:
    old, new = new_secret(), new_secret()
    headers = signed_headers([new, old], "s0:p0:7-1", event(), now_ms())
    shouted = {header.title(): value for header, value in headers.items()}
    for secrets in ([old], [new], [new_secret(), old]):
        push = verify_webhook(event(), shouted, secrets)
        assert push is not None
        assert (push.id, push.device_ids) == ("s0:p0:7-1", ("a", "手机"))
    body = event(type="webhook.test", data={"partner": "amap"})
    assert verify_webhook(body, signed_headers([new], "test:1", body, now_ms()), [new]) is None


@pytest.mark.parametrize("secrets", [[], [new_secret()], ["whsec_!"]])
def test_webhook_that_none_of_the_secrets_signed_is_not_genuine(secrets: list[str]) -> None:
    headers = signed_headers([new_secret()], "s0:p0:7-1", event(), now_ms())
    with pytest.raises(NotGenuine):
        verify_webhook(event(), headers, secrets)


@pytest.mark.parametrize(
    "change",
    [
        {"webhook-id": "s0:p0:8-1"},
        {"webhook-timestamp": "1"},
        {"webhook-timestamp": "soon"},
        {"webhook-signature": "v1"},
        {"webhook-signature": "v1,!!!"},
        {"webhook-signature": ""},
        {"webhook-signature": "v2,AAAA"},
    ],
)
def test_webhook_with_changed_headers_is_not_genuine(change: dict[str, str]) -> None:
    secret = new_secret()
    headers = signed_headers([secret], "s0:p0:7-1", event(), now_ms()) | change
    with pytest.raises(NotGenuine):
        verify_webhook(event(), headers, [secret])


def test_webhook_that_was_recorded_a_while_ago_is_not_genuine() -> None:
    secret = new_secret()
    headers = signed_headers([secret], "s0:p0:7-1", event(), now_ms() - 600_000)
    assert datetime.fromtimestamp(int(headers["webhook-timestamp"]), UTC).year >= 2026
    with pytest.raises(NotGenuine, match="too old"):
        verify_webhook(event(), headers, [secret])


# --- what it needs ----------------------------------------------------------------------------------------------------


def test_importing_the_client_loads_no_web_framework_compiler_or_server() -> None:
    heavy = ["fastapi", "starlette", "pydantic", "uvicorn", "numba", "llvmlite", "redis", "bytewax", "cryptography"]
    code = f"import sys, gateway.client; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("options", [{"batch_pings": 0}, {"batch_pings": 10, "buffer_pings": 5}, {"when_full": "wait"}])
def test_senders_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with Gateway().client() as partner, pytest.raises(ValueError, match="must be"):
        partner.pings(**options)


def test_signing_needs_a_whole_key() -> None:
    with Gateway().client(sign=True) as partner, pytest.raises((ValueError, ClientError)):
        partner.poll(wait_s=0)
