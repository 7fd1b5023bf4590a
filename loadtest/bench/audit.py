"""The audit of a live system: how many pings a second it reads, decodes and works through again, on one core."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, cast

from flows.checkpoints import CheckpointStore
from flows.log import format_id, parse_id
from flows.reconcile import Reconciliation, reconcile
from flows.wire import decode_push
from loadtest.bench.live import APPEND_PINGS, SHARD_COUNT, LiveSystem, live_system, now_batches
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import Traffic, active_alerts

ALERT_COUNT = 10


def measure(devices: int, pings: int, repeats: int, say: Say, alert_count: int = ALERT_COUNT) -> Report:
    """First sight of all devices, alerts, then `pings` more, through a flow; then the audit from the first entry on."""
    report = Report("audit")
    traffic = Traffic(devices)
    with (
        tempfile.TemporaryDirectory(prefix="tuanyuan-bench-") as nowhere,
        live_system(traffic.settings(SHARD_COUNT), checkpoint_interval_s=0) as system,
    ):
        store = CheckpointStore(Path(nowhere), system.settings)
        for sent in traffic.first_sight(system.now_ms(), APPEND_PINGS):
            system.append(sent.pings)
        system.publish(active.alert for active in active_alerts(traffic.world, alert_count, system.now_ms()))
        for sent in now_batches(system, traffic, pings):
            system.append(sent.pings)
        system.wait_done()
        say(f"{system.ping_count:,} pings are in the logs, and done")
        system.freeze()  # it shares the cores
        seconds: list[float] = []
        results: list[Reconciliation] = []
        for _ in range(repeats):
            started_s = time.perf_counter()
            results.append(reconcile(system.client, store, system.settings))
            seconds.append(time.perf_counter() - started_s)
            _check(report, system, results[-1])
        system.thaw()
        lost = _lose_a_push(system)
        faulty = reconcile(system.client, store, system.settings)
        report.expect("faults after a push was deleted", {**results[0].counts, "missed": lost}, faulty.counts)
    report.values = {
        "pings_per_s": system.ping_count / min(seconds),
        "ns_per_ping": 1e9 * min(seconds) / system.ping_count,
        "seconds_of_repeats": [round(one, 3) for one in seconds],
        "pings": system.ping_count,
        "pushes": sum(account.told for account in results[0].shards),
        "devices": devices,
        "alerts": alert_count,
        "shards": SHARD_COUNT,
        "repeats": repeats,
    }
    report.notes.append(
        "The fastest repeat, on one thread: XRANGE, decoding, who was owed what, the queues, the comparison. Verified: "
        "clean, every ping and push looked at; and a push deleted from a queue is found missing."
    )
    return report


def _check(report: Report, system: LiveSystem, result: Reconciliation) -> None:
    report.expect("faults", 0, sum(result.counts.values()))
    report.expect("pings looked at", system.ping_count, sum(account.pings for account in result.shards))
    told = sum(len(device_ids) for _, _, _, device_ids in system.queued())
    report.expect("pushes compared", told, sum(account.compared for account in result.shards))
    report.expect("there are pushes", True, told > 0)


def _lose_a_push(system: LiveSystem) -> int:
    """Delete the first entry of a queue; how many devices it told."""
    for _, key in system.queues():
        found = cast(Any, system.client.xrange(key, count=1))
        if found:
            raw_id, fields = found[0]
            system.client.xdel(key, format_id(parse_id(raw_id)))
            return len(decode_push(next(iter(fields.values()))).device_ids)
    return 0
