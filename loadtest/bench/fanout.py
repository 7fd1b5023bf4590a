"""One alert whose ring holds every phone: from publishing it to the last id in the queues."""

from __future__ import annotations

import time

import numpy as np

from geoindex.columns import U64
from geoindex.entries import DEFAULT_EXPIRY_MS, DEFAULT_SCHEDULE, Alert
from loadtest.bench.live import APPEND_PINGS, SHARD_COUNT, LiveSystem, live_system, measured_cpu
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import Traffic, squeezed

PLACE = "Chengdu"


def measure(devices: int, repeats: int, processes: int, say: Say) -> Report:
    """All of China's phones moved to within some 40 km of one city; each repeat publishes another alert there."""
    report = Report("fanout")
    traffic = Traffic(devices)
    place = traffic.world.place(PLACE)
    seconds: list[float] = []
    shares: list[dict[str, float]] = []
    with live_system(traffic.settings(SHARD_COUNT), processes) as system:
        for sent in traffic.first_sight(system.now_ms(), APPEND_PINGS):
            system.append(squeezed(sent.pings, place.lat, place.lng))
        system.wait_done()
        owed = _all_ids(traffic)
        say(f"{devices:,} devices known")
        for repeat in range(repeats):
            now_ms = system.now_ms()
            alert = Alert(
                f"fan-out-{repeat}",
                1,
                place.lat,
                place.lng,
                now_ms,
                DEFAULT_SCHEDULE,
                now_ms + DEFAULT_EXPIRY_MS,
            )
            with measured_cpu(system) as cores:
                started_s = time.monotonic()
                system.publish([alert])
                seconds.append(system.wait_done(poll_s=0.002) - started_s)
            shares.append(cores)
            say(f"{seconds[-1]:.3f} s, {devices / seconds[-1] / 1e6:.2f} M ids/s")
            _check_queues(system, alert, owed, report)
            system.trim_queues()
        system.check_totals(report, repeats * devices)
        fsync = str(system.client.config_get("appendfsync")["appendfsync"])
    median = float(np.median(seconds))
    report.values = {
        "seconds": median,
        "ids_per_s": devices / median,
        "seconds_of_repeats": [round(value, 3) for value in seconds],
        "flow_cores": float(np.median([cores["flow"] for cores in shares])),
        "server_cores": float(np.median([cores["server"] for cores in shares])),
        "flow_processes": processes,
        "devices": devices,
        "alerts": 1,
        "shards": SHARD_COUNT,
        "partners": len(traffic.world.partners),
        "repeats": repeats,
        "appendfsync": fsync,
    }
    report.notes.append(
        "From before the alert goes to the desk until `done` of every shard is at its log entry: every id is then in "
        "the queues and on disk. The ids in the queues were counted and compared with the world's, each exactly once."
    )
    return report


def _all_ids(traffic: Traffic) -> U64:
    """Hashes of (partner, id) of every phone, ascending."""
    hashes = [
        _hashes(
            [
                (traffic.world.partner_names[partner], sent.pings.device_id(row))
                for row, partner in enumerate(sent.pings.partner.tolist())
            ]
        )
        for sent in traffic.first_sight(0)
    ]
    return np.sort(np.concatenate(hashes))


def _hashes(ids: list[tuple[str, str]]) -> U64:
    return np.array([hash(pair) & ((1 << 64) - 1) for pair in ids], np.uint64)


def _check_queues(system: LiveSystem, alert: Alert, owed: U64, report: Report) -> None:
    found: list[U64] = []
    strange = 0
    for partner, kind, alert_id, device_ids in system.queued():
        if kind == "alert" and alert_id == alert.alert_id:
            found.append(_hashes([(partner, device_id) for device_id in device_ids]))
        else:
            strange += 1
    queued = np.sort(np.concatenate(found)) if found else np.empty(0, np.uint64)
    report.expect(f"{alert.alert_id}: ids in the queues", len(owed), len(queued))
    report.expect(f"{alert.alert_id}: the world's ids, each once", True, np.array_equal(owed, queued))
    report.expect(f"{alert.alert_id}: other pushes", 0, strange)
