"""Checkpoints of all shards on real files: how long they take to write and to load, and for how long a shard stands.

The machines of all shards know every phone and have told all alerts. Each is copied as the flow copies it, into memory
made ready beforehand; written as fast as the disk takes it, and once more at the pace of a flow; and loaded again.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path

import numpy as np

from flows.checkpointer import BYTES_PER_S, ROOM_SPARE, room
from flows.checkpoints import Checkpoint, CheckpointStore
from flows.disk import drop_cache
from flows.wire import split_by_shard
from geoindex.columns import I64, PingBatch
from geoindex.entries import AlertRevision, LogEntry, Settings
from geoindex.shard import ShardMachine
from geoindex.snapshot import Snapshot
from loadtest.bench.brute_force import BruteForce, count_bits
from loadtest.bench.live import SHARD_COUNT
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import ALERT_COUNT, OFFLINE_MS, SentPings, Traffic, active_alerts, as_decoded

BATCH_PINGS = 125_000
"""Over all shards."""


class Shards:
    """The machines of all shards, and what brute force says of them."""

    def __init__(self, traffic: Traffic, alert_count: int) -> None:
        self.traffic = traffic
        self.settings: Settings = traffic.settings(SHARD_COUNT)
        self.alerts = active_alerts(traffic.world, alert_count, OFFLINE_MS)
        self.expected = BruteForce(self.alerts, traffic.phone_count)
        self.machines = [ShardMachine() for _ in range(SHARD_COUNT)]
        self.expected_count = 0
        self.pushed_count = 0
        for machine in self.machines:
            machine.apply(OFFLINE_MS, self.settings)

    def fill(self, say: Say) -> None:
        """Every phone once, all alerts told."""
        started_s = time.monotonic()
        for sent in self.traffic.first_sight(OFFLINE_MS, BATCH_PINGS):
            self.pings(sent)
        for index, active in enumerate(self.alerts):
            self._apply_all(OFFLINE_MS, AlertRevision("publish", active.alert, (1, index + 1)))
        self.expected_count += self.expected.publish()
        elapsed_s = time.monotonic() - started_s
        say(f"{self.traffic.phone_count:,} devices and {len(self.alerts)} alerts after {elapsed_s:.0f} s")

    def pings(self, sent: SentPings) -> None:
        """Pings to all machines and to brute force."""
        self.expected_count += len(self.expected.apply(sent)[0])
        for machine, part in zip(self.machines, self.split(sent.pings), strict=True):
            if part is not None:
                self.pushed_count += machine.apply(sent.at_ms, part).device_count

    def split(self, pings: PingBatch) -> list[PingBatch | None]:
        """By shard, each part as it comes off the wire."""
        return [part and as_decoded(part) for part in split_by_shard(pings, self.settings)]

    def _apply_all(self, at_ms: int, entry: LogEntry) -> None:
        for machine in self.machines:
            self.pushed_count += machine.apply(at_ms, entry).device_count


def measure(devices: int, repeats: int, say: Say, alert_count: int = ALERT_COUNT) -> Report:
    """`repeats`: the median of so many writings and loadings of all shards."""
    report = Report("checkpoint")
    shards = Shards(Traffic(devices), alert_count)
    shards.fill(say)
    stops_ms: list[float] = []
    write_s: list[float] = []
    cold_s: list[float] = []
    load_s: list[float] = []
    size_bytes = 0
    with tempfile.TemporaryDirectory(prefix="tuanyuan-bench-") as folder:
        store = CheckpointStore(Path(folder) / "checkpoints", shards.settings)
        for repeat in range(repeats):
            position = OFFLINE_MS, repeat
            write_s.append(0.0)
            for shard, machine in enumerate(shards.machines):
                snapshot, stop_s = _copied(machine)
                stops_ms.append(1000 * stop_s)
                started_s = time.monotonic()
                written = store.write(shard, position, snapshot.state, snapshot.columns)
                store.finalise(written)
                write_s[-1] += time.monotonic() - started_s + stop_s
                size_bytes += written.size_bytes if repeat == 0 else 0
                del snapshot
            say(f"{size_bytes / 1e6:,.0f} MB written in {write_s[-1]:.2f} s")
            finals = [store.final(shard, position) for shard in range(SHARD_COUNT)]
            _forget(finals)
            cold_s.append(_timed_load(store, finals, None))
            load_s.append(_timed_load(store, finals, None))
            say(f"loaded in {cold_s[-1]:.2f} s from the disk, {load_s[-1]:.2f} s from the page cache")
        paced_s = _paced(store, shards.machines, (OFFLINE_MS, repeats))
        restored: list[ShardMachine] = []
        _timed_load(store, [store.final(shard, (OFFLINE_MS, repeats)) for shard in range(SHARD_COUNT)], restored)
    say("comparing the loaded machines with brute force and with those that were written")
    _verify(report, shards, restored)
    sizes = [machine.size for machine in restored]
    report.values = {
        "write_seconds": float(np.median(write_s)),
        "write_seconds_of_repeats": [round(value, 3) for value in write_s],
        "write_seconds_at_pace": paced_s,
        "pace_bytes_per_s": BYTES_PER_S,
        "load_seconds": float(np.median(cold_s)),
        "load_seconds_of_repeats": [round(value, 3) for value in cold_s],
        "load_seconds_from_cache": float(np.median(load_s)),
        "stop_ms_max": max(stops_ms),
        "stop_ms_median": float(np.median(stops_ms)),
        "bytes": size_bytes,
        "bytes_per_device": size_bytes / devices,
        "bytes_per_shard_max": max(machine.snapshot_bytes for machine in shards.machines),
        "devices": sum(size.located_count for size in sizes),
        "alerts": alert_count,
        "told_per_device": shards.pushed_count / devices,
        "shards": SHARD_COUNT,
        "repeats": repeats,
    }
    report.notes.append(
        "One thread. write_seconds: copy, file, fdatasync after each block, fsync and rename of all shards, one after "
        "another, as fast as the disk takes it; at_pace: as a flow writes, slower for the sake of the server's log on "
        "the same disk. load_seconds: files read from the disk (the page cache was told to forget them) into machines. "
        "stop: the copy of one shard's columns, the time for which nothing else of the shard is done."
    )
    return report


def _copied(machine: ShardMachine) -> tuple[Snapshot, float]:
    """As the flow does it: room first, then the copy, during which the shard stands still."""
    prepared = room(round(machine.snapshot_bytes * ROOM_SPARE) + (1 << 20))
    started_s = time.perf_counter()
    snapshot = machine.snapshot(prepared)
    return snapshot, time.perf_counter() - started_s


def _paced(store: CheckpointStore, machines: list[ShardMachine], position: tuple[int, int]) -> float:
    started_s = time.monotonic()
    for shard, machine in enumerate(machines):
        snapshot, _ = _copied(machine)
        store.finalise(store.write(shard, position, snapshot.state, snapshot.columns, bytes_per_s=BYTES_PER_S))
    return time.monotonic() - started_s


def _forget(finals: list[Checkpoint]) -> None:
    """Ask the kernel to drop the files from its cache."""
    for final in finals:
        with final.path.open("rb", buffering=0) as file:
            drop_cache(file.fileno())


def _timed_load(store: CheckpointStore, finals: list[Checkpoint], kept: list[ShardMachine] | None) -> float:
    """Seconds for all shards; the machines go to `kept`, or away."""
    gc.collect()
    loaded: list[ShardMachine] = []
    started_s = time.monotonic()
    for final in finals:
        loaded.append(store.load(final))
    elapsed_s = time.monotonic() - started_s
    if kept is not None:
        kept += loaded
    return elapsed_s


def _verify(report: Report, shards: Shards, restored: list[ShardMachine]) -> None:
    """What was written has told what brute force says; what was loaded holds the same, and goes on in the same way."""
    report.expect("ids pushed", shards.expected_count, shards.pushed_count)
    report.expect("pairs told", shards.expected_count, count_bits(shards.expected.told))
    for shard, (written, loaded) in enumerate(zip(shards.machines, restored, strict=True)):
        before, after = written.snapshot(), loaded.snapshot()
        report.expect(f"state of shard {shard}", before.state, after.state)
        for name, column in before.columns.items():
            report.expect(f"column {name} of shard {shard}", True, _same(column, after.columns[name]))
    sent = next(shards.traffic.batches(min(BATCH_PINGS, shards.traffic.phone_count), BATCH_PINGS))
    for written, loaded, part in zip(shards.machines, restored, shards.split(sent.pings), strict=True):
        if part is not None:
            pushes = [
                [(push.kind, push.alert_id, push.device_ids()) for push in machine.apply(sent.at_ms, part)]
                for machine in (written, loaded)
            ]
            report.expect("pushes of the next pings", pushes[0], pushes[1])


def _same(one: I64, other: I64) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()
