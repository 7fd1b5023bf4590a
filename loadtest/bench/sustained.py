"""Appending and matching at the same time: the highest rate at which the flow keeps up.

    sender process ──appendfsync always──> server ──> flow ──> queues, trimmed as partners would
    every 0.25 s: how far `done` is behind the head of the log

Trials of a few seconds climb until the lag grows; the last rate that did not is then held for as long as was asked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from loadtest.bench.brute_force import BruteForce
from loadtest.bench.live import APPEND_PINGS, SHARD_COUNT, LiveSystem, live_system, measured_cpu, server_info, warm_up
from loadtest.bench.report import Report, Say
from loadtest.bench.sender import POOL_PINGS_MAX, SENDERS, Sender, sender_process
from loadtest.bench.traffic import ALERT_COUNT, Traffic, active_alerts

SAMPLE_S = 0.25
TRIM_SAMPLES = 2
ACHIEVED_SHARE_MIN = 0.98
LAG_MS_STEADY = 500.0
"""A lag below this is not growing, whatever its trend; above, it must not rise from the second quarter to the last."""
LAG_GROWTH_MAX = 1.5
LAG_MS_MAX = 2_000.0
"""A flow that is further behind, in the last quarter, does not keep up, even if it does not fall back any more."""
CHECKPOINT_INTERVAL_S = 10
"""Shorter than usual: logs are kept for about two intervals, and the machine's memory has to hold that."""
FINAL_STEP = 0.95
FINAL_TRIES = 4


