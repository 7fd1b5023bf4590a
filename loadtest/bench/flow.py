"""The whole flow over prefilled logs: embedded server -> Bytewax -> push queues, everything on the machine's cores.

The flow knows every phone, has told every alert and has caught up; then its processes are frozen, the logs are filled
with pings never seen before, and the time runs from letting the processes go until `done` has reached the end. A
rewrite of the server's file that the filling has brought about is waited for first.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from geoindex.columns import I64, U32
from loadtest.bench.brute_force import BruteForce
from loadtest.bench.live import (
    APPEND_PINGS,
    SHARD_COUNT,
    Told,
    live_system,
    measured_cpu,
    now_batches,
    server_info,
    told_pairs,
    warm_up,
)
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import ALERT_COUNT, ActiveAlert, Traffic, active_alerts
from loadtest.world import World


def measure(
    devices: int, repeats: int, pings_per_repeat: int, processes: int, say: Say, alert_count: int = ALERT_COUNT
) -> Report:
    """`processes`: flow processes, each a single-worker Bytewax flow that owns its part of the 8 shards."""
    report = Report("flow")
    traffic = Traffic(devices)
    with live_system(traffic.settings(SHARD_COUNT), processes) as system:
        alerts = active_alerts(traffic.world, alert_count, system.now_ms())
        expected = BruteForce(alerts, devices)
        id_count = warm_up(system, traffic, alerts, expected, say)
        warm_up_pings = system.ping_count
        rates: list[float] = []
        shares: list[dict[str, float]] = []
        ids_pushed = 0
        log_bytes = 0
        for repeat in range(repeats):
            system.freeze()
            memory_before = server_info(system.client, "memory")["used_memory"]
            owed: Counter[Told] = Counter()
            for sent in now_batches(system, traffic, pings_per_repeat):
                system.append(sent.pings)
                owed.update(pairs(traffic.world, alerts, *expected.apply(sent)))
            log_bytes += server_info(system.client, "memory")["used_memory"] - memory_before
            system.wait_rewritten()
            with measured_cpu(system) as cores:
                started_s = time.monotonic()
                system.thaw()
                seconds = system.wait_done() - started_s
            rates.append(pings_per_repeat / seconds)
            shares.append(cores)
            say(f"{rates[-1] / 1e6:.2f} M pings/s; cores: flow {cores['flow']:.2f}, server {cores['server']:.2f}")
            _compare(report, repeat, owed, told_pairs(system))
            ids_pushed += owed.total()
            system.trim_queues()
        system.check_totals(report, id_count + ids_pushed)
        memory_bytes = system.memory_bytes()
        fsync = str(system.client.config_get("appendfsync")["appendfsync"])
    median = float(np.median(rates))
    report.values = {
        "pings_per_s": median,
        "pings_per_s_of_repeats": [round(rate) for rate in rates],
        "flow_cpu_ns_per_ping": float(np.median([cores["flow"] for cores in shares])) * 1e9 / median,
        "server_cpu_ns_per_ping": float(np.median([cores["server"] for cores in shares])) * 1e9 / median,
        "flow_cores": float(np.median([cores["flow"] for cores in shares])),
        "server_cores": float(np.median([cores["server"] for cores in shares])),
        "flow_processes": processes,
        "devices": devices,
        "alerts": alert_count,
        "shards": SHARD_COUNT,
        "prefill_pings": pings_per_repeat,
        "prefill_bytes": round(log_bytes / repeats),
        "bytes_per_ping": log_bytes / (repeats * pings_per_repeat),
        "batch_pings": entry_pings(pings_per_repeat),
        "warm_up_pings": warm_up_pings,
        "ids_pushed": ids_pushed,
        "repeats": repeats,
        "flow_memory_bytes": memory_bytes["flow"],
        "appendfsync": fsync,
    }
    report.notes.append(
        "Logs were filled while the flow processes were stopped (SIGSTOP); measured from SIGCONT to the last entry's "
        "`done`. Server, flow and its threads share the machine's cores; pushes are written with appendfsync always. "
        "Every pair of alert and phone in the queues was compared with brute force."
    )
    return report


def entry_pings(ping_count: int) -> int:
    """About how many pings the log entries hold that `LiveSystem.append` writes."""
    return min(APPEND_PINGS, ping_count) // SHARD_COUNT


def pairs(world: World, alerts: Sequence[ActiveAlert], phones: U32, positions: I64) -> list[Told]:
    """Phones and alert positions, as brute force gives them, with the ids that stand in the queues."""
    if not len(phones):
        return []
    partner, id_bytes, id_end = world.phone_ids(phones)
    raw, ends = id_bytes.tobytes(), id_end.tolist()
    return [
        (alerts[position].alert.alert_id, world.partner_names[index], raw[start:end].decode())
        for position, index, start, end in zip(positions.tolist(), partner.tolist(), [0, *ends[:-1]], ends, strict=True)
    ]


def _compare(report: Report, repeat: int, owed: Counter[Told], queued: Counter[Told]) -> None:
    missed, extra = owed - queued, queued - owed
    if missed or extra:
        report.faults.append(
            f"repeat {repeat}: {missed.total()} pushes missed (such as {next(iter(missed), None)}), "
            f"{extra.total()} too many (such as {next(iter(extra), None)})"
        )
