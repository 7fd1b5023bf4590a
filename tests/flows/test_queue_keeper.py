"""Trimming and watching push queues, on a real server, round by round."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, cast

import pytest
import redis

from flows import queue_keeper
from flows.consumers import Consumer
from flows.dead_letters import dead_key
from flows.embedded import EmbeddedServer
from flows.log import (
    LogId,
    RawEntry,
    add_partner,
    done_key,
    ensure_settings,
    format_id,
    parse_id,
    push_key,
    trimmed_key,
)
from flows.metrics import Metrics
from flows.push_commands import first_push_id, log_id_of, push_id
from flows.queue_keeper import (
    QueueKeeper,
    disable_partner,
    disabled_partners,
    enable_partner,
    queue_trimmed_key,
)
from flows.queues import PushWriter
from flows.server import LinkOpener, connect, link_opener
from flows.wire import encode_push
from geoindex.columns import Pushes
from geoindex.entries import Settings
from tests.flows.test_queues import push
from tests.flows.waiting import eventually

SETTINGS = Settings(shard_count=2, partners=("amap", "didi"), hash_key=5)
SHARDS = range(SETTINGS.shard_count)
SHARD = 1
NOW_MS = 1_700_000_000_000
"""Of the keeper's link in these tests."""


def log_id(number: int) -> LogId:
    """Log entries a second apart."""
    return NOW_MS - 100_000 + 1000 * number, 0


