"""`POST /v1/pings` from the outside: what is sent, what is answered, and what is in the logs then."""

from __future__ import annotations

import gzip
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import pytest
import redis
import zstandard

from flows.embedded import EmbeddedServer
from flows.log import done_key, last_id, log_key
from flows.metrics import Metrics
from flows.wire import PingColumns, decode_entry, encode_pings
from gateway.config import GatewayConfig
from gateway.datum import Datum, to_wgs84
from gateway.intake import Intake
from gateway.pings import PATH, PingsAnswer
from gateway.runtime import Gateway
from geoindex.columns import PingBatch
from tests.flows.waiting import eventually, memory_limit
from tests.gateway.conftest import SETTINGS, Http, Keys
from tests.geoindex.machines import batch_of
from tests.reference.events import PingEvent

JSON, NDJSON = {"Content-Type": "application/json"}, {"Content-Type": "application/x-ndjson"}
COLUMNS = {"Content-Type": "application/vnd.tuanyuan.pings+msgpack"}


def now_ms() -> int:
    return round(time.time() * 1000)


def ping(device_id: str, **other: Any) -> dict[str, Any]:
    return {"device_id": device_id, "lat": 30.25, "lng": 120.13, "observed_at": now_ms()} | other


def in_the_logs(client: redis.Redis) -> dict[str, tuple[str, int, int, int]]:
    """Every ping in the logs: id -> partner, lat_e7, lng_e7, observed_at_ms."""
    found = {}
    for shard in range(SETTINGS.shard_count):
        for _, fields in cast(Any, client.xrange(log_key(shard))):
            for kind, payload in fields.items():
                entry = decode_entry(kind, payload)
                if isinstance(entry, PingColumns):
                    batch = PingBatch(
                        entry.partner, entry.id_bytes, entry.id_end, entry.lat_e7, entry.lng_e7, entry.observed_at_ms
                    )
                    for row in range(len(batch)):
                        found[batch.device_id(row)] = (
                            SETTINGS.partners[batch.partner[row]],
                            int(batch.lat_e7[row]),
                            int(batch.lng_e7[row]),
                            int(batch.observed_at_ms[row]),
                        )
    return found


def columns(*ids: str, partner: str = "amap") -> bytes:
    events = [PingEvent("amap", name, 302500000, 1201300000, now_ms()) for name in ids]
    batch = batch_of(events, ("amap",))
    batch.partner[:] = SETTINGS.partners.index(partner)
    return encode_pings(batch)


