"""What each open alert costs: a ping, a publication and memory beside 10, 100, 1,000 and 10,000 of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from geoindex.entries import AlertRevision
from loadtest.bench.inside import cover_bytes, told_bytes
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import BATCH_PINGS, OFFLINE_MS, Traffic, active_alerts
from loadtest.bench.warm import WarmMachine, measure_pings, warm_machine

COUNTS = (10, 100, 1_000, 10_000)
"""China had 1,317 alerts in a whole year: the last is what nobody expects."""
SMOKE_COUNTS = (10, 100)
DEVICES_MAX = 50_000
"""Told bits are counted a device; what brute force needs grows with devices times alerts."""
CELL_SAMPLE = 2_000
PUBLISHED = 50
"""Alerts published one by one besides, for the time of one."""


def measure(
    report: Report, devices: int, repeats: int, pings_per_repeat: int, say: Say, counts: Sequence[int] = COUNTS
) -> None:
    """Add `alerts_open` and, in its order, nanoseconds a ping, milliseconds a publication, bytes; verified each."""
    devices = min(devices, DEVICES_MAX)
    ns_per_ping: list[float] = []
    publish_ms: list[float] = []
    covers_mb: list[float] = []
    told_per_device: list[float] = []
    for count in counts:
        traffic = Traffic(devices)
        warm = warm_machine(traffic, active_alerts(traffic.world, count, OFFLINE_MS), lambda _: None)
        rates = measure_pings(warm, repeats, pings_per_repeat, BATCH_PINGS)
        covers_mb.append(round(cover_bytes(warm.machine) / 1e6, 1))
        told_per_device.append(round(told_bytes(warm.machine) / devices, 1))
        ns_per_ping.append(round(rates.median_ns, 2))
        warm.check(report, CELL_SAMPLE)
        publish_ms.append(round(_publish_ms(warm), 3))
        say(f"{count:,} alerts open: {ns_per_ping[-1]:.1f} ns a ping, {publish_ms[-1]:.2f} ms a publication")
        del warm
        gc.collect()
    report.values |= {
        "alerts_open": list(counts),
        "ns_per_ping_of_alerts": ns_per_ping,
        "publish_ms_of_alerts": publish_ms,
        "cover_mb_of_alerts": covers_mb,
        "told_bytes_per_device_of_alerts": told_per_device,
        "alerts_devices": devices,
    }
    report.notes.append(
        "of_alerts: beside so many open alerts at places drawn by population, in one shard of alerts_devices devices. "
        "publish_ms: one more alert meets cover and table; cover_mb: the index of all covers, once a shard; "
        "told_bytes_per_device: who was told what."
    )


def _publish_ms(warm: WarmMachine) -> float:
    """Median time of one more publication, each a new alert at the place and with the ring of one that is open."""
    took_s: list[float] = []
    now_ms = warm.machine.clock_ms
    for index, active in enumerate(warm.alerts[:PUBLISHED]):
        again = replace(active.alert, alert_id=f"one-more-{index}")
        started_s = time.perf_counter()
        warm.machine.apply(now_ms, AlertRevision("publish", again, (2, index + 1)))
        took_s.append(time.perf_counter() - started_s)
    return float(np.median(took_s)) * 1000
