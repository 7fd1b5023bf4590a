"""What operators are shown, worked out of two looks at what all processes publish (`flows.metrics`).

    Stats before ─┐                                                    ┌─> the gateway's page, its history
    Stats now ────┴─> view_figures: rates, levels, quantiles by name ──┼─> `tuanyuan top`
                                                                       └─> (Prometheus makes its own, of the counters)

A figure has one name everywhere: what it is, its unit last, and behind a colon which one of several it is.

    pings_per_s, pings_per_s:{partner}             accepted by the flow
    pings_refused_per_s, pings_refused_per_s:{reason}    set aside by the flow
    pings_turned_away_per_s:{reason}               not taken by gateways, which the partner was told
    matches_per_s                                  phones told of an alert; below 20 in the time looked at: 0
    publish_to_queue_p50_ms, _p99_ms               publication, edit, close or growth -> its pushes are in the queues
    ping_to_queue_p50_ms, _p99_ms                  a ping that met a ring -> its push is in the queue; both of 20 phones
                                                   at least in the time looked at
    lag_ms, lag_ms:{shard}                         age of the first log entry whose pushes are not written; the largest,
                                                   also of shards that no process tells of, as gateways see them
    queue_entries:{partner}, queue_pending:{partner}     entries in its queues; of them handed over, not acknowledged;
                                                   in tens, below 20: 0
    queue_oldest_ms, queue_oldest_ms:{partner}     age of the oldest entry that is not acknowledged; the largest; below
                                                   a minute: 0
    dead_letters, dead_letters:{partner}           set aside since the processes that run now began
    checkpoint_age_ms, checkpoint_age_ms:{shard}   of the newest checkpoint; the largest
    server_memory_bytes, server_memory_max_bytes   of the Valkey server; the largest it may be
    flow_memory_bytes, gateway_memory_bytes        resident, all processes of the kind
    disk_free_bytes, disk_free_share               of the fuller disk of two: the embedded server's, the checkpoints'
    devices_live                                   live phones, rounded down to two digits
    requests_per_s, webhook_failures_per_s         of the gateways
    flow_processes, gateway_processes

A figure that nobody knows is not there. A rate is made process by process, over the time between that process's own
two snapshots: whoever ended in between gives none, whoever began counts from its beginning, and so no rate is negative
and none leaps when a process ends.

Nothing here points at few phones. With one alert open, a first match, a latency where there was none, a queue that is
longer by one or has an oldest entry all say the same: a phone has just come into its ring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from flows.alarms import Alarm
from flows.density import SHOWN_MIN
from flows.metrics import BUCKETS_MS, GATEWAY, Labels, ProcessStats, Stats, quantile_of

WINDOW_S = 5.0
"""Between the two looks: each process publishes once a second, so over less the figures would dance."""
BEGAN_S_MAX = 2 * WINDOW_S
"""So young is a process that began between the two looks."""
OLDEST_SHOWN_MS = 60_000
"""As old as the density of the map is when it is shown."""
NO_FLOW = Alarm("no_flow", "", "no flow process publishes: nobody is told of anything until one runs")
LATENCIES = {"publish_to_queue": "publish_to_queue_ms", "ping_to_queue": "ping_to_queue_ms"}
"""Figures -> histograms."""

DESCRIPTIONS: dict[str, str] = {
    "pings_per_s": "Pings accepted by the flow; by partner.",
    "pings_refused_per_s": "Pings that the flow set aside; by reason.",
    "pings_turned_away_per_s": "Pings that gateways did not take; by reason.",
    "matches_per_s": "Phones told of an alert. Fewer than 20 within the seconds looked at are 0.",
    "publish_to_queue_p50_ms": "From a publication, edit, close or growth until its pushes are in the queues: median.",
    "publish_to_queue_p99_ms": "The same, 99 of 100.",
    "ping_to_queue_p50_ms": "From a ping that met a ring until its push is in the queue: median.",
    "ping_to_queue_p99_ms": "The same, 99 of 100.",
    "lag_ms": "Age of the first log entry whose pushes are not written yet: the largest; by shard.",
    "queue_entries": "Entries in the queues, in tens, none below 20; by partner.",
    "queue_pending": "Of them handed over and not acknowledged, likewise; by partner.",
    "queue_oldest_ms": "Age of the oldest entry that is not acknowledged, from a minute on: the largest; by partner.",
    "dead_letters": "Pushes set aside because nobody could deal with them, since the processes began; by partner.",
    "checkpoint_age_ms": "Age of the newest checkpoint: the largest; by shard.",
    "server_memory_bytes": "What the Valkey server has in use.",
    "server_memory_max_bytes": "What it may use at most.",
    "flow_memory_bytes": "Resident memory of all flow processes.",
    "gateway_memory_bytes": "Resident memory of all gateways.",
    "disk_free_bytes": "Free on the fuller of the disks under the embedded server and the checkpoints.",
    "disk_free_share": "The same as a share of that disk, 0 to 1.",
    "devices_live": "Live phones, rounded down to two digits.",
    "requests_per_s": "Requests answered by the gateways.",
    "webhook_failures_per_s": "Webhook deliveries that failed and will be tried again.",
    "flow_processes": "Flow processes that publish.",
    "gateway_processes": "Gateways that publish.",
}
"""Every figure by the part of its name before the colon."""


@dataclass(frozen=True, slots=True)
class ViewFigures:
    """Figures of one moment."""

    at_ms: int
    """By the server's clock."""
    figures: Mapping[str, float] = field(default_factory=dict)
    alarms: tuple[Alarm, ...] = ()
    """Those that are on, each once, by kind and source."""


