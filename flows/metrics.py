"""Counters, gauges and one kind of histogram for a process, and their way to whoever watches.

Names and labels are those of Prometheus (https://prometheus.io/docs/practices/naming/): a counter ends in `_total`, the
unit stands in the name, labels are few and bounded. Each process publishes a snapshot under `stats:<process>` once a
second; `read_stats` adds the snapshots of all processes up.

    pings_accepted_total{partner}            pings_refused_total{reason}      malformed_entries_total
    pushes_total{partner,kind}               push_entries_total               push_entries_known_total
    push_write_errors_total{shard}           push_link_errors_total           push_drops_total{shard}
    log_read_errors_total                    tick_errors_total{shard}         shard_reloads_total{shard}
    lag_ms{shard}                            devices_live{shard}              table_memory_bytes{shard}
    publish_to_queue_ms (histogram): publication, edit, close or growth -> its pushes are in the queues
    ping_to_queue_ms (histogram): a ping that met a ring -> its push is in the queue
    checkpoints_total{shard}                 checkpoint_failures_total{shard} checkpoint_stop_ms (histogram)
    checkpoint_age_ms{shard}                 checkpoint_duration_ms{shard}    checkpoint_bytes{shard}
    checkpoints_damaged_total{shard}         checkpoints_outdated_total{shard} checkpoint_load_ms{shard}
    log_entries_trimmed_total{shard}         log_trim_errors_total{shard}     log_kept_ms{shard}
    log_tail_lost_total{shard}
    queue_entries{partner,shards}            queue_pending{partner,shards}    queue_entries_trimmed_total{partner}
    queue_oldest_unacknowledged_ms{partner,shards}    dead_letters_total{partner}    queue_keeper_errors_total
    alarm{kind}: 0 or 1 (`flows.alarms`)     unsafe_server: 0 or 1             clock_offset_ms: server's minus ours
    server_memory_bytes                      server_memory_max_bytes          server_runs_total: runs of the server seen
    server_restarts_total                    server_disk_free_bytes           server_disk_bytes
                                             (of the embedded server's supervisor)
    checkpoint_disk_free_bytes               checkpoint_disk_bytes            (of the disk under a flow's checkpoints)
    aof_rewrites_total                       aof_rewrite_failures_total       aof_rewrite_age_ms (since the last began)
    aof_rewrite_duration_ms                  raw_pings_age_ms: no raw ping in the append-only file is older
    gateway_requests_total{route,status}     gateway_request_ms (histogram)    gateway_faults_total: answers 500
    gateway_callers_refused_total            audit_rows_total                 (of gateways)
    pings_received_total{partner}            (by gateways, accepted or not)    pings_turned_away_total{partner,reason}
    pings_request_ms (histogram)             intake_append_ms (histogram)      intake_held_bytes
    intake_pings_total                       intake_rounds_total               intake_rounds_failed_total
    intake_waiting_requests                  intake_flow_lag_ms: what a gateway sees of the flow
    cases_erased_total: children whose details the gateway has erased
    density_age_ms{shard}                    density_stop_ms (histogram)      figure_write_errors_total{figure}
    push_waits: long polls and webhooks that wait  push_polls_total{outcome}       push_acks_total: entries, by polls
    push_watch_errors_total                  webhooks_delivered_to: by this gateway
    webhook_deliveries_total{partner,kind,outcome}: kind push or test; accepted, later, refused, unreachable, gone
    webhook_delivery_ms (histogram)          webhook_down{partner}: 0 or 1     webhook_entries_on_their_way{partner}
    view_listeners                           view_sample_ms (histogram)       view_errors_total
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgpack
import redis

from flows.alarms import ALARM_KINDS, Alarm, AlarmBoard

logger = logging.getLogger(__name__)

STATS_KEY = "stats"
"""Sorted set: process names by the ms of their last snapshot."""
STATS_EXPIRY_S = 5
"""A process that has said nothing for this long is gone."""
_ON_IF_ANYWHERE = {"alarm", "unsafe_server"}
"""Gauges that are 1 for all if they are 1 for one process."""

_PUBLISH_WHEN_FULL = """#!lua flags=allow-oom
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[4])
"""
"""A server at `maxmemory` refuses SET, just when somebody should see why; a script may say that it is worth it."""

BUCKETS_MS = tuple(round(0.25 * 2**octave * (1 + step / 4), 4) for octave in range(18) for step in range(4))
"""Upper bounds: four to a doubling, 0.25 ms to 57 s, so that a quantile is at most 25 % too high (19 % on average)."""

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts by bucket, as in HdrHistogram: exact, bounded error, addable. `counts` has one more, for the rest."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_MS) + 1)
        self.sum_ms = 0.0

    def observe(self, value_ms: float, count: int = 1) -> None:
        self.counts[bisect_left(BUCKETS_MS, value_ms)] += count
        self.sum_ms += value_ms * count


class Metrics:
    """All numbers of one process. Thread-safe; an update costs about 0.3 us: made per entry, never per ping."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[tuple[str, Labels], float] = {}
        self._gauges: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[str, Histogram] = {}
        self._started_ms = round(time.time() * 1000)
        self.alarms = AlarmBoard()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Raise a counter."""
        key = name, tuple(labels.items())
        with self._lock:
            self._counters[key] = self._counters.get(key, 0) + amount

    def count_each(self, name: str, label: str, amounts: Mapping[str, float]) -> None:
        """Raise a counter for several values of its one label: cheaper than one by one."""
        with self._lock:
            for value, amount in amounts.items():
                key = name, ((label, value),)
                self._counters[key] = self._counters.get(key, 0) + amount

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._gauges[name, tuple(labels.items())] = value

    def observe(self, name: str, value_ms: float, count: int = 1) -> None:
        """Add to a histogram; `name` ends in `_ms`."""
        with self._lock:
            histogram = self._histograms.get(name)
            if histogram is None:
                histogram = self._histograms[name] = Histogram()
            histogram.observe(value_ms, count)

    def value(self, name: str, **labels: str) -> float:
        """A counter or gauge; 0 if it was never touched."""
        key = name, tuple(labels.items())
        with self._lock:
            return self._counters.get(key, self._gauges.get(key, 0))

    def total(self, name: str) -> float:
        """Sum of the counters of this name, whatever their labels."""
        with self._lock:
            return sum(number for (key, _), number in self._counters.items() if key == name)

    def snapshot(self) -> dict[str, Any]:
        """All numbers, msgpack-ready: counters and gauges as [name, {label: value}, number], histograms by name, alarms
        that are on as [kind, source, words].
        """
        alarms = self.alarms.current()
        kinds = {alarm.kind for alarm in alarms}
        with self._lock:
            return {
                "at_ms": round(time.time() * 1000),
                "started_ms": self._started_ms,
                "alarms": [list(alarm) for alarm in alarms],
                "counters": [[name, dict(labels), number] for (name, labels), number in self._counters.items()],
                "gauges": [[name, dict(labels), number] for (name, labels), number in self._gauges.items()]
                + [["alarm", {"kind": kind}, int(kind in kinds)] for kind in ALARM_KINDS],
                "histograms": {
                    name: {"bucket_counts": list(histogram.counts), "sum_ms": histogram.sum_ms}
                    for name, histogram in self._histograms.items()
                },
            }


FLOW, GATEWAY = "flow", "gateway"
"""Roles of processes that publish."""

METRICS = Metrics()
"""Those of this process."""


@dataclass(frozen=True, slots=True)
class ProcessStats:
    """What one process has published last: for rates, which are made process by process."""

    role: str
    at_ms: int
    started_ms: int
    """Since when it counts; 0: it does not say."""
    memory_bytes: int
    """Resident; 0: it does not say."""
    counters: dict[tuple[str, Labels], float] = field(default_factory=dict)
    buckets: dict[str, list[int]] = field(default_factory=dict)
    sums_ms: dict[str, float] = field(default_factory=dict)


class Stats:
    """Snapshots of several processes, added up. Two that give the same gauge (a shard that moved): the newer counts."""

    def __init__(self, snapshots: Iterable[dict[str, Any]] = ()) -> None:
        self.process_count = 0
        """Flow processes: a gateway publishes, too, and must not pass for a flow that is not there."""
        self.alarms: list[Alarm] = []
        """Those that are on in any process; one that several have seen stands here once for each."""
        self._counters: dict[tuple[str, Labels], float] = {}
        self._gauges: dict[tuple[str, Labels], float] = {}
        self._buckets: dict[str, list[int]] = {}
        self.processes: dict[str, ProcessStats] = {}
        """By name."""
        for snapshot in sorted(snapshots, key=lambda snapshot: cast(int, snapshot["at_ms"])):
            self._add(snapshot)

    def _add(self, snapshot: dict[str, Any]) -> None:
        process = ProcessStats(
            role=snapshot.get("role", FLOW),
            at_ms=snapshot["at_ms"],
            started_ms=snapshot.get("started_ms", 0),
            memory_bytes=snapshot.get("memory_bytes", 0),
        )
        self.processes[snapshot.get("process", f"process {len(self.processes)}")] = process
        self.process_count += process.role == FLOW
        for name, labels, number in snapshot["counters"]:
            key = name, tuple(labels.items())
            process.counters[key] = number
            self._counters[key] = self._counters.get(key, 0) + number
        self.alarms += [Alarm(*alarm) for alarm in snapshot["alarms"]]
        for name, labels, number in snapshot["gauges"]:
            key = name, tuple(labels.items())
            before = self._gauges.get(key, 0) if name in _ON_IF_ANYWHERE else number
            self._gauges[key] = max(before, number)
        for name, histogram in snapshot["histograms"].items():
            counts = histogram["bucket_counts"]
            process.buckets[name], process.sums_ms[name] = counts, histogram["sum_ms"]
            before = self._buckets.get(name, [0] * len(counts))
            self._buckets[name] = [old + new for old, new in zip(before, counts, strict=True)]

    def total(self, name: str, **labels: str) -> float:
        """Sum of the counters, or else of the gauges, of this name that have these labels (and maybe others)."""
        wanted = labels.items()
        for numbers in (self._counters, self._gauges):
            found = [
                number for (key, given), number in numbers.items() if key == name and wanted <= dict(given).items()
            ]
            if found:
                return sum(found)
        return 0

    def largest(self, name: str) -> float:
        """The largest of the gauges of this name; 0 if there are none."""
        return max((number for (key, _), number in self._gauges.items() if key == name), default=0)

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Sums by one label's values."""
        sums: dict[str, float] = {}
        for numbers in (self._counters, self._gauges):
            for (key, given), number in numbers.items():
                value = dict(given).get(label)
                if key == name and value is not None:
                    sums[value] = sums.get(value, 0) + number
        return sums

    def gauges(self) -> dict[tuple[str, Labels], float]:
        """All gauges, by name and labels."""
        return self._gauges

    def largest_by(self, name: str, label: str) -> dict[str, float]:
        """The largest of the gauges of this name, by one label's values."""
        largest: dict[str, float] = {}
        for (key, given), number in self._gauges.items():
            value = dict(given).get(label)
            if key == name and value is not None:
                largest[value] = max(largest.get(value, number), number)
        return largest

    def gauge(self, name: str) -> float | None:
        """The gauge of this name and no labels; None if no process has it."""
        return self._gauges.get((name, ()))

    def quantile_ms(self, name: str, quantile: float) -> float | None:
        """Upper bound of the bucket that holds the quantile; None without observations, infinity beyond the last."""
        return quantile_of(self._buckets.get(name, []), quantile)


