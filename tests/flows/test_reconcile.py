"""The audit of a server: clean where all is well, and every planted fault found, by its kind and device."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from flows import reconcile as reconcile_module
from flows.checkpoints import CheckpointStore
from flows.consumers import Consumer
from flows.log import FIRST, LogId, format_id, log_key, parse_id, push_key, trimmed_key
from flows.metrics import Metrics
from flows.push_commands import first_push_id, log_id_of
from flows.queue_keeper import QueueKeeper, disable_partner, queue_trimmed_key
from flows.reconcile import FAULTS, Fault, Reconciliation, reconcile
from flows.server import connect, link_opener
from flows.wire import PushEntry, decode_push, encode_push
from geoindex.columns import Push, pack_ids
from tests.flows.deployment import PARTNERS, SHARD_COUNT, SHARDS, Deployment, deployed

AT_THE_END: dict[str, Any] = {"checkpoint_interval_s": 600.0, "trim_logs": False}
KEYS = [push_key(shard, partner) for shard in SHARDS for partner in PARTNERS]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two lives of a flow, a checkpoint at the end of each.

    Alert `a` in the first, `b` from the first into the second, `c` from the second on, still open.
    """
    with deployed(tmp_path_factory.mktemp("stopped")) as deployment:
        flow = deployment.flow(**AT_THE_END)
        deployment.send_crowd(1)
        deployment.publish("a", 0.02)
        deployment.send_crowd(2)
        deployment.publish("b", 0.02)
        deployment.send_crowd(3)
        deployment.close("a")
        deployment.settle()
        assert flow.stop() == 0, flow.said
        flow = deployment.flow(**AT_THE_END)
        deployment.send_crowd(4)
        deployment.publish("c", 0.002)
        deployment.close("b")
        deployment.send_crowd(5)
        deployment.settle()
        assert flow.stop() == 0, flow.said
        yield deployment


@contextmanager
def restored(client: redis.Redis, *more: str) -> Iterator[None]:
    """Puts the queues, and other keys, back as they were."""
    keys = [*KEYS, "disabled", *more]
    before = {key: client.dump(key) for key in keys}
    try:
        yield
    finally:
        for key, stored in before.items():
            client.delete(key)
            if stored is not None:
                client.restore(key, 0, stored)


@pytest.fixture
def client(stopped: Deployment) -> Iterator[redis.Redis]:
    with restored(stopped.client):
        yield stopped.client


@pytest.fixture
def trimmed(stopped: Deployment) -> Iterator[redis.Redis]:
    """With logs and queues trimmed behind the first life's checkpoints."""
    keys = [log_key(shard) for shard in SHARDS] + [trimmed_key(shard) for shard in SHARDS]
    keys += [queue_trimmed_key(shard, partner) for shard in SHARDS for partner in PARTNERS]
    client = stopped.client
    with restored(client, *keys):
        for shard in SHARDS:
            cut = stopped.positions(shard)[1]
            ((raw_id, _),) = cast(Any, client.xrevrange(log_key(shard), max=f"({format_id(cut)}", count=1))
            client.xtrim(log_key(shard), minid=format_id(cut), approximate=False)
            client.set(trimmed_key(shard), raw_id)
            for partner in PARTNERS:
                behind = format_id(first_push_id((cut[0], cut[1] + 1)))
                client.xtrim(push_key(shard, partner), minid=behind, approximate=False)
                client.set(queue_trimmed_key(shard, partner), behind)
        yield client


def audit(deployment: Deployment, **options: Any) -> Reconciliation:
    return reconcile(deployment.client, deployment.store, deployment.settings, **options)


def counts(**expected: int) -> dict[str, int]:
    return dict.fromkeys(FAULTS, 0) | expected


Entry = tuple[str, LogId, PushEntry]


