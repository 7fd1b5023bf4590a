"""What the gateway's figures cost a flow: phones by zone once a minute, devices told with every entry.

The machines of all shards know every phone and have told all alerts; a count begins with the first entry and goes on
behind the next ones, as in a flow. What is counted is published to a server, read back, and held against the world.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from flows.clock import Clock
from flows.density import density_key, phones_in_circle, read_density
from flows.embedded import EmbeddedServer
from flows.figures import Figures
from flows.log import RawEntry
from flows.match import ShardNotes, ShardPushes
from flows.metrics import Metrics
from flows.server import connect
from flows.tallies import read_tallies
from loadtest.bench.checkpoint import BATCH_PINGS, Shards
from loadtest.bench.live import SHARD_COUNT
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import ALERT_COUNT, OFFLINE_MS, Traffic

MINUTE_S = 60.0


class _LogClock(Clock):
    """The process is as far as its logs."""

    def __init__(self) -> None:
        self.at_ms = OFFLINE_MS

    def now_ms(self) -> float:
        return self.at_ms


def measure(devices: int, ping_count: int, repeats: int, say: Say, alert_count: int = ALERT_COUNT) -> Report:
    """`ping_count`: over all shards; behind its entries a count must have come to its end.

    `repeats`: the median of so many publishings and readings.
    """
    report = Report("figures")
    shards = Shards(Traffic(devices), alert_count)
    shards.fill(say)
    metrics, clock = Metrics(), _LogClock()
    with (
        tempfile.TemporaryDirectory(prefix="tuanyuan-bench-") as folder,
        EmbeddedServer.start(Path(folder)) as server,
    ):
        client = connect(server.url)
        # Once before, so that every kernel is in memory.
        unmeasured = Figures(client, range(SHARD_COUNT), Metrics(), clock)
        for shard, machine in enumerate(shards.machines):
            unmeasured.begin(shard, machine, (OFFLINE_MS, 1))
        _apply(shards, unmeasured, clock, BATCH_PINGS)
        figures = Figures(client, range(SHARD_COUNT), metrics, clock)
        started_s = time.perf_counter()
        for shard, machine in enumerate(shards.machines):
            figures.begin(shard, machine, (OFFLINE_MS, 1))
        begin_s = time.perf_counter() - started_s
        entry_s, stops_s = _apply(shards, figures, clock, ping_count)
        count_ms = float(metrics.snapshot()["histograms"]["density_stop_ms"]["sum_ms"])
        say(f"{len(stops_s)} entries; counting all phones took {count_ms:.0f} ms")
        started_s, started_cpu_s = time.perf_counter(), time.thread_time()
        figures.publish()
        publish_s, publish_cpu_s = time.perf_counter() - started_s, time.thread_time() - started_cpu_s
        published_bytes = sum(int(client.strlen(density_key(shard))) for shard in range(SHARD_COUNT))
        density = read_density(client, SHARD_COUNT)
        read_ms: list[float] = []
        for _ in range(repeats):
            started_s = time.perf_counter()
            read_density(client, SHARD_COUNT)
            read_ms.append(1000 * (time.perf_counter() - started_s))
        circle_ms: list[float] = []
        for active in shards.alerts:
            started_s = time.perf_counter()
            phones_in_circle(density, active.alert.lat, active.alert.lng, active.ring_km)
            circle_ms.append(1000 * (time.perf_counter() - started_s))
        say("comparing with the world, and with what brute force says was told")
        report.expect("phones counted", devices, density.phone_count)
        report.expect("shards that have counted", (), density.missing)
        tallies = [read_tallies(client, SHARD_COUNT, active.alert.alert_id) for active in shards.alerts]
        told_count = sum(told for tally in tallies for told, _ in tally.values())
        report.expect("ids pushed", shards.expected_count, shards.pushed_count)
        report.expect("devices told", shards.expected_count, told_count)
        report.expect("writes that failed", 0, metrics.value("figure_write_errors_total", figure="density"))
        client.close()
    # Most entries meet no part of a count.
    stop_s, matching_s = float(np.median(stops_s)), float(np.median(entry_s))
    report.values = {
        "cpu_share_of_density": (count_ms / 1000 + publish_cpu_s) / MINUTE_S,
        "count_ns_per_device": count_ms * 1e6 / devices,
        "stop_ms_max": 1000 * max(stops_s),
        "stop_us_median": 1e6 * stop_s,
        "stop_share_of_matching": stop_s / matching_s,
        "begin_seconds": begin_s,
        "publish_seconds": publish_s,
        "published_bytes": published_bytes,
        "read_ms": float(np.median(read_ms)),
        "circle_ms": float(np.median(circle_ms)),
        "pairs": len(density.zone),
        "devices": devices,
        "alerts": alert_count,
        "pings": ping_count,
        "shards": SHARD_COUNT,
    }
    report.notes.append(
        "One thread for all shards. cpu_share_of_density: counting and publishing, once a minute, of one core. "
        "stop: the wait of an entry for what was counted behind the one before: its pushes, and, in the longest, a "
        "part of the phones. pairs: of zone and partner, over all shards."
    )
    return report


def _apply(shards: Shards, figures: Figures, clock: _LogClock, ping_count: int) -> tuple[list[float], list[float]]:
    """Pings to all machines: seconds that a machine took for each entry, and that the figures took behind it."""
    entry_s: list[float] = []
    stops_s: list[float] = []
    partners = shards.settings.partners
    for seq, sent in enumerate(shards.traffic.batches(ping_count, BATCH_PINGS)):
        clock.at_ms = sent.at_ms
        shards.expected_count += len(shards.expected.apply(sent)[0])
        for shard, (machine, part) in enumerate(zip(shards.machines, shards.split(sent.pings), strict=True)):
            if part is None:
                continue
            started_s = time.perf_counter()
            pushes = machine.apply(sent.at_ms, part)
            entry_s.append(time.perf_counter() - started_s)
            caused = ShardPushes(RawEntry(shard, sent.at_ms, seq, b"", b"", ""), pushes, partners, ShardNotes())
            started_s = time.perf_counter()
            figures.after_entry(caused, machine)
            stops_s.append(time.perf_counter() - started_s)
            shards.pushed_count += pushes.device_count
    return entry_s, stops_s