def view_figures(before: Stats, now: Stats, at_ms: int) -> ViewFigures:
    """Figures of the time between two looks; levels are those of the second one."""
    if not now.processes:
        return ViewFigures(at_ms, {"flow_processes": 0, "gateway_processes": 0}, (NO_FLOW,))
    found: dict[str, float] = {
        "flow_processes": now.process_count,
        "gateway_processes": sum(process.role == GATEWAY for process in now.processes.values()),
    }
    found |= _rates(before, now)
    for figure, histogram in LATENCIES.items():
        counts = _bucket_increases(before, now, histogram)  # a count is a phone
        if sum(counts) < SHOWN_MIN:
            continue
        for name, quantile in (("p50", 0.5), ("p99", 0.99)):
            value = quantile_of(counts, quantile)
            if value is not None:
                found[f"{figure}_{name}_ms"] = min(value, BUCKETS_MS[-1])
    found |= _levels(now)
    alarms = set(now.alarms) if now.process_count else {*now.alarms, NO_FLOW}
    return ViewFigures(at_ms, found, tuple(sorted(alarms)))


# --- rates ------------------------------------------------------------------------------------------------------------


def _rates(before: Stats, now: Stats) -> dict[str, float]:
    found: dict[str, float] = {}
    if now.process_count:
        found |= _with_sum("pings_per_s", _rates_by(before, now, "pings_accepted_total", "partner"))
        found |= _with_sum("pings_refused_per_s", _rates_by(before, now, "pings_refused_total", "reason"))
        found["matches_per_s"] = _matches_per_s(before, now)
    if any(process.role == GATEWAY for process in now.processes.values()):
        found |= _with_sum("pings_turned_away_per_s", _rates_by(before, now, "pings_turned_away_total", "reason"))
        found["requests_per_s"] = sum(_rates_by(before, now, "gateway_requests_total", "status").values())
        outcomes = _rates_by(before, now, "webhook_deliveries_total", "outcome")
        found["webhook_failures_per_s"] = sum(rate for outcome, rate in outcomes.items() if outcome != "accepted")
    return found


def _matches_per_s(before: Stats, now: Stats) -> float:
    """Phones told a second. With one alert open that is how many have come into its ring: few are not told."""
    count = rate = 0.0
    for old, new, seconds in _pairs(before, now):
        told = sum(
            _increase(old, number, key) for key, number in new.counters.items() if _is(key, "pushes_total", "alert")
        )
        count += told
        rate += told / seconds
    return rate if count >= SHOWN_MIN else 0.0


def _is(key: tuple[str, Labels], name: str, kind: str) -> bool:
    return key[0] == name and ("kind", kind) in key[1]