def entries(client: redis.Redis, kind: str, alert_id: str) -> list[Entry]:
    """Queue entries of one kind and alert: queue, id, push."""
    return [
        (key, parse_id(raw_id), push)
        for key in KEYS
        for raw_id, fields in cast(Any, client.xrange(key))
        if (push := decode_push(next(iter(fields.values())))).kind == kind and push.alert_id == alert_id
    ]


def largest(found: list[Entry]) -> Entry:
    return max(found, key=lambda entry: len(entry[2].device_ids))


def append(client: redis.Redis, key: str, push: PushEntry) -> LogId:
    """Write a push behind the last entry of a queue, under the same log entry."""
    last = parse_id(cast(Any, client.xinfo_stream(key))["last-generated-id"])
    entry_id = last[0], last[1] + 1
    packed = Push(0, push.alert_id, push.revision, push.kind, push.ring_km, push.at_ms, *pack_ids([*push.device_ids]))
    client.xadd(key, {push.kind: encode_push(packed)}, id=format_id(entry_id))
    return entry_id


def named(result: Reconciliation, fault: str) -> list[str]:
    return sorted(found.device_id for found in result.faults if found.fault == fault)


# --- clean ------------------------------------------------------------------------------------------------------------


def test_a_whole_log_is_taken_from_its_beginning_and_is_clean(stopped: Deployment) -> None:
    result = audit(stopped)
    assert (result.clean, result.complete, result.left_out) == (True, True, [])
    pushes = sum(
        len(push.device_ids)
        for kind in ("alert", "resolved")
        for alert in "abc"
        for _, _, push in entries(stopped.client, kind, alert)
    )
    assert pushes > 300
    assert result.line() == f"{pushes:,} pushes, 0 missed, 0 extra, 0 duplicate, 0 unretracted"
    for account in result.shards:
        assert account.began == FIRST
        assert account.cut == stopped.done(account.shard)
        assert account.owed == account.told == account.compared > 0
        assert (account.later, account.notes) == ({}, [])
    assert sum(account.pings for account in result.shards) == 5 * 300


def test_a_trimmed_log_is_taken_up_at_the_older_checkpoint_and_is_clean(
    stopped: Deployment, trimmed: redis.Redis
) -> None:
    result = audit(stopped)
    assert (result.clean, result.complete) == (True, True)
    assert not entries(trimmed, "alert", "a")
    for account in result.shards:
        assert account.began == stopped.positions(account.shard)[1]
        assert account.owed == account.told == account.compared > 0
        assert account.later == {}
    assert sum(account.pings for account in result.shards) == 2 * 300


def test_since_takes_the_newest_checkpoint_that_is_old_enough(stopped: Deployment) -> None:
    newest = max(stopped.positions(shard)[0][0] for shard in SHARDS)
    result = audit(stopped, since_ms=newest)
    assert (result.clean, result.complete) == (True, True)
    assert [account.began for account in result.shards] == [stopped.positions(shard)[0] for shard in SHARDS]
    assert [account.owed for account in result.shards] == [0] * SHARD_COUNT
    assert all(account.told > 0 and account.compared == 0 for account in result.shards)
    assert [account.began for account in audit(stopped, since_ms=0).shards] == [FIRST] * SHARD_COUNT


def test_one_partner_alone(stopped: Deployment, client: redis.Redis) -> None:
    key, entry_id, push = largest([entry for entry in entries(client, "alert", "c") if entry[0].endswith("baidu")])
    client.xdel(key, format_id(entry_id))
    assert audit(stopped, partner="amap").clean
    result = audit(stopped, partner="baidu")
    assert result.counts == counts(missed=len(push.device_ids))
    whole = audit(stopped)
    assert sum(account.told for account in result.shards) < sum(account.told for account in whole.shards)


# --- planted faults ---------------------------------------------------------------------------------------------------


