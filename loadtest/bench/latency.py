"""From publishing an alert to the first push in a queue, while pings flow in."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np

from flows.log import format_id
from flows.server import connect
from flows.wire import decode_push
from geoindex.entries import DEFAULT_EXPIRY_MS, DEFAULT_SCHEDULE, Alert
from loadtest.bench.brute_force import BruteForce, count_bits
from loadtest.bench.live import APPEND_PINGS, SHARD_COUNT, LiveSystem, live_system, measured_cpu, server_info, warm_up
from loadtest.bench.report import Report, Say
from loadtest.bench.sender import POOL_PINGS_MAX, SENDERS, Sender, sender_process
from loadtest.bench.traffic import ActiveAlert, Traffic, active_alerts

STEPS_PER_S = 40
"""Appends a second of the sender: a ping waits 25 ms at most before it is sent."""
BETWEEN_S = 0.3
FIRST_PUSH_TIMEOUT_S = 60.0
RING_KM = 100.0
CHECKPOINT_INTERVAL_S = 20
"""Logs are kept for about two intervals, and the machine's memory has to hold that."""


def measure(devices: int, rate: float, alert_count: int, processes: int, say: Say) -> Report:
    """Publish alerts one after the other, each at another place drawn by population, under `rate` pings a second."""
    report = Report("latency")
    traffic = Traffic(devices)
    pool_pings = min(2 * devices, POOL_PINGS_MAX)
    step = max(100, min(APPEND_PINGS, round(rate / STEPS_PER_S), pool_pings // 2))
    round_s = pool_pings / rate
    latency_ms: list[float] = []
    lag_ms: list[float] = []
    with live_system(traffic.settings(SHARD_COUNT), processes, CHECKPOINT_INTERVAL_S) as system:
        warm_up(system, traffic, [], None, say)
        places = [active.alert for active in active_alerts(traffic.world, alert_count, system.now_ms())]
        first_ping = traffic.world.ping_count
        with sender_process(system.server.url, devices, first_ping, pool_pings, step) as sender:
            # Every phone passes through all its places before the first alert and after the last one, so that brute
            # force can say who is told.
            sender.send(rate, 24 * 3600.0)
            _let_pass(system, sender, pool_pings, round_s)
            say(f"{sender.progress.sent:,} pings sent; publishing {alert_count} alerts")
            with measured_cpu(system) as cores, ThreadPoolExecutor(1) as watcher:
                started_s, sent_before = time.monotonic(), sender.progress.sent
                for place in places:
                    latency_ms.append(_publish(system, watcher, place))
                    lag_ms.append(system.lag_ms())
                    time.sleep(BETWEEN_S)
                    system.trim_queues()
                seconds = time.monotonic() - started_s
                achieved = (sender.progress.sent - sent_before) / seconds
            _let_pass(system, sender, pool_pings, round_s)
            sent_at_least = sender.progress.sent
        system.wait_done()
        say("comparing totals with brute force")
        expected = BruteForce([ActiveAlert(place, RING_KM) for place in places], devices)
        expected.publish()
        for batch in traffic.batches(pool_pings, step, system.now_ms()):
            batch.pings.observed_at_ms[:] = batch.at_ms
            expected.apply(batch)
        rewrites = int(server_info(system.client, "persistence").get("aof_rewrites", 0))
        stats = system.last_stats()
        report.expect("ids pushed by the flow", count_bits(expected.told), int(stats.total("pushes_total")))
        report.expect("pings refused by the flow", 0, int(stats.total("pings_refused_total")))
        accepted = stats.total("pings_accepted_total")
        if accepted < system.ping_count + sent_at_least:
            report.faults.append(f"the flow accepted {accepted:.0f} pings of {system.ping_count + sent_at_least}")
        own = (stats.quantile_ms(name, 0.99) for name in ("publish_to_queue_ms", "ping_to_queue_ms"))
        own_p99_ms = max((found for found in own if found is not None), default=None)
        fsync = str(system.client.config_get("appendfsync")["appendfsync"])
    report.values = {
        "p50_ms": float(np.percentile(latency_ms, 50)),
        "p90_ms": float(np.percentile(latency_ms, 90)),
        "p99_ms": float(np.percentile(latency_ms, 99)),
        "max_ms": max(latency_ms),
        "pings_per_s": achieved,
        "offered_pings_per_s": rate,
        "lag_p50_ms": float(np.median(lag_ms)),
        "all_pushes_p99_ms": own_p99_ms,
        "flow_cores": cores["flow"],
        "server_cores": cores["server"],
        "flow_processes": processes,
        "devices": devices,
        "alerts": alert_count,
        "shards": SHARD_COUNT,
        "senders": SENDERS,
        "batch_pings": max(1, step // SHARD_COUNT),
        "appendfsync": fsync,
        "aof_rewrites": rewrites,
        "checkpoint_interval_s": CHECKPOINT_INTERVAL_S,
    }
    report.series["latency"] = {"latency_ms": [round(value, 3) for value in latency_ms]}
    report.notes.append(
        "From before the alert goes to the desk until a reader that waits at every queue, behind what was published "
        "before, holds the first push of that alert. Sender, server, flow and reader share the machine's cores. "
        "all_pushes_p99_ms: log entry to queue, weighted by device, over every push of the run, by the flow's own "
        "histogram."
    )
    if achieved < 0.97 * rate:
        report.notes.append(f"The sender did not reach the offered rate: {achieved:,.0f} of {rate:,.0f} pings/s.")
    return report


def _let_pass(system: LiveSystem, sender: Sender, pings: int, round_s: float) -> None:
    """Wait until so many more pings have been sent, trimming meanwhile."""
    until = sender.progress.sent + pings
    deadline_s = time.monotonic() + 60 + 10 * round_s
    while sender.progress.sent < until:
        system.check()
        if time.monotonic() > deadline_s:
            raise RuntimeError("the sender does not get on")
        time.sleep(0.25)
        system.trim_queues()


def _publish(system: LiveSystem, watcher: ThreadPoolExecutor, place: Alert) -> float:
    """Publish an alert there now; milliseconds until its first push was read."""
    now_ms = system.now_ms()
    alert = Alert(place.alert_id, 1, place.lat, place.lng, now_ms, DEFAULT_SCHEDULE, now_ms + DEFAULT_EXPIRY_MS)
    # A push's id begins with the ms of the log entry that caused it, so nothing that earlier entries cause, whenever it
    # comes, is read here: it would be the reader that is measured.
    positions = {key: format_id((now_ms, 0)) for _, key in system.queues()}
    seen = watcher.submit(_first_push_s, system, positions, alert.alert_id)
    time.sleep(0.02)  # until the watcher waits
    started_s = time.monotonic()
    system.publish([alert])
    return (seen.result() - started_s) * 1000


def _first_push_s(system: LiveSystem, positions: dict[str, str], alert_id: str) -> float:
    """Wait at all queues for a push of the alert; the moment (monotonic) at which one was read."""
    client = connect(system.server.url)
    try:
        deadline_s = time.monotonic() + FIRST_PUSH_TIMEOUT_S
        while time.monotonic() < deadline_s:
            reply = cast(Any, client.xread(cast(Any, positions), count=20, block=500))
            read_s = time.monotonic()
            for key, entries in reply or []:
                for entry_id, fields in entries:
                    positions[key.decode()] = entry_id.decode()
                    if any(decode_push(payload).alert_id == alert_id for payload in fields.values()):
                        return read_s
        raise RuntimeError(f"no push of {alert_id} within {FIRST_PUSH_TIMEOUT_S:.0f} s")
    finally:
        client.close()
