"""Bytes that a shard machine needs for each device, beside the bytes of the device's id."""

from __future__ import annotations

import gc
import resource
import sys

import psutil

from flows.malloc import give_back_freed_memory
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import ALERT_COUNT, OFFLINE_MS, Traffic, active_alerts
from loadtest.bench.warm import warm_machine

CELL_SAMPLE = 2_000
SAMPLE_PHONES = 20_000
PRACTICE_DEVICES = 1_000


def measure(devices: int, say: Say, alert_count: int = ALERT_COUNT) -> Report:
    """A machine with all devices and the told sets of all alerts: by the process's memory, and by sums over columns."""
    report = Report("memory")
    practice = Traffic(PRACTICE_DEVICES)
    warm_machine(practice, active_alerts(practice.world, 2, OFFLINE_MS), lambda _: None)
    gc.collect()
    traffic = Traffic(devices)
    alerts = active_alerts(traffic.world, alert_count, OFFLINE_MS)
    process = psutil.Process()
    before_bytes, peak_before_bytes = process.memory_info().rss, _peak_bytes()
    warm = warm_machine(traffic, alerts, say, settle=False, sample_phones=SAMPLE_PHONES)
    gc.collect()
    kept_bytes = process.memory_info().rss - before_bytes
    give_back_freed_memory()
    grown_bytes = process.memory_info().rss - before_bytes
    peak_bytes = max(_peak_bytes() - max(peak_before_bytes, before_bytes), kept_bytes)
    sums_bytes = warm.machine.size.memory_bytes
    report.values = {
        "bytes_per_device": (max(grown_bytes, sums_bytes) - warm.id_bytes) / devices,
        "bytes_per_device_by_rss": (grown_bytes - warm.id_bytes) / devices,
        "bytes_per_device_by_sums": (sums_bytes - warm.id_bytes) / devices,
        "bytes_per_device_with_freed": (kept_bytes - warm.id_bytes) / devices,
        "peak_bytes_per_device": (peak_bytes - warm.id_bytes) / devices,
        "id_bytes_per_device": warm.id_bytes / devices,
        "rss_growth_bytes": grown_bytes,
        "devices": devices,
        "alerts": alert_count,
        "told_per_device": warm.pushed_count / devices,
    }
    report.notes.append(
        "The device's id is left out (id_bytes_per_device), all else is in: records, index, cells, told sets, the "
        "heap's gaps, covers and what the process allocated besides. by_rss: growth of resident memory once malloc has "
        "given back what was freed; by_sums: what the machine says of itself; the larger counts. with_freed: resident "
        "before that, as in a flow, whose malloc keeps what fan-outs freed for the next one. peak: the most there ever "
        "was, scratch memory of a publish included."
    )
    warm.check(report, CELL_SAMPLE)
    return report


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
