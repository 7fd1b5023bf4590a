"""The shard machine alone: how many pings a second one core applies, with everything around it left out."""

from __future__ import annotations

from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import ALERT_COUNT, BATCH_PINGS, OFFLINE_MS, Traffic, active_alerts
from loadtest.bench.warm import measure_pings, warm_machine

CELL_SAMPLE = 20_000


def measure(
    devices: int,
    repeats: int,
    pings_per_repeat: int,
    say: Say,
    alert_count: int = ALERT_COUNT,
    seconds_min: float = 0.0,
) -> Report:
    """One machine with one shard that holds all devices; batches wait in memory as the wire leaves them.

    `seconds_min`: more repeats until so much time was measured.
    """
    report = Report("kernel")
    traffic = Traffic(devices)
    warm = warm_machine(traffic, active_alerts(traffic.world, alert_count, OFFLINE_MS), say)
    told_before = warm.pushed_count
    say(f"measuring {repeats} times or more: {pings_per_repeat:,} pings")
    rates = measure_pings(warm, repeats, pings_per_repeat, BATCH_PINGS, seconds_min)
    report.values = {
        "pings_per_s_per_core": 1e9 / rates.median_ns,
        "ns_per_ping": rates.median_ns,
        "ns_per_ping_min": min(rates.ns_per_ping),
        "cpu_ns_per_ping": rates.median_cpu_ns,
        "ns_per_ping_of_repeats": [round(ns, 2) for ns in rates.ns_per_ping],
        "looked_at_closely_share": rates.closely_share,
        "ids_pushed": warm.pushed_count - told_before,
        "devices": devices,
        "alerts": alert_count,
        "told_per_device": told_before / devices,
        "batch_pings": BATCH_PINGS,
        "pings_per_repeat": pings_per_repeat,
        "repeats": len(rates.ns_per_ping),
    }
    report.notes.append(
        "One thread, one shard. All devices were known, all alerts told, every phone had settled. 90 % of the pings "
        "come from within 50 m of the one before, 10 % from 0.1 to 5 km away; the clock moves 10 s while every phone "
        "pings once."
    )
    say("comparing every device's told alerts with brute force, and cells with the h3 library")
    warm.check(report, CELL_SAMPLE)
    return report