def answer(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return PingsAnswer.model_validate_json(response.content).model_dump()


def test_an_array_of_pings_is_in_the_logs_when_it_is_answered(http: Http, keys: Keys, client: redis.Redis) -> None:
    at_ms = now_ms()
    body = [ping("甲", observed_at=at_ms), ping("b", lat=-1, lng=2, observed_at="2026-01-01T00:00:00.5+08:00")]
    body[1]["observed_at"] = np.datetime64(at_ms + 1, "ms").item().isoformat()
    got = answer(http.post(PATH, key=keys.amap, json=body))
    assert got == {"accepted": 2, "refused_total": 0, "refused": []}
    assert in_the_logs(client) == {
        "甲": ("amap", 302500000, 1201300000, at_ms),
        "b": ("amap", -10000000, 20000000, at_ms + 1),
    }


def test_a_refused_ping_costs_its_neighbours_nothing(http: Http, keys: Keys, client: redis.Redis) -> None:
    body = [ping("a"), ping("b", lat=90.1), ping("c"), None, ping("e", observed_at=now_ms() + 3_600_000), ping("f")]
    got = answer(http.post(PATH, key=keys.amap, json=body))
    assert (got["accepted"], got["refused_total"]) == (3, 3)
    assert [(refused["position"], refused["reason"]) for refused in got["refused"]] == [
        (1, "latitude"),
        (3, "malformed"),
        (4, "from_the_future"),
    ]
    assert sorted(in_the_logs(client)) == ["a", "c", "f"]


def test_a_body_without_a_good_ping_is_answered_too(http: Http, keys: Keys, client: redis.Redis) -> None:
    assert answer(http.post(PATH, key=keys.amap, json=[{}]))["accepted"] == 0
    assert answer(http.post(PATH, key=keys.amap, json=[]))["refused_total"] == 0
    assert in_the_logs(client) == {}


def test_a_broken_line_is_one_refused_ping(http: Http, keys: Keys, client: redis.Redis) -> None:
    body = orjson.dumps(ping("a")) + b'\n{"device_id": "b", "lat"\n\n' + orjson.dumps(ping("c"))
    got = answer(http.post(PATH, key=keys.amap, content=body, headers=NDJSON))
    assert got["accepted"] == 2
    assert [(refused["position"], refused["reason"]) for refused in got["refused"]] == [(1, "malformed")]
    assert sorted(in_the_logs(client)) == ["a", "c"]


def test_columns_are_written_under_the_account_and_under_no_other(http: Http, keys: Keys, client: redis.Redis) -> None:
    got = answer(http.post(PATH, key=keys.amap, content=columns("a", "bb", partner="baidu"), headers=COLUMNS))
    assert got["accepted"] == 2
    assert {partner for partner, *_ in in_the_logs(client).values()} == {"amap"}


@pytest.mark.parametrize("kind", ["json", "ndjson", "columns"])
@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_every_body_may_be_compressed(http: Http, keys: Keys, client: redis.Redis, kind: str, encoding: str) -> None:
    raw, headers = {
        "json": (orjson.dumps([ping("a"), ping("b")]), JSON),
        "ndjson": (orjson.dumps(ping("a")) + b"\n" + orjson.dumps(ping("b")), NDJSON),
        "columns": (columns("a", "b"), COLUMNS),
    }[kind]
    body = gzip.compress(raw) if encoding == "gzip" else zstandard.ZstdCompressor().compress(raw)
    response = http.post(PATH, key=keys.amap, content=body, headers=headers | {"Content-Encoding": encoding})
    assert answer(response)["accepted"] == 2
    assert sorted(in_the_logs(client)) == ["a", "b"]


def test_an_account_in_another_datum_is_converted(http: Http, keys: Keys, client: redis.Redis) -> None:
    answer(http.post(PATH, key=keys.baidu, json=[ping("a", lat=39.915, lng=116.404)]))
    lat_e7, lng_e7 = to_wgs84(Datum.BD09, np.array([399150000], np.int32), np.array([1164040000], np.int32))
    assert in_the_logs(client)["a"][:3] == ("baidu", lat_e7[0], lng_e7[0])
    assert abs(lng_e7[0] - 1164040000) > 100_000


@pytest.mark.parametrize(
    ("content", "headers", "status", "name"),
    [
        (b"", JSON, 400, "malformed-body"),
        (b"[{}", JSON, 400, "malformed-body"),
        (b"hello", JSON, 400, "malformed-body"),
        (b'{"device_id": "a"}', JSON, 400, "malformed-body"),
        (b"\x81", COLUMNS, 400, "malformed-body"),
        (b"[]", JSON | {"Content-Encoding": "gzip"}, 400, "malformed-body"),
        (b"[]", JSON | {"Content-Encoding": "br"}, 415, "content-encoding"),
        (b"[]", JSON | {"Content-Encoding": "gzip, zstd"}, 415, "content-encoding"),
        (b"[]", {"Content-Type": "text/csv"}, 415, "content-type"),
        (b"[]", {}, 415, "content-type"),
        (b"[" + b" " * 9_000_000, JSON, 413, "too-large"),
        (gzip.compress(b"[" + b" " * 40_000_000 + b"]"), JSON | {"Content-Encoding": "gzip"}, 413, "too-large"),
    ],
)
def test_what_cannot_be_read_as_a_whole_is_refused_as_a_whole(
    http: Http, keys: Keys, client: redis.Redis, content: bytes, headers: dict[str, str], status: int, name: str
) -> None:
    response = http.post(PATH, key=keys.amap, content=content, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["type"].endswith(f":{name}")
    assert in_the_logs(client) == {}


def test_an_unknown_encoding_is_answered_with_the_known_ones(http: Http, keys: Keys) -> None:
    response = http.post(PATH, key=keys.amap, content=b"[]", headers=JSON | {"Content-Encoding": "br"})
    assert response.headers["Accept-Encoding"] == "gzip, zstd"
    response = http.post(PATH, key=keys.amap, content=b"[]", headers={"Content-Type": "text/csv"})
    assert "application/x-ndjson" in response.headers["Accept-Post"]


def test_pings_are_for_partners_alone(http: Http, keys: Keys, client: redis.Redis) -> None:
    assert http.post(PATH, json=[ping("a")]).status_code == 401
    assert http.post(PATH, key=keys.county, json=[ping("a")]).status_code == 403
    assert in_the_logs(client) == {}


def test_more_refused_pings_than_an_answer_lists_are_counted(http: Http, keys: Keys, metrics: Metrics) -> None:
    got = answer(http.post(PATH, key=keys.amap, json=[ping("a"), *[ping("", lat=200)] * 1_500]))
    assert (got["accepted"], got["refused_total"], len(got["refused"])) == (1, 1_500, 1_000)
    assert metrics.value("pings_received_total", partner="amap") == 1_501
    assert metrics.value("pings_turned_away_total", partner="amap", reason="id_length") == 1_500


class TestOverTheRate:
    @pytest.fixture
    def config(self, server: EmbeddedServer, tmp_path: Path) -> GatewayConfig:
        return GatewayConfig(valkey=server.url, var=tmp_path / "var", pings_per_s=2, burst_s=1)

    def test_who_sends_too_much_is_told_when_to_come_again(self, http: Http, keys: Keys, client: redis.Redis) -> None:
        answer(http.post(PATH, key=keys.amap, json=[ping("a"), ping("b"), ping("c")]))
        response = http.post(PATH, key=keys.amap, json=[ping("d"), ping("e")])
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert "d" not in in_the_logs(client)
        answer(http.post(PATH, key=keys.baidu, json=[ping("f")]))


class TestTheFlowIsBehind:
    @pytest.fixture
    def config(self, server: EmbeddedServer, tmp_path: Path) -> GatewayConfig:
        return GatewayConfig(valkey=server.url, var=tmp_path / "var", flow_lag_s_max=0.05)

    def test_pings_wait_until_it_has_caught_up(
        self, http: Http, keys: Keys, client: redis.Redis, gateway: Gateway
    ) -> None:
        watch = gateway.service(Intake)._watch

        def refused() -> bool:
            watch.look()
            response = http.post(PATH, key=keys.amap, json=[ping("a")])
            if response.status_code == 503:
                assert response.headers["Retry-After"] == "5"
                assert "behind in shard" in response.json()["detail"]
            return response.status_code == 503

        eventually(refused, 60)
        for shard in range(SETTINGS.shard_count):
            ms, seq = last_id(client, log_key(shard))
            client.set(done_key(shard), f"{ms}-{seq}")
        watch.look()
        assert answer(http.post(PATH, key=keys.amap, json=[ping("b")]))["accepted"] == 1


def _is_taken(http: Http, key: str, body: list[dict[str, object]]) -> bool:
    return http.post(PATH, key=key, json=body).status_code == 200


class TestTheServerIsKilled:
    @pytest.fixture
    def server(self, own_server: EmbeddedServer) -> EmbeddedServer:
        return own_server

    def test_what_was_answered_is_in_the_logs_and_what_was_not_is_sent_again(
        self, http: Http, keys: Keys, client: redis.Redis, gateway: Gateway, server: EmbeddedServer
    ) -> None:
        bodies = [[ping(f"{body}-{row}") for row in range(20)] for body in range(30)]
        for number, body in enumerate(bodies):
            if number in (7, 8, 20):  # and so the body is sent until it is accepted, as partners do
                os.kill(server.pid, signal.SIGKILL)
                response = http.post(PATH, key=keys.amap, json=body)
                assert response.status_code == 503, response.text
                assert int(response.headers["Retry-After"]) >= 1
                eventually(lambda: server.ended() is not None, 60)
                server.revive(lambda _: None)
                client.connection_pool.disconnect()
                gateway.guards.look()
            eventually(partial(_is_taken, http, keys.amap, body), 60)
        assert set(in_the_logs(client)) == {one["device_id"] for body in bodies for one in body}


def test_a_full_server_is_said_and_nothing_is_lost(
    http: Http, keys: Keys, client: redis.Redis, gateway: Gateway
) -> None:
    used_bytes = cast(dict[str, int], client.info("memory"))["used_memory"]
    with memory_limit(client, used_bytes * 5 // 4):
        gateway.guards.look()
        response = http.post(PATH, key=keys.amap, json=[ping("a")])
        assert response.status_code == 503
        assert "memory" in response.json()["detail"]
        assert int(response.headers["Retry-After"]) >= 1
    gateway.guards.look()
    assert in_the_logs(client) == {}
    assert answer(http.post(PATH, key=keys.amap, json=[ping("a")]))["accepted"] == 1


def test_a_body_that_finds_no_room_is_told_to_come_again(http: Http, keys: Keys, gateway: Gateway) -> None:
    intake = gateway.service(Intake)
    with intake.hold() as held:
        held.grow(intake._held_bytes_max - 10)
        response = http.post(PATH, key=keys.amap, json=[ping("a")])
        assert response.status_code == 503
        assert response.headers["Retry-After"] == "1"
    assert answer(http.post(PATH, key=keys.amap, json=[ping("a")]))["accepted"] == 1
    assert intake._held_bytes == 0


def test_the_description_names_all_bodies_and_shows_good_examples(http: Http, keys: Keys) -> None:
    operation = http.get("/openapi.json").json()["paths"][PATH]["post"]
    bodies = operation["requestBody"]["content"]
    assert set(bodies) == {JSON["Content-Type"], NDJSON["Content-Type"], COLUMNS["Content-Type"]}
    assert {"400", "401", "403", "413", "415", "429", "503"} <= set(operation["responses"])
    (encoding,) = [header for header in operation["parameters"] if header["name"] == "Content-Encoding"]
    assert {"gzip", "zstd"} <= set(encoding["examples"])
    for media_type, body in bodies.items():
        for example in body["examples"].values():
            value = example["value"]
            content = orjson.dumps(value) if media_type == JSON["Content-Type"] else value.encode()
            if media_type == COLUMNS["Content-Type"]:
                content = bytes.fromhex(value)
            got = answer(http.post(PATH, key=keys.amap, content=content, headers={"Content-Type": media_type}))
            # They were observed long ago.
            assert {refused["reason"] for refused in got["refused"]} <= {"too_old"}
