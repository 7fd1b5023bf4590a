"""A ring that grows over a large table, and what a large table, or many open alerts, do to the cost of a ping."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

import numpy as np

from geoindex.columns import E7, F64, Pushes
from geoindex.entries import DEFAULT_EXPIRY_MS, HOUR_MS, Alert, AlertRevision, Schedule, Tick
from geoindex.shard import ShardMachine
from loadtest.bench import open_alerts
from loadtest.bench.brute_force import distance_km
from loadtest.bench.inside import told_of
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import ALERT_COUNT, BATCH_PINGS, OFFLINE_MS, ActiveAlert, Traffic, active_alerts
from loadtest.bench.warm import Rates, WarmMachine, measure_pings, warm_machine
from loadtest.places import Place

CELL_SAMPLE = 20_000
NEW_SHARE = 0.01
"""Of all devices, newly inside when the ring grows."""
FIRST_KM = 100.0
METRE_KM = 0.001
STEP_S = 1.0
"""By the shard clock, between publish, the growth that is measured, and the one that finds nobody."""
OPEN_PINGS_MAX = 60_000
"""Pings of a repeat beside many open alerts, each of which brute force compares with all of them."""
PLACES = ("Chengdu", "Zhengzhou", "Guangzhou")


def measure(
    devices: int,
    repeats: int,
    pings_per_repeat: int,
    say: Say,
    alert_count: int = ALERT_COUNT,
    open_counts: Sequence[int] = open_alerts.COUNTS,
) -> Report:
    """Machines with 1, 10 and 100 % of the devices, one after the other; the ring grows in the last.

    Before them small ones, with `open_counts` alerts open.
    """
    report = Report("growth")
    open_alerts.measure(report, devices, repeats, min(pings_per_repeat, OPEN_PINGS_MAX), say, open_counts)
    sizes = [devices // 100, devices // 10, devices]
    ns_per_ping: list[float] = []
    cpu_ns_per_ping: list[float] = []
    for size in sizes:
        traffic = Traffic(size)
        warm = warm_machine(traffic, active_alerts(traffic.world, alert_count, OFFLINE_MS), say)
        rates = measure_pings(warm, repeats, pings_per_repeat, BATCH_PINGS)
        say(f"{size:,} devices: {rates.median_ns:.1f} ns a ping")
        ns_per_ping.append(rates.median_ns)
        cpu_ns_per_ping.append(rates.median_cpu_ns)
        if size == devices:
            _measure_growth(warm, report, say)
            _add_cost(report, sizes, ns_per_ping, cpu_ns_per_ping, rates)
        warm.check(report, CELL_SAMPLE)
        del warm
        gc.collect()
    report.values |= {"devices": devices, "alerts": alert_count, "batch_pings": BATCH_PINGS, "repeats": repeats}
    return report


def _add_cost(report: Report, sizes: list[int], ns: list[float], cpu_ns: list[float], last: Rates) -> None:
    report.values |= {
        "cost_ratio": ns[-1] / ns[0],
        "cpu_cost_ratio": cpu_ns[-1] / cpu_ns[0],
        "sizes_devices": sizes,
        "ns_per_ping_of_sizes": [round(value, 2) for value in ns],
        "cpu_ns_per_ping_of_sizes": [round(value, 2) for value in cpu_ns],
        "ns_per_ping_of_repeats": [round(value, 2) for value in last.ns_per_ping],
    }
    report.series["cost"] = {"devices": [float(size) for size in sizes], "ns_per_ping": ns}


def _measure_growth(warm: WarmMachine, report: Report, say: Say) -> None:
    """Publish alerts whose rings grow seconds later, first to 1 % more devices, then by a metre to nobody."""
    whole_s: list[float] = []
    scan_s: list[float] = []
    new_ids: list[int] = []
    now_ms = warm.machine.clock_ms
    for index, name in enumerate(PLACES):
        place = warm.traffic.world.place(name)
        distances_km = _distances_km(warm, place)
        grown_km = _radius_with(distances_km, FIRST_KM, NEW_SHARE)
        alert = _growing(place, f"growing-{index}", grown_km, now_ms)
        published = warm.machine.apply(now_ms, AlertRevision("publish", alert, (2, index + 1)))
        seconds, grown = _timed_tick(warm.machine, now_ms + round(STEP_S * 1000))
        whole_s.append(seconds)
        new_ids.append(grown.device_count)
        seconds, nobody = _timed_tick(warm.machine, now_ms + round(2 * STEP_S * 1000))
        scan_s.append(seconds)
        now_ms = warm.machine.clock_ms
        warm.pushed_count += published.device_count + grown.device_count + nobody.device_count
        warm.expected_count += int((distances_km <= grown_km + METRE_KM).sum())
        say(f"{name}: {whole_s[-1]:.3f} s for {new_ids[-1]:,} new devices, {scan_s[-1]:.3f} s for nobody")
        report.faults += _check_told(warm, ActiveAlert(alert, grown_km + METRE_KM), distances_km)
    fan_out_s = float(np.median(whole_s)) - float(np.median(scan_s))
    report.values |= {
        "seconds": float(np.median(whole_s)),
        "scan_seconds": float(np.median(scan_s)),
        "fan_out_seconds": fan_out_s,
        "fan_out_ns_per_id": fan_out_s * 1e9 / max(1.0, float(np.median(new_ids))),
        "scan_ns_per_device": float(np.median(scan_s)) * 1e9 / warm.traffic.phone_count,
        "new_ids": int(np.median(new_ids)),
        "new_share": float(np.median(new_ids)) / warm.traffic.phone_count,
        "seconds_of_repeats": [round(value, 4) for value in whole_s],
        "scan_seconds_of_repeats": [round(value, 4) for value in scan_s],
    }
    report.notes.append(
        "seconds: the machine's whole step when a ring grows to 1 % more of its devices, their ids gathered into "
        "pushes; scan_seconds: the same ring one metre wider, when nobody is new; fan_out_seconds: the difference."
    )


def _timed_tick(machine: ShardMachine, at_ms: int) -> tuple[float, Pushes]:
    started_s = time.perf_counter()
    pushes = machine.apply(at_ms, Tick())
    return time.perf_counter() - started_s, pushes


def _growing(place: Place, alert_id: str, grown_km: float, now_ms: int) -> Alert:
    hour = STEP_S * 1000 / HOUR_MS
    schedule: Schedule = ((hour, FIRST_KM), (2 * hour, grown_km), (None, grown_km + METRE_KM))
    return Alert(alert_id, 1, place.lat, place.lng, now_ms, schedule, now_ms + DEFAULT_EXPIRY_MS)


def _distances_km(warm: WarmMachine, place: Place) -> F64:
    """From a place to every phone that brute force follows."""
    return distance_km(place.lat, place.lng, warm.expected.lat_e7 / E7, warm.expected.lng_e7 / E7)


def _radius_with(distances_km: F64, first_km: float, new_share: float) -> float:
    """A radius that adds this share of all phones to those within `first_km`."""
    inside = int((distances_km <= first_km).sum())
    rank = min(inside + round(new_share * len(distances_km)), len(distances_km)) - 1
    return round(float(np.partition(distances_km, rank)[rank]), 3)


def _check_told(warm: WarmMachine, active: ActiveAlert, distances_km: F64) -> list[str]:
    """Everybody within the grown ring, and nobody else, was told."""
    phone_of_row = warm.traffic.senders(0, warm.traffic.phone_count)
    if warm.expected.phones is None:
        rows, distances_km = np.arange(warm.traffic.phone_count), distances_km[phone_of_row]
    else:
        rows = np.flatnonzero(np.isin(phone_of_row, warm.expected.phones))
        distances_km = distances_km[np.searchsorted(warm.expected.phones, phone_of_row[rows])]
    told = told_of(warm.machine, [active], rows)[:, 0] != 0
    wrong = int((told != (distances_km <= active.ring_km)).sum())
    return [f"{active.alert.alert_id}: {wrong} of {len(rows)} devices were told wrongly"] if wrong else []