@dataclass(slots=True)
class Trial:
    """One rate, held for a while."""

    rate: float
    seconds: float
    sent: int = 0
    at_s: list[float] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)
    sent_count: list[float] = field(default_factory=list)
    cores: dict[str, float] = field(default_factory=dict)
    memory_bytes: list[int] = field(default_factory=list)
    """What the server held."""
    drain_s: float = 0.0
    """How long the flow needed for what was left when the sender stopped."""

    @property
    def achieved(self) -> float:
        return self.sent / self.seconds

    @property
    def keeps_up(self) -> bool:
        return self.achieved >= ACHIEVED_SHARE_MIN * self.rate and not self.lag_grows

    @property
    def lag_grows(self) -> bool:
        quarter = max(1, len(self.lag_ms) // 4)
        early, late = float(np.median(self.lag_ms[quarter : 2 * quarter])), float(np.median(self.lag_ms[-quarter:]))
        return late > LAG_MS_MAX or (late > LAG_MS_STEADY and late > LAG_GROWTH_MAX * early)

    def line(self) -> str:
        return (
            f"offered {self.rate / 1e6:.2f} M/s, appended {self.achieved / 1e6:.2f} M/s, lag median "
            f"{np.median(self.lag_ms):.0f} ms, largest {max(self.lag_ms):.0f} ms, drained in {self.drain_s:.2f} s; "
            f"cores: {', '.join(f'{name} {share:.2f}' for name, share in self.cores.items())}: "
            f"{'keeps up' if self.keeps_up else 'does not keep up'}"
        )


def measure(
    devices: int,
    seconds: float,
    trial_seconds: float,
    processes: int,
    say: Say,
    rates: list[float],
    alert_count: int = ALERT_COUNT,
) -> Report:
    """`rates`: offered rates to climb, pings a second; with one only, that one is held without trials."""
    report = Report("sustained")
    traffic = Traffic(devices)
    pool_pings = min(2 * devices, POOL_PINGS_MAX)
    step = min(APPEND_PINGS, max(1_000, pool_pings // 4))
    trials: list[Trial] = []
    with live_system(traffic.settings(SHARD_COUNT), processes, CHECKPOINT_INTERVAL_S) as system:
        alerts = active_alerts(traffic.world, alert_count, system.now_ms())
        expected = BruteForce(alerts, devices)
        id_count = warm_up(system, traffic, alerts, expected, say)
        rewrites_before = int(server_info(system.client, "persistence").get("aof_rewrites", 0))
        first_ping = traffic.world.ping_count
        with sender_process(system.server.url, devices, first_ping, pool_pings, step) as sender:
            rate = _climb(system, sender, rates, trial_seconds, trials, say)
            final = _hold(system, sender, rate, seconds, trials, say)
            sent = sender.progress.sent
        system.ping_count += sent
        say("comparing totals with brute force")
        for batch in traffic.batches(min(sent, pool_pings), step, system.now_ms()):
            batch.pings.observed_at_ms[:] = batch.at_ms
            id_count += len(expected.apply(batch)[0])
        system.check_totals(report, id_count)
        rewrites = int(server_info(system.client, "persistence").get("aof_rewrites", 0)) - rewrites_before
        fsync = str(system.client.config_get("appendfsync")["appendfsync"])
    if not final.keeps_up:
        report.notes.append(f"No rate was found that the flow keeps up with, so pings_per_s is 0: {final.line()}")
    report.values = {
        "pings_per_s": final.achieved if final.keeps_up else 0.0,
        "appended_pings_per_s": final.achieved,
        "offered_pings_per_s": final.rate,
        "seconds": final.seconds,
        "lag_p50_ms": float(np.median(final.lag_ms)),
        "lag_p99_ms": float(np.percentile(final.lag_ms, 99)),
        "lag_max_ms": max(final.lag_ms),
        "lag_end_ms": final.lag_ms[-1],
        "lag_grows": final.lag_grows,
        "drain_s": final.drain_s,
        "flow_cores": final.cores["flow"],
        "server_cores": final.cores["server"],
        "sender_cores": final.cores["sender"],
        "flow_processes": processes,
        "devices": devices,
        "alerts": alert_count,
        "shards": SHARD_COUNT,
        "senders": SENDERS,
        "batch_pings": step // SHARD_COUNT,
        "tried_pings_per_s": [round(trial.rate) for trial in trials],
        "kept_up_of_tried": [int(trial.keeps_up) for trial in trials],
        "appendfsync": fsync,
        "aof_rewrites": rewrites,
        "server_memory_max_bytes": max(final.memory_bytes, default=0),
        "checkpoint_interval_s": CHECKPOINT_INTERVAL_S,
    }
    report.series["lag"] = {"at_s": final.at_s, "lag_ms": final.lag_ms, "sent": final.sent_count}
    report.notes.append(
        "Sender, server and flow share the machine's cores. The sender's pings were drawn before (a pool sent round "
        "and round, observed when sent). Lag: age of the newest log entry less age of the last one done. The flow "
        f"takes checkpoints every {CHECKPOINT_INTERVAL_S} s and trims the logs behind them; queues are emptied twice a "
        "second, as partners would."
    )
    return report


def _climb(
    system: LiveSystem, sender: Sender, rates: list[float], seconds: float, trials: list[Trial], say: Say
) -> float:
    """The highest of the rates that the flow keeps up with; the first one if it keeps up with none."""
    best = rates[0]
    if len(rates) > 1:
        for rate in rates:
            trials.append(_trial(system, sender, rate, seconds))
            say(trials[-1].line())
            if not trials[-1].keeps_up:
                break
            best = rate
    return best


def _hold(system: LiveSystem, sender: Sender, rate: float, seconds: float, trials: list[Trial], say: Say) -> Trial:
    """Hold the rate; a few per cent less if it was too much for so long."""
    for _ in range(FINAL_TRIES):
        trials.append(_trial(system, sender, rate, seconds))
        say(trials[-1].line())
        if trials[-1].keeps_up:
            break
        rate *= FINAL_STEP
    return trials[-1]


def _trial(system: LiveSystem, sender: Sender, rate: float, seconds: float) -> Trial:
    trial = Trial(rate, seconds)
    before = sender.progress
    with measured_cpu(system) as cores:
        started_s = time.monotonic()
        sender.send(rate, seconds)
        while not sender.progress.final:
            time.sleep(SAMPLE_S)
            system.check()
            trial.at_s.append(round(time.monotonic() - started_s, 3))
            trial.lag_ms.append(system.lag_ms())
            trial.sent_count.append(float(sender.progress.sent - before.sent))
            if len(trial.at_s) % TRIM_SAMPLES == 0:
                system.trim_queues()
                trial.memory_bytes.append(server_info(system.client, "memory")["used_memory"])
            if trial.at_s[-1] > seconds + 60:
                raise RuntimeError("the sender does not come to an end")
        elapsed_s = time.monotonic() - started_s
    after = sender.progress
    trial.sent = after.sent - before.sent
    trial.cores = dict(cores) | {"sender": (after.cpu_s - before.cpu_s) / elapsed_s}
    drained_from_s = time.monotonic()
    trial.drain_s = system.wait_done() - drained_from_s
    system.trim_queues()
    return trial
