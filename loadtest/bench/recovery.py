"""A restart: a flow that knows every phone has ended, and the logs have gone on for a minute without it.

    launch ──> process ──> checkpoints checked ──> loaded, first entries done ──> everything done ──> live

The time runs from launching the processes until `done` has reached the end of every log.
"""

from __future__ import annotations

import time
from collections import Counter

from loadtest.bench.brute_force import BruteForce
from loadtest.bench.flow import pairs
from loadtest.bench.live import POLL_S, SHARD_COUNT, LiveSystem, Told, live_system, now_batches, told_pairs, warm_up
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import ALERT_COUNT, Traffic, active_alerts

CHECKPOINT_INTERVAL_S = 600
"""None while the phones become known: the one that counts is that of the clean end."""
TIMEOUT_S = 300.0
LIVE_PINGS = 8


def measure(devices: int, missed_pings: int, processes: int, say: Say, alert_count: int = ALERT_COUNT) -> Report:
    """`missed_pings`: how many wait in the logs when the flow starts again."""
    report = Report("recovery")
    traffic = Traffic(devices)
    with live_system(traffic.settings(SHARD_COUNT), processes, CHECKPOINT_INTERVAL_S) as system:
        alerts = active_alerts(traffic.world, alert_count, system.now_ms())
        expected = BruteForce(alerts, devices)
        warm_up(system, traffic, alerts, expected, say)
        started_s = time.monotonic()
        system.end_flows()
        end_s = time.monotonic() - started_s
        say(f"ended with checkpoints in {end_s:.1f} s; {missed_pings:,} pings are appended without a flow")
        owed: Counter[Told] = Counter()
        for sent in now_batches(system, traffic, missed_pings):
            system.append(sent.pings)
            owed.update(pairs(traffic.world, alerts, *expected.apply(sent)))
        seconds = _restart(system)
        say(f"launched, and everything done after {seconds['seconds']:.1f} s")
        (sent,) = now_batches(system, traffic, LIVE_PINGS)
        owed.update(pairs(traffic.world, alerts, *expected.apply(sent)))
        started_s = time.monotonic()
        system.append(sent.pings)
        live_ms = 1000 * (system.wait_done(0.001) - started_s)
        queued = told_pairs(system)
        missed, extra = owed - queued, queued - owed
        if missed or extra:
            report.faults.append(
                f"{missed.total()} pushes missed (such as {next(iter(missed), None)}), "
                f"{extra.total()} too many (such as {next(iter(extra), None)})"
            )
        stats = system.last_stats()
        report.expect("pings replayed", missed_pings + LIVE_PINGS, int(stats.total("pings_accepted_total")))
        report.expect("pings refused", 0, int(stats.total("pings_refused_total")))
        report.expect("ids pushed", owed.total(), int(stats.total("pushes_total")))
        report.expect("devices", devices, int(stats.total("devices_live")))
        load_ms = stats.total("checkpoint_load_ms")
        memory_bytes = system.memory_bytes()
    report.values = {
        **seconds,
        "live_ms": live_ms,
        "load_seconds": load_ms / 1000,
        "replayed_pings_per_s": missed_pings / max(POLL_S, seconds["seconds"] - seconds["first_done_seconds"]),
        "clean_end_seconds": end_s,
        "devices": devices,
        "alerts": alert_count,
        "shards": SHARD_COUNT,
        "flow_processes": processes,
        "missed_pings": missed_pings,
        "ids_pushed": owed.total(),
        "flow_memory_bytes": memory_bytes["flow"],
        "server_memory_bytes": memory_bytes["server"],
    }
    report.notes.append(
        "The flow was ended cleanly and its logs went on without it. seconds: from launching `tuanyuan run` until "
        "`done` had reached the end of every log; first_done: until the first entry behind a checkpoint was through; "
        "load: reading the checkpoints into machines, summed over shards; live_ms: a few more pings after that, from "
        "XADD to `done`. Server and flow share the machine's cores. Every pair of alert and phone in the queues was "
        "compared with brute force."
    )
    return report


def _restart(system: LiveSystem) -> dict[str, float]:
    """Launch the flow processes; seconds from there to each stage."""
    before, heads = system.done(), system.heads()
    started_s = time.monotonic()
    system.launch()

    def elapsed_s(at_s: float) -> float:
        return round(at_s - started_s, 3)

    checked_s = system.wait_until(
        lambda: system.said().count("reads its log from a checkpoint") >= SHARD_COUNT, TIMEOUT_S, "checkpoints checked"
    )
    first_s = system.wait_until(lambda: system.done() != before, TIMEOUT_S, "the first entries are done", POLL_S)
    done_s = system.wait_until(
        lambda: all(done >= head for done, head in zip(system.done(), heads, strict=True)),
        TIMEOUT_S,
        "logs are worked through",
        POLL_S,
    )
    return {
        "seconds": elapsed_s(done_s),
        "checked_seconds": elapsed_s(checked_s),
        "first_done_seconds": elapsed_s(max(first_s, checked_s)),
    }
