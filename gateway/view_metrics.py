"""`/metrics`: everything that processes publish, in Prometheus's text format, in seconds and bytes.

    snapshots of all processes ──> CounterSums: sums that never fall ──> exposition
                               └─> gauges ──────────────────────────────┘

Names are those of `flows.metrics` with `tuanyuan_` before them; a `_ms` becomes `_seconds`. FAMILIES names all of them,
so that each is there, with its help, before anything was counted. Labels are few and bounded: partner, shard, reason,
kind, route, status; no device, no alert, no place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from importlib.metadata import version

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from flows.metrics import BUCKETS_MS, Labels, ProcessStats, Stats

PREFIX = "tuanyuan_"
FORGOTTEN_MS = 3_600_000
"""A process that has been silent for so long does not come back."""
BEGAN_MS = 10_000
SHOWN_BUCKETS = [index for index in range(len(BUCKETS_MS)) if index % 2 == 0]
"""Two to a doubling: 36 of 72, so that a dozen histograms are some 450 series."""

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

FAMILIES: dict[str, tuple[str, str]] = {
    # --- flow
    "pings_accepted_total": (COUNTER, "Pings accepted by the flow, by partner."),
    "pings_refused_total": (COUNTER, "Pings that the flow set aside, by reason."),
    "malformed_entries_total": (COUNTER, "Log entries that could not be decoded and were set aside."),
    "pushes_total": (COUNTER, "Devices told, by partner and kind: alert, update, resolved."),
    "push_entries_total": (COUNTER, "Entries written to queues."),
    "push_entries_known_total": (COUNTER, "Entries that the queues had already: a replay writes nothing twice."),
    "push_write_errors_total": (COUNTER, "Blocks of pushes that the server did not take at once, by shard."),
    "push_link_errors_total": (COUNTER, "Times that the push writer lost the server."),
    "push_drops_total": (COUNTER, "Log entries dropped because the server was started anew; they are read again."),
    "log_read_errors_total": (COUNTER, "Times that the log reader lost the server."),
    "tick_errors_total": (COUNTER, "Ticks that could not be written, by shard."),
    "shard_reloads_total": (COUNTER, "Times that a shard was started anew from a checkpoint, by shard."),
    "log_tail_lost_total": (COUNTER, "Times that a log had lost its end, by shard."),
    "log_entries_trimmed_total": (COUNTER, "Log entries trimmed behind checkpoints, by shard."),
    "log_trim_errors_total": (COUNTER, "Trims of a log that failed, by shard."),
    "log_kept_ms": (GAUGE, "Age of the oldest entry of a log, by shard."),
    "lag_ms": (GAUGE, "Age of the first log entry whose pushes are not in the queues yet, by shard."),
    "devices_live": (GAUGE, "Live phones, by shard."),
    "table_memory_bytes": (GAUGE, "Memory of the device table, by shard."),
    "publish_to_queue_ms": (HISTOGRAM, "From a publication, edit, close or growth until its pushes are in the queues."),
    "ping_to_queue_ms": (HISTOGRAM, "From a ping that met a ring until its push is in the queue."),
    "checkpoints_total": (COUNTER, "Checkpoints made final, by shard."),
    "checkpoint_failures_total": (COUNTER, "Checkpoints that failed, by shard."),
    "checkpoints_damaged_total": (COUNTER, "Checkpoints that were found damaged, by shard."),
    "checkpoints_outdated_total": (COUNTER, "Checkpoints of another format, by shard."),
    "checkpoint_age_ms": (GAUGE, "Age of the newest checkpoint, by shard."),
    "checkpoint_duration_ms": (GAUGE, "How long the last checkpoint took, by shard."),
    "checkpoint_load_ms": (GAUGE, "How long the last start from a checkpoint took, by shard."),
    "checkpoint_bytes": (GAUGE, "Size of the last checkpoint, by shard."),
    "checkpoint_stop_ms": (HISTOGRAM, "How long a shard stood still to be copied for a checkpoint."),
    "checkpoint_disk_free_bytes": (GAUGE, "Free on the disk under the checkpoints."),
    "checkpoint_disk_bytes": (GAUGE, "Size of the disk under the checkpoints."),
    "density_age_ms": (GAUGE, "Age of the count of live phones by zone, by shard."),
    "density_stop_ms": (HISTOGRAM, "How long a shard stood still for a part of a count."),
    "figure_write_errors_total": (COUNTER, "Counts that could not be written, by figure."),
    # --- queues
    "queue_entries": (GAUGE, "Entries in a partner's queues."),
    "queue_pending": (GAUGE, "Entries handed over and not acknowledged, by partner."),
    "queue_oldest_unacknowledged_ms": (GAUGE, "Age of the oldest entry that is not acknowledged, by partner."),
    "queue_entries_trimmed_total": (COUNTER, "Entries trimmed from queues, by partner."),
    "queue_keeper_errors_total": (COUNTER, "Rounds of the queue keeper that failed."),
    "dead_letters_total": (COUNTER, "Pushes set aside because nobody could deal with them, by partner."),
    # --- server
    "alarm": (GAUGE, "1: the alarm is on, by kind; `tuanyuan health` gives its words."),
    "unsafe_server": (GAUGE, "1: the server may lose what it acknowledged."),
    "clock_offset_ms": (GAUGE, "The server's clock minus the process's."),
    "server_memory_bytes": (GAUGE, "Memory that the Valkey server has in use."),
    "server_memory_max_bytes": (GAUGE, "Memory that it may use; 0: no limit."),
    "server_runs_total": (COUNTER, "Runs of the server that processes have seen."),
    "server_restarts_total": (COUNTER, "Times that the embedded server was started again."),
    "server_disk_free_bytes": (GAUGE, "Free on the disk under the embedded server."),
    "server_disk_bytes": (GAUGE, "Size of the disk under the embedded server."),
    "aof_rewrites_total": (COUNTER, "Rewrites of the append-only file that were begun."),
    "aof_rewrite_failures_total": (COUNTER, "Rewrites of the append-only file that failed."),
    "aof_rewrite_age_ms": (GAUGE, "Since the last rewrite of the append-only file began."),
    "aof_rewrite_duration_ms": (GAUGE, "How long the last rewrite took."),
    "raw_pings_age_ms": (GAUGE, "No raw ping in the append-only file is older."),
    # --- gateways
    "gateway_requests_total": (COUNTER, "Requests answered, by route and status."),
    "gateway_request_ms": (HISTOGRAM, "How long answers took."),
    "gateway_faults_total": (COUNTER, "Answers 500: faults of the program."),
    "gateway_callers_refused_total": (COUNTER, "Requests with a wrong key or signature."),
    "audit_rows_total": (COUNTER, "Rows written to the audit log."),
    "pings_received_total": (COUNTER, "Pings received by gateways, accepted or not, by partner."),
    "pings_turned_away_total": (COUNTER, "Pings that gateways did not take, by partner and reason."),
    "pings_request_ms": (HISTOGRAM, "How long answers to pings took."),
    "intake_append_ms": (HISTOGRAM, "How long an append of pings to the logs took."),
    "intake_held_bytes": (GAUGE, "Pings that wait to be appended."),
    "intake_pings_total": (COUNTER, "Pings appended to logs."),
    "intake_rounds_total": (COUNTER, "Appends of pings."),
    "intake_rounds_failed_total": (COUNTER, "Appends of pings that failed."),
    "intake_waiting_requests": (GAUGE, "Requests whose pings wait to be appended."),
    "intake_flow_lag_ms": (GAUGE, "How far the flow is behind, as a gateway sees it."),
    "cases_erased_total": (COUNTER, "Children whose details were erased."),
    "push_waits": (GAUGE, "Long polls and webhooks that wait for pushes."),
    "push_polls_total": (COUNTER, "Long polls, by outcome."),
    "push_acks_total": (COUNTER, "Entries acknowledged by polls."),
    "push_watch_errors_total": (COUNTER, "Times that the queues could not be watched."),
    "webhooks_delivered_to": (GAUGE, "Partners whose webhooks a gateway serves."),
    "webhook_deliveries_total": (COUNTER, "Deliveries, by partner, kind and outcome."),
    "webhook_delivery_ms": (HISTOGRAM, "How long a delivery took."),
    "webhook_down": (GAUGE, "1: a partner's webhook does not answer, by partner."),
    "webhook_entries_on_their_way": (GAUGE, "Entries being delivered, by partner."),
    "view_listeners": (GAUGE, "Open streams of the operator's view."),
    "view_sample_ms": (HISTOGRAM, "How long a look for the operator's view took."),
    "view_errors_total": (COUNTER, "Looks that failed."),
}
"""Kind and help of everything in `flows.metrics`, by its name there. A test holds it against the source."""


def exposed_name(name: str) -> str:
    """As Prometheus knows it: `lag_ms` is `tuanyuan_lag_seconds`."""
    return PREFIX + (f"{name.removesuffix('_ms')}_seconds" if name.endswith("_ms") else name)


class CounterSums:
    """Counters and histograms of all processes, added up so that a sum never falls when a process ends. Thread-safe.

    Prometheus takes a counter that falls for one that began anew, and would count everything twice.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, ProcessStats] = {}
        self._since_ms: int | None = None
        self.counters: dict[tuple[str, Labels], float] = {}
        self.buckets: dict[str, list[int]] = {}
        self.sums_ms: dict[str, float] = {}

    def add(self, stats: Stats) -> None:
        """Take up what has been counted since the last call; the first time, of those that have just begun.

        Sums begin near 0, as those of a process that begins do: Prometheus then adds nothing at a gateway's start.
        """
        with self._lock:
            newest_ms = max((process.at_ms for process in stats.processes.values()), default=0)
            if self._since_ms is None and stats.processes:
                self._since_ms = newest_ms
            for name, process in stats.processes.items():
                last = self._last.get(name)
                if last is not None and process.at_ms < last.at_ms:
                    continue  # whoever looked later was faster
                self._add(last, process)
                self._last[name] = process
            for name in [name for name, last in self._last.items() if last.at_ms < newest_ms - FORGOTTEN_MS]:
                del self._last[name]

    def _add(self, last: ProcessStats | None, now: ProcessStats) -> None:
        if last is not None and last.started_ms != now.started_ms:
            last = None
        elif last is None and self._since_ms is not None and now.started_ms < self._since_ms - BEGAN_MS:
            # What it counted before this began to look is no increase.
            last = now
        for key, number in now.counters.items():
            known = 0.0 if last is None else last.counters.get(key, 0.0)
            self.counters[key] = self.counters.get(key, 0.0) + max(0.0, number - known)
        for name, counts in now.buckets.items():
            before = self.buckets.setdefault(name, [0] * len(counts))
            earlier = [0] * len(counts) if last is None else last.buckets.get(name) or [0] * len(counts)
            for index, (count, known_count) in enumerate(zip(counts, earlier, strict=True)):
                before[index] += max(0, count - known_count)
            known_ms = 0.0 if last is None else last.sums_ms.get(name, 0.0)
            self.sums_ms[name] = self.sums_ms.get(name, 0.0) + max(0.0, now.sums_ms.get(name, 0.0) - known_ms)

    def families(self) -> list[Metric]:
        """As Prometheus takes them."""
        with self._lock:
            counters, histograms = dict(self.counters), {name: list(counts) for name, counts in self.buckets.items()}
            sums_ms = dict(self.sums_ms)
        found: list[Metric] = []
        by_name: dict[str, list[tuple[Labels, float]]] = {}
        for (name, labels), number in counters.items():
            by_name.setdefault(name, []).append((labels, number))
        for name in _names(COUNTER, by_name):
            family = CounterMetricFamily(exposed_name(name), _help(name))
            _add_samples(family, exposed_name(name), by_name.get(name, ()), 1.0)
            found.append(family)
        for name in _names(HISTOGRAM, histograms):
            histogram = HistogramMetricFamily(exposed_name(name), _help(name))
            counts = histograms.get(name)
            if counts is not None:
                histogram.add_metric([], _cumulative(counts), sum_value=sums_ms[name] / 1000)
            found.append(histogram)
        return found


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    """Observations up to each bound, in seconds."""
    bounds: list[tuple[str, float]] = []
    seen, index = 0, 0
    for shown in SHOWN_BUCKETS:
        seen += sum(counts[index : shown + 1])
        index = shown + 1
        bounds.append((repr(BUCKETS_MS[shown] / 1000), seen))
    bounds.append(("+Inf", seen + sum(counts[index:])))
    return bounds


