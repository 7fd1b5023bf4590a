"""A shard machine that knows every phone, has told what was to tell, and has settled: the start of each measurement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geoindex.columns import U32, PingBatch, Pushes
from geoindex.entries import AlertRevision
from geoindex.shard import ShardMachine
from loadtest.bench.brute_force import BruteForce
from loadtest.bench.inside import verify
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import OFFLINE_MS, ActiveAlert, SentPings, Traffic, as_decoded

BRUTE_FORCE_PHONES_MAX = 20_000_000
"""Up to so many phones all are compared with brute force; of more, a sample."""
SAMPLE_PHONES = 200_000


@dataclass(slots=True)
class WarmMachine:
    """A machine in its steady state, what brute force says it must have done, and what it did."""

    machine: ShardMachine
    traffic: Traffic
    alerts: Sequence[ActiveAlert]
    expected: BruteForce
    sent_count: int = 0
    """Pings applied."""
    pushed_count: int = 0
    """Ids in the pushes that came out."""
    expected_count: int = 0
    """Ids that brute force says; of the sample only, where it is one."""
    id_bytes: int = 0
    """Bytes of all device ids."""

    def apply(self, sent: SentPings) -> None:
        """Pings, outside of any measurement."""
        self.take(sent, self.machine.apply(sent.at_ms, sent.pings))

    def take(self, sent: SentPings, pushes: Pushes) -> None:
        """Account for pings that the machine was given, and for what came out."""
        self.sent_count += len(sent.pings)
        self.pushed_count += pushes.device_count
        self.expected_count += len(self.expected.apply(sent)[0])

    def check(self, report: Report, cell_sample: int) -> None:
        """The verification that every benchmark of a machine ends with."""
        counters = self.machine.counters
        report.expect("pings accepted", self.sent_count, counters.pings_accepted)
        report.expect("pings refused", 0, sum(counters.pings_refused.values()))
        report.expect("ids counted by the machine", self.pushed_count, counters.devices_pushed["alert"])
        if self.expected.phones is None:
            report.expect("ids pushed", self.expected_count, self.pushed_count)
        report.faults += verify(self.machine, self.traffic, self.alerts, self.expected, cell_sample)


def warm_machine(
    traffic: Traffic,
    alerts: Sequence[ActiveAlert],
    say: Say,
    settle: bool = True,
    sample_phones: int | None = None,
) -> WarmMachine:
    """First sight of every phone, all alerts published, and, if `settle`, every phone once more.

    `sample_phones`: how many phones brute force follows; None: all, as long as that is not too many.
    """
    if sample_phones is None and traffic.phone_count > BRUTE_FORCE_PHONES_MAX:
        sample_phones = SAMPLE_PHONES
    sample = None if sample_phones is None else _sample(traffic, sample_phones)
    warm = WarmMachine(ShardMachine(), traffic, alerts, BruteForce(alerts, traffic.phone_count, sample))
    started_s = time.monotonic()
    warm.machine.apply(OFFLINE_MS, traffic.settings())
    for sent in traffic.first_sight(OFFLINE_MS):
        warm.apply(sent)
        warm.id_bytes += len(sent.pings.id_bytes)
    say(f"{traffic.phone_count:,} devices known after {time.monotonic() - started_s:.0f} s")
    for index, active in enumerate(alerts):
        pushes = warm.machine.apply(OFFLINE_MS, AlertRevision("publish", active.alert, (1, index + 1)))
        warm.pushed_count += pushes.device_count
    warm.expected_count += warm.expected.publish()
    if settle:
        for sent in traffic.batches(traffic.phone_count):
            warm.apply(sent)
    say(f"{len(alerts)} alerts told to {warm.pushed_count:,} devices after {time.monotonic() - started_s:.0f} s")
    return warm


@dataclass(frozen=True, slots=True)
class Rates:
    """Repeats of one measurement of the ping path."""

    ns_per_ping: list[float]
    cpu_ns_per_ping: list[float]
    """CPU time of the thread instead of the clock on the wall: what a busy machine does not distort as much."""
    closely_share: float
    """Pings of phones that had left their stay box."""

    @property
    def median_ns(self) -> float:
        return float(np.median(self.ns_per_ping))

    @property
    def median_cpu_ns(self) -> float:
        return float(np.median(self.cpu_ns_per_ping))


def measure_pings(
    warm: WarmMachine, repeats: int, ping_count: int, batch_pings: int, seconds_min: float = 0.0
) -> Rates:
    """Apply pings never seen before, `ping_count` a repeat. They wait in memory, decoded; drawing them is not timed.

    `seconds_min`: go on with more repeats until so much time was measured.
    """
    machine = warm.machine
    ns_per_ping: list[float] = []
    cpu_ns_per_ping: list[float] = []
    closely_before = machine.counters.pings_looked_at_closely
    measured_s = 0.0
    while len(ns_per_ping) < repeats or measured_s < seconds_min:
        sent = list(warm.traffic.batches(ping_count, batch_pings))
        entries: list[tuple[int, PingBatch]] = [(batch.at_ms, as_decoded(batch.pings)) for batch in sent]
        pushes: list[Pushes] = []
        cpu_s, wall_s = time.thread_time(), time.perf_counter()
        for at_ms, pings in entries:
            pushes.append(machine.apply(at_ms, pings))
        wall_s, cpu_s = time.perf_counter() - wall_s, time.thread_time() - cpu_s
        measured_s += wall_s
        ns_per_ping.append(wall_s * 1e9 / ping_count)
        cpu_ns_per_ping.append(cpu_s * 1e9 / ping_count)
        for batch, caused in zip(sent, pushes, strict=True):
            warm.take(batch, caused)
    closely = machine.counters.pings_looked_at_closely - closely_before
    return Rates(ns_per_ping, cpu_ns_per_ping, closely / (len(ns_per_ping) * ping_count))


def _sample(traffic: Traffic, phone_count: int) -> U32:
    random = np.random.default_rng(traffic.world.seed)
    return np.unique(random.integers(0, traffic.phone_count, phone_count, dtype=np.uint32))