def _rates_by(before: Stats, now: Stats, name: str, label: str) -> dict[str, float]:
    """Increase a second of a counter, by one label's values; also of those that stand still."""
    rates: dict[str, float] = {}
    for old, new, seconds in _pairs(before, now):
        for key, number in new.counters.items():
            if key[0] == name:
                value = dict(key[1]).get(label, "")
                rates[value] = rates.get(value, 0.0) + _increase(old, number, key) / seconds
    return rates


def _pairs(before: Stats, now: Stats) -> Iterator[tuple[ProcessStats | None, ProcessStats, float]]:
    """Each process that has published since: what it said before (None: it had not begun), now, and the seconds."""
    for name, new in now.processes.items():
        old = before.processes.get(name)
        if old is not None and old.started_ms == new.started_ms:
            seconds = (new.at_ms - old.at_ms) / 1000
        else:
            # One that began in between. Of one that was merely silent nobody knows when it counted what.
            old, seconds = None, (new.at_ms - new.started_ms) / 1000
            if seconds > BEGAN_S_MAX:
                continue
        if seconds > 0:
            yield old, new, seconds


def _increase(old: ProcessStats | None, number: float, key: tuple[str, Labels]) -> float:
    return number if old is None else max(0.0, number - old.counters.get(key, 0.0))


def _bucket_increases(before: Stats, now: Stats, name: str) -> list[int]:
    increases = [0] * (len(BUCKETS_MS) + 1)
    for old, new, _ in _pairs(before, now):
        counts = new.buckets.get(name)
        if counts is not None:
            earlier = (old.buckets.get(name) if old is not None else None) or [0] * len(counts)
            for index, (count, known) in enumerate(zip(counts, earlier, strict=True)):
                increases[index] += max(0, count - known)
    return increases


# --- levels -----------------------------------------------------------------------------------------------------------


def _levels(now: Stats) -> dict[str, float]:
    found: dict[str, float] = {}
    found |= _with_largest("lag_ms", now.largest_by("lag_ms", "shard"))
    behind_ms = now.gauge("intake_flow_lag_ms")
    if behind_ms is not None:
        found["lag_ms"] = max(behind_ms, found.get("lag_ms", 0.0))
    found |= _with_largest("checkpoint_age_ms", now.largest_by("checkpoint_age_ms", "shard"))
    oldest = now.largest_by("queue_oldest_unacknowledged_ms", "partner")
    shown = {partner: age_ms if age_ms >= OLDEST_SHOWN_MS else 0.0 for partner, age_ms in oldest.items()}
    found |= _with_largest("queue_oldest_ms", shown)
    for name in ("queue_entries", "queue_pending"):
        by_partner = {
            partner: count // 10 * 10 if count >= SHOWN_MIN else 0.0
            for partner, count in now.by_label(name, "partner").items()
        }
        if by_partner:
            found |= _with_sum(name, by_partner)
    found |= _with_sum("dead_letters", now.by_label("dead_letters_total", "partner"))
    for name in ("server_memory_bytes", "server_memory_max_bytes"):
        value = now.gauge(name)
        if value is not None:
            found[name] = value
    for role in ("flow", "gateway"):
        memory = [process.memory_bytes for process in now.processes.values() if process.role == role]
        if memory and all(memory):
            found[f"{role}_memory_bytes"] = sum(memory)
    found |= _disk(now)
    if now.process_count:
        phones = int(sum(now.by_label("devices_live", "shard").values()))
        if phones >= SHOWN_MIN:
            step = max(10, 10 ** (len(str(phones)) - 2))
            found["devices_live"] = phones // step * step
    return found


def _disk(now: Stats) -> dict[str, float]:
    """Of the disk that is fuller."""
    disks = []
    for name in ("server_disk", "checkpoint_disk"):
        free, size = now.gauge(f"{name}_free_bytes"), now.gauge(f"{name}_bytes")
        if free is not None and size:
            disks.append((free / size, free))
    if not disks:
        return {}
    share, free = min(disks)
    return {"disk_free_bytes": free, "disk_free_share": share}


def _with_sum(name: str, parts: Mapping[str, float]) -> dict[str, float]:
    return {name: sum(parts.values())} | _named(name, parts)


def _with_largest(name: str, parts: Mapping[str, float]) -> dict[str, float]:
    return {name: max(parts.values())} | _named(name, parts) if parts else {}


def _named(name: str, parts: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}:{part}": value for part, value in sorted(parts.items()) if part}
