"""CPU of flow and server with nothing to do."""

from __future__ import annotations

import time

from loadtest.bench.live import SHARD_COUNT, live_system, measured_cpu, warm_up
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import Traffic, active_alerts

PHONES = 10_000
QUIET_S = 3.0


def measure(seconds: float, processes: int, say: Say) -> Report:
    """A flow that has seen some phones and alerts; then nobody sends anything, for so long."""
    report = Report("idle")
    traffic = Traffic(PHONES)
    with live_system(traffic.settings(SHARD_COUNT), processes) as system:
        warm_up(system, traffic, active_alerts(traffic.world, 10, system.now_ms()), None, say)
        time.sleep(min(QUIET_S, seconds / 2))
        heads = system.heads()
        with measured_cpu(system) as cores:
            time.sleep(seconds)
        ticks = sum(after[0] > before[0] for before, after in zip(heads, system.heads(), strict=True))
        report.expect("shards whose clock went on", SHARD_COUNT, ticks)
        system.check_totals(report, None)
    report.values = {
        "cpu_share": cores["flow"] + cores["server"],
        "flow_cpu_share": cores["flow"],
        "server_cpu_share": cores["server"],
        "seconds": seconds,
        "flow_processes": processes,
        "shards": SHARD_COUNT,
        "devices": PHONES,
        "alerts": 10,
    }
    report.notes.append(
        "Share of one core, by the CPU time of the processes. Each silent log still gets a tick a second."
    )
    return report