def _names(kind: str, found: Iterable[str]) -> list[str]:
    known = [name for name, (known_kind, _) in FAMILIES.items() if known_kind == kind]
    return known + sorted(set(found) - set(known))


def _help(name: str) -> str:
    return FAMILIES[name][1] if name in FAMILIES else f"See flows.metrics: {name}."


def _add_samples(family: Metric, name: str, samples: Iterable[tuple[Labels, float]], factor: float) -> None:
    for labels, number in samples:
        family.add_sample(name, dict(labels), number * factor)


def gauge_families(stats: Stats) -> list[Metric]:
    """Levels of now."""
    by_name: dict[str, list[tuple[Labels, float]]] = {}
    for (name, labels), number in stats.gauges().items():
        by_name.setdefault(name, []).append((labels, number))
    found: list[Metric] = []
    for name in _names(GAUGE, by_name):
        family = GaugeMetricFamily(exposed_name(name), _help(name))
        factor = 0.001 if name.endswith("_ms") else 1.0
        _add_samples(family, exposed_name(name), by_name.get(name, ()), factor)
        found.append(family)
    processes = GaugeMetricFamily(f"{PREFIX}processes", "Processes that publish, by role.", labels=["role"])
    memory = GaugeMetricFamily(f"{PREFIX}resident_memory_bytes", "Resident memory, by role.", labels=["role"])
    for role in ("flow", "gateway"):
        of_role = [process for process in stats.processes.values() if process.role == role]
        processes.add_metric([role], len(of_role))
        memory.add_metric([role], sum(process.memory_bytes for process in of_role))
    build = GaugeMetricFamily(f"{PREFIX}build_info", "1; the program's version.", labels=["version"])
    build.add_metric([version("tuanyuan")], 1)
    return [*found, processes, memory, build]


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def exposition(stats: Stats, sums: CounterSums, accept: str = "") -> tuple[bytes, str]:
    """The answer's bytes and its type; `accept`: what the scraper takes."""
    sums.add(stats)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families([*sums.families(), *gauge_families(stats)]))
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type