def quantile_of(counts: list[int], quantile: float) -> float | None:
    """Upper bound in ms of the bucket that holds the quantile; None without observations, infinity beyond the last."""
    total = sum(counts)
    if not total:
        return None
    rank = quantile * total
    seen = 0
    bound: float
    for bound, count in zip((*BUCKETS_MS, float("inf")), counts, strict=True):
        seen += count
        if seen >= rank and seen:
            return bound
    raise AssertionError("the last bucket ends the sum")


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where nobody says."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def process_name() -> str:
    """This process among all that publish."""
    return f"{socket.gethostname()}:{os.getpid()}"


class StatsPublisher:
    """Publishes this process's snapshot every second, from a thread of its own; a failure is logged, never raised."""

    def __init__(
        self,
        client: redis.Redis,
        metrics: Metrics = METRICS,
        before: Callable[[], None] = lambda: None,
        interval_s: float = 1.0,
        role: str = FLOW,
    ) -> None:
        """`before` is called ahead of each snapshot, to set gauges. `role`: what this process is."""
        self._client = client
        self._metrics = metrics
        self._before = before
        self._interval_s = interval_s
        self._name = process_name()
        self._role = role
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stats-publisher", daemon=True)
        self._was_down = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Publish once more and stop."""
        self._stopping.set()
        self._thread.join(timeout_s)
        self.publish()

    def publish(self) -> None:
        """One snapshot, now."""
        try:
            self._before()
            more = {"role": self._role, "process": self._name, "memory_bytes": resident_bytes()}
            snapshot = self._metrics.snapshot() | more
            key, packed, at_ms = f"{STATS_KEY}:{self._name}", msgpack.packb(snapshot), snapshot["at_ms"]
            try:
                with self._client.pipeline(transaction=False) as pipeline:
                    pipeline.set(key, packed, ex=STATS_EXPIRY_S)
                    pipeline.zadd(STATS_KEY, {self._name: at_ms})
                    pipeline.zremrangebyscore(STATS_KEY, "-inf", at_ms - 3_600_000)
                    pipeline.execute()
            except redis.OutOfMemoryError:
                arguments = (packed, str(STATS_EXPIRY_S), str(at_ms), self._name)
                self._client.eval(_PUBLISH_WHEN_FULL, 2, key, STATS_KEY, *arguments)
            self._was_down = False
        except redis.RedisError as error:
            if not self._was_down:
                logger.warning("statistics cannot be published: %s", error)
            self._was_down = True

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self.publish()


def read_stats(client: redis.Redis) -> Stats:
    """What all processes have published within the last seconds, added up."""
    return _stats_of(client, cast(list[bytes], client.zrange(STATS_KEY, 0, -1)))


def _stats_of(client: redis.Redis, names: list[bytes]) -> Stats:
    if not names:
        return Stats()
    keys = [f"{STATS_KEY}:{name.decode()}" for name in names]
    payloads = cast(list[bytes | None], client.mget(keys))
    return Stats(msgpack.unpackb(payload) for payload in payloads if payload is not None)


def read_stats_at(client: redis.Redis) -> tuple[Stats, int]:
    """`read_stats`, and the server's clock at that moment, ms since 1970."""
    with client.pipeline(transaction=False) as pipeline:
        pipeline.time()
        pipeline.zrange(STATS_KEY, 0, -1)
        (seconds, microseconds), names = pipeline.execute()
    at_ms = seconds * 1000 + microseconds // 1000
    return _stats_of(client, names), at_ms
