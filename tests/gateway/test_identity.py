"""Who is let in: keys, signatures, limits, and the rows that refusals leave."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import httpx
import pytest
import redis
from fastapi import FastAPI, Request

from flows.embedded import EmbeddedServer
from gateway.audit_log import REFUSED, last_rows
from gateway.config import GatewayConfig
from gateway.identity import OfficerDep, OperatorDep, PartnerDep
from gateway.keys import Key, new_key, parse_key
from gateway.runtime import Gateway
from gateway.signing import WINDOW_S, sign
from tests.gateway.conftest import Http, Keys, TurnableClock


@pytest.fixture
def config(server: EmbeddedServer, tmp_path: Path) -> GatewayConfig:
    return GatewayConfig(valkey=server.url, var=tmp_path / "var", requests_per_s=25, failures_per_s=5)


@pytest.fixture
def http(app: FastAPI, http: Http) -> Http:
    """With an endpoint for each kind of caller, and one that reads bodies as they come."""

    @app.api_route("/t/partner", methods=["GET", "POST"])
    async def partner(caller: PartnerDep) -> dict[str, object]:
        return {"name": caller.name, "index": caller.account.index, "signed": caller.signed}

    @app.get("/t/officer")
    def officer(caller: OfficerDep) -> dict[str, str]:
        return {"name": caller.name, "division": caller.account.division}

    @app.get("/t/operator")
    def operator(caller: OperatorDep) -> dict[str, str]:
        return {"name": caller.name}

    @app.post("/t/length")
    async def length(caller: PartnerDep, request: Request) -> dict[str, int]:
        return {"bytes": sum([len(chunk) async for chunk in request.stream()])}

    return http


def signed(http: Http, key: str, method: str, url: str, body: bytes = b"", nonce: str | None = None) -> httpx.Response:
    headers = sign(key, method, url, body, nonce=nonce)
    return http.request(method, url, content=body or None, headers=headers)


def type_of(answer: httpx.Response) -> str:
    assert answer.headers["content-type"] == "application/problem+json"
    return str(answer.json()["type"]).removeprefix("urn:tuanyuan:problem:")


def test_each_kind_of_caller_is_known_by_its_key(http: Http, keys: Keys) -> None:
    assert http.get("/t/partner", key=keys.baidu).json() == {"name": "baidu", "index": 1, "signed": False}
    assert http.get("/t/officer", key=keys.county).json() == {"name": "西湖 值班", "division": "330106"}
    assert http.get("/t/operator", key=keys.operator).json() == {"name": "operator"}


def test_every_key_that_is_not_accepted_gets_the_same_answer(
    http: Http, gateway: Gateway, keys: Keys, client: redis.Redis
) -> None:
    known = parse_key(keys.amap)
    assert known is not None
    stolen = gateway.accounts.add_officer("gone", "330106", "county")
    gateway.accounts.disable("officer", "gone")
    ended = gateway.accounts.add_operator("ended")
    gateway.accounts.rotate("operator", "ended", 0)
    refused = {
        "unknown id": new_key().text,
        "wrong secret": Key(known.key_id, new_key().secret).text,
        "disabled account": stolen.text,
        "ended key": ended.text,
        "no key at all": "hello",
        "cut off": keys.amap[:-1],
    }
    answers = [http.get("/t/partner", key=key, headers={"X-Request-Id": "same"}) for key in refused.values()]
    answers.append(http.get("/t/partner", headers={"X-Request-Id": "same"}))
    answers.append(http.get("/t/partner", headers={"X-Request-Id": "same", "Authorization": f"Basic {keys.amap}"}))
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.content for answer in answers}) == 1
    assert len({tuple(sorted(answer.headers.items())) for answer in answers}) == 1
    assert type_of(answers[0]) == "not-accepted"
    assert answers[0].headers["www-authenticate"] == 'Bearer realm="tuanyuan"'


def test_a_key_of_another_kind_is_refused_and_at_the_desk_written_down(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    for path, key in (("/t/officer", keys.amap), ("/t/operator", keys.county), ("/t/partner", keys.county)):
        answer = http.get(path, key=key)
        assert (answer.status_code, type_of(answer)) == (403, "not-for-you")
    rows = last_rows(client, 10)
    assert [(row.actor, row.action, row.outcome) for row in rows] == [
        ("partner:amap", "GET /t/officer", REFUSED),
        ("officer:西湖 值班", "GET /t/operator", REFUSED),
    ]


def test_refusals_cannot_fill_the_audit_log(http: Http, keys: Keys, client: redis.Redis) -> None:
    codes = [http.get("/t/officer", key=keys.amap).status_code for _ in range(70)]
    assert codes[:60] == [403] * 60
    assert codes[-1] == 429
    assert len(last_rows(client, 100)) <= 62


def test_a_disabled_account_ends_with_the_next_request(http: Http, gateway: Gateway, keys: Keys) -> None:
    assert http.get("/t/partner", key=keys.amap).status_code == 200
    gateway.accounts.disable("partner", "amap")
    assert http.get("/t/partner", key=keys.amap).status_code == 401


def test_a_signed_request_is_its_signers(http: Http, keys: Keys) -> None:
    answer = signed(http, keys.amap, "GET", "/t/partner?a=%20b")
    assert answer.json() == {"name": "amap", "index": 0, "signed": True}
    body = b"x" * 200_000
    assert signed(http, keys.amap, "POST", "/t/length", body).json() == {"bytes": 200_000}


def test_an_account_may_demand_signatures(http: Http, gateway: Gateway, keys: Keys) -> None:
    gateway.accounts.change_partner("amap", signed=True)
    answer = http.get("/t/partner", key=keys.amap)
    assert (answer.status_code, type_of(answer)) == (401, "signature-demanded")
    assert signed(http, keys.amap, "GET", "/t/partner").status_code == 200


def test_a_signed_request_that_is_sent_again_is_refused(http: Http, keys: Keys) -> None:
    headers = sign(keys.amap, "GET", "/t/partner")
    assert http.get("/t/partner", headers=headers).status_code == 200
    answer = http.get("/t/partner", headers=headers)
    assert (answer.status_code, type_of(answer)) == (401, "signature-replayed")


def test_a_nonce_is_remembered_for_as_long_as_its_signature_could_pass(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    signed(http, keys.amap, "GET", "/t/partner", nonce="0123456789abcdef")
    (name,) = cast("list[bytes]", client.keys("nonce:{desk}:*"))
    key = parse_key(keys.amap)
    assert key is not None
    assert name.decode() == f"nonce:{{desk}}:{key.key_id}:0123456789abcdef"
    assert client.ttl(name) > 2 * WINDOW_S
    # Another's nonce is its own.
    assert signed(http, keys.baidu, "GET", "/t/partner", nonce="0123456789abcdef").status_code == 200


@pytest.mark.parametrize("off_s", [-WINDOW_S - 5, WINDOW_S + 5])
def test_a_signature_of_another_time_is_refused(http: Http, keys: Keys, clock: TurnableClock, off_s: int) -> None:
    headers = sign(keys.amap, "GET", "/t/partner")
    clock.ahead_s = off_s
    answer = http.get("/t/partner", headers=headers)
    assert (answer.status_code, type_of(answer)) == (401, "signature-untimely")


def test_a_signature_is_good_for_its_method_path_query_and_body_alone(http: Http, keys: Keys) -> None:
    headers = sign(keys.amap, "POST", "/t/length", b"body")
    for method, url, body in (("POST", "/t/partner", b"body"), ("POST", "/t/length?a=1", b"body")):
        answer = http.request(method, url, content=body, headers=headers)
        assert (answer.status_code, type_of(answer)) == (401, "not-accepted")
    answer = http.post("/t/length", content=b"doby", headers=headers)
    assert (answer.status_code, type_of(answer)) == (401, "digest-differs")


def test_another_body_than_the_signed_one_is_refused_also_as_json(http: Http, keys: Keys) -> None:
    headers = sign(keys.amap, "POST", "/t/partner", b"{}") | {"Content-Type": "application/json"}
    answer = http.post("/t/partner", content=b"[]", headers=headers)
    assert (answer.status_code, type_of(answer)) == (401, "digest-differs")


def test_a_body_needs_a_signed_digest(http: Http, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.signing._COMPONENTS", ('"@method"', '"@path"', '"@query"'))
    headers = sign(keys.amap, "POST", "/t/length", b"body")
    del headers["Content-Digest"]
    monkeypatch.undo()
    answer = http.post("/t/length", content=b"body", headers=headers)
    assert (answer.status_code, type_of(answer)) == (401, "digest-demanded")


def test_a_signature_by_nobody_looks_like_any_other_refusal(http: Http, gateway: Gateway, keys: Keys) -> None:
    known = parse_key(keys.amap)
    assert known is not None
    disabled = gateway.accounts.add_operator("gone")
    gateway.accounts.disable("operator", "gone")
    for key in (new_key(), Key(known.key_id, new_key().secret), disabled):
        answer = signed(http, key.text, "GET", "/t/partner")
        assert (answer.status_code, type_of(answer)) == (401, "not-accepted")


def test_a_key_and_a_signature_together_are_not_understood(http: Http, keys: Keys) -> None:
    headers = sign(keys.amap, "GET", "/t/partner") | {"Authorization": f"Bearer {keys.baidu}"}
    answer = http.get("/t/partner", headers=headers)
    assert (answer.status_code, type_of(answer)) == (400, "two-credentials")
    answer = http.get("/t/partner", headers={"Signature": "sig=:x:"})
    assert (answer.status_code, type_of(answer)) == (400, "malformed-signature")


def test_nothing_is_written_without_a_key_whatever_the_path(http: Http, keys: Keys) -> None:
    for path in ("/t/length", "/nothing", "/healthz"):
        assert http.post(path, content=b"x" * 1000).status_code == 401


def test_a_key_has_a_limit_and_is_told_how_much_is_left(http: Http, keys: Keys, clock: TurnableClock) -> None:
    clock.stand()
    answers = [http.get("/t/partner", key=keys.amap) for _ in range(101)]
    assert [answer.status_code for answer in answers] == [200] * 100 + [429]
    assert answers[0].headers["ratelimit-policy"] == '"key";q=100;w=4'
    assert answers[0].headers["ratelimit"].startswith('"key";r=99;')
    refused = answers[-1]
    assert type_of(refused) == "rate-limit"
    assert int(refused.headers["retry-after"]) >= 1
    assert http.get("/t/partner", key=keys.baidu).status_code == 200  # others do not suffer
    clock.ahead_s = 5
    assert http.get("/t/partner", key=keys.amap).status_code == 200


def test_an_account_may_have_a_limit_of_its_own(http: Http, gateway: Gateway, keys: Keys, clock: TurnableClock) -> None:
    clock.stand()
    gateway.accounts.change_partner("amap", requests_per_s=0.5)
    answers = [http.get("/t/partner", key=keys.amap) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]


def test_guessing_keys_is_slowed_down_by_address(http: Http, keys: Keys, clock: TurnableClock) -> None:
    clock.stand()
    codes = [http.get("/t/partner", key=new_key().text).status_code for _ in range(22)]
    assert codes == [401] * 20 + [429] * 2
    assert http.get("/t/partner", key=keys.amap).status_code == 200  # a valid key from the same address goes through
    clock.ahead_s = 1
    assert http.get("/t/partner", key=new_key().text).status_code == 401
