"""Push queues on a real server: derived ids, MULTI in log order."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, cast

import pytest
import redis

from flows import queues
from flows.embedded import EmbeddedServer
from flows.log import LogId, RawEntry, done_key, parse_id, push_key
from flows.metrics import Metrics
from flows.push_commands import PUSH_COUNT_MAX, first_push_id, log_id_of, push_id
from flows.queues import PushWriter
from flows.server import Link, LinkOpener, connect, link_opener
from flows.wire import PushEntry, decode_push
from geoindex.columns import Push, Pushes, pack_ids
from tests.flows.waiting import eventually

PARTNERS = ("amap", "didi")


def push(partner: int = 0, kind: str = "alert", ids: tuple[str, ...] = ("phone",), revision: int = 1) -> Push:
    return Push(partner, "a17", revision, kind, 100.0, 1_700_000_000_000, *pack_ids(list(ids)))


def pushes_of(number: int) -> list[Push]:
    """What log entry `number` causes in these tests: nothing, or up to 3 pushes for two partners."""
    return [push(index % 2, ids=(f"phone-{number}-{index}",)) for index in range(number % 4)]


class Writing:
    """A writer driven round by round, without a thread, and what it said was done."""

    def __init__(self, open_link: LinkOpener, run_id: str) -> None:
        self.done: list[tuple[int, LogId]] = []
        self.metrics = Metrics()
        self.run_id = run_id
        self.writer = PushWriter(open_link, lambda shard, log_id: self.done.append((shard, log_id)), self.metrics)

    def submit(self, log_id: LogId, pushes: list[Push], shard: int = 3, run_id: str | None = None) -> None:
        raw = RawEntry(shard, *log_id, b"tick", b"", self.run_id if run_id is None else run_id)
        self.writer.submit(raw, Pushes(pushes), PARTNERS)

    def failures_after_a_round(self) -> float:
        self.writer.step()
        return self.metrics.value("push_write_errors_total", shard="3")

    def finish(self, timeout_s: float = 5.0) -> None:
        """Rounds until nothing waits any more."""

        def finished() -> bool:
            self.writer.step()
            return self.writer.waiting_count() == 0

        eventually(finished, timeout_s)


@pytest.fixture
def run_id(client: redis.Redis) -> str:
    return str(client.info("server")["run_id"])


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "BACKOFF_S", (0.001, 0.01))
    monkeypatch.setattr(queues, "DONE_INTERVAL_S", 0.0)


@pytest.fixture
def writing(open_link: LinkOpener, run_id: str) -> Iterator[Writing]:
    writing = Writing(open_link, run_id)
    yield writing
    writing.writer.stop()


def queue(client: redis.Redis, partner: str = "amap", shard: int = 3) -> list[tuple[LogId, PushEntry]]:
    entries = cast(list[tuple[bytes, dict[bytes, bytes]]], client.xrange(push_key(shard, partner)))
    return [(parse_id(raw_id), decode_push(next(iter(fields.values())))) for raw_id, fields in entries]


def all_devices(client: redis.Redis) -> list[str]:
    """Sorted, each as often as it is told."""
    entries = [entry for queued in all_queues(client).values() for _, entry in queued]
    return sorted(device_id for entry in entries for device_id in entry.device_ids)


def all_queues(client: redis.Redis) -> dict[str, list[tuple[LogId, PushEntry]]]:
    return {partner: queue(client, partner) for partner in PARTNERS}


# --- ids --------------------------------------------------------------------------------------------------------------


def test_push_id_is_the_log_id_shifted() -> None:
    assert push_id((1_700_000_000_000, 5), 1) == (1_700_000_000_000, (5 << 24) + 1)
    assert log_id_of(push_id((7, 5), 123)) == (7, 5)


def test_push_ids_rise_with_the_log_and_within_an_entry() -> None:
    assert push_id((7, 0), 1) < push_id((7, 0), PUSH_COUNT_MAX) < push_id((7, 1), 1) < push_id((8, 0), 1)


def test_first_push_id_lies_between_the_pushes_of_two_log_entries() -> None:
    assert push_id((7, 4), PUSH_COUNT_MAX) < first_push_id((7, 5)) < push_id((7, 5), 1)


@pytest.mark.parametrize(("log_id", "number"), [((7, 0), 0), ((7, 0), 1 << 24), ((7, 1 << 40), 1)])
def test_push_id_that_would_overflow_is_a_programming_error(log_id: LogId, number: int) -> None:
    with pytest.raises(AssertionError):
        push_id(log_id, number)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_done_never_turns_back_behind_a_faster_worker(
    client: redis.Redis, open_link: LinkOpener, run_id: str, writing: Writing
) -> None:
    slow = Writing(open_link, run_id)
    for worker, log_id in ((writing, (9, 12)), (slow, (7, 2)), (slow, (9, 2)), (slow, (9, 9))):
        worker.submit(log_id, [push(0)])
        worker.finish()
        assert client.get(done_key(3)) == b"9-12"
    assert slow.done == [(3, (7, 2)), (3, (9, 2)), (3, (9, 9))]
    for log_id, done in (((9, 13), b"9-13"), ((10, 0), b"10-0")):
        slow.submit(log_id, [])
        slow.finish()
        assert client.get(done_key(3)) == done
    slow.writer.stop()


def test_pushes_stand_in_the_queues_under_their_derived_ids(client: redis.Redis, writing: Writing) -> None:
    writing.submit((7, 2), [push(0, ids=("a", "b")), push(1, "update", ids=("c",)), push(0, "resolved", ids=("d",))])
    writing.finish()
    assert queue(client, "amap") == [
        ((7, (2 << 24) + 1), PushEntry("a17", 1, "alert", 100.0, 1_700_000_000_000, ("a", "b"))),
        ((7, (2 << 24) + 2), PushEntry("a17", 1, "resolved", 100.0, 1_700_000_000_000, ("d",))),
    ]
    assert queue(client, "didi") == [
        ((7, (2 << 24) + 1), PushEntry("a17", 1, "update", 100.0, 1_700_000_000_000, ("c",)))
    ]
    assert client.get(done_key(3)) == b"7-2"
    assert writing.done == [(3, (7, 2))]
    ((_, fields),) = cast(Any, client.xrange(push_key(3, "didi")))
    assert list(fields) == [b"update"]


def test_replay_writes_nothing_new(client: redis.Redis, open_link: LinkOpener, run_id: str) -> None:
    first: dict[str, list[tuple[LogId, PushEntry]]] = {}
    for replay in range(3):
        writing = Writing(open_link, run_id)
        for number in range(50):
            writing.submit((1000 + number // 3, number % 3), pushes_of(number))
        writing.finish()
        if replay == 0:
            first = all_queues(client)
        assert all_queues(client) == first
        assert sum(len(entries) for entries in first.values()) == sum(len(pushes_of(number)) for number in range(50))
        written = writing.metrics.value("push_entries_total")
        known = writing.metrics.value("push_entries_known_total")
        assert (written, known) == ((73, 0) if replay == 0 else (0, 73))
        writing.writer.stop()


def test_second_worker_of_a_shard_adds_nothing_and_misses_nothing(
    client: redis.Redis, open_link: LinkOpener, run_id: str
) -> None:
    workers = [Writing(open_link, run_id) for _ in range(2)]
    for worker in workers:
        worker.writer.start()

    def work(worker: Writing) -> None:
        for number in range(300):
            worker.submit((1000 + number, 0), pushes_of(number))
        assert worker.writer.drain(10)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker in workers:
        worker.writer.stop()
    ids = [
        device_id for entries in all_queues(client).values() for _, entry in entries for device_id in entry.device_ids
    ]
    assert sorted(ids) == sorted(f"phone-{number}-{index}" for number in range(300) for index in range(number % 4))


def test_shards_and_partners_have_queues_of_their_own(client: redis.Redis, writing: Writing) -> None:
    for shard in (0, 3):
        writing.submit((7, 0), [push(0), push(1)], shard=shard)
    writing.finish()
    assert sorted(cast(list[bytes], client.keys("push:*"))) == [
        b"push:{s0}:amap",
        b"push:{s0}:didi",
        b"push:{s3}:amap",
        b"push:{s3}:didi",
    ]


def test_done_moves_once_for_many_entries_without_pushes(client: redis.Redis, writing: Writing) -> None:
    client.config_resetstat()
    for number in range(500):
        writing.submit((1000 + number, 0), [])
    writing.finish()
    assert client.get(done_key(3)) == b"1499-0"
    assert client.info("commandstats")["cmdstat_set"]["calls"] == 1
    assert writing.done == [(3, (1499, 0))]


def test_done_waits_a_little_when_there_is_nothing_to_push(
    client: redis.Redis, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing.submit((1, 0), [])
    writing.finish()
    monkeypatch.setattr(queues, "DONE_INTERVAL_S", 3600.0)
    writing.submit((2, 0), [])
    writing.writer.step()
    assert client.get(done_key(3)) == b"1-0"
    writing.submit((3, 0), [push()])
    writing.writer.step()
    assert client.get(done_key(3)) == b"3-0"


def test_block_ends_at_its_size_and_the_next_goes_on_from_there(
    client: redis.Redis, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "BLOCK_BYTES_MAX", 3000)
    writing.writer.first_block_bytes = 3000
    for number in range(40):
        writing.submit((1000 + number, 0), [push(0, ids=("x" * 60,)), push(1)])
    writing.writer.step()
    assert writing.writer.waiting_count() > 0
    done = parse_id(cast(bytes, client.get(done_key(3))))
    assert queue(client)[-1][0] == push_id(done, 1)
    writing.finish()
    assert [log_id_of(entry_id) for entry_id, _ in queue(client)] == [(1000 + number, 0) for number in range(40)]


def test_a_fan_out_goes_out_in_growing_blocks_and_is_done_with_the_last(
    client: redis.Redis, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "BLOCK_BYTES_MAX", 4000)
    writing.writer.first_block_bytes = 500  # two pushes of 200 bytes and their ids
    writing.submit((6, 0), [])
    writing.submit((7, 5), [push(index % 2, ids=(f"phone-{index}",)) for index in range(100)])
    writing.submit((8, 0), [push()])
    sizes, known = [], 0
    while writing.writer.waiting_count() > 1:
        assert writing.done in ([], [(3, (6, 0))])
        writing.writer.step()
        count = sum(len(entries) for entries in all_queues(client).values())
        sizes.append(count - known)
        known = count
    assert sizes[:4] == [2, 8, 18, 18]  # 500, 2,000 and 4,000 bytes
    writing.finish()
    assert writing.done[-1] == (3, (8, 0))
    for partner, name in enumerate(PARTNERS):
        entries = [entry_id for entry_id, _ in queue(client, partner=name)]
        assert entries[:50] == [push_id((7, 5), number) for number in range(1, 51)]
        assert entries[50:] == ([push_id((8, 0), 1)] if partner == 0 else [])


def test_a_fan_out_that_was_cut_off_is_completed_by_a_replay(
    client: redis.Redis, open_link: LinkOpener, run_id: str
) -> None:
    caused = [push(index % 2, ids=(f"phone-{index}",)) for index in range(20)]
    first = Writing(open_link, run_id)
    first.writer.first_block_bytes = 500
    first.submit((7, 0), caused)
    first.writer.step()
    first.writer.stop()
    assert first.done == []
    assert client.get(done_key(3)) is None
    assert sum(len(entries) for entries in all_queues(client).values()) == 2
    second = Writing(open_link, run_id)
    second.submit((7, 0), caused)
    second.finish()
    second.writer.stop()
    assert second.done == [(3, (7, 0))]
    assert second.metrics.value("push_entries_known_total") == 2
    for name in PARTNERS:
        assert [entry_id for entry_id, _ in queue(client, partner=name)] == [push_id((7, 0), k) for k in range(1, 11)]


def test_counts_and_latency_are_measured(writing: Writing) -> None:
    caused_ms = round(time.time() * 1000) - 100
    writing.submit((caused_ms, 0), [push(0, ids=("a", "b")), push(1, "update")])
    writing.finish()
    assert writing.metrics.value("pushes_total", partner="amap", kind="alert") == 2
    assert writing.metrics.value("pushes_total", partner="didi", kind="update") == 1
    counts = writing.metrics.snapshot()["histograms"]["publish_to_queue_ms"]
    assert sum(counts["bucket_counts"]) == 3
    assert 3 * 90 < counts["sum_ms"] < 3 * 2000


# --- when the server does not take it ---------------------------------------------------------------------------------


def test_full_server_is_retried_until_it_takes_everything(
    client: redis.Redis, writing: Writing, caplog: pytest.LogCaptureFixture
) -> None:
    limit = client.config_get("maxmemory")["maxmemory"] or 0
    client.config_set("maxmemory", 1)
    try:
        with caplog.at_level(logging.WARNING):
            for number in range(20):
                writing.submit((1000 + number, 0), pushes_of(number))
            eventually(lambda: writing.failures_after_a_round() > 3)
        assert "pushes up to log entry 1019-0 were not taken (try 1)" in caplog.text
        assert all_queues(client) == {"amap": [], "didi": []}
        assert client.get(done_key(3)) is None
    finally:
        client.config_set("maxmemory", limit)
    writing.finish()
    assert sum(len(entries) for entries in all_queues(client).values()) == sum(len(pushes_of(n)) for n in range(20))
    assert client.get(done_key(3)) == b"1019-0"


def test_queue_that_is_no_stream_holds_up_its_shard_and_no_other(client: redis.Redis, writing: Writing) -> None:
    client.set(push_key(3, "amap"), "not a stream")
    writing.submit((7, 0), [push(0)], shard=3)
    writing.submit((7, 0), [push(0)], shard=1)
    eventually(lambda: writing.failures_after_a_round() > 2)
    assert writing.done == [(1, (7, 0))]
    assert len(queue(client, shard=1)) == 1
    client.delete(push_key(3, "amap"))
    writing.finish()
    assert writing.done == [(1, (7, 0)), (3, (7, 0))]


@pytest.mark.parametrize("replies_read", [0, 1, 3, 4])
def test_lost_replies_lead_to_no_second_entry(
    client: redis.Redis, open_link: LinkOpener, run_id: str, replies_read: int
) -> None:
    class Forgetful(Link):
        lost = 0
        left: int | None = None

        def send(self, parts: Iterable[bytes | memoryview]) -> None:
            parts = list(parts)
            super().send(parts)
            if bytes(parts[0]).endswith(b"MULTI\r\n") and Forgetful.lost == 0:
                self.left = replies_read

        def skip(self, expected: bytes) -> bool:
            return self.left is None and super().skip(expected)

        def receive(self) -> object:
            if self.left is not None:
                if self.left == 0:
                    eventually(lambda: client.get(done_key(3)))  # the server has done its part
                    Forgetful.lost = 1
                    self.close()
                    raise redis.ConnectionError("the reply was lost")
                self.left -= 1
            return super().receive()

    writing = Writing(lambda: Forgetful(client), run_id)
    writing.submit((7, 0), [push(0), push(0, ids=("b",))])
    writing.finish()
    assert Forgetful.lost == 1
    assert [entry.device_ids for _, entry in queue(client)] == [("phone",), ("b",)]
    assert writing.metrics.value("push_entries_known_total") == 2
    assert writing.metrics.value("push_link_errors_total") == 1
    writing.writer.stop()


def test_killed_connections_lose_and_repeat_nothing(client: redis.Redis, open_link: LinkOpener, run_id: str) -> None:
    writing = Writing(open_link, run_id)
    writing.writer.start()
    for number in range(400):
        writing.submit((1000 + number, 0), pushes_of(number))
        if number % 50 == 25:
            client.client_kill_filter(_type="normal", skipme=True)
    assert writing.writer.drain(10)
    ids = [
        device_id for entries in all_queues(client).values() for _, entry in entries for device_id in entry.device_ids
    ]
    assert sorted(ids) == sorted(f"phone-{number}-{index}" for number in range(400) for index in range(number % 4))
    assert [entry_id for entry_id, _ in queue(client)] == sorted(entry_id for entry_id, _ in queue(client))
    writing.writer.stop()


# --- runs of the server -----------------------------------------------------------------------------------------------


def test_entries_of_a_run_that_is_over_are_dropped(client: redis.Redis, writing: Writing) -> None:
    writing.submit((7, 0), [push(ids=("old",))], run_id="0" * 40)
    writing.submit((8, 0), [push(ids=("new",))])
    writing.finish()
    assert [entry.device_ids for _, entry in queue(client)] == [("new",)]
    assert writing.metrics.value("push_drops_total", shard="3") == 1
    assert writing.done == [(3, (8, 0))]


def test_restart_of_the_server_drops_what_was_read_before_it(own_server: EmbeddedServer) -> None:
    client = connect(own_server.url)
    writing = Writing(link_opener(client), str(client.info("server")["run_id"]))
    writing.submit((7, 0), [push(ids=("before",))])
    writing.finish()
    writing.submit((8, 0), [push(ids=("lost",))])
    directory = own_server.directory
    own_server.close()
    client.close()
    writing.writer.step()
    with EmbeddedServer.start(directory, port=None):
        writing.run_id = str(client.info("server")["run_id"])
        writing.finish()
        writing.submit((8, 0), [push(ids=("after the reload",))])
        writing.finish()
        assert [entry.device_ids for _, entry in queue(client)] == [("before",), ("after the reload",)]
        writing.writer.stop()
    client.close()


# --- the writing thread -----------------------------------------------------------------------------------------------


def test_drain_returns_when_everything_is_in_the_queues(client: redis.Redis, writing: Writing) -> None:
    writing.writer.start()
    for number in range(100):
        writing.submit((1000 + number, 0), pushes_of(number))
    assert writing.writer.drain(5)
    assert client.get(done_key(3)) == b"1099-0"


def test_writer_stops_promptly_although_the_server_hangs(own_server: EmbeddedServer) -> None:
    client = connect(own_server.url)
    writing = Writing(link_opener(client), str(client.info("server")["run_id"]))
    writing.writer.start()
    writing.submit((7, 0), [push()])
    assert writing.writer.drain(5)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        writing.submit((8, 0), [push()])
        assert not writing.writer.drain(0.1)
        started_s = time.monotonic()
        writing.writer.stop(timeout_s=0.4)
        assert time.monotonic() - started_s < 1
        assert not any(thread.name == "push-writer" for thread in threading.enumerate())
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    client.close()


def test_programming_error_in_the_thread_reaches_the_flow(open_link: LinkOpener, run_id: str) -> None:
    writing = Writing(open_link, run_id)
    writing.writer.start()
    writing.submit((7, 0), [push(partner=9)])  # no such partner

    def submit() -> bool:
        try:
            writing.submit((8, 0), [])
        except RuntimeError as error:
            return isinstance(error.__cause__, IndexError)
        return False

    eventually(submit)
    writing.writer.stop()
