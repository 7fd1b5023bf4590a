"""Checkpoint files, and what is made of them when they and the log do not agree."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import redis

from flows import checkpoints
from flows.checkpointer import Checkpointer, LogTooShort, room
from flows.checkpoints import Checkpoint, CheckpointAbandoned, CheckpointStore, CheckpointUnusable, OpenCheckpoint
from flows.log import (
    FIRST,
    LogId,
    RawEntry,
    append_entry,
    done_key,
    ensure_settings,
    format_id,
    log_key,
    parse_id,
    trimmed_key,
)
from flows.metrics import Metrics
from geoindex.columns import U8
from geoindex.entries import HOUR_MS, Settings, Tick
from geoindex.shard import SettingsRefused, ShardMachine
from geoindex.snapshot import Columns
from tests.flows.waiting import eventually, memory_limit
from tests.geoindex.test_snapshot import assert_same, log_entries, plain, rearranged, some_machine
from tests.reference.generator import generate_log

SETTINGS = Settings(shard_count=4, partners=("amap", "baidu"), hash_key=7)
P1, P2, P3, P4 = ((1_700_000_000_000 + step * 60_000, step) for step in range(4))
SHARD = 2


@pytest.fixture(scope="module")
def machine() -> ShardMachine:
    return some_machine()


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path, SETTINGS)


def put(store: CheckpointStore, machine: ShardMachine, position: LogId = P1, shard: int = SHARD) -> Checkpoint:
    return store.finalise(store.write(shard, position, machine.state(), machine.columns()))


def verify(checkpoint: Checkpoint) -> None:
    with contextlib.closing(OpenCheckpoint(checkpoint)) as opened:
        opened.verify()


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in (store.directory / f"s{SHARD:03d}").iterdir())


# ---- files


def test_a_machine_comes_back_as_it_was(store: CheckpointStore, machine: ShardMachine) -> None:
    checkpoint = put(store, machine)
    assert store.finals(SHARD) == [checkpoint]
    assert (checkpoint.position, checkpoint.path.name) == (P1, f"{format_id(P1)}.checkpoint")
    verify(checkpoint)
    assert_same(store.load(checkpoint), machine)


@pytest.mark.parametrize("seed", range(3))
def test_restarts_from_files_change_no_push(seed: int, store: CheckpointStore) -> None:
    log = generate_log(np.random.default_rng(seed), device_count=30)
    rng = np.random.default_rng(seed)
    straight, restarted = ShardMachine(), ShardMachine()
    for number, (at_ms, entry) in enumerate(log_entries(log, np.random.default_rng(seed), seed % 2 == 0)):
        assert plain(restarted.apply(at_ms, entry)) == plain(straight.apply(at_ms, entry))
        if rng.random() < 0.1:
            restarted = store.load(put(store, restarted, (at_ms, number)))
    assert_same(restarted, straight)


def test_a_machine_before_its_first_entry_comes_back(store: CheckpointStore) -> None:
    assert_same(store.load(put(store, ShardMachine())), ShardMachine())


def test_nothing_but_a_final_checkpoint_is_found(store: CheckpointStore, machine: ShardMachine) -> None:
    assert store.finals(SHARD) == []
    written = store.write(SHARD, P1, machine.state(), machine.columns())
    assert store.finals(SHARD) == []
    assert written.size_bytes == written.path.stat().st_size
    store.give_up(written)
    assert names(store) == []


def test_the_two_latest_are_kept(store: CheckpointStore, machine: ShardMachine) -> None:
    for position in (P1, P2, P3):
        put(store, machine, position)
    assert [checkpoint.position for checkpoint in store.finals(SHARD)] == [P3, P2]
    assert len(names(store)) == 2


def test_one_that_cannot_be_used_stays_until_there_are_others_and_is_none_of_the_two(
    store: CheckpointStore, machine: ShardMachine
) -> None:
    for position in (P1, P4):
        put(store, machine, position)
    store.finalise(store.write(SHARD, P2, machine.state(), machine.columns()), unusable={P4})
    assert [checkpoint.position for checkpoint in store.finals(SHARD)] == [P2, P1]
    # It may also be replaced by a good one of the same position.
    store.finalise(store.write(SHARD, P2, machine.state(), machine.columns()), unusable={P2})
    assert [checkpoint.position for checkpoint in store.finals(SHARD)] == [P2, P1]


def test_shards_and_deployments_do_not_mix(tmp_path: Path, store: CheckpointStore, machine: ShardMachine) -> None:
    put(store, machine)
    assert store.finals(SHARD + 1) == []
    assert CheckpointStore(tmp_path, Settings(shard_count=4, hash_key=8)).finals(SHARD) == []
    assert CheckpointStore(tmp_path, Settings(shard_count=5, hash_key=7)).finals(SHARD) == []
    assert len(CheckpointStore(tmp_path, Settings(shard_count=4, hash_key=7, partners=("new",))).finals(SHARD)) == 1


def test_nobody_else_can_read_them(store: CheckpointStore, machine: ShardMachine) -> None:
    checkpoint = put(store, machine)
    assert checkpoint.path.stat().st_mode & 0o077 == 0
    assert store.directory.stat().st_mode & 0o077 == 0


def test_what_a_dead_process_left_is_swept_and_what_a_live_one_writes_is_not(
    store: CheckpointStore, machine: ShardMachine
) -> None:
    written = store.write(SHARD, P1, machine.state(), machine.columns())
    assert store.sweep(SHARD) == 0
    fcntl.flock(written.descriptor, fcntl.LOCK_UN)  # as its death would
    assert store.sweep(SHARD) == 1
    os.close(written.descriptor)
    assert names(store) == []


def test_an_open_checkpoint_can_be_read_when_it_was_deleted(store: CheckpointStore, machine: ShardMachine) -> None:
    checkpoint = put(store, machine)
    with contextlib.closing(OpenCheckpoint(checkpoint)) as opened:
        checkpoint.path.unlink()
        opened.verify()
        assert_same(opened.load(), machine)


# ---- damage


def refused(store: CheckpointStore, checkpoint: Checkpoint, words: str | None = None) -> None:
    for use in (verify, store.load):
        with pytest.raises(CheckpointUnusable, match=words):
            use(checkpoint)


def test_every_flipped_bit_is_noticed(store: CheckpointStore, machine: ShardMachine) -> None:
    checkpoint = put(store, machine)
    whole = checkpoint.path.read_bytes()
    rng = np.random.default_rng(1)
    for offset in [*range(20), *rng.integers(20, len(whole), 120).tolist(), len(whole) - 1]:
        raw = bytearray(whole)
        raw[offset] ^= 1 << int(rng.integers(8))
        checkpoint.path.write_bytes(raw)
        with pytest.raises(CheckpointUnusable):
            verify(checkpoint)
    checkpoint.path.write_bytes(whole)
    verify(checkpoint)


def test_a_file_that_is_too_short_or_too_long_is_noticed(store: CheckpointStore, machine: ShardMachine) -> None:
    checkpoint = put(store, machine)
    whole = checkpoint.path.read_bytes()
    for raw in [whole[:length] for length in (0, 7, 16, 100, len(whole) // 2, len(whole) - 1)] + [whole + b"\0"]:
        checkpoint.path.write_bytes(raw)
        refused(store, checkpoint)


def test_a_block_in_the_place_of_another_is_noticed(
    store: CheckpointStore, machine: ShardMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "BLOCK_BYTES", 64)
    checkpoint = put(store, machine)
    assert_same(store.load(checkpoint), machine)
    whole = checkpoint.path.read_bytes()
    first = whole.index(machine.columns()["records"][:1].tobytes())
    swapped = whole[first + 68 : first + 136] + whole[first : first + 68]
    assert swapped != whole[first : first + 136]
    checkpoint.path.write_bytes(whole[:first] + swapped + whole[first + 136 :])
    refused(store, checkpoint, "column 'records' is damaged between bytes 0 and 64")


def test_a_file_under_the_name_of_another_is_refused(store: CheckpointStore, machine: ShardMachine) -> None:
    checkpoint = put(store, machine)
    other = Checkpoint(SHARD, P2, checkpoint.path.with_name(f"{format_id(P2)}.checkpoint"))
    checkpoint.path.rename(other.path)
    refused(store, other, "it holds log entry .* of shard 2")
    refused(store, checkpoint, "it cannot be opened: No such file")


def test_a_file_of_another_version_is_refused(
    store: CheckpointStore, machine: ShardMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_VERSION", 2)
    checkpoint = put(store, machine)
    monkeypatch.undo()
    refused(store, checkpoint, "it has version 2, this program reads version 1")


def with_columns(store: CheckpointStore, machine: ShardMachine, changed: Columns) -> Checkpoint:
    return store.finalise(store.write(SHARD, P1, machine.state(), {**machine.columns(), **changed}))


def test_records_of_another_layout_are_read_field_by_field(store: CheckpointStore, machine: ShardMachine) -> None:
    checkpoint = with_columns(store, machine, {"records": rearranged(machine.columns()["records"])})
    verify(checkpoint)
    assert_same(store.load(checkpoint), machine)


def test_columns_that_do_not_fit_are_refused(store: CheckpointStore, machine: ShardMachine) -> None:
    cells = machine.columns()["cell"]
    refused(store, with_columns(store, machine, {"cell": cells[:-1]}), "its column 'cell' must hold")
    refused(store, with_columns(store, machine, {"cell": cells.astype(np.uint64)}), "its column 'cell' must hold")
    refused(store, with_columns(store, machine, {"new": cells}), "does not know the column 'new'")
    columns = {name: column for name, column in machine.columns().items() if name != "told"}
    refused(store, store.finalise(store.write(SHARD, P2, machine.state(), columns)), "it lacks the column 'told'")


def test_settings_that_this_program_does_not_follow_are_refused(
    store: CheckpointStore, machine: ShardMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = put(store, machine)
    monkeypatch.setattr("geoindex.shard.EMISSION_VERSION", 99)
    for use in (verify, store.load):
        with pytest.raises(SettingsRefused, match="emission version must be 99"):
            use(checkpoint)


# ---- disks


def test_a_write_that_takes_less_than_it_is_given_goes_on(
    store: CheckpointStore, machine: ShardMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(descriptor: int, views: Iterable[memoryview]) -> int:
        return os.write(descriptor, b"".join(views)[:1000])

    monkeypatch.setattr(os, "writev", short)
    assert_same(store.load(put(store, machine)), machine)


def test_a_full_disk_leaves_nothing_behind(
    store: CheckpointStore, machine: ShardMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, views: Iterable[memoryview]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(OSError, match="No space left"):
        put(store, machine)
    assert names(store) == []


def test_writing_is_given_up_when_nobody_wants_it_any_more(store: CheckpointStore, machine: ShardMachine) -> None:
    answers = iter([True, True, False])
    with pytest.raises(CheckpointAbandoned):
        store.write(SHARD, P1, machine.state(), machine.columns(), lambda: next(answers))
    assert names(store) == []


def test_writing_keeps_to_its_pace(store: CheckpointStore, machine: ShardMachine) -> None:
    size_bytes = sum(column.nbytes for column in machine.columns().values())
    started_s = time.monotonic()
    store.write(SHARD, P1, machine.state(), machine.columns(), bytes_per_s=size_bytes / 0.1)
    assert time.monotonic() - started_s >= 0.1


# ---- against a log


class Flow:
    """A checkpointer and what a flow does around it, for one shard of a real log, entry by entry."""

    def __init__(self, client: redis.Redis, folder: Path, *, interval_s: float = 0.05, keep_ms: int = HOUR_MS) -> None:
        self.client = client
        self.settings = ensure_settings(client, SETTINGS)
        self.store = CheckpointStore(folder, self.settings)
        self.metrics = Metrics()
        self.checkpointer = Checkpointer(self.store, client, [SHARD], interval_s, keep_ms, self.metrics)
        self.position = self.checkpointer.begin(SHARD)
        self.machine = self.checkpointer.machine_at(SHARD, self.position)

    def read(self) -> None:
        """What the log holds more, as a worker would."""
        entries = self.client.xrange(log_key(SHARD), min=f"({format_id(self.position)}")
        for raw_id, fields in cast("list[tuple[bytes, dict[bytes, bytes]]]", entries):
            ((kind, payload),) = fields.items()
            self.position = ms, seq = parse_id(raw_id)
            self.machine.apply(ms, self.settings if kind == b"settings" else Tick())
            self.checkpointer.after_entry(RawEntry(SHARD, ms, seq, kind, payload, "run"), self.machine)

    def tick(self) -> LogId:
        position = append_entry(self.client, SHARD, Tick())
        self.read()
        return position

    def done(self, position: LogId) -> None:
        self.client.set(done_key(SHARD), format_id(position))
        self.checkpointer.on_done(SHARD, position)

    def positions(self) -> list[LogId]:
        return [checkpoint.position for checkpoint in self.store.finals(SHARD)]

    def written(self) -> list[Path]:
        return list(self.store.directory.glob("*/*.writing"))

    def until(self, holds: Callable[[], object], done: bool = True) -> None:
        """Tick until it holds."""

        def ticked() -> object:
            position = self.tick()
            if done:
                self.done(position)
            return holds()

        eventually(ticked)

    def count(self, name: str) -> float:
        return self.metrics.value(name, shard=str(SHARD))


@pytest.fixture
def start(client: redis.Redis, tmp_path: Path) -> Iterator[Callable[..., Flow]]:
    flows: list[Flow] = []

    def started(**options: Any) -> Flow:
        flows.append(Flow(client, tmp_path, **options))
        return flows[-1]

    yield started
    for flow in flows:
        flow.checkpointer.stop()


def test_a_checkpoint_is_final_when_done_has_passed_it_and_not_before(start: Callable[..., Flow]) -> None:
    flow = start()
    flow.checkpointer.start()
    flow.until(flow.written, done=False)
    (path,) = flow.written()
    position = parse_id(path.name.partition(".")[0])
    flow.done((position[0], position[1] - 1) if position[1] else (position[0] - 1, 0))
    for _ in range(20):
        flow.tick()
        time.sleep(0.005)
    assert flow.written() == [path]
    assert flow.positions() == []
    flow.done(position)
    eventually(lambda: flow.count("checkpoints_total") == 1)
    assert flow.positions() == [position]
    assert flow.count("checkpoint_bytes") == flow.store.finals(SHARD)[0].path.stat().st_size
    flow.checkpointer.set_gauges()
    assert 0 <= flow.count("checkpoint_age_ms") < 5000


def test_a_checkpoint_of_a_machine_that_was_replaced_never_becomes_final(start: Callable[..., Flow]) -> None:
    flow = start()
    flow.checkpointer.start()
    flow.until(flow.written, done=False)
    flow.machine = flow.checkpointer.machine_at(SHARD, FIRST)
    eventually(lambda: not flow.written())
    flow.done(flow.position)
    time.sleep(0.1)
    assert flow.positions() == []


def test_room_is_made_once_and_serves_the_checkpoints_that_follow(start: Callable[..., Flow]) -> None:
    flow = start()
    made: list[int] = []

    def counted(size_bytes: int) -> U8:
        made.append(size_bytes)
        return room(size_bytes)

    flow.checkpointer.prepare_room = counted
    flow.tick()
    flow.machine = some_machine()
    assert flow.machine.snapshot_bytes > 0
    flow.tick()
    flow.checkpointer.start()
    flow.until(lambda: flow.count("checkpoints_total") >= 3)
    assert len(made) == 1
    assert made[0] > 1.02 * flow.machine.snapshot_bytes, "devices come while it is ordered"


def test_the_log_is_trimmed_behind_the_older_of_two_checkpoints(
    client: redis.Redis, start: Callable[..., Flow]
) -> None:
    flow = start()
    flow.checkpointer.start()
    flow.until(lambda: len(flow.positions()) == 1)
    assert client.get(trimmed_key(SHARD)) is None
    flow.until(lambda: client.get(trimmed_key(SHARD)))
    flow.checkpointer.stop()
    older = flow.positions()[1]
    entries = cast("list[tuple[bytes, object]]", client.xrange(log_key(SHARD)))
    assert parse_id(entries[0][0]) == older
    assert parse_id(cast(bytes, client.get(trimmed_key(SHARD)))) < older
    assert start().position == flow.positions()[0]


def test_trimming_never_turns_back_what_another_process_trimmed(
    client: redis.Redis, start: Callable[..., Flow], monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = start()
    positions = [flow.tick() for _ in range(6)]
    for position in positions[2:4]:
        put(flow.store, flow.machine, position)
    cut = flow.checkpointer._cut

    def meanwhile(shard: int, connection: Any) -> LogId | None:
        found = cut(shard, connection)
        client.xtrim(log_key(SHARD), minid=format_id(positions[5]), approximate=False)
        client.set(trimmed_key(SHARD), format_id(positions[4]))
        return found

    monkeypatch.setattr(flow.checkpointer, "_cut", meanwhile)
    flow.checkpointer._trim(SHARD)
    assert client.get(trimmed_key(SHARD)) == format_id(positions[4]).encode()


def test_a_server_whose_memory_is_full_is_trimmed_all_the_same(client: redis.Redis, start: Callable[..., Flow]) -> None:
    flow = start()
    positions = [flow.tick() for _ in range(6)]
    for position in positions[2:4]:
        put(flow.store, flow.machine, position)
    with memory_limit(client, 1):
        with pytest.raises(redis.OutOfMemoryError):
            client.set("anything", "else")
        flow.checkpointer._trim(SHARD)
    assert client.get(trimmed_key(SHARD)) == format_id(positions[1]).encode()
    assert client.xlen(log_key(SHARD)) == 4
    assert flow.count("log_entries_trimmed_total") == 3  # the settings, too


def test_a_full_server_that_lost_the_entry_that_should_stay_is_not_trimmed(
    client: redis.Redis, start: Callable[..., Flow], monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = start()
    positions = [flow.tick() for _ in range(6)]
    for position in positions[2:4]:
        put(flow.store, flow.machine, position)
    cut = flow.checkpointer._cut

    def meanwhile(shard: int, connection: Any) -> LogId | None:
        found = cut(shard, connection)
        client.xdel(log_key(SHARD), format_id(positions[2]))
        client.config_set("maxmemory", 1)
        return found

    monkeypatch.setattr(flow.checkpointer, "_cut", meanwhile)
    with memory_limit(client, 1 << 30):
        flow.checkpointer._trim(SHARD)
    assert client.get(trimmed_key(SHARD)) is None
    assert client.xlen(log_key(SHARD)) == 6


def test_a_log_that_was_kept_for_too_long_is_trimmed_behind_the_newest_checkpoint(
    client: redis.Redis, start: Callable[..., Flow], caplog: pytest.LogCaptureFixture
) -> None:
    flow = start(keep_ms=200)
    positions = [flow.tick() for _ in range(6)]
    for position in positions[1:4:2]:
        put(flow.store, flow.machine, position)
    flow.checkpointer._trim(SHARD)
    assert client.get(trimmed_key(SHARD)) == format_id(positions[0]).encode()
    time.sleep(0.3)
    with caplog.at_level(logging.ERROR):
        flow.checkpointer._trim(SHARD)
    assert client.get(trimmed_key(SHARD)) == format_id(positions[2]).encode()
    # What is newer than both checkpoints stays, and is complained of.
    assert client.xlen(log_key(SHARD)) == 3
    assert "raw pings are kept for too long" in caplog.text
    assert flow.count("log_kept_ms") > 200


def test_a_disk_that_is_full_costs_checkpoints_and_trims_nothing(
    client: redis.Redis, start: Callable[..., Flow], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    flow = start()
    with monkeypatch.context() as patched:
        patched.setattr(os, "writev", full)
        flow.checkpointer.start()
        flow.until(lambda: flow.count("checkpoint_failures_total") > 1)
    assert flow.positions() == []
    assert client.get(trimmed_key(SHARD)) is None
    flow.until(flow.positions)


def test_a_checkpoint_that_was_chosen_stays_until_it_is_loaded(start: Callable[..., Flow]) -> None:
    flow = start()
    positions = [flow.tick() for _ in range(3)]
    put(flow.store, flow.machine, positions[0])
    flow.done(positions[2])
    assert flow.checkpointer.begin(SHARD) == positions[0]
    for position in positions[1:]:
        put(flow.store, flow.machine, position)
    assert positions[0] not in flow.positions()
    assert flow.checkpointer.machine_at(SHARD, positions[0]).clock_ms == flow.machine.clock_ms


def test_a_silent_log_is_left_alone(start: Callable[..., Flow], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.checkpointer.TAKE_TIMEOUT_S", 0.02)
    flow = start()
    flow.read()
    flow.checkpointer.start()
    time.sleep(0.2)
    assert flow.written() == [] == flow.positions()
    flow.until(flow.positions)


def test_a_broken_invariant_in_the_thread_ends_the_flow(
    start: Callable[..., Flow], monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = start()

    def broken(*_: object) -> None:
        raise AssertionError("broken")

    monkeypatch.setattr(flow.checkpointer, "_take", broken)
    flow.read()
    flow.checkpointer.start()
    eventually(lambda: not any(thread.name == "checkpoints" for thread in threading.enumerate()))
    with pytest.raises(RuntimeError, match="checkpoints have failed"):
        flow.tick()


def test_a_checkpoint_whose_entry_or_pushes_the_server_lost_is_passed_over(
    client: redis.Redis, start: Callable[..., Flow], caplog: pytest.LogCaptureFixture
) -> None:
    flow = start()
    first, second, third = (flow.tick() for _ in range(3))
    ahead = third[0] + 5, 0
    for position in (first, third):
        put(flow.store, flow.machine, position)
    client.set(done_key(SHARD), format_id(third))
    assert start().position == third
    client.set(done_key(SHARD), format_id(second))
    assert start().position == first
    assert f"the queues have lost their tail: they hold what was caused up to {format_id(second)}" in caplog.text
    client.set(done_key(SHARD), format_id(ahead))
    put(flow.store, flow.machine, ahead)
    flow = start()
    assert flow.position == third
    assert f"the log has lost its tail: it ends with {format_id(third)}" in caplog.text
    assert flow.count("log_tail_lost_total") == 1
    # When another is final, the one that was passed over is not the other of the two.
    flow.read()
    flow.done(flow.tick())
    flow.checkpointer.finish()
    assert flow.positions() == [flow.position, third]


def test_a_log_that_was_trimmed_beyond_every_checkpoint_is_refused(
    client: redis.Redis, start: Callable[..., Flow]
) -> None:
    flow = start()
    first, second, third = (flow.tick() for _ in range(3))
    put(flow.store, flow.machine, first)
    client.set(done_key(SHARD), format_id(third))
    client.xtrim(log_key(SHARD), minid=format_id(third), approximate=False)
    client.set(trimmed_key(SHARD), format_id(first))
    assert start().position == first  # the next entry is still there
    client.set(trimmed_key(SHARD), format_id(second))
    with pytest.raises(LogTooShort, match=r"shard 2 cannot be started: .* the log was trimmed up to .* since"):
        start()
