"""Shard logs on a real server."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import redis

from flows import log, log_reader
from flows.embedded import EmbeddedServer
from flows.log import (
    FIRST,
    LogId,
    LogWriter,
    RawEntry,
    SettingsMismatch,
    add_partner,
    append_entry,
    done_key,
    ensure_settings,
    format_id,
    last_id,
    log_key,
    parse_id,
    read_settings,
    settings_key,
    trimmed_key,
)
from flows.log_reader import LogReader, ReaderLimits
from flows.metrics import Metrics
from flows.queues import DoneFollower
from flows.server import Link, LinkOpener, connect, link_opener
from flows.wire import PingColumns, decode_entry
from geoindex.entries import AlertClose, Settings, Tick
from tests.flows.test_wire import pings
from tests.flows.waiting import eventually

SETTINGS = Settings(shard_count=4, partners=("amap", "didi"), hash_key=7)
CLOSE = AlertClose("a17", None, "found", (1, 0))


@pytest.fixture
def logs(client: redis.Redis) -> Settings:
    return ensure_settings(client, SETTINGS)


def stream(client: redis.Redis, key: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
    return cast(list[tuple[bytes, dict[bytes, bytes]]], client.xrange(key))


def kinds(client: redis.Redis, shard: int) -> list[bytes]:
    return [next(iter(fields)) for _, fields in stream(client, log_key(shard))]


# --- names ------------------------------------------------------------------------------------------------------------


def test_keys_carry_the_shard_as_hash_tag() -> None:
    assert log.log_key(3) == "log:{s3}"
    assert log.push_key(3, "amap") == "push:{s3}:amap"
    assert log.done_key(63) == "done:{s63}"
    assert log.trimmed_key(0) == "trimmed:{s0}"
    assert log.relay_key(12) == "relay:{s12}"


def test_ids_are_pairs_that_compare_like_the_server_compares_them() -> None:
    assert parse_id(b"1700000000000-12") == (1_700_000_000_000, 12)
    assert format_id((5, 0)) == "5-0"
    assert parse_id("9-10") > parse_id("9-9")


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_the_first_entry_of_every_log(client: redis.Redis) -> None:
    assert read_settings(client) is None
    assert ensure_settings(client, SETTINGS) == SETTINGS
    for shard in range(4):
        ((_, fields),) = stream(client, log_key(shard))
        ((kind, payload),) = fields.items()
        assert decode_entry(kind, payload) == SETTINGS
    assert read_settings(client) == SETTINGS


def test_existing_settings_win(client: redis.Redis, logs: Settings) -> None:
    other = replace(SETTINGS, hash_key=8, live_window_ms=1, partners=())
    assert ensure_settings(client, other) == SETTINGS
    assert [kinds(client, shard) for shard in range(4)] == [[b"settings"]] * 4


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (replace(SETTINGS, shard_count=8), "shard count 4, which never changes; wanted 8"),
        (replace(SETTINGS, hash_name="crc"), "hash function mum128, which never changes; wanted crc"),
        (replace(SETTINGS, format_version=2), "format version 1, which never changes; wanted 2"),
    ],
)
def test_settings_that_never_change_must_agree(
    client: redis.Redis, logs: Settings, wanted: Settings, message: str
) -> None:
    with pytest.raises(SettingsMismatch) as caught:
        ensure_settings(client, wanted)
    assert message in str(caught.value)


def test_processes_that_start_at_once_agree_on_the_settings(client: redis.Redis) -> None:
    found: list[Settings] = []
    barrier = threading.Barrier(6)

    def start(key: int) -> None:
        barrier.wait()
        found.append(ensure_settings(client, replace(SETTINGS, hash_key=key)))

    threads = [threading.Thread(target=start, args=(key,)) for key in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    payloads = {client.get(settings_key(shard)) for shard in range(4)}
    assert len(payloads) == 1
    assert all(kinds(client, shard) == [b"settings"] for shard in range(4))


def test_start_that_was_cut_short_is_completed_by_the_next(client: redis.Redis) -> None:
    log._append_settings(client, 0, None, SETTINGS)
    assert read_settings(client) is None
    assert ensure_settings(client, replace(SETTINGS, hash_key=8)) == SETTINGS
    assert read_settings(client) == SETTINGS


def test_log_of_somebody_else_is_not_taken_over(client: redis.Redis) -> None:
    client.xadd(log_key(0), {b"hello": b"world"})
    with pytest.raises(SettingsMismatch) as caught:
        ensure_settings(client, SETTINGS)
    assert "log:{s0} has entries but no settings" in str(caught.value)


def test_partner_is_added_to_every_log_once(client: redis.Redis, logs: Settings) -> None:
    assert add_partner(client, ["baidu", "amap"]).partners == ("amap", "didi", "baidu")
    assert add_partner(client, ["baidu"]).partners == ("amap", "didi", "baidu")
    assert [kinds(client, shard) for shard in range(4)] == [[b"settings", b"settings"]] * 4
    assert read_settings(client) == replace(SETTINGS, partners=("amap", "didi", "baidu"))


def test_partners_added_at_once_have_one_order_everywhere(client: redis.Redis, logs: Settings) -> None:
    threads = [threading.Thread(target=add_partner, args=(client, [f"p{number}"])) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settings = [decode_entry(b"settings", cast(bytes, client.get(settings_key(shard)))) for shard in range(4)]
    assert len(set(cast(list[Settings], settings))) == 1
    assert sorted(cast(Settings, settings[0]).partners) == ["amap", "didi", "p0", "p1", "p2", "p3", "p4", "p5"]
    for shard in range(4):
        lists = [
            cast(Settings, decode_entry(b"settings", fields[b"settings"])).partners
            for _, fields in stream(client, log_key(shard))
        ]
        assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(lists))


def test_settings_count_only_when_every_shard_has_them(client: redis.Redis, logs: Settings) -> None:
    log._append_settings(client, 0, SETTINGS, replace(SETTINGS, partners=("amap", "didi", "new")))
    assert read_settings(client) == SETTINGS
    add_partner(client, [])
    assert cast(Settings, read_settings(client)).partners == ("amap", "didi", "new")


@pytest.mark.parametrize("name", ["", "a b", "a:b", "{a}", "a\n", "x" * 65, "团" * 22])
def test_partner_name_that_cannot_be_part_of_a_key_is_refused(client: redis.Redis, logs: Settings, name: str) -> None:
    with pytest.raises(ValueError, match="a partner's name must have 1 to 64 bytes"):
        add_partner(client, [name])


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(open_link: LinkOpener, logs: Settings) -> Iterator[LogWriter]:
    writer = LogWriter(open_link, logs)
    yield writer
    writer.close()


def all_pings(client: redis.Redis) -> dict[str, int]:
    """observed_at of every ping in the logs, by device."""
    found: dict[str, int] = {}
    for shard in range(4):
        for _, fields in stream(client, log_key(shard))[1:]:
            ((kind, payload),) = fields.items()
            columns = decode_entry(kind, payload)
            assert isinstance(columns, PingColumns)
            raw, ends = columns.id_bytes.tobytes(), [0, *columns.id_end.tolist()]
            for row, observed_at_ms in enumerate(columns.observed_at_ms.tolist()):
                found[raw[ends[row] : ends[row + 1]].decode()] = observed_at_ms
    return found


def test_every_ping_is_appended_to_one_shard(client: redis.Redis, writer: LogWriter) -> None:
    batch = pings(rows=1000)
    appended = writer.append_pings(batch)
    assert sum(entry.ping_count for entry in appended) == 1000
    assert [entry.shard for entry in appended] == [0, 1, 2, 3]
    assert [last_id(client, log_key(entry.shard)) for entry in appended] == [entry.log_id for entry in appended]
    assert all_pings(client) == {batch.device_id(row): int(batch.observed_at_ms[row]) for row in range(1000)}


def test_large_batches_are_cut_into_several_entries(
    client: redis.Redis, writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PINGS_PER_ENTRY_MAX", 10)
    monkeypatch.setattr(log, "SEND_BYTES", 1000)
    batch = pings(rows=200)
    appended = writer.append_pings(batch)
    assert max(entry.ping_count for entry in appended) == 10
    assert len(appended) >= 20
    assert len(all_pings(client)) == 200


def test_writer_whose_connection_was_lost_says_so_and_goes_on_with_the_next_batch(
    client: redis.Redis, writer: LogWriter
) -> None:
    writer.append_pings(pings(rows=10))
    client.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(redis.ConnectionError):
        writer.append_pings(pings(rows=10))
    assert writer.append_pings(pings(rows=10))


def test_refused_append_is_raised(client: redis.Redis, writer: LogWriter) -> None:
    used = client.config_get("maxmemory")["maxmemory"] or 0
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.ResponseError, match="used memory > 'maxmemory'"):
            writer.append_pings(pings(rows=10))
    finally:
        client.config_set("maxmemory", used)
    assert writer.append_pings(pings(rows=10))


# --- reading ----------------------------------------------------------------------------------------------------------


def take_all(reader: LogReader, shard: int) -> list[RawEntry]:
    """All that can be taken: no more at once than up to an alert event."""
    return list(itertools.chain.from_iterable(iter(lambda: reader.take(shard, 1000), [])))


class Reading:
    """A reader driven round by round, without a thread."""

    def __init__(self, open_link: LinkOpener, positions: dict[int, LogId] | None = None, **options: Any) -> None:
        self.metrics = Metrics()
        self.reader = LogReader(
            open_link,
            positions or dict.fromkeys(range(4), FIRST),
            metrics=self.metrics,
            **({"writes_ticks": False} | options),
        )

    def round(self) -> dict[int, list[RawEntry]]:
        self.reader.step()
        return {shard: taken for shard in range(4) if (taken := take_all(self.reader, shard))}


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reader, "BLOCK_S", 0.01)


@pytest.fixture
def reading(open_link: LinkOpener, logs: Settings) -> Iterator[Reading]:
    reading = Reading(open_link)
    yield reading
    reading.reader.stop()


def test_reader_delivers_every_entry_in_log_order(client: redis.Redis, reading: Reading) -> None:
    ids = [append_entry(client, 2, CLOSE) for _ in range(20)]
    read = reading.round()
    assert [entry.kind for entry in read[0]] == [b"settings"]
    entries = read[2] + reading.round()[2]
    assert [entry.log_id for entry in entries][1:] == ids
    assert decode_entry(entries[5].kind, entries[5].payload) == CLOSE
    later = append_entry(client, 1, Tick())
    assert [(entry.shard, entry.log_id) for entry in reading.round()[1]] == [(1, later)]


def test_an_alert_event_is_the_last_of_what_is_taken_at_once(client: redis.Redis, reading: Reading) -> None:
    for entry in (CLOSE, Tick(), Tick(), CLOSE, CLOSE, Tick()):
        append_entry(client, 2, entry)
    reading.reader.step()
    taken = list(iter(lambda: reading.reader.take(2, 1000), []))
    assert [[entry.kind for entry in entries] for entries in taken] == [
        [b"settings", b"close"],
        [b"tick", b"tick", b"close"],
        [b"close"],
        [b"tick"],
    ]


def test_reader_begins_behind_its_positions(client: redis.Redis, open_link: LinkOpener, logs: Settings) -> None:
    ids = [append_entry(client, 2, CLOSE) for _ in range(5)]
    reading = Reading(open_link, {2: ids[2]})
    reading.reader.step()
    assert [entry.log_id for entry in take_all(reading.reader, 2)] == ids[3:]
    reading.reader.stop()


def test_items_carry_the_run_they_were_read_under(client: redis.Redis, reading: Reading) -> None:
    assert {entry.run_id for entries in reading.round().values() for entry in entries} == {client.info()["run_id"]}


def test_entry_with_two_fields_arrives_as_no_kind_at_all(client: redis.Redis, reading: Reading) -> None:
    client.xadd(log_key(1), {b"tick": b"x", b"close": b"y"})
    assert [entry.kind for entry in reading.round()[1]] == [b"settings", b""]


def test_reader_holds_no_more_than_its_limits(client: redis.Redis, open_link: LinkOpener, logs: Settings) -> None:
    ids = [append_entry(client, 1, Tick()) for _ in range(30)]
    reader = Reading(open_link, limits=ReaderLimits(entries_max=8, in_flight_max=5)).reader
    for _ in range(3):
        reader.step()
    first = reader.take(1, 100)
    assert len(first) == 5
    assert reader.take(1, 100) == []
    reader.step()
    reader.release(1, first[2].log_id)
    assert len(reader.take(1, 100)) == 3
    reader.step()
    reader.release(1, ids[-1])
    taken = [entry.log_id for entry in first]
    while taken[-1] != ids[-1]:
        reader.step()
        more = [entry.log_id for entry in reader.take(1, 100)]
        taken += more
        reader.release(1, taken[-1])
    assert len(taken) == 28
    reader.stop()


def test_reader_holds_no_more_than_its_bytes(client: redis.Redis, open_link: LinkOpener, logs: Settings) -> None:
    for _ in range(20):
        client.xadd(log_key(1), {b"pings": bytes(100_000)})
    reader = Reading(open_link, limits=ReaderLimits(process_bytes_max=4 * 300_000)).reader
    for _ in range(10):
        reader.step()
    assert sum(len(entry.payload) for entry in reader.take(1, 100)) < 500_000
    reader.stop()


def test_one_read_of_many_shards_asks_for_few_entries_of_each(client: redis.Redis, open_link: LinkOpener) -> None:
    ensure_settings(client, replace(SETTINGS, shard_count=32))
    for _ in range(10):
        append_entry(client, 1, CLOSE)
    reader = LogReader(open_link, dict.fromkeys(range(32), FIRST), writes_ticks=False)
    reader.step()
    assert len(reader.take(1, 100)) == 2
    reader.stop()


def test_full_shard_holds_up_no_other(client: redis.Redis, open_link: LinkOpener, logs: Settings) -> None:
    for _ in range(10):
        append_entry(client, 1, CLOSE)
    reader = Reading(open_link, limits=ReaderLimits(entries_max=4)).reader
    reader.step()
    reader.step()
    append_entry(client, 3, CLOSE)
    reader.step()
    assert len(reader.take(3, 10)) == 2
    reader.stop()


def test_silent_log_gets_a_tick(client: redis.Redis, open_link: LinkOpener, logs: Settings, monkeypatch: Any) -> None:
    monkeypatch.setattr(log_reader, "TICK_S", 0.05)
    reading = Reading(open_link, writes_ticks=True)
    reading.round()
    eventually(lambda: b"tick" in [entry.kind for entry in reading.round().get(3, [])])
    assert kinds(client, 0)[:2] == [b"settings", b"tick"]
    reading.reader.stop()


def test_log_that_has_not_begun_gets_no_tick(client: redis.Redis, open_link: LinkOpener, monkeypatch: Any) -> None:
    monkeypatch.setattr(log_reader, "TICK_S", 0.01)
    reading = Reading(open_link, writes_ticks=True)
    for _ in range(5):
        assert reading.round() == {}
    assert client.exists(log_key(0)) == 0
    reading.reader.stop()


def test_refused_tick_is_counted_and_reading_goes_on(
    client: redis.Redis, open_link: LinkOpener, logs: Settings, monkeypatch: Any
) -> None:
    monkeypatch.setattr(log_reader, "TICK_S", 0.01)
    reading = Reading(open_link, writes_ticks=True)
    reading.round()
    used = client.config_get("maxmemory")["maxmemory"] or 0
    client.config_set("maxmemory", 1)
    try:
        eventually(lambda: reading.round() or reading.metrics.value("tick_errors_total", shard="1"))
    finally:
        client.config_set("maxmemory", used)
    eventually(lambda: 1 in reading.round())
    reading.reader.stop()


# --- reading, when the log is no longer the one that was read ---------------------------------------------------------


def test_reader_that_slept_through_a_trim_stops_the_shard(client: redis.Redis, reading: Reading) -> None:
    reading.round()
    ids = [append_entry(client, 1, CLOSE) for _ in range(3)]
    client.xtrim(log_key(1), minid=format_id(ids[2]))
    client.set(trimmed_key(1), format_id(ids[1]))
    other = append_entry(client, 2, CLOSE)
    read = reading.round()
    assert [entry.log_id for entry in read[2]] == [other]
    assert 1 not in read
    assert "its log was trimmed up to" in reading.reader.stopped()[1]
    assert 1 not in reading.round()
    reading.reader.seek(1, ids[1])
    assert reading.reader.stopped() == {}
    assert [entry.log_id for entry in reading.round()[1]] == ids[2:]


def test_trim_behind_the_reader_is_none_of_its_business(client: redis.Redis, reading: Reading) -> None:
    ids = [append_entry(client, 1, CLOSE) for _ in range(3)]
    reading.round()
    client.xtrim(log_key(1), maxlen=0)
    client.set(trimmed_key(1), format_id(ids[2]))
    later = append_entry(client, 1, CLOSE)
    assert later > ids[2]
    assert [entry.log_id for entry in reading.round()[1]] == [later]


def test_what_was_asked_for_before_a_seek_is_thrown_away(
    client: redis.Redis, open_link: LinkOpener, logs: Settings
) -> None:
    ids = [append_entry(client, 1, CLOSE) for _ in range(3)]
    reader: LogReader

    class Seeking(Link):
        seek_count = 0

        def send(self, parts: Iterable[bytes | memoryview]) -> None:
            parts = list(parts)
            super().send(parts)
            if b"XREAD" in parts[0] and not self.seek_count:
                self.seek_count = 1
                reader.seek(1, ids[1])

    reader = LogReader(lambda: Seeking(client), {1: FIRST}, writes_ticks=False)
    reader.step()
    assert reader.take(1, 10) == []
    reader.step()
    assert [entry.log_id for entry in reader.take(1, 10)] == ids[2:]
    reader.stop()


def test_a_replay_of_what_is_done_gets_credit_all_the_way(
    client: redis.Redis, open_link: LinkOpener, logs: Settings
) -> None:
    """In a cluster credit comes from `done` alone, which stands still until the replay is past it."""
    for _ in range(40):
        append_entry(client, 1, CLOSE)
    ids = [parse_id(raw_id) for raw_id, _ in stream(client, log_key(1))]
    client.set(done_key(1), format_id(ids[-1]))
    reader = Reading(open_link, {1: FIRST}, limits=ReaderLimits(in_flight_max=4)).reader
    reader.start()
    follower = DoneFollower(open_link, [1], reader.release, interval_s=0.001)
    follower.start()
    replayed: list[LogId] = []

    def replay() -> bool:
        replayed.extend(entry.log_id for entry in reader.take(1, 8))
        return len(replayed) == len(ids)

    try:
        eventually(replay)
    finally:
        follower.stop()
        reader.stop()
    assert replayed == ids


def test_lost_connection_to_the_same_run_loses_and_repeats_nothing(
    client: redis.Redis, open_link: LinkOpener, logs: Settings
) -> None:
    reader = LogReader(open_link, {1: FIRST}, writes_ticks=False, metrics=Metrics())
    reader.start()
    ids = [append_entry(client, 1, CLOSE) for _ in range(5)]
    read: list[LogId] = []

    def take() -> int:
        read.extend(entry.log_id for entry in reader.take(1, 10))
        return len(read)

    eventually(lambda: take() == 6)
    client.client_kill_filter(_type="normal", skipme=True)
    ids += [append_entry(client, 1, CLOSE) for _ in range(5)]
    eventually(lambda: take() == 11)
    assert read[1:] == ids
    assert reader.stopped() == {}
    reader.stop()


def test_restarted_server_stops_every_shard_until_it_is_reloaded(own_server: EmbeddedServer) -> None:
    client = connect(own_server.url)
    ensure_settings(client, SETTINGS)
    reader = LogReader(link_opener(client), dict.fromkeys(range(4), FIRST), writes_ticks=False, metrics=Metrics())
    reader.start()
    eventually(lambda: reader.take(1, 10))
    directory = own_server.directory
    own_server.close()
    with EmbeddedServer.start(directory, port=None):
        eventually(lambda: len(reader.stopped()) == 4)
        assert "the server was restarted" in reader.stopped()[1]
        append_entry(client, 1, CLOSE)
        assert reader.take(1, 10) == []
        reader.seek(1, FIRST)
        taken: list[RawEntry] = []

        def take() -> bool:
            taken.extend(reader.take(1, 10))
            return len(taken) == 2

        eventually(take)
        assert [entry.kind for entry in taken] == [b"settings", b"close"]
        assert {entry.run_id for entry in taken} == {client.info()["run_id"]}
        reader.stop()
    client.close()


def test_reader_without_room_notices_that_the_server_was_restarted(own_server: EmbeddedServer) -> None:
    client = connect(own_server.url)
    ensure_settings(client, SETTINGS)
    limits = ReaderLimits(entries_max=1, in_flight_max=1)
    reader = LogReader(link_opener(client), {1: FIRST}, limits, writes_ticks=False, metrics=Metrics())
    reader.start()
    eventually(lambda: reader.take(1, 10))
    directory = own_server.directory
    own_server.close()
    with EmbeddedServer.start(directory, port=None):
        # Nothing is released: the writer drops what was read of the run before.
        eventually(lambda: "the server was restarted" in reader.stopped().get(1, ""))
        reader.stop()
    client.close()


# --- the reading thread -----------------------------------------------------------------------------------------------


def take_of_each(reader: LogReader, shard_count: int) -> None:
    """Until entries of every shard were taken; links deliver theirs at different moments."""
    left = set(range(shard_count))

    def take() -> bool:
        left.difference_update([shard for shard in left if reader.take(shard, 10)])
        return not left

    eventually(take)


@pytest.fixture(params=[1, 3], ids=["one_link", "three_links"])
def reader(open_link: LinkOpener, logs: Settings, request: Any) -> Iterator[LogReader]:
    reader = LogReader(open_link, dict.fromkeys(range(4), FIRST), metrics=Metrics(), link_count=request.param)
    reader.start()
    yield reader
    reader.stop()


def test_wait_ends_when_an_entry_arrives(client: redis.Redis, reader: LogReader, monkeypatch: Any) -> None:
    take_of_each(reader, 4)
    for shard in range(4):
        reader.release(shard, last_id(client, log_key(shard)))
    started_s = time.monotonic()
    timer = threading.Timer(0.05, append_entry, (client, 2, CLOSE))
    timer.start()
    reader.wait(range(4), 5.0)
    assert time.monotonic() - started_s < 1.0
    assert reader.take(2, 10)
    timer.join()


def test_wait_does_not_begin_while_entries_are_in_flight(client: redis.Redis, reader: LogReader) -> None:
    eventually(lambda: reader.take(2, 10))
    started_s = time.monotonic()
    reader.wait([2], 5.0)
    assert time.monotonic() - started_s < 0.5
    assert not reader.is_idle([2])
    reader.release(2, last_id(client, log_key(2)))
    assert reader.is_idle([2])


def test_reader_tells_how_far_behind_the_flow_is(client: redis.Redis, reader: LogReader) -> None:
    eventually(lambda: reader.take(2, 10))
    time.sleep(0.02)
    assert reader.lag_ms(2) >= 20
    assert not reader.at_head(2)
    reader.release(2, last_id(client, log_key(2)))
    eventually(lambda: reader.lag_ms(2) == 0)
    assert reader.at_head(2)


def test_reader_stops_promptly_although_it_blocks(open_link: LinkOpener, logs: Settings, monkeypatch: Any) -> None:
    monkeypatch.setattr(log_reader, "BLOCK_S", 5.0)
    reader = LogReader(open_link, dict.fromkeys(range(4), FIRST), writes_ticks=False)
    reader.start()
    eventually(lambda: reader.take(1, 10))
    started_s = time.monotonic()
    reader.stop()
    assert time.monotonic() - started_s < 0.5
    assert not any(thread.name == "log-reader" for thread in threading.enumerate())


def test_reader_waits_for_a_server_that_is_down(own_server: EmbeddedServer) -> None:
    client = connect(own_server.url)
    ensure_settings(client, SETTINGS)
    metrics = Metrics()
    os.kill(own_server.pid, signal.SIGSTOP)
    reader = LogReader(link_opener(client), {1: FIRST}, metrics=metrics)
    try:
        reader.start()
        assert reader.take(1, 10) == []
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    eventually(lambda: reader.take(1, 10))
    reader.stop()
    client.close()


def test_programming_error_in_the_thread_reaches_the_flow(logs: Settings) -> None:
    def broken() -> Link:
        raise ZeroDivisionError

    reader = LogReader(broken, {1: FIRST})
    reader.start()

    def take() -> bool:
        try:
            reader.take(1, 10)
        except RuntimeError as error:
            return isinstance(error.__cause__, ZeroDivisionError)
        return False

    eventually(take)
    reader.stop()


def test_idle_reader_costs_next_to_nothing(client: redis.Redis, open_link: LinkOpener, monkeypatch: Any) -> None:
    monkeypatch.setattr(log_reader, "BLOCK_S", 1.0)
    ensure_settings(client, replace(SETTINGS, shard_count=8))
    reader = LogReader(open_link, dict.fromkeys(range(8), FIRST), link_count=4)
    reader.start()
    take_of_each(reader, 8)
    time.sleep(0.2)

    def used_s() -> float:
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        return sum(
            cast(float, thread.user_time + thread.system_time)
            for thread in psutil.Process().threads()
            if names.get(thread.id, "").startswith("log-reader")
        )

    before_s = used_s()
    time.sleep(2)
    assert (used_s() - before_s) / 2 <= 0.015
    reader.stop()


def test_a_link_that_is_left_over_from_another_run_of_the_server_delivers_nothing(
    client: redis.Redis, logs: Settings
) -> None:
    """Two links: shards 0 and 2 by one, 1 and 3 by the other, which is the first to meet a later run."""
    opened: list[Link] = []

    def open_link() -> Link:
        link = Link(client)
        if len(opened) >= 2:
            link.run_id = "later"
        opened.append(link)
        return link

    reader = LogReader(open_link, dict.fromkeys(range(4), FIRST), writes_ticks=False, metrics=Metrics(), link_count=2)
    reader.start()
    take_of_each(reader, 4)
    opened[1].close()
    eventually(lambda: reader.run_id == "later")
    assert set(reader.stopped()) == set(range(4))
    for shard in range(4):
        reader.seek(shard, FIRST)
        append_entry(client, shard, CLOSE)
    taken: list[log.RawEntry] = []

    def take() -> bool:
        taken.extend(entry for shard in range(4) for entry in reader.take(shard, 10))
        return {entry.shard for entry in taken} == set(range(4))

    eventually(take)
    assert {entry.run_id for entry in taken} == {"later"}
    reader.stop()


def test_the_pings_of_one_append_are_one_transaction(
    client: redis.Redis, open_link: LinkOpener, logs: Settings
) -> None:
    """So that they are one fsync, not one a shard: the server's other clients wait for each."""
    writer = LogWriter(open_link, logs)
    before = client.info("commandstats").get("cmdstat_exec", {"calls": 0})["calls"]
    assert len(writer.append_pings(pings(rows=5000))) == 4
    assert client.info("commandstats")["cmdstat_exec"]["calls"] == before + 1
    writer.close()