def test_a_deleted_entry_is_missed_by_each_of_its_devices(stopped: Deployment, client: redis.Redis) -> None:
    key, entry_id, push = largest(entries(client, "alert", "c"))
    client.xdel(key, format_id(entry_id))
    result = audit(stopped)
    assert result.counts == counts(missed=len(push.device_ids))
    assert named(result, "missed") == sorted(push.device_ids)
    fault = next(result.faults)
    shard, partner = int(key[7]), key.rpartition(":")[2]
    expected = Fault(
        "missed", shard, partner, fault.device_id, "c", "alert", push.revision, format_id(log_id_of(entry_id))
    )
    assert fault == expected
    assert f"missed: alert of 'c' revision 1 to {fault.device_id!r}" in fault.line()
    assert not result.clean


def test_a_copied_entry_is_a_duplicate_to_each_of_its_devices(stopped: Deployment, client: redis.Redis) -> None:
    for alert_id in ("a", "c"):
        key, _, push = largest(entries(client, "alert", alert_id))
        with restored(client):
            copy = append(client, key, push)
            result = audit(stopped)
        assert result.counts == counts(duplicate=len(push.device_ids))
        assert named(result, "duplicate") == sorted(push.device_ids)
        assert {fault.entry for fault in result.faults} == {format_id(copy)}


def test_an_alert_told_again_at_another_revision_is_a_duplicate_and_extra(
    stopped: Deployment, client: redis.Redis
) -> None:
    key, _, push = largest(entries(client, "alert", "c"))
    append(client, key, PushEntry("c", 2, "alert", push.ring_km, push.at_ms, push.device_ids[:3]))
    assert audit(stopped).counts == counts(duplicate=3, extra=3)


def test_a_push_that_nothing_owes_is_extra(stopped: Deployment, client: redis.Redis) -> None:
    key, _, push = largest(entries(client, "alert", "c"))
    append(client, key, PushEntry("c", 1, "alert", push.ring_km, push.at_ms, ("a stranger", "another")))
    result = audit(stopped)
    assert result.counts == counts(extra=2)
    assert named(result, "extra") == ["a stranger", "another"]


def test_a_device_that_was_never_told_the_end_is_missed_and_unretracted(
    stopped: Deployment, client: redis.Redis
) -> None:
    key, entry_id, push = largest(entries(client, "resolved", "a"))
    client.xdel(key, format_id(entry_id))
    result = audit(stopped)
    assert result.counts == counts(missed=len(push.device_ids), unretracted=len(push.device_ids))
    assert named(result, "unretracted") == sorted(push.device_ids)


def test_an_update_after_the_end_is_out_of_order_and_extra(stopped: Deployment, client: redis.Redis) -> None:
    key, _, push = largest(entries(client, "resolved", "a"))
    append(client, key, PushEntry("a", 2, "update", push.ring_km, push.at_ms, push.device_ids[:5]))
    result = audit(stopped)
    assert result.counts == counts(extra=5, out_of_order=5)
    assert named(result, "out_of_order") == sorted(push.device_ids[:5])


def test_a_push_under_the_id_of_another_log_entry_is_displaced(stopped: Deployment, client: redis.Redis) -> None:
    by_queue = Counter(key for key, _, _ in entries(client, "alert", "c"))
    key = by_queue.most_common(1)[0][0]
    first = next(entry for entry in entries(client, "alert", "c") if entry[0] == key)
    last_cause = log_id_of(parse_id(cast(Any, client.xinfo_stream(key))["last-generated-id"]))
    assert log_id_of(first[1]) < last_cause
    client.xdel(key, format_id(first[1]))
    append(client, key, first[2])
    result = audit(stopped)
    assert result.counts == counts(displaced=len(first[2].device_ids))
    assert named(result, "displaced") == sorted(first[2].device_ids)


