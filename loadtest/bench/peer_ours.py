"""Ours, as the peers are measured: the shard machine alone, and the flow in Bytewax, each on one core."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from bytewax.testing import run_main

from flows.log import RawEntry
from flows.match import ShardPushes, build_flow, shard_key
from flows.wire import encode_entry, encode_push
from geoindex.columns import Push, Pushes
from geoindex.entries import AlertRevision, LogEntry
from geoindex.shard import ShardMachine
from loadtest.bench.live import Told
from loadtest.bench.peer import PeerRun, Workload
from loadtest.bench.traffic import OFFLINE_MS, as_decoded

ENTRIES_PER_BATCH = 8
"""As in `flows.live`."""


def run_machine(workload: Workload) -> PeerRun:
    """Decoded columns in, pushes out, as the flow takes them: in columns."""
    rates: list[float] = []
    cores: list[float] = []
    told: set[Told] = set()
    for _ in range(workload.repeats):
        machine = ShardMachine()
        for at_ms, entry in _before(workload):
            machine.apply(at_ms, entry)
        entries = [(sent.at_ms, as_decoded(sent.pings)) for sent in workload.measured]
        gc.collect()
        caused: list[Pushes] = []
        cpu_s, started_s = time.process_time(), time.perf_counter()
        for at_ms, pings in entries:
            caused.append(machine.apply(at_ms, pings))
        seconds = time.perf_counter() - started_s
        cores.append((time.process_time() - cpu_s) / seconds)
        rates.append(workload.ping_count / seconds)
        told = _told(workload, (push for pushes in caused for push in pushes))
    words = "the shard machine alone: decoded columns in, pushes out in columns; H3 cells of all devices kept"
    return PeerRun(float(np.median(rates)), float(np.median(cores)), told, words)


def run_flow(workload: Workload) -> PeerRun:
    """Bytes of log entries in, through Bytewax with one worker, bytes of queue entries out."""
    rates: list[float] = []
    cores: list[float] = []
    told: set[Told] = set()
    before = [_raw(seq, at_ms, entry) for seq, (at_ms, entry) in enumerate(_before(workload))]
    measured = [_raw(len(before) + seq, sent.at_ms, sent.pings) for seq, sent in enumerate(workload.measured)]
    for _ in range(workload.repeats):
        clock = FlowClock(len(before), len(measured))
        sink = _Sink(clock)
        run_main(build_flow(_Source(before, measured, clock), sink, lambda _shard: ShardMachine()))
        rates.append(workload.ping_count / clock.seconds)
        cores.append(clock.cpu_s / clock.seconds)
        told = _told(workload, sink.pushes)
    words = (
        "our flow as it runs live, server and threads left out: log entries decoded and screened, one Bytewax worker, "
        "pushes encoded for the queues"
    )
    return PeerRun(float(np.median(rates)), float(np.median(cores)), told, words)


class FlowClock:
    """When the first measured item enters a flow and when the last one has left it.

    The source holds the measured items back until everything before has come out at the other end.
    """

    def __init__(self, before_count: int, measured_count: int) -> None:
        self._left_to_start = before_count
        self._left_to_end = before_count + measured_count
        self._started = (0.0, 0.0)
        self._ended = (0.0, 0.0)

    @property
    def may_start(self) -> bool:
        return self._left_to_start <= 0

    def start(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def came_out(self, count: int) -> None:
        self._left_to_start -= count
        self._left_to_end -= count
        if self._left_to_end == 0:
            self._ended = time.perf_counter(), time.process_time()

    @property
    def is_measuring(self) -> bool:
        return self._started != (0.0, 0.0)

    @property
    def seconds(self) -> float:
        assert self._left_to_end == 0, f"{self._left_to_end} items have not come out"
        return self._ended[0] - self._started[0]

    @property
    def cpu_s(self) -> float:
        return self._ended[1] - self._started[1]


class _Source(FixedPartitionedSource[tuple[str, RawEntry], None]):
    def __init__(self, before: Sequence[RawEntry], measured: Sequence[RawEntry], clock: FlowClock) -> None:
        self._arguments = before, measured, clock

    def list_parts(self) -> list[str]:
        return [shard_key(0)]

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _Partition:
        before, measured, clock = self._arguments
        return _Partition(before, measured, clock)


class _Partition(StatefulSourcePartition[tuple[str, RawEntry], None]):
    def __init__(self, before: Sequence[RawEntry], measured: Sequence[RawEntry], clock: FlowClock) -> None:
        self._before, self._measured, self._clock = before, measured, clock
        self._key = shard_key(0)
        self._batches = self._in_turn()

    def _in_turn(self) -> Iterator[list[RawEntry]]:
        yield from self._portions(self._before)
        while not self._clock.may_start:
            yield []
        gc.collect()
        self._clock.start()
        yield from self._portions(self._measured)

    def _portions(self, entries: Sequence[RawEntry]) -> Iterator[list[RawEntry]]:
        for start in range(0, len(entries), ENTRIES_PER_BATCH):
            yield list(entries[start : start + ENTRIES_PER_BATCH])

    def next_batch(self) -> list[tuple[str, RawEntry]]:
        return [(self._key, entry) for entry in next(self._batches)]

    def snapshot(self) -> None:
        return None


class _Sink(FixedPartitionedSink[ShardPushes, None]):
    def __init__(self, clock: FlowClock) -> None:
        self.clock = clock
        self.pushes: list[Push] = []
        self.payloads: list[bytes] = []

    def list_parts(self) -> list[str]:
        return [shard_key(0)]

    def part_fn(self, item_key: str) -> int:
        return 0

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _SinkPartition:
        return _SinkPartition(self)


class _SinkPartition(StatefulSinkPartition[ShardPushes, None]):
    def __init__(self, sink: _Sink) -> None:
        self._sink = sink

    def write_batch(self, items: list[ShardPushes]) -> None:
        for caused in items:
            if self._sink.clock.is_measuring:
                self._sink.pushes += caused.pushes
                self._sink.payloads += [encode_push(push) for push in caused.pushes]
        self._sink.clock.came_out(len(items))

    def snapshot(self) -> None:
        return None


def _before(workload: Workload) -> Iterable[tuple[int, LogEntry]]:
    """What a log holds before the measured pings: settings, alerts, every phone twice."""
    yield OFFLINE_MS, workload.traffic.settings()
    for index, active in enumerate(workload.alerts):
        yield OFFLINE_MS, AlertRevision("publish", active.alert, (1, index + 1))
    for sent in workload.before:
        yield sent.at_ms, as_decoded(sent.pings)


def _raw(seq: int, at_ms: int, entry: LogEntry) -> RawEntry:
    kind, payload = encode_entry(entry)
    return RawEntry(0, at_ms, seq, kind, payload, "")


def _told(workload: Workload, pushes: Iterable[Push]) -> set[Told]:
    names = workload.traffic.world.partner_names
    return {(push.alert_id, names[push.partner], device_id) for push in pushes for device_id in push.device_ids()}
