"""Consumers of the push queues and their dead letters, on a real server."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest
import redis

from flows import dead_letters as dead_letters_module
from flows.consumers import DELIVERIES_MAX, Consumer, Delivery
from flows.dead_letters import Corpse, DeadLetter, bury, dead_key, dead_letters, drop, replay
from flows.log import LogId, format_id, push_key
from flows.metrics import Metrics
from flows.push_commands import push_id
from flows.wire import encode_push
from geoindex.columns import Push
from tests.flows.test_queues import push
from tests.flows.waiting import eventually

SHARD_COUNT = 2
A, B = push_id((7, 0), 1), push_id((7, 0), 2)


def put(client: redis.Redis, shard: int, entry_id: LogId, pushed: Push, partner: str = "amap") -> None:
    client.xadd(push_key(shard, partner), {pushed.kind: encode_push(pushed)}, id=format_id(entry_id))


@pytest.fixture
def filled(client: redis.Redis) -> None:
    """Three entries for amap, on two shards, and one for didi."""
    put(client, 0, A, push(ids=("a",)))
    put(client, 0, B, push(ids=("b",)))
    put(client, 1, A, push(ids=("c",)))
    put(client, 1, A, push(1, ids=("d",)), "didi")


def consumer_of(client: redis.Redis, name: str = "consumer", **options: Any) -> Consumer:
    consumer = Consumer(client, "amap", SHARD_COUNT, consumer=name, metrics=Metrics(), **options)
    consumer.create_groups()
    return consumer


def devices(deliveries: Iterable[Delivery]) -> list[str]:
    return [device_id for delivery in deliveries for device_id in delivery.push.device_ids]


def read_in_vain(client: redis.Redis, times: int, **options: Any) -> list[list[str]]:
    """What consumers that die before they acknowledge are given, one after the other, under one name."""
    return [devices(consumer_of(client, **options).read(block_s=0)) for _ in range(times)]


def lying(client: redis.Redis) -> list[DeadLetter]:
    return dead_letters(client, "amap", SHARD_COUNT)


# --- delivery ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("filled")
def test_consumer_gets_the_pushes_of_its_partner_from_all_shards(client: redis.Redis) -> None:
    consumer = consumer_of(client)
    consumer.create_groups()
    deliveries = consumer.read(block_s=0)
    assert devices(deliveries) == ["a", "b", "c"]
    assert [(delivery.stream, delivery.entry_id) for delivery in deliveries] == [
        ("push:{s0}:amap", A),
        ("push:{s0}:amap", B),
        ("push:{s1}:amap", A),
    ]
    assert {delivery.delivery_count for delivery in deliveries} == {1}
    assert consumer.read(block_s=0) == []
    assert consumer.acknowledge(deliveries) == 3
    assert consumer.acknowledge(deliveries) == 0


@pytest.mark.usefixtures("filled")
def test_group_is_made_at_the_first_read(client: redis.Redis) -> None:
    assert devices(Consumer(client, "amap", SHARD_COUNT).read(block_s=0)) == ["a", "b", "c"]


def test_group_made_before_the_first_push_gets_it(client: redis.Redis) -> None:
    consumer = consumer_of(client)
    put(client, 1, A, push(ids=("first",)))
    assert devices(consumer.read(block_s=0)) == ["first"]


@pytest.mark.usefixtures("filled")
def test_every_group_gets_every_push(client: redis.Redis) -> None:
    for group in ("sms", "app"):
        assert devices(consumer_of(client, group=group).read(block_s=0)) == ["a", "b", "c"]


@pytest.mark.usefixtures("filled")
def test_what_was_not_acknowledged_comes_again_after_a_restart(client: redis.Redis) -> None:
    consumer = consumer_of(client, "one")
    consumer.acknowledge(consumer.read(block_s=0)[:1])
    again = consumer_of(client, "one")
    deliveries = again.read(entries_max=1, block_s=0)
    assert devices(deliveries) == ["b", "c"]
    assert {delivery.delivery_count for delivery in deliveries} == {2}
    assert again.read(block_s=0) == []


@pytest.mark.usefixtures("filled")
def test_what_another_consumer_gave_up_is_claimed(client: redis.Redis) -> None:
    assert len(consumer_of(client, "one").read(block_s=0)) == 3
    second = consumer_of(client, "two", claim_after_s=0.05)
    found: list[Delivery] = []

    def read() -> bool:
        found.extend(second.read(block_s=0))
        return len(found) == 3

    eventually(read)
    assert sorted(devices(found)) == ["a", "b", "c"]
    assert second.acknowledge(found) == 3


@pytest.mark.usefixtures("filled")
def test_what_another_consumer_still_works_on_is_left_to_it(client: redis.Redis) -> None:
    consumer_of(client, "one").read(block_s=0)
    assert consumer_of(client, "two", claim_after_s=60.0).read(block_s=0) == []


@pytest.mark.usefixtures("filled")
def test_what_is_given_back_is_the_next_readers_and_was_no_delivery(client: redis.Redis) -> None:
    for number in range(2 * DELIVERIES_MAX):
        consumer = consumer_of(client, f"looker-{number}")
        deliveries = consumer.read(block_s=0)
        assert devices(deliveries) == ["a", "b", "c"]
        assert {delivery.delivery_count for delivery in deliveries} == {1}
        consumer.give_back(deliveries)
    assert lying(client) == []


@pytest.mark.usefixtures("filled")
def test_entry_deleted_since_its_delivery_is_passed_over(client: redis.Redis) -> None:
    consumer_of(client).read(block_s=0)
    client.xdel(push_key(0, "amap"), format_id(A))
    assert devices(consumer_of(client).read(block_s=0)) == ["b", "c"]


def test_taking_is_bounded_by_entries_over_all_shards_and_every_shard_has_its_turn(client: redis.Redis) -> None:
    for shard in range(SHARD_COUNT):
        for number in range(1, 8):
            put(client, shard, push_id((7, 0), number), push(ids=(f"{shard}-{number}",)))
    consumer = consumer_of(client)
    taken = [devices(consumer.take(4, 1_000, 1)) for _ in range(5)]
    assert [len(part) for part in taken] == [4, 4, 4, 2, 0]
    assert [part[0] for part in taken[:2]] == ["0-1", "1-3"]
    for name in "01":
        got = [device_id for part in taken for device_id in part if device_id[0] == name]
        assert got == [f"{name}-{number}" for number in range(1, 8)]


def test_one_shard_alone_fills_what_is_taken(client: redis.Redis) -> None:
    for number in range(1, 8):
        put(client, 1, push_id((7, 0), number), push(ids=(f"{number}",)))
    assert devices(consumer_of(client).take(6, 1_000, 1)) == ["1", "2", "3", "4", "5", "6"]


def test_taking_never_exceeds_the_devices_that_were_asked_for(client: redis.Redis) -> None:
    for number in range(1, 8):
        put(client, number % 2, push_id((7, 0), number), push(ids=tuple(f"{number}{letter}" for letter in "abc")))
    consumer = consumer_of(client)
    sizes = [len(devices(consumer.take(100, 8, 4))) for _ in range(5)]
    assert sizes == [6, 6, 6, 3, 0]


@pytest.mark.usefixtures("filled")
def test_what_is_given_back_is_taken_at_once_and_claims_are_bounded_too(client: redis.Redis) -> None:
    consumer = consumer_of(client)
    consumer.give_back(consumer.take(10, 1_000, 1))
    taken = [devices(consumer.take(2, 1_000, 1)) for _ in range(3)]
    assert sorted(taken[0] + taken[1]) == ["a", "b", "c"]
    assert [len(part) for part in taken] == [2, 1, 0]


@pytest.mark.parametrize("name", ["", "two words", "x" * 129])
def test_consumer_names_are_checked(client: redis.Redis, name: str) -> None:
    with pytest.raises(ValueError, match="consumer must have 1 to 128 characters"):
        Consumer(client, "amap", 2, consumer=name)


# --- dead letters -----------------------------------------------------------------------------------------------------


def test_push_delivered_five_times_in_vain_is_a_dead_letter(
    client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    put(client, 1, A, push(ids=("poison",)))
    assert read_in_vain(client, DELIVERIES_MAX) == [["poison"]] * DELIVERIES_MAX
    assert lying(client) == []
    consumer = consumer_of(client)
    assert consumer.read(block_s=0) == []
    (letter,) = lying(client)
    assert (letter.shard, letter.partner, letter.entry_id, letter.group) == (1, "amap", A, "default")
    assert (letter.delivery_count, letter.reason) == (5, "delivered 5 times and never acknowledged")
    assert letter.fields == {b"alert": encode_push(push(ids=("poison",)))}
    assert not letter.replayed
    assert client.xpending(push_key(1, "amap"), "default")["pending"] == 0
    assert consumer._metrics.value("dead_letters_total", partner="amap") == 1
    assert f"amap: entry {format_id(A)} of push:{{s1}}:amap, group 'default': goes to the dead letters" in caplog.text
    # It stands in its queue as before, where it is the trimmer's, and nobody gets it again.
    assert client.xlen(push_key(1, "amap")) == 1
    assert read_in_vain(client, 2) == [[], []]
    assert lying(client) == [letter]


def test_deliveries_are_counted_across_consumers_and_claims(client: redis.Redis) -> None:
    put(client, 0, A, push(ids=("poison",)))
    put(client, 0, B, push(ids=("fine",)))
    got: list[str] = []

    def dead() -> bool:
        consumer = consumer_of(client, f"consumer-{len(got)}", claim_after_s=0.01)
        deliveries = consumer.read(block_s=0)
        got.extend(devices(deliveries))
        consumer.acknowledge(delivery for delivery in deliveries if delivery.entry_id == B)
        return bool(lying(client))

    eventually(dead)
    assert got.count("poison") == DELIVERIES_MAX
    assert got.count("fine") == 1
    assert [letter.entry_id for letter in lying(client)] == [A]


def test_entry_that_is_no_push_is_a_dead_letter_at_once_and_holds_up_nothing(client: redis.Redis) -> None:
    client.xadd(push_key(1, "amap"), {b"alert": b"\xff"}, id="8-1")
    client.xadd(push_key(1, "amap"), {b"alert": b"", b"more": b"x"}, id="8-2")
    put(client, 1, (8, 3), push(ids=("fine",)))
    consumer = consumer_of(client)
    assert devices(consumer.read(block_s=0)) == ["fine"]
    assert [(letter.entry_id, letter.reason, letter.delivery_count) for letter in lying(client)] == [
        ((8, 1), "cannot be decoded: must be a msgpack map", 1),
        ((8, 2), "cannot be decoded: must have one field, got 2", 1),
    ]
    assert lying(client)[1].fields == {b"alert": b"", b"more": b"x"}
    assert client.xpending(push_key(1, "amap"), "default")["pending"] == 1


def test_each_group_has_its_own_dead_letters(client: redis.Redis) -> None:
    put(client, 0, A, push(ids=("poison",)))
    read_in_vain(client, DELIVERIES_MAX + 1, group="app")
    sms = consumer_of(client, group="sms")
    assert devices(sms.read(block_s=0)) == ["poison"]
    read_in_vain(client, DELIVERIES_MAX, group="sms")
    assert [(letter.group, letter.entry_id) for letter in lying(client)] == [("app", A), ("sms", A)]


def test_pushes_that_die_in_another_order_than_they_were_written_all_lie_there(client: redis.Redis) -> None:
    put(client, 0, A, push(ids=("poison",)))
    consumer_of(client).read(block_s=0)
    client.xadd(push_key(0, "amap"), {b"alert": b"\xff"}, id=format_id(B))
    read_in_vain(client, DELIVERIES_MAX + 1)
    assert sorted(letter.entry_id for letter in lying(client)) == [A, B]


def test_push_that_many_see_die_is_buried_once(client: redis.Redis) -> None:
    queue = push_key(0, "amap")
    for number in range(1, 21):
        put(client, 0, push_id((7, 0), number), push())
    consumer_of(client).read(block_s=0)
    buried: list[bool] = []

    def bury_all() -> None:
        own = redis.Redis(connection_pool=client.connection_pool)
        for number in range(1, 21):
            buried.append(bury(own, Corpse(queue, format_id(push_id((7, 0), number)), "default", 5, "in vain")))

    threads = [threading.Thread(target=bury_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert buried.count(True) == 20
    assert len(lying(client)) == len({letter.entry_id for letter in lying(client)}) == 20


def test_burial_whose_answer_was_lost_is_not_made_twice(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    put(client, 0, A, push(ids=("poison",)))
    read_in_vain(client, DELIVERIES_MAX)
    execute = redis.client.Pipeline.execute

    def lose(pipeline: Any, **options: Any) -> Any:
        monkeypatch.setattr(redis.client.Pipeline, "execute", execute)
        pipeline.execute(**options)
        raise redis.ConnectionError("the reply was lost")

    consumer = consumer_of(client)

    def die(*arguments: Any) -> bool:
        monkeypatch.setattr(redis.client.Pipeline, "execute", lose)
        return bury(*arguments)

    monkeypatch.setattr("flows.consumers.bury", die)
    with pytest.raises(redis.ConnectionError):
        consumer.read(block_s=0)
    monkeypatch.setattr("flows.consumers.bury", bury)
    assert read_in_vain(client, 2) == [[], []]
    assert len(lying(client)) == 1


def test_trimmed_entry_leaves_the_group_without_a_dead_letter(client: redis.Redis) -> None:
    put(client, 0, A, push())
    consumer_of(client).read(block_s=0)
    client.xtrim(push_key(0, "amap"), maxlen=0)
    assert not bury(client, Corpse(push_key(0, "amap"), format_id(A), "default", 5, "in vain"))
    assert client.xpending(push_key(0, "amap"), "default")["pending"] == 0
    assert lying(client) == []


# --- replay and drop --------------------------------------------------------------------------------------------------


@pytest.fixture
def dead(client: redis.Redis) -> list[DeadLetter]:
    """Two dead letters, their queue trimmed since."""
    put(client, 0, A, push(ids=("a",)))
    put(client, 1, B, push(ids=("b",)))
    read_in_vain(client, DELIVERIES_MAX + 1)
    for shard in range(SHARD_COUNT):
        client.xtrim(push_key(shard, "amap"), maxlen=0)
    return lying(client)


def test_replayed_letter_comes_under_its_own_id_and_is_gone_when_acknowledged(
    client: redis.Redis, dead: list[DeadLetter]
) -> None:
    assert replay(client, dead) == 2
    assert [letter.replayed for letter in lying(client)] == [True, True]
    consumer = consumer_of(client, "another")
    deliveries = consumer.read(block_s=0)
    assert [(delivery.stream, delivery.entry_id, *delivery.push.device_ids) for delivery in deliveries] == [
        ("push:{s0}:amap", A, "a"),
        ("push:{s1}:amap", B, "b"),
    ]
    assert {delivery.delivery_count for delivery in deliveries} == {1}
    assert consumer.acknowledge(deliveries[:1]) == 1
    assert [letter.entry_id for letter in lying(client)] == [B]
    assert consumer.acknowledge(deliveries) == 1
    assert lying(client) == []
    assert client.xlen(push_key(0, "amap")) == 0


def test_only_the_group_that_a_letter_died_in_gets_it_again(client: redis.Redis, dead: list[DeadLetter]) -> None:
    replay(client, dead)
    assert consumer_of(client, group="others").read(block_s=0) == []


def test_letter_replayed_in_vain_is_dead_again(client: redis.Redis, dead: list[DeadLetter]) -> None:
    replay(client, dead[:1])
    got: list[str] = []

    def dead_again() -> bool:
        got.extend(devices(consumer_of(client, f"consumer-{len(got)}", claim_after_s=0.01).read(block_s=0)))
        return not lying(client)[0].replayed

    eventually(dead_again)
    assert got == ["a"] * DELIVERIES_MAX
    assert [letter.entry_id for letter in lying(client)] == [A, B]
    replay(client, lying(client)[:1])
    consumer = consumer_of(client, "mended", claim_after_s=0.01)
    assert consumer.acknowledge(consumer.read(block_s=0)) == 1
    assert [letter.entry_id for letter in lying(client)] == [B]


def test_replayed_letter_that_is_given_back_waits_for_the_next_reader(
    client: redis.Redis, dead: list[DeadLetter]
) -> None:
    replay(client, dead[:1])
    for number in range(2 * DELIVERIES_MAX):
        consumer = consumer_of(client, f"looker-{number}")
        deliveries = consumer.read(block_s=0)
        assert devices(deliveries) == ["a"]
        consumer.give_back(deliveries)
    assert lying(client)[0].replayed


def test_replay_of_what_was_dropped_does_nothing(client: redis.Redis, dead: list[DeadLetter]) -> None:
    assert drop(client, dead[:1]) == 1
    assert drop(client, dead[:1]) == 0
    assert replay(client, dead) == 1
    assert [letter.entry_id for letter in lying(client)] == [B]


def test_drop_takes_a_replayed_letter_off_its_group(client: redis.Redis, dead: list[DeadLetter]) -> None:
    replay(client, dead)
    drop(client, dead)
    assert lying(client) == []
    assert client.xpending(dead_key(0, "amap"), "default")["pending"] == 0
    assert consumer_of(client).read(block_s=0) == []


def test_many_letters_are_all_listed(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters_module, "READ_COUNT", 3)
    for number in range(1, 9):
        client.xadd(push_key(0, "amap"), {b"alert": b"\xff"}, id=f"8-{number}")
    consumer_of(client).read(block_s=0)
    names = [letter.name for letter in lying(client)]
    assert len(set(names)) == 8
    assert all(name.startswith("0/") for name in names)
    assert client.xlen(dead_key(0, "amap")) == 8