def test_an_entry_that_is_no_push_is_undecodable(stopped: Deployment, client: redis.Redis) -> None:
    last = parse_id(cast(Any, client.xinfo_stream(KEYS[0]))["last-generated-id"])
    entry_id = format_id((last[0], last[1] + 1))
    client.xadd(KEYS[0], {b"alert": b"\xff"}, id=entry_id)
    result = audit(stopped)
    assert result.counts == counts(undecodable=1)
    assert [fault.line() for fault in result.faults] == [f"undecodable: entry {entry_id} of {KEYS[0]}"]


def test_faults_are_counted_beyond_those_that_are_kept(
    stopped: Deployment, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile_module, "FAULTS_KEPT_MAX", 2)
    key, entry_id, push = largest(entries(client, "alert", "c"))
    client.xdel(key, format_id(entry_id))
    result = audit(stopped)
    assert result.counts["missed"] == len(push.device_ids) > 2
    assert len(list(result.faults)) == 2


@pytest.mark.parametrize(
    ("kind", "alert_id", "faults"),
    [("alert", "c", ("missed",)), ("resolved", "b", ("missed", "unretracted"))],
    ids=["an alert of the second life", "the end of an alert told of in the first"],
)
def test_faults_behind_a_checkpoint_are_found(
    kind: str, alert_id: str, faults: tuple[str, ...], stopped: Deployment, trimmed: redis.Redis
) -> None:
    key, entry_id, push = largest(entries(trimmed, kind, alert_id))
    trimmed.xdel(key, format_id(entry_id))
    assert audit(stopped).counts == counts(**dict.fromkeys(faults, len(push.device_ids)))


def test_what_was_trimmed_by_hand_is_missed_and_what_the_keeper_trimmed_is_not(
    stopped: Deployment, trimmed: redis.Redis
) -> None:
    key, entry_id, _ = entries(trimmed, "resolved", "b")[0]
    shard, partner = int(key[7]), key.rpartition(":")[2]
    mark = queue_trimmed_key(shard, partner)
    cut = first_push_id((entry_id[0], (entry_id[1] >> 24) + 1))
    gone = sum(len(push.device_ids) for one, id_, push in entries(trimmed, "resolved", "b") if one == key and id_ < cut)
    trimmed.xtrim(key, minid=format_id(cut), approximate=False)
    result = audit(stopped)
    assert result.counts["missed"] >= gone
    assert 0 < result.counts["unretracted"] <= gone  # some were told of it in what was trimmed
    before = cast(bytes, trimmed.get(mark))
    trimmed.set(mark, format_id(cut))
    result = audit(stopped)
    assert result.clean
    assert result.shards[shard].later == {partner: log_id_of(cut)}
    trimmed.set(mark, before)


# --- what is in the way -----------------------------------------------------------------------------------------------


def test_a_trimmed_log_without_checkpoints_leaves_what_needs_no_log(
    stopped: Deployment, trimmed: redis.Redis, tmp_path: Path
) -> None:
    nowhere = CheckpointStore(tmp_path, stopped.settings)
    result = reconcile(trimmed, nowhere, stopped.settings)
    assert (result.clean, result.complete) == (True, False)
    for account in result.shards:
        assert (account.began, account.owed, account.compared) == (None, 0, 0)
        assert "there is no checkpoint to begin with in" in account.notes[0]
    key, _, push = largest(entries(trimmed, "alert", "c"))
    append(trimmed, key, push)
    assert reconcile(trimmed, nowhere, stopped.settings).counts == counts(duplicate=len(push.device_ids))


def test_a_damaged_checkpoint_is_passed_over_for_the_next_and_named(stopped: Deployment, trimmed: redis.Redis) -> None:
    older = stopped.store.finals(2)[1]
    whole = older.path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) * 2 // 3] ^= 0x10
    older.path.write_bytes(damaged)
    try:
        result = audit(stopped)
    finally:
        older.path.write_bytes(whole)
    assert (result.clean, result.complete) == (True, True)
    account = result.shards[2]
    assert account.began == stopped.positions(2)[0]
    assert str(older.path) in account.notes[0]