@pytest.mark.parametrize("is_cluster", [False, True])
def test_an_append_that_the_server_has_no_room_for_is_refused(
    client: redis.Redis, open_link: LinkOpener, logs: Settings, is_cluster: bool
) -> None:
    def open_node() -> Link:
        link = open_link()
        link.is_cluster = is_cluster
        return link

    writer = LogWriter(open_node, logs)
    before = str(client.config_get("maxmemory")["maxmemory"])
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.ResponseError, match="maxmemory"):
            writer.append_pings(pings(rows=5000))
    finally:
        client.config_set("maxmemory", before)
    assert len(writer.append_pings(pings(rows=5000))) == 4
    writer.close()


def test_on_a_node_of_a_cluster_every_shard_is_appended_to_by_itself(
    client: redis.Redis, open_link: LinkOpener, logs: Settings
) -> None:
    def open_node() -> Link:
        link = open_link()
        link.is_cluster = True
        return link

    writer = LogWriter(open_node, logs)
    before = client.info("commandstats").get("cmdstat_exec", {"calls": 0})["calls"]
    assert len(writer.append_pings(pings(rows=5000))) == 4
    assert client.info("commandstats").get("cmdstat_exec", {"calls": 0})["calls"] == before
    writer.close()


def test_pings_written_by_one_side_are_read_by_the_other(
    client: redis.Redis, open_link: LinkOpener, logs: Settings
) -> None:
    batch = pings(rows=5000)
    writer = LogWriter(open_link, logs)
    reader = LogReader(open_link, dict.fromkeys(range(4), FIRST), writes_ticks=False)
    reader.start()
    writer.append_pings(batch)
    observed: list[int] = []

    def take() -> int:
        for shard in range(4):
            for entry in reader.take(shard, 10):
                columns = decode_entry(entry.kind, entry.payload)
                if isinstance(columns, PingColumns):
                    observed.extend(columns.observed_at_ms.tolist())
                reader.release(shard, entry.log_id)
        return len(observed)

    eventually(lambda: take() == 5000)
    assert sorted(observed) == np.sort(batch.observed_at_ms).tolist()
    writer.close()
    reader.stop()
