"""Long polls and acknowledgements, on a real server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import msgpack
import pytest
import redis
from fastapi import FastAPI

from flows.consumers import DELIVERIES_MAX
from flows.dead_letters import dead_letters
from flows.log import format_id, push_key
from flows.metrics import Metrics
from flows.queue_keeper import QueueKeeper
from flows.server import link_opener
from gateway.handover import GROUP, EntryName, acknowledge, forget_handed, handed_over
from gateway.pushes import PushQueue, PushQueues
from gateway.runtime import Gateway
from geoindex.entries import Settings
from tests.flows.waiting import eventually, memory_limit
from tests.gateway.conftest import SETTINGS, Http, Keys
from tests.gateway.queues import devices, name, put

# --- by HTTP ----------------------------------------------------------------------------------------------------------


def poll(http: Http, key: str, **query: Any) -> list[dict[str, Any]]:
    answer = http.get("/v1/pushes", key=key, params=query)
    assert answer.status_code == 200, answer.text
    pushes = answer.json()["pushes"]
    assert isinstance(pushes, list)
    return pushes


def ack(http: Http, key: str, ids: list[str]) -> dict[str, Any]:
    answer = http.post("/v1/pushes/ack", key=key, json={"ids": ids})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert isinstance(found, dict)
    return found


def test_partner_takes_its_pushes_of_all_shards_and_acknowledges_them(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    first, second = put(client, 0, 7, ["a", "b"]), put(client, 1, 7, ["c"], kind="update", revision=2)
    put(client, 1, 7, ["other"], partner="baidu")
    pushes = poll(http, keys.amap)
    assert sorted(devices(pushes)) == ["a", "b", "c"]
    by_id = {push["id"]: push for push in pushes}
    assert by_id[name(1, second)] == {
        "id": name(1, second),
        "alert_id": "a17",
        "revision": 2,
        "kind": "update",
        "ring_km": 100.0,
        "at": 1_764_000_000_000,
        "device_ids": ["c"],
        "delivery_count": 1,
    }
    assert poll(http, keys.amap) == []
    ids = [name(0, first), name(1, second)]
    assert ack(http, keys.amap, ids) == {"acknowledged": 2, "refused": []}
    assert ack(http, keys.amap, ids[:1])["refused"] == [{"id": ids[0], "reason": "unknown"}]
    assert client.xpending(push_key(0, "amap"), GROUP)["pending"] == 0


def test_msgpack_holds_the_same_as_json(http: Http, keys: Keys, client: redis.Redis) -> None:
    put(client, 0, 7, ["a"])
    answer = http.get("/v1/pushes", key=keys.amap, headers={"Accept": "application/msgpack"})
    assert answer.headers["content-type"] == "application/msgpack"
    found = msgpack.unpackb(answer.content)
    assert devices(found["pushes"]) == ["a"]
    assert found["claim_after_s"] == 60.0


def test_ids_of_another_partner_are_refused_and_named_and_the_others_acknowledged(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    # Entries of one log entry have one id in every partner's queue.
    own, foreign = put(client, 0, 7, ["a"]), put(client, 0, 7, ["b"], partner="baidu")
    assert own == foreign
    poll(http, keys.amap)
    poll(http, keys.baidu)
    names = {"own": name(0, own), "foreign": name(0, foreign, "baidu"), "shard": f"s9:p0:{format_id(own)}"}
    assert ack(http, keys.amap, [names["foreign"]])["acknowledged"] == 0
    found = ack(http, keys.amap, ["nonsense", *names.values(), names["own"]])
    assert found["acknowledged"] == 1
    assert {one["id"]: one["reason"] for one in found["refused"]} == {
        "nonsense": "malformed",
        names["foreign"]: "not_yours",
        names["shard"]: "unknown",
    }
    assert client.xpending(push_key(0, "baidu"), GROUP)["pending"] == 1
    assert ack(http, keys.baidu, [names["foreign"]])["acknowledged"] == 1


def test_an_answer_is_bounded_by_entries(http: Http, keys: Keys, client: redis.Redis) -> None:
    for number in range(1, 6):
        put(client, number % 2, number, [f"{number}"])
    assert [len(poll(http, keys.amap, max=2)) for _ in range(4)] == [2, 2, 1, 0]


@pytest.mark.parametrize("query", [{"max": 0}, {"max": 1_001}, {"wait": -1}, {"wait": 61}, {"max": "x"}])
def test_queries_out_of_bounds_are_refused(http: Http, keys: Keys, query: dict[str, Any]) -> None:
    assert http.get("/v1/pushes", key=keys.amap, params=query).status_code == 422


def test_pushes_are_for_partners_alone(http: Http, keys: Keys) -> None:
    assert http.get("/v1/pushes").status_code == 401
    assert http.get("/v1/pushes", key=keys.county).status_code == 403
    assert http.post("/v1/pushes/ack", key=keys.county, json={"ids": ["x"]}).status_code == 403


def test_a_long_poll_brings_the_push_that_comes_while_it_waits(http: Http, keys: Keys, client: redis.Redis) -> None:
    poll(http, keys.amap)
    found: list[dict[str, Any]] = []
    waiting = threading.Thread(target=lambda: found.extend(poll(http, keys.amap, wait=30)))
    waiting.start()
    put(client, 1, 7, ["late"])
    waiting.join(20)
    assert devices(found) == ["late"]


def test_a_long_poll_without_pushes_ends_empty(http: Http, keys: Keys) -> None:
    assert poll(http, keys.amap, wait=0.05) == []


def test_poison_that_is_never_acknowledged_goes_to_the_dead_letters(
    http: Http, keys: Keys, client: redis.Redis, gateway: Gateway
) -> None:
    poison, fine = put(client, 0, 7, ["poison"]), put(client, 0, 8, ["fine"])
    queue = gateway.service(PushQueues).of("amap", SETTINGS)
    ack(http, keys.amap, [push["id"] for push in poll(http, keys.amap) if push["device_ids"] == ["fine"]])
    assert format_id(fine)
    for count in range(2, DELIVERIES_MAX + 1):
        _grow_old(client, 0)
        queue._consumer._claim_at_s = 0.0
        assert [push["delivery_count"] for push in poll(http, keys.amap)] == [count]
    _grow_old(client, 0)
    queue._consumer._claim_at_s = 0.0
    assert poll(http, keys.amap) == []
    (letter,) = dead_letters(client, "amap", 2)
    assert (letter.entry_id, letter.group, letter.delivery_count) == (poison, GROUP, 5)


def _grow_old(client: redis.Redis, shard: int) -> None:
    """A minute passes for what is pending there, as the server sees it."""
    key = push_key(shard, "amap")
    for one in client.xpending_range(key, GROUP, "-", "+", 100):
        owner = cast(bytes, one["consumer"])
        client.xclaim(key, GROUP, owner, 0, [cast(bytes, one["message_id"])], idle=61_000, justid=True)


def test_queue_that_was_acknowledged_can_be_trimmed(http: Http, keys: Keys, client: redis.Redis) -> None:
    for shard in (0, 1):
        client.set(f"trimmed:{{s{shard}}}", "100-0")
        client.set(f"done:{{s{shard}}}", "100-0")
        put(client, shard, 7, ["a"])
    keeper = QueueKeeper(link_opener(client), range(2), Metrics())
    poll(http, keys.amap)
    assert keeper.round() == 0
    ack(http, keys.amap, [name(shard, (7, 1)) for shard in (0, 1)])
    assert keeper.round() == 2


# --- what was handed over ---------------------------------------------------------------------------------------------


def test_devices_are_counted_once_when_they_are_acknowledged(http: Http, keys: Keys, client: redis.Redis) -> None:
    alert_id = "寻找-" + "长" * 60  # longer than msgpack's short texts
    entries = [put(client, 0, 7, ["a", "b"], alert_id=alert_id), put(client, 1, 7, ["c"], alert_id=alert_id)]
    put(client, 0, 8, ["a"], alert_id=alert_id, kind="resolved")
    put(client, 1, 8, ["d"], alert_id="another")
    poll(http, keys.amap)
    handed = handed_over(client, 2, alert_id, ["amap", "baidu"])
    assert handed["amap"].delivered == {"alert": 3, "update": 0, "resolved": 1}
    assert handed["amap"].acknowledged == {"alert": 0, "update": 0, "resolved": 0}
    ids = [name(shard, entry_id) for shard, entry_id in enumerate(entries)]
    ack(http, keys.amap, [*ids, *ids])
    ack(http, keys.amap, ids)
    handed = handed_over(client, 2, alert_id, ["amap", "baidu"])
    assert handed["amap"].acknowledged == {"alert": 3, "update": 0, "resolved": 0}
    assert handed["baidu"].delivered == {"alert": 0, "update": 0, "resolved": 0}
    forget_handed(client, 2, alert_id, ["amap", "baidu"])
    assert handed_over(client, 2, alert_id, ["amap"])["amap"].delivered["alert"] == 0
    assert handed_over(client, 2, "another", ["amap"])["amap"].delivered["alert"] == 1


def test_acknowledgements_of_two_gateways_at_once_count_once(client: redis.Redis, settings: Settings) -> None:
    entries = [put(client, 0, log_ms, ["a", "b", "c"]) for log_ms in range(7, 87)]
    client.xgroup_create(push_key(0, "amap"), GROUP, id="0")
    client.xreadgroup(GROUP, "one", {push_key(0, "amap"): ">"}, count=1_000)
    done: list[int] = []
    names = [EntryName(0, 0, entry_id) for entry_id in entries]

    def all_of_them() -> None:
        done.append(len(acknowledge(client, "amap", names)))

    threads = [threading.Thread(target=all_of_them) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(done) == 80
    assert handed_over(client, 1, "a17", ["amap"])["amap"].acknowledged["alert"] == 240


def test_a_full_server_still_takes_acknowledgements(http: Http, keys: Keys, client: redis.Redis) -> None:
    entry_id = put(client, 0, 7, ["a"])
    poll(http, keys.amap)
    with memory_limit(client, 1):
        assert acknowledge(client, "amap", [EntryName(0, 0, entry_id)])
    assert handed_over(client, 2, "a17", ["amap"])["amap"].acknowledged["alert"] == 1


def test_dead_letter_that_is_replayed_is_acknowledged_under_its_entrys_id(
    http: Http, keys: Keys, client: redis.Redis, gateway: Gateway
) -> None:
    entry_id = put(client, 1, 7, ["a", "b"])
    poll(http, keys.amap)
    for _ in range(DELIVERIES_MAX):
        _deliver_in_vain(client)
    queue = gateway.service(PushQueues).of("amap", SETTINGS)
    _grow_old(client, 1)
    queue._consumer._claim_at_s = 0.0
    assert poll(http, keys.amap) == []
    letters = http.get("/v1/dead-letters", key=keys.amap).json()["dead_letters"]
    assert [(letter["entry_id"], letter["push"]["device_ids"]) for letter in letters] == [
        (name(1, entry_id), ["a", "b"])
    ]
    replayed = http.post("/v1/dead-letters/replay", key=keys.amap, json={"ids": [letters[0]["id"]]})
    assert replayed.json() == {"replayed": 1, "unknown": []}
    queue._consumer._claim_at_s = 0.0
    assert [push["id"] for push in poll(http, keys.amap)] == [name(1, entry_id)]
    assert ack(http, keys.amap, [name(1, entry_id)]) == {"acknowledged": 1, "refused": []}
    assert dead_letters(client, "amap", 2) == []
    assert handed_over(client, 2, "a17", ["amap"])["amap"].acknowledged["alert"] == 2


def _deliver_in_vain(client: redis.Redis) -> None:
    key = push_key(1, "amap")
    for one in client.xpending_range(key, GROUP, "-", "+", 10):
        client.xclaim(key, GROUP, cast(bytes, one["consumer"]), 0, [cast(bytes, one["message_id"])])


# --- many who wait, clients that go away, several gateways ------------------------------------------------------------


@asynccontextmanager
async def queues_of(client: redis.Redis, **options: Any) -> AsyncIterator[PushQueues]:
    queues = PushQueues(client, asyncio.get_running_loop(), Metrics(), **options)
    queues.start()
    try:
        yield queues
    finally:
        await asyncio.to_thread(queues.stop)


def within(client: redis.Redis, story: Callable[[PushQueues], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), queues_of(client, **options) as queues:
            await story(queues)

    asyncio.run(run())


async def taken(queue: PushQueue, entries_max: int = 100, wait_s: float = 30.0) -> list[str]:
    return [one for delivery in await queue.take(entries_max, wait_s) for one in delivery.push.device_ids]


@pytest.mark.usefixtures("settings")
def test_hundreds_who_wait_are_one_thread_and_each_push_goes_to_one_of_them(client: redis.Redis) -> None:
    async def story(queues: PushQueues) -> None:
        waiting = [
            asyncio.ensure_future(taken(queues.of(partner, SETTINGS), 1, 30.0))
            for partner in ("amap", "baidu")
            for _ in range(150)
        ]
        while queues._metrics.value("push_waits") < 2:
            await asyncio.sleep(0.001)
        threads = [thread for thread in threading.enumerate() if thread.name == "queue-watcher"]
        assert len(threads) == 1
        for number in range(20):
            await asyncio.to_thread(put, client, number % 2, 7 + number, [f"{number}"])
        done: set[asyncio.Future[list[str]]] = set()
        while len(done) < 20:
            done |= (await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))[0]
            waiting = [one for one in waiting if one not in done]
        assert sorted((device for one in done for device in one.result()), key=int) == [str(n) for n in range(20)]
        for one in waiting:
            one.cancel()
        await asyncio.wait(waiting)

    within(client, story)


@pytest.mark.usefixtures("settings")
def test_those_who_wait_soon_ask_the_server_nothing(client: redis.Redis) -> None:
    async def story(queues: PushQueues) -> None:
        waiting = [asyncio.ensure_future(taken(queues.of("amap", SETTINGS))) for _ in range(50)]
        commands = 1_000
        while commands > 4:  # of these one is INFO
            before = client.info("stats")["total_commands_processed"]
            await asyncio.sleep(0.3)
            commands = client.info("stats")["total_commands_processed"] - before
        assert not any(one.done() for one in waiting)
        for one in waiting:
            one.cancel()
        await asyncio.wait(waiting)

    within(client, story)


@pytest.mark.usefixtures("settings")
def test_a_client_that_leaves_while_it_waits_takes_nothing_with_it(client: redis.Redis) -> None:
    async def story(queues: PushQueues) -> None:
        queue = queues.of("amap", SETTINGS)
        for number in range(20):
            leaving = asyncio.ensure_future(taken(queue))
            await asyncio.sleep(0)
            putting = asyncio.ensure_future(asyncio.to_thread(put, client, 0, 7 + number, [f"{number}"]))
            await asyncio.sleep(0.0005 * number)
            leaving.cancel()
            await asyncio.wait((leaving, putting))
            got = leaving.result() if not leaving.cancelled() else await taken(queue, wait_s=10.0)
            assert got == [f"{number}"]

    within(client, story)


@pytest.mark.usefixtures("settings")
def test_what_a_dead_gateway_had_handed_out_comes_through_another_one(client: redis.Redis) -> None:
    put(client, 0, 7, ["a"])

    async def die(queues: PushQueues) -> None:
        assert await taken(queues.of("amap", SETTINGS)) == ["a"]

    async def take_over(queues: PushQueues) -> None:
        queue = queues.of("amap", SETTINGS)
        (delivery,) = await queue.take(10, 30.0)
        assert (delivery.push.device_ids, delivery.delivery_count) == (("a",), 2)

    within(client, die)
    within(client, take_over, claim_after_s=0.2)


@pytest.mark.usefixtures("settings")
def test_a_gateway_that_stops_leaves_no_name_in_the_group_unless_something_is_pending(client: redis.Redis) -> None:
    put(client, 0, 7, ["a"])

    async def story(queues: PushQueues) -> None:
        await taken(queues.of("amap", SETTINGS))

    within(client, story)
    assert [one["pending"] for one in client.xinfo_consumers(push_key(0, "amap"), GROUP)] == [1]
    assert client.xinfo_consumers(push_key(1, "amap"), GROUP) == []


def test_who_waits_goes_on_waiting_while_the_server_restarts(
    app: FastAPI, client: redis.Redis, settings: Settings
) -> None:
    async def story(queues: PushQueues) -> None:
        waiting = asyncio.ensure_future(taken(queues.of("amap", SETTINGS)))
        while queues.watcher._blocked_id is None:
            await asyncio.sleep(0.001)
        client.client_kill_filter(_type="normal", skipme=True)
        while queues._metrics.value("push_watch_errors_total") == 0:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(eventually, lambda: _put_one(client))
        assert await waiting == ["after"]

    within(client, story)


def _put_one(client: redis.Redis) -> bool:
    try:
        put(client, 0, 7, ["after"])
    except redis.ConnectionError:
        return False
    return True


def test_who_begins_to_wait_is_told_once_that_the_queues_are_watched_and_then_of_each_push(client: redis.Redis) -> None:
    async def story(queues: PushQueues) -> None:
        watcher = queues.watcher
        async with watcher.watching("amap", 2) as first:
            await first.wait()
            first.clear()
            async with watcher.watching("amap", 2) as second, watcher.watching("baidu", 2) as other:
                await second.wait()
                await other.wait()
                second.clear()
                other.clear()
                await asyncio.to_thread(put, client, 1, 7, ["a"])
                await first.wait()
                await second.wait()
                assert not other.is_set()
            await asyncio.to_thread(put, client, 0, 7, ["b"], partner="baidu")

    within(client, story)
