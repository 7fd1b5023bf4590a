"""Webhooks from registration to delivery: a real server, a gateway, and a partner's own server on the loopback."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from anyio.from_thread import BlockingPortal
from fastapi import FastAPI
from standardwebhooks import Webhook as Verifier

from flows.consumers import Consumer
from flows.dead_letters import dead_letters, replay
from flows.embedded import EmbeddedServer
from flows.log import push_key
from flows.metrics import Metrics
from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.handover import GROUP, handed_over
from gateway.keys import Sealer
from gateway.pushes import PushQueues
from gateway.runtime import Gateway
from gateway.webhook_plan import DOWN_AFTER, TRIES_MAX, Pace
from gateway.webhook_settings import Webhook, new_secret, read_webhook, replace_webhook, sealed_secret, tries_key
from gateway.webhooks import WebhookDeliveries
from geoindex.entries import Settings
from tests.flows.waiting import eventually
from tests.gateway.conftest import Http, Keys
from tests.gateway.queues import devices, name, put
from tests.gateway.receivers import OK, Answer, Received, Receiver, receiving

FAST = Pace(base_s=0.002, retry_s_max=0.02, probe_s_max=0.02)
PATIENCE_S = 30.0


@pytest.fixture
def config(server: EmbeddedServer, tmp_path: Path) -> GatewayConfig:
    return GatewayConfig(
        valkey=server.url, var=tmp_path / "var", webhook_private_addresses=True, webhook_timeout_s=10.0
    )


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


# --- registration -----------------------------------------------------------------------------------------------------


def verified(request: Received, *secrets: str) -> None:
    """Raises WebhookVerificationError unless each of these secrets signed it."""
    for secret in secrets:
        Verifier(secret).verify(request.body, request.headers)


def put_webhook(http: Http, key: str, **body: Any) -> dict[str, Any]:
    answer = http.put("/v1/webhook", key=key, json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert isinstance(found, dict)
    return found


def test_url_is_verified_by_a_signed_test_event_and_its_secret_is_shown_once(
    http: Http, keys: Keys, receiver: Receiver
) -> None:
    made = put_webhook(http, keys.amap, url=receiver.url)
    assert (made["state"], made["test"]) == ("active", {"accepted": True, "status": 200, "reason": "answered 200"})
    (request,) = receiver.requests
    verified(request, made["secret"])
    assert (request.event["type"], request.event["data"]) == ("webhook.test", {"partner": "amap"})
    shown = http.get("/v1/webhook", key=keys.amap)
    assert (shown.json()["state"], shown.json()["secret"]) == ("active", None)
    assert made["secret"] not in shown.text
    assert http.get("/v1/webhook", key=keys.baidu).status_code == 404


def test_secrets_are_kept_sealed(http: Http, keys: Keys, receiver: Receiver, client: redis.Redis) -> None:
    secret = put_webhook(http, keys.amap, url=receiver.url)["secret"]
    for key in client.keys("*webhook*"):
        if client.type(key) == b"string":
            assert base64.b64decode(secret.removeprefix("whsec_")) not in (client.get(key) or b"")
            assert secret.encode() not in (client.get(key) or b"")


def test_receiver_that_must_know_the_secret_first_is_given_it_and_tested_again(
    http: Http, keys: Keys, receiver: Receiver
) -> None:
    known: list[str] = []

    def strict(request: Received) -> Answer:
        try:
            verified(request, *known)
        except Exception:
            return 401, {}, b""
        return (200 if known else 401), {}, b""

    receiver.answer = strict
    made = put_webhook(http, keys.amap, url=receiver.url)
    assert (made["state"], made["reason"]) == ("unverified", "answered 401")
    assert http.get("/v1/pushes", key=keys.amap).status_code == 200
    known.append(made["secret"])
    tested = http.post("/v1/webhook/test", key=keys.amap).json()
    assert (tested["state"], tested["secret"], tested["test"]["accepted"]) == ("active", None, True)
    assert http.get("/v1/pushes", key=keys.amap).status_code == 409


def test_own_secret_is_used_and_rotation_signs_with_both(http: Http, keys: Keys, receiver: Receiver) -> None:
    own = new_secret()
    assert put_webhook(http, keys.amap, url=receiver.url, secret=own)["secret"] is None
    verified(receiver.requests[-1], own)
    made = put_webhook(http, keys.amap, url=receiver.url, rotate_secret=True)
    verified(receiver.requests[-1], own, made["secret"])
    assert len(receiver.requests[-1].headers["webhook-signature"].split(" ")) == 2
    assert made["old_secret_until"] > made["changed_at"]
    # The same url once more, with nothing said of secrets, keeps them.
    assert put_webhook(http, keys.amap, url=receiver.url)["secret"] is None
    verified(receiver.requests[-1], own, made["secret"])


def test_active_webhook_stays_as_it_was_if_the_new_url_is_not_verified(
    http: Http, keys: Keys, receiver: Receiver, client: redis.Redis
) -> None:
    put_webhook(http, keys.amap, url=receiver.url)
    before = read_webhook(client, "amap")
    with receiving() as other:
        other.answer = lambda _: (500, {}, b"")
        answer = http.put("/v1/webhook", key=keys.amap, json={"url": other.url, "rotate_secret": True})
    assert answer.status_code == 422
    assert answer.json()["detail"] == "the test event must be accepted, got: answered 500; nothing was changed"
    assert read_webhook(client, "amap") == before


@pytest.mark.parametrize(
    "body",
    [
        {"url": "ftp://example.org/"},
        {"url": "https://user@example.org/"},
        {"url": "https://example.org/", "secret": "whsec_c2hvcnQ="},
        {"url": "https://example.org/", "secret": "no secret"},
        {"url": "https://example.org/", "secret": new_secret(), "rotate_secret": True},
        {"url": "https://example.org/", "more": 1},
        {},
    ],
)
def test_registrations_that_make_no_sense_are_refused(http: Http, keys: Keys, body: dict[str, Any]) -> None:
    answer = http.put("/v1/webhook", key=keys.amap, json=body)
    assert answer.status_code == 422
    assert "whsec_c2hvcnQ" not in answer.json()["detail"]
    assert http.get("/v1/webhook", key=keys.amap).status_code == 404


def test_tests_are_limited_for_they_go_where_the_partner_says(http: Http, keys: Keys, receiver: Receiver) -> None:
    statuses = [http.put("/v1/webhook", key=keys.amap, json={"url": receiver.url}).status_code for _ in range(12)]
    assert statuses.count(429) >= 1
    assert len(receiver.requests) == statuses.count(200)


def test_secret_that_another_key_file_sealed_is_said_to_be_lost(
    http: Http, keys: Keys, receiver: Receiver, client: redis.Redis
) -> None:
    stranger = Sealer([b"x" * 32])
    sealed = sealed_secret(stranger, "amap", new_secret())
    webhook = Webhook(url=receiver.url, state="active", secrets=(sealed,), created_at_ms=1, changed_at_ms=1)
    assert replace_webhook(client, "amap", None, webhook)
    assert http.post("/v1/webhook/test", key=keys.amap).json()["type"].endswith("secret-lost")
    assert http.delete("/v1/webhook", key=keys.amap).status_code == 204
    assert put_webhook(http, keys.amap, url=receiver.url)["state"] == "active"


def test_deleted_webhook_leaves_the_pushes_to_polls(http: Http, keys: Keys, receiver: Receiver) -> None:
    put_webhook(http, keys.amap, url=receiver.url)
    assert http.delete("/v1/webhook", key=keys.amap).status_code == 204
    assert http.delete("/v1/webhook", key=keys.amap).status_code == 404
    assert http.post("/v1/webhook/test", key=keys.amap).status_code == 404
    assert http.get("/v1/pushes", key=keys.amap).status_code == 200


def test_webhook_of_a_running_gateway_gets_what_comes(
    http: Http, keys: Keys, receiver: Receiver, client: redis.Redis
) -> None:
    entry_id = put(client, 0, 7, ["before"])
    put_webhook(http, keys.amap, url=receiver.url)
    eventually(lambda: receiver.accepted, PATIENCE_S)
    put(client, 1, 8, ["after"])
    eventually(lambda: len(receiver.accepted) == 2, PATIENCE_S)
    first, second = receiver.accepted
    assert (first.id, first.devices, second.devices) == (name(0, entry_id), ["before"], ["after"])
    assert first.event["type"] == "push.alert"
    assert first.event["timestamp"] == "2025-11-24T16:00:00.000Z"
    assert first.event["data"] == {
        "id": name(0, entry_id),
        "alert_id": "a17",
        "revision": 1,
        "kind": "alert",
        "ring_km": 100.0,
        "at": 1_764_000_000_000,
        "device_ids": ["before"],
    }
    eventually(lambda: handed_over(client, 2, "a17", ["amap"])["amap"].acknowledged["alert"] == 2, PATIENCE_S)


# --- delivery ---------------------------------------------------------------------------------------------------------


@contextmanager
def delivering(gateway: Gateway, portal: BlockingPortal, **options: Any) -> Iterator[WebhookDeliveries]:
    """What a running gateway does for webhooks, at a pace for tests."""
    loop = portal.call(_running_loop)
    queues = PushQueues(gateway.client, loop, gateway.metrics)
    queues.start()
    settings: dict[str, Any] = {"pace": FAST, "round_s": 0.02, "look_every_s": 0.05} | options
    deliveries = WebhookDeliveries(gateway, loop, queues, **settings)
    deliveries.start()
    try:
        yield deliveries
    finally:
        deliveries.stop()
        queues.stop()


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def register(gateway: Gateway, url: str, partner: str = "amap") -> Webhook:
    secret = sealed_secret(gateway.sealer, partner, new_secret())
    webhook = Webhook(url=url, state="active", secrets=(secret,), created_at_ms=1, changed_at_ms=1)
    assert replace_webhook(gateway.client, partner, read_webhook(gateway.client, partner), webhook)
    return webhook


def pending(client: redis.Redis, partner: str = "amap") -> int:
    found = 0
    for shard in (0, 1):
        groups = client.xinfo_groups(push_key(shard, partner))
        found += sum(group["pending"] + (group["lag"] or 0) for group in groups)
    return found


def story_of(client: redis.Redis) -> list[str]:
    """Twelve devices of one alert on two shards, from `alert` to `resolved`, in an order that must be kept for each."""
    wanted = []
    for shard in (0, 1):
        log_ms = 10
        for kind, revision in (("alert", 1), ("update", 2), ("alert", 2), ("resolved", 3)):
            for part in range(3):
                new = f"{shard}-{part}-new"
                old = f"{shard}-{part}"
                told = {"alert": [old] if revision == 1 else [new], "update": [old], "resolved": [old, new]}[kind]
                put(client, shard, log_ms, told, kind=kind, revision=revision)
                wanted += [f"{device} {kind} {revision}" for device in told]
                log_ms += 1
    return wanted


def told(receiver: Receiver) -> list[str]:
    """What devices were told, once each, in the order of the answers."""
    seen: dict[str, None] = {}
    for request in receiver.accepted:
        push = request.event["data"]
        for device in push["device_ids"]:
            seen.setdefault(f"{device} {push['kind']} {push['revision']}")
    return list(seen)


def in_order(told: list[str]) -> bool:
    """Whether every device was told `alert`, then updates, then `resolved`."""
    rank = {"alert": 0, "update": 1, "resolved": 2}
    ranks: dict[str, list[int]] = {}
    for one in told:
        device, kind, _ = one.split()
        ranks.setdefault(device, []).append(rank[kind])
    return all(found == sorted(found) for found in ranks.values())


@pytest.mark.usefixtures("keys")
def test_everything_arrives_once_and_in_order(
    gateway: Gateway, portal: BlockingPortal, receiver: Receiver, client: redis.Redis
) -> None:
    wanted = story_of(client)
    register(gateway, receiver.url)
    with delivering(gateway, portal):
        eventually(lambda: len(receiver.accepted) == 24, PATIENCE_S)
        eventually(lambda: pending(client) == 0, PATIENCE_S)
    assert sorted(told(receiver)) == sorted(wanted)
    assert in_order(told(receiver))
    assert len({request.id for request in receiver.accepted}) == 24
    handed = handed_over(client, 2, "a17", ["amap"])["amap"]
    assert handed.acknowledged == {"alert": 12, "update": 6, "resolved": 12}
    assert gateway.metrics.value("webhook_deliveries_total", partner="amap", kind="push", outcome="accepted") == 24


@pytest.mark.usefixtures("keys")
def test_receiver_that_was_down_gets_everything_in_order_once_it_is_up(
    gateway: Gateway, portal: BlockingPortal, client: redis.Redis
) -> None:
    with receiving() as receiver:
        pass  # its port is known, and nobody listens there
    wanted = story_of(client)
    register(gateway, receiver.url)
    with delivering(gateway, portal):

        def down_for_long() -> bool:
            return (
                gateway.metrics.value("webhook_deliveries_total", partner="amap", kind="test", outcome="unreachable")
                >= 2 * TRIES_MAX
            )

        eventually(down_for_long, PATIENCE_S)
        with receiving(receiver):
            eventually(lambda: len(receiver.accepted) == 24, PATIENCE_S)
            eventually(lambda: pending(client) == 0, PATIENCE_S)
    assert sorted(told(receiver)) == sorted(wanted)
    assert in_order(told(receiver))
    assert dead_letters(client, "amap", 2) == []


@pytest.mark.usefixtures("keys")
def test_failures_here_and_there_break_no_order(
    gateway: Gateway, portal: BlockingPortal, receiver: Receiver, client: redis.Redis
) -> None:
    seen: dict[str, int] = {}

    def moody(request: Received) -> Answer:
        if not request.is_push:
            return OK
        count = seen[request.id] = seen.get(request.id, 0) + 1
        return OK if count > sum(map(ord, request.id)) % 3 else (500, {}, b"")

    receiver.answer = moody
    wanted = story_of(client)
    register(gateway, receiver.url)
    with delivering(gateway, portal):
        eventually(lambda: len(receiver.accepted) == 24, PATIENCE_S)
    assert max(seen.values()) == 3
    assert sorted(told(receiver)) == sorted(wanted)
    assert in_order(told(receiver))


@pytest.mark.usefixtures("keys")
def test_entry_that_the_receiver_cannot_stomach_is_a_dead_letter_and_can_be_replayed(
    gateway: Gateway, portal: BlockingPortal, receiver: Receiver, client: redis.Redis
) -> None:
    poison = put(client, 0, 7, ["poison"])
    for log_ms in range(8, 20):
        put(client, log_ms % 2, log_ms, [f"fine-{log_ms}"])
    healed = threading.Event()
    receiver.answer = lambda request: (
        (500, {}, b"") if request.is_push and request.devices == ["poison"] and not healed.is_set() else OK
    )
    register(gateway, receiver.url)
    with delivering(gateway, portal):
        eventually(lambda: dead_letters(client, "amap", 2), PATIENCE_S)
        (letter,) = dead_letters(client, "amap", 2)
        assert (letter.entry_id, letter.group, letter.delivery_count) == (poison, GROUP, TRIES_MAX)
        assert letter.reason == "not accepted: answered 500"
        eventually(lambda: pending(client) == 0, PATIENCE_S)
        assert len(receiver.accepted) == 12
        eventually(lambda: client.hgetall(tries_key("amap")) == {}, PATIENCE_S)
        healed.set()
        replay(client, [letter])
        eventually(lambda: len(receiver.accepted) == 13, PATIENCE_S)
        eventually(lambda: dead_letters(client, "amap", 2) == [], PATIENCE_S)
    assert receiver.accepted[-1].id == name(0, poison)
    assert handed_over(client, 2, "a17", ["amap"])["amap"].acknowledged["alert"] == 13


@pytest.mark.usefixtures("keys")
def test_entry_that_is_no_push_is_a_dead_letter_and_holds_up_nothing(
    gateway: Gateway, portal: BlockingPortal, receiver: Receiver, client: redis.Redis
) -> None:
    client.xadd(push_key(0, "amap"), {b"alert": b"\xff"}, id="6-1")
    put(client, 0, 7, ["fine"])
    register(gateway, receiver.url)
    with delivering(gateway, portal):
        eventually(lambda: receiver.accepted, PATIENCE_S)
        eventually(lambda: pending(client) == 0, PATIENCE_S)
    (letter,) = dead_letters(client, "amap", 2)
    assert letter.reason == "cannot be decoded: must be a msgpack map"


@pytest.mark.usefixtures("keys")
def test_receiver_that_wants_no_more_is_left_alone_and_polls_get_the_rest(
    gateway: Gateway, portal: BlockingPortal, receiver: Receiver, client: redis.Redis
) -> None:
    receiver.answer = lambda _: (410, {}, b"")
    put(client, 0, 7, ["a"])
    register(gateway, receiver.url)

    def disabled() -> bool:
        found = read_webhook(client, "amap")
        return found is not None and found.state == "disabled" and found.reason == "answered 410"

    with delivering(gateway, portal):
        eventually(disabled, PATIENCE_S)
    assert len(receiver.requests) == 1
    assert pending(client) == 1


def test_pushes_of_a_webhook_that_ends_are_the_polls_at_once(
    app: FastAPI, gateway: Gateway, portal: BlockingPortal, keys: Keys, client: redis.Redis, request: Any
) -> None:
    with receiving() as receiver:
        receiver.answer = lambda _: (500, {}, b"")
        put(client, 0, 7, ["a"])
        webhook = register(gateway, receiver.url)
        with delivering(gateway, portal):
            eventually(lambda: len(receiver.requests) > DOWN_AFTER, PATIENCE_S)
    assert replace_webhook(client, "amap", webhook, None)
    http = request.getfixturevalue("http")
    answer = http.get("/v1/pushes", key=keys.amap).json()["pushes"]
    assert (devices(answer), answer[0]["delivery_count"]) == (["a"], 1)


@pytest.mark.usefixtures("keys")
def test_pushes_that_a_poll_took_and_let_lie_are_delivered(
    gateway: Gateway, portal: BlockingPortal, receiver: Receiver, client: redis.Redis
) -> None:
    for log_ms in range(1, 101):
        put(client, 0, log_ms, [f"{log_ms}"], kind="update", revision=log_ms)
    client.xgroup_create(push_key(0, "amap"), GROUP, id="0")
    client.xreadgroup(GROUP, "poller", {push_key(0, "amap"): ">"}, count=70)
    register(gateway, receiver.url)
    with delivering(gateway, portal):
        eventually(lambda: len(receiver.accepted) == 100, PATIENCE_S)
    assert [request.devices for request in receiver.accepted] == [[f"{log_ms}"] for log_ms in range(1, 101)]


@pytest.mark.usefixtures("keys")
def test_of_two_gateways_one_delivers_and_the_other_takes_over(
    config: GatewayConfig,
    gateway: Gateway,
    portal: BlockingPortal,
    receiver: Receiver,
    client: redis.Redis,
    settings: Settings,
) -> None:
    other = create_app(config, client, Metrics()).state.gateway
    for log_ms in range(1, 41):
        put(client, log_ms % 2, log_ms, [f"{log_ms}"])
    register(gateway, receiver.url)
    with delivering(other, portal):
        with delivering(gateway, portal):
            eventually(lambda: len(receiver.accepted) == 40, PATIENCE_S)
            eventually(lambda: pending(client) == 0, PATIENCE_S)
            working = [
                one.metrics.value("webhook_deliveries_total", partner="amap", kind="push", outcome="accepted")
                for one in (gateway, other)
            ]
            assert sorted(working) == [0, 40]
        with delivering(gateway, portal):
            put(client, 0, 50, ["late"])
            eventually(lambda: len(receiver.accepted) == 41, PATIENCE_S)
    assert len({request.id for request in receiver.accepted}) == 41


@pytest.mark.usefixtures("keys")
def test_another_gateway_delivers_when_the_lease_of_a_dead_one_has_run_out(
    gateway: Gateway, portal: BlockingPortal, receiver: Receiver, client: redis.Redis
) -> None:
    put(client, 0, 7, ["a"])
    client.set("webhook-lease:{desk}:amap", "a gateway that died", px=300)
    register(gateway, receiver.url)
    with delivering(gateway, portal):
        eventually(lambda: receiver.accepted, PATIENCE_S)
    assert client.pttl("webhook-lease:{desk}:amap") == -2


@pytest.mark.usefixtures("keys")
def test_failures_that_counted_are_remembered_over_a_restart(
    gateway: Gateway, portal: BlockingPortal, receiver: Receiver, client: redis.Redis
) -> None:
    entry_id = put(client, 0, 7, ["poison"])
    receiver.answer = lambda request: (500, {}, b"") if request.is_push else OK
    register(gateway, receiver.url)
    for tries in range(1, TRIES_MAX + 1):
        receiver.requests.clear()
        with delivering(gateway, portal, pace=Pace(base_s=60.0)):
            eventually(lambda: receiver.requests, PATIENCE_S)
        if tries < TRIES_MAX:
            assert client.hgetall(tries_key("amap")) == {name(0, entry_id).encode(): f"{tries}".encode()}
    assert [letter.entry_id for letter in dead_letters(client, "amap", 2)] == [entry_id]


@pytest.mark.usefixtures("keys")
def test_time_that_the_receiver_asks_for_is_given(
    gateway: Gateway, portal: BlockingPortal, receiver: Receiver, client: redis.Redis
) -> None:
    put(client, 0, 7, ["a"])
    receiver.answer = lambda _: (429, {"retry-after": "1000"}, b"")
    register(gateway, receiver.url)
    with delivering(gateway, portal):
        eventually(lambda: receiver.requests, PATIENCE_S)
        put(client, 1, 8, ["b"])
        eventually(lambda: pending(client) == 2, PATIENCE_S)
    assert len(receiver.requests) == 1
    assert client.hgetall(tries_key("amap")) == {}


@pytest.mark.usefixtures("keys")
def test_partners_do_not_wait_for_each_other(
    gateway: Gateway, portal: BlockingPortal, receiver: Receiver, client: redis.Redis
) -> None:
    with receiving() as away:
        pass
    put(client, 0, 7, ["a"], partner="baidu")
    register(gateway, away.url, "baidu")
    put(client, 0, 7, ["a"])
    register(gateway, receiver.url)
    with delivering(gateway, portal):
        eventually(lambda: receiver.accepted, PATIENCE_S)
    assert pending(client, "baidu") == 1


# --- dead letters by HTTP ---------------------------------------------------------------------------------------------


def test_dead_letters_are_listed_page_by_page_and_only_ones_own(http: Http, keys: Keys, client: redis.Redis) -> None:
    for shard in (0, 1):
        client.xgroup_create(push_key(shard, "amap"), "app", id="0", mkstream=True)
        for number in range(1, 4):
            client.xadd(push_key(shard, "amap"), {b"alert": b"\xff"}, id=f"8-{number}")
    Consumer(client, "amap", 2, "app", metrics=Metrics()).read(block_s=0)
    found: list[dict[str, Any]] = []
    after: str | None = None
    pages = 0
    while pages == 0 or after is not None:
        query = {"max": 2} | ({} if after is None else {"after": after})
        page = http.get("/v1/dead-letters", key=keys.amap, params=query).json()
        found += page["dead_letters"]
        after, pages = page["next"], pages + 1
    assert pages == 3
    assert [letter["entry_id"] for letter in found] == [f"s{s}:p0:8-{n}" for s in (0, 1) for n in (1, 2, 3)]
    assert {(letter["group"], letter["push"], letter["replayed"]) for letter in found} == {("app", None, False)}
    assert http.get("/v1/dead-letters", key=keys.baidu).json() == {"dead_letters": [], "next": None}
    answer = http.post("/v1/dead-letters/replay", key=keys.baidu, json={"ids": [found[0]["id"], "nonsense"]})
    assert answer.json() == {"replayed": 0, "unknown": [found[0]["id"], "nonsense"]}


@pytest.mark.parametrize("after", ["x", "s1", "s1:5", "s-1:5-0", "s1:5-99999999999999999999", "s1:٣-0", "3:5-0"])
def test_pages_that_do_not_exist_are_refused(http: Http, keys: Keys, after: str) -> None:
    assert http.get("/v1/dead-letters", key=keys.amap, params={"after": after}).status_code == 422