class Keeping:
    """A keeper without a thread, and the queues it keeps."""

    def __init__(self, client: redis.Redis, open_link: LinkOpener, **options: Any) -> None:
        self.client = client
        self.metrics = Metrics()

        def open_clocked() -> Any:
            link = open_link()
            link.now_ms = lambda: float(NOW_MS)  # type: ignore[method-assign]
            return link

        self.keeper = QueueKeeper(open_clocked, SHARDS, self.metrics, **options)

    def put(self, *numbers: int, partner: str = "amap", pushes: int = 1, shard: int = SHARD) -> None:
        """What log entries cause, as the push writer puts it there."""
        for number in numbers:
            with self.client.pipeline(transaction=True) as pipeline:
                for k in range(1, pushes + 1):
                    entry_id = format_id(push_id(log_id(number), k))
                    pipeline.xadd(push_key(shard, partner), {"alert": encode_push(push())}, id=entry_id)
                pipeline.set(done_key(shard), format_id(log_id(number)))
                pipeline.execute()

    def trim_log(self, number: int, shard: int = SHARD) -> None:
        """The log was trimmed up to this entry."""
        self.client.set(trimmed_key(shard), format_id(log_id(number)))

    def left(self, partner: str = "amap", shard: int = SHARD) -> list[int]:
        """The log entries whose pushes are left, one for each push."""
        entries = cast(Any, self.client.xrange(push_key(shard, partner)))
        causes = [log_id_of(parse_id(raw_id)) for raw_id, _ in entries]
        return [(ms - NOW_MS + 100_000) // 1000 for ms, _ in causes]

    def read(self, count: int, group: str = "default", partner: str = "amap") -> None:
        """A consumer of the group is given so many entries, and acknowledges nothing."""
        stream = push_key(SHARD, partner)
        if not any(one["name"] == group.encode() for one in cast(Any, self.client).xinfo_groups(stream)):
            self.client.xgroup_create(stream, group, id="0")
        if count:
            self.client.xreadgroup(group, "consumer", {stream: ">"}, count=count)

    def acknowledge(self, *numbers: int, group: str = "default", partner: str = "amap", k: int = 1) -> None:
        ids = [format_id(push_id(log_id(number), k)) for number in numbers]
        assert self.client.xack(push_key(SHARD, partner), group, *ids) == len(ids)

    def gauge(self, name: str, partner: str = "amap") -> float:
        return self.metrics.value(name, partner=partner, shards="0-1")

    @property
    def alarm(self) -> int:
        return sum(alarm.kind == "queue_unread" for alarm in self.metrics.alarms.current())


@pytest.fixture
def keeping(client: redis.Redis, open_link: LinkOpener) -> Iterator[Keeping]:
    ensure_settings(client, SETTINGS)
    keeping = Keeping(client, open_link)
    yield keeping
    keeping.keeper.stop()


# --- trimming ---------------------------------------------------------------------------------------------------------


def test_queue_is_trimmed_behind_the_group_that_lags(keeping: Keeping) -> None:
    keeping.put(*range(10))
    keeping.trim_log(9)
    keeping.read(10, "fast")
    keeping.acknowledge(*range(9), group="fast")
    keeping.read(6, "slow")
    keeping.acknowledge(0, 1, 2, 4, 5, group="slow")
    assert keeping.keeper.round() == 3
    assert keeping.left() == list(range(3, 10))
    keeping.acknowledge(3, group="slow")
    assert keeping.keeper.round() == 3
    assert keeping.left() == [6, 7, 8, 9]
    keeping.acknowledge(9, group="fast")
    keeping.read(4, "slow")
    assert keeping.keeper.round() == 0
    keeping.acknowledge(6, 7, 8, 9, group="slow")
    assert keeping.keeper.round() == 4
    assert keeping.left() == []
    assert keeping.metrics.value("queue_entries_trimmed_total", partner="amap") == 10


def test_group_that_was_made_and_never_read_holds_everything(keeping: Keeping) -> None:
    keeping.put(*range(5))
    keeping.trim_log(4)
    keeping.read(5)
    keeping.acknowledge(*range(5))
    keeping.read(0, "new")
    assert keeping.keeper.round() == 0
    assert keeping.left() == [0, 1, 2, 3, 4]


def test_group_that_was_destroyed_holds_nothing(keeping: Keeping) -> None:
    keeping.put(*range(5))
    keeping.trim_log(4)
    keeping.read(5)
    keeping.acknowledge(*range(5))
    keeping.read(1, "old")
    assert keeping.keeper.round() == 0
    keeping.client.xgroup_destroy(push_key(SHARD, "amap"), "old")
    assert keeping.keeper.round() == 5


def test_pushes_stay_as_long_as_the_log_can_account_for_them(keeping: Keeping) -> None:
    keeping.put(*range(6))
    keeping.read(6)
    keeping.acknowledge(*range(6))
    assert keeping.keeper.round() == 0
    keeping.trim_log(2)
    assert keeping.keeper.round() == 3
    assert keeping.left() == [3, 4, 5]
    assert keeping.client.get(queue_trimmed_key(SHARD, "amap")) == format_id(first_push_id((log_id(2)[0], 1))).encode()


def test_pushes_of_one_log_entry_go_together(keeping: Keeping) -> None:
    keeping.put(0, 1, pushes=3)
    keeping.trim_log(1)
    keeping.read(5)
    for k in (1, 2, 3):
        keeping.acknowledge(0, k=k)
    keeping.acknowledge(1)
    assert keeping.keeper.round() == 3
    assert keeping.left() == [1, 1, 1]


def test_queue_without_a_group_is_kept(keeping: Keeping) -> None:
    keeping.put(*range(5))
    keeping.trim_log(4)
    assert keeping.keeper.round() == 0
    assert keeping.left() == [0, 1, 2, 3, 4]


def test_keeper_that_keeps_all_trims_nothing(client: redis.Redis, open_link: LinkOpener) -> None:
    ensure_settings(client, SETTINGS)
    keeping = Keeping(client, open_link, keeps_all=True)
    keeping.put(*range(5))
    keeping.trim_log(4)
    keeping.read(5)
    keeping.acknowledge(*range(5))
    assert keeping.keeper.round() == 0
    assert keeping.left() == [0, 1, 2, 3, 4]
    keeping.keeper.stop()


def test_shards_and_partners_are_trimmed_on_their_own(keeping: Keeping) -> None:
    for partner in SETTINGS.partners:
        keeping.put(*range(4), partner=partner)
    keeping.put(*range(4), shard=0)
    keeping.trim_log(3)
    keeping.read(4, partner="didi")
    keeping.acknowledge(*range(4), partner="didi")
    assert keeping.keeper.round() == 4
    assert (keeping.left(), keeping.left("didi"), keeping.left(shard=0)) == ([0, 1, 2, 3], [], [0, 1, 2, 3])


def test_partner_that_comes_later_is_kept_too(keeping: Keeping) -> None:
    assert keeping.keeper.round() == 0
    add_partner(keeping.client, ["ditu"])
    keeping.put(*range(4), partner="ditu")
    keeping.trim_log(3)
    keeping.read(4, partner="ditu")
    keeping.acknowledge(*range(4), partner="ditu")
    assert keeping.keeper.round() == 4


def test_new_run_of_the_keeper_goes_on_where_the_last_one_stopped(
    keeping: Keeping, client: redis.Redis, open_link: LinkOpener
) -> None:
    keeping.put(*range(4))
    keeping.trim_log(1)
    keeping.read(4)
    keeping.acknowledge(*range(4))
    assert keeping.keeper.round() == 2
    again = Keeping(client, open_link)
    assert again.keeper.round() == 0
    keeping.trim_log(2)
    assert again.keeper.round() == 1
    again.keeper.stop()


def test_full_server_is_trimmed_although_it_takes_no_mark(keeping: Keeping) -> None:
    keeping.put(*range(4))
    keeping.trim_log(3)
    keeping.read(4)
    keeping.acknowledge(*range(4))
    limit = keeping.client.config_get("maxmemory")["maxmemory"] or 0
    keeping.client.config_set("maxmemory", 1)
    try:
        assert keeping.keeper.round() == 4
        assert keeping.left() == []
        assert keeping.client.get(queue_trimmed_key(SHARD, "amap")) is None
    finally:
        keeping.client.config_set("maxmemory", limit)
    keeping.put(4)
    keeping.keeper.round()
    assert keeping.client.get(queue_trimmed_key(SHARD, "amap")) is not None
    assert keeping.left() == [4]


def test_long_queue_is_trimmed_in_steps(keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_keeper, "TRIM_ENTRIES", 200)
    keeping.put(*range(20), pushes=50)
    keeping.trim_log(19)
    keeping.read(1000)
    for k in range(1, 51):
        keeping.acknowledge(*range(19), k=k)
    keeping.client.config_resetstat()
    assert keeping.keeper.round() == 950
    assert keeping.left() == [19] * 50
    assert keeping.client.info("commandstats")["cmdstat_xtrim"]["calls"] >= 5


def test_what_is_missing_lies_below_its_mark_at_every_moment(keeping: Keeping) -> None:
    keeping.put(*range(4))
    keeping.trim_log(3)
    keeping.read(4)
    keeping.acknowledge(*range(4))
    asked: list[bytes] = []
    link = keeping.keeper._open_link()
    send = link.send

    def recorded(parts: Any) -> None:
        parts = list(parts)
        asked.extend(parts)
        send(parts)

    link.send = recorded  # type: ignore[method-assign]
    keeping.keeper._link = link
    keeping.keeper.round()
    changes = [part.split(b"\r\n")[2] for part in asked if b"XTRIM" in part or b"SET\r\n" in part]
    assert changes == [b"SET", b"XTRIM"]


def test_replay_after_trim_rewrite_and_restart_writes_nothing_new(own_server: EmbeddedServer) -> None:
    client = connect(own_server.url)
    ensure_settings(client, SETTINGS)

    def write() -> tuple[float, float]:
        """What a flow that starts from the first log entry writes: new entries, and such that were there before."""
        metrics = Metrics()
        writer = PushWriter(link_opener(client), metrics=metrics)
        run_id = str(client.info("server")["run_id"])
        for number in range(30):
            raw = RawEntry(SHARD, *log_id(number), b"tick", b"", run_id)
            writer.submit(raw, Pushes([push(number % 2, ids=(f"phone-{number}",))]), SETTINGS.partners)

        def finished() -> bool:
            writer.step()
            return writer.waiting_count() == 0

        eventually(finished)
        writer.stop()
        return metrics.value("push_entries_total"), metrics.value("push_entries_known_total")

    assert write() == (30, 0)
    consumer = Consumer(client, "amap", SETTINGS.shard_count)
    consumer.create_groups()
    assert consumer.acknowledge(consumer.read(block_s=0)) == 15
    client.set(trimmed_key(SHARD), format_id(log_id(29)))
    disable_partner(client, "didi")
    keeper = QueueKeeper(link_opener(client), SHARDS, Metrics())
    assert keeper.round() == 30
    keeper.stop()
    assert write() == (0, 30)

    client.bgrewriteaof()
    eventually(lambda: not client.info("persistence")["aof_rewrite_in_progress"], 20)
    assert client.info("persistence")["aof_last_bgrewrite_status"] == "ok"
    directory = own_server.directory
    own_server.close()
    client.close()
    with EmbeddedServer.start(directory, port=None):
        assert write() == (0, 30)
        for partner in SETTINGS.partners:
            assert client.xlen(push_key(SHARD, partner)) == 0
    client.close()


# --- watching ---------------------------------------------------------------------------------------------------------


def test_depth_pending_and_age_are_measured_for_each_partner(keeping: Keeping) -> None:
    keeping.put(*range(80, 90))
    keeping.put(95, shard=0)
    keeping.put(97, partner="didi")
    keeping.read(4)
    keeping.acknowledge(80, 81)
    keeping.keeper.round()
    assert (keeping.gauge("queue_entries"), keeping.gauge("queue_entries", "didi")) == (11, 1)
    assert (keeping.gauge("queue_pending"), keeping.gauge("queue_pending", "didi")) == (2, 0)
    assert keeping.gauge("queue_oldest_unacknowledged_ms") == 18_000
    assert keeping.gauge("queue_oldest_unacknowledged_ms", "didi") == 3_000
    keeping.acknowledge(82, 83)
    keeping.keeper.round()
    assert keeping.gauge("queue_oldest_unacknowledged_ms") == 16_000
    keeping.read(6)
    keeping.acknowledge(*range(84, 90))
    keeping.keeper.round()
    assert keeping.gauge("queue_pending") == 0
    assert keeping.gauge("queue_oldest_unacknowledged_ms") == 5_000  # of shard 0, which nobody reads
    assert keeping.alarm == 0


def test_partner_that_does_not_read_raises_an_alarm_until_it_does(
    client: redis.Redis, open_link: LinkOpener, caplog: pytest.LogCaptureFixture
) -> None:
    ensure_settings(client, SETTINGS)
    keeping = Keeping(client, open_link, unread_alarm_ms=30_000)
    keeping.put(75)
    keeping.put(60, partner="didi")
    keeping.read(1, partner="didi")
    keeping.keeper.round()
    assert keeping.alarm == 1
    assert "alarm queue_unread (didi): the oldest unacknowledged push of 'didi' is 40 s old" in caplog.text
    assert "'amap'" not in caplog.text
    keeping.keeper.round()
    assert caplog.text.count("alarm queue_unread") == 1
    keeping.acknowledge(60, partner="didi")
    with caplog.at_level(logging.WARNING):
        keeping.keeper.round()
    assert keeping.alarm == 0
    assert "alarm queue_unread (didi): is over" in caplog.text
    keeping.keeper.stop()


def test_queue_that_nobody_has_ever_read_raises_an_alarm(
    client: redis.Redis, open_link: LinkOpener, caplog: pytest.LogCaptureFixture
) -> None:
    ensure_settings(client, SETTINGS)
    keeping = Keeping(client, open_link, unread_alarm_ms=30_000)
    keeping.put(60)
    for _ in range(2):
        keeping.keeper.round()
        assert keeping.alarm == 1
        assert keeping.gauge("queue_oldest_unacknowledged_ms") == 40_000
    assert "some of its queues have no consumer group" in caplog.text
    keeping.keeper.stop()


def test_oldest_entry_of_a_silent_group_is_asked_for_once(keeping: Keeping) -> None:
    keeping.put(*range(3))
    keeping.read(0)
    keeping.client.config_resetstat()
    for _ in range(3):
        keeping.keeper.round()
    assert keeping.client.info("commandstats")["cmdstat_xrange"]["calls"] == 1


# --- disabled partners ------------------------------------------------------------------------------------------------


def test_disabled_partners_queues_are_emptied_and_kept_empty_and_no_others(keeping: Keeping) -> None:
    for partner in SETTINGS.partners:
        keeping.put(*range(5), partner=partner)
        keeping.read(3, partner=partner)
    keeping.client.xadd(dead_key(SHARD, "amap"), {"id": "1-1"})
    assert disable_partner(keeping.client, "amap")
    assert not disable_partner(keeping.client, "amap")
    assert disabled_partners(keeping.client) == {"amap"}
    assert keeping.keeper.round() == 5
    assert (keeping.left(), keeping.left("didi")) == ([], [0, 1, 2, 3, 4])
    assert keeping.client.xlen(dead_key(SHARD, "amap")) == 0
    keeping.put(5, 6)
    assert keeping.keeper.round() == 2
    assert keeping.left() == []
    assert (keeping.gauge("queue_pending"), keeping.gauge("queue_oldest_unacknowledged_ms")) == (0, 0)


def test_disabled_partner_raises_no_alarm(keeping: Keeping, client: redis.Redis, open_link: LinkOpener) -> None:
    watching = Keeping(client, open_link, unread_alarm_ms=1000)
    watching.put(1)
    watching.keeper.round()
    assert watching.alarm == 1
    disable_partner(client, "amap")
    watching.keeper.round()
    watching.keeper.round()
    assert watching.alarm == 0
    watching.keeper.stop()


def test_partner_that_is_enabled_again_gets_what_is_written_from_then_on(keeping: Keeping) -> None:
    keeping.put(*range(5))
    disable_partner(keeping.client, "amap")
    keeping.keeper.round()
    assert enable_partner(keeping.client, "amap")
    assert not enable_partner(keeping.client, "amap")
    keeping.put(5, 6)
    assert keeping.keeper.round() == 0
    consumer = Consumer(keeping.client, "amap", SETTINGS.shard_count)
    consumer.create_groups()
    assert [log_id_of(delivery.entry_id) for delivery in consumer.read(block_s=0)] == [log_id(5), log_id(6)]
    with pytest.raises(redis.ResponseError, match="equal or smaller"):
        keeping.put(4)


def test_partner_that_does_not_exist_cannot_be_disabled(keeping: Keeping) -> None:
    for act in (disable_partner, enable_partner):
        with pytest.raises(ValueError, match="no such partner: 'nobody'; there are amap, didi"):
            act(keeping.client, "nobody")
    assert disabled_partners(keeping.client) == frozenset()


# --- the thread -------------------------------------------------------------------------------------------------------


def test_thread_goes_on_after_its_connection_was_cut(client: redis.Redis, open_link: LinkOpener) -> None:
    ensure_settings(client, SETTINGS)
    keeping = Keeping(client, open_link, interval_s=0.01)
    keeping.put(*range(4))
    keeping.trim_log(3)
    keeping.read(4)
    keeping.keeper.start()
    eventually(lambda: keeping.gauge("queue_pending") == 4)
    client.client_kill_filter(_type="normal", skipme=True)
    eventually(lambda: keeping.metrics.value("queue_keeper_errors_total") >= 1)
    keeping.acknowledge(*range(4))
    eventually(lambda: keeping.left() == [])
    keeping.keeper.stop()
    assert not keeping.keeper._thread.is_alive()