def test_a_disabled_partner_is_left_out(stopped: Deployment, client: redis.Redis) -> None:
    disable_partner(client, "baidu")
    for shard in SHARDS:
        client.xtrim(push_key(shard, "baidu"), maxlen=0, approximate=False)
    result = audit(stopped)
    assert (result.clean, result.left_out) == (True, ["baidu"])
    assert all(account.told > 0 for account in result.shards)


def test_a_log_that_is_trimmed_while_it_is_read_is_read_again_from_a_newer_checkpoint(
    stopped: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_log = reconcile_module._Reader._read_log
    calls: Counter[int] = Counter()

    def trimmed_at_first(reader: Any, shard: int, *arguments: Any) -> None:
        calls[shard] += 1
        if (shard == 1 and calls[shard] == 1) or shard == 3:
            raise reconcile_module._LogTrimmed
        read_log(reader, shard, *arguments)

    monkeypatch.setattr(reconcile_module._Reader, "_read_log", trimmed_at_first)
    result = audit(stopped)
    assert result.clean
    assert [account.began for account in result.shards] == [FIRST, stopped.positions(1)[0], FIRST, None]
    assert calls == {0: 1, 1: 2, 2: 1, 3: 3}
    assert "the log was trimmed while it was read, 3 times" in result.shards[3].notes[0]


def test_entries_that_are_trimmed_behind_the_reader_are_noticed(
    stopped: Deployment, trimmed: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log lost what the account had not read yet: a newer checkpoint it must be, or nothing."""
    usable = reconcile_module._Reader._usable

    def outdated(reader: Any, shard: int, finals: Any) -> Any:
        found = usable(reader, shard, finals)
        newest = stopped.positions(shard)[0]
        trimmed.set(trimmed_key(shard), format_id((newest[0], newest[1])))
        return found

    monkeypatch.setattr(reconcile_module._Reader, "_usable", outdated)
    result = audit(stopped)
    assert [account.began for account in result.shards] == [stopped.positions(shard)[0] for shard in SHARDS]


# --- while everything runs --------------------------------------------------------------------------------------------


class Partners(threading.Thread):
    """Consumers of all partners that acknowledge what they read."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._ending = threading.Event()

    def run(self) -> None:
        client = connect(self._url)
        consumers = [Consumer(client, partner, SHARD_COUNT) for partner in PARTNERS]
        for consumer in consumers:
            consumer.create_groups()
        while not self._ending.wait(0.01):
            for consumer in consumers:
                consumer.acknowledge(consumer.read(block_s=0))
        client.close()

    def end(self) -> None:
        self._ending.set()
        self.join(10)


def test_audits_beside_a_flow_whose_logs_and_queues_are_trimmed_are_clean(tmp_path: Path) -> None:
    with deployed(tmp_path) as deployment:
        partners = Partners(deployment.server.url)
        partners.start()
        flow = deployment.flow(checkpoint_interval_s=0.3)
        metrics = Metrics()
        keeper = QueueKeeper(link_opener(deployment.client), SHARDS, metrics, interval_s=0.05)
        keeper.start()
        sender = deployment.sender()
        compared = 0
        for number in range(3):
            deployment.publish(str(number))
            deployment.wait_for_checkpoints(1)
            result = audit(deployment)
            assert result.clean, (result.line(), list(result.faults)[:5])
            compared += sum(account.compared for account in result.shards)
            deployment.close(str(number))
        sender.end()
        deployment.wait_for_checkpoints(2)
        deployment.settle()
        partners.end()
        keeper.stop()
        assert flow.stop() == 0, flow.said
        assert compared > 0
        assert sum(metrics.value("queue_entries_trimmed_total", partner=partner) for partner in PARTNERS) > 0
        result = audit(deployment)
        assert (result.clean, result.complete) == (True, True), list(result.faults)[:5]
        assert all(account.began not in (None, FIRST) for account in result.shards)
