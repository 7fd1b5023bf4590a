"""A run in figures: one JSON object, whose `values` are what thresholds look at and what two runs are compared by.

Figures are those of the load behind its warm-up; plots show all of it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from loadtest.bench.report import machine_values
from loadtest.load.account import KINDS, OTHERS, Account
from loadtest.load.histogram import PERCENTILES, Histogram, merged
from loadtest.load.limits import Threshold, read_thresholds
from loadtest.load.recorder import Recorder
from loadtest.load.senders import LATE
from loadtest.load.spec import RunSpec
from loadtest.load.steps import Stepper, cores_of, memory_share, ping_names
from loadtest.load.watch import Sample

FORMAT_VERSION = 1
PROBES, DECIDED, HOUR = "E2E ping to push", "E2E decided to taken", "E2E hour to push"
PUBLISH, ACK = "POST /v1/alerts", "POST /v1/pushes/ack"
CAUGHT_UP_MS = 1000.0
AHEAD_S_MIN = 0.5
"""A feeder that is ahead by less could not keep up."""

SATURATION = {
    "generator_late_p99_ms": "1 % of the sends were late by {:,.0f} ms or more",
    "generator_busy": "a generator process was busy for {:.0%} of a core",
    "feeder_behind_share": "requests were not made in time for {:.0%} of the run",
}
"""What it means that one of these thresholds is missed."""

Values = dict[str, float]


def summarise(
    spec: RunSpec,
    recorder: Recorder,
    samples: list[Sample],
    account: Account,
    *,
    faults: list[dict[str, Any]] = (),  # type: ignore[assignment]
    stepper: Stepper | None = None,
    workers: int = 1,
    filled: int = 0,
    load_s: float,
    drain_s: float = 0.0,
    begin_ms: float = 0.0,
    problem: str | None = None,
) -> dict[str, Any]:
    """The report's JSON. `load_s`: how long the load lasted."""
    if stepper is not None and stepper.broken is None and load_s >= spec.seconds:
        stepper.finish()
    from_s = min(spec.warm_up_s, load_s / 2)
    loaded = [sample for sample in samples if from_s <= sample["at_s"] <= load_s]
    alerts = alert_times(recorder)
    values = {
        **_rates(recorder, from_s, load_s),
        **_latencies(recorder, from_s, alerts),
        **_system(loaded),
        **_generator(recorder, from_s, load_s),
        **_account(account),
        **_recovery(faults, samples),
        "alerts": float(sum(1 for facts in recorder.published.values() if not facts.get("is_watch"))),
        "actions_not_taken": float(recorder.counted("actions not taken")),
        "delivered_again": float(recorder.counted("delivered again")),
        "load_s": round(load_s, 1),
        "drain_s": round(drain_s, 1),
        "phones_known": float(filled),
    }
    if recorder.published:
        values["devices_told"] = float(recorder.counted("devices told"))
    if stepper is not None:
        values["held_pings_per_s"] = stepper.held.rate if stepper.held is not None else 0.0
    growth = _memory_growth(loaded)
    if growth is not None:
        values["memory_growth_share_per_h"] = growth
    thresholds = verdicts(values, spec.scenario, is_stepping=stepper is not None)
    passed = account.passes and problem is None and not any(verdict["verdict"] == "missed" for verdict in thresholds)
    saturated = _saturation(values)
    return {
        "format": FORMAT_VERSION,
        "scenario": spec.scenario,
        "about": spec.plays.about,
        "at": datetime.fromtimestamp(begin_ms / 1000, UTC).isoformat(timespec="seconds"),
        "passed": passed,
        "problem": problem,
        "spec": spec.to_json(),
        "workers": workers,
        "warm_up_s": round(from_s, 1),
        "values": {name: value if math.isfinite(value) else None for name, value in values.items()},
        "thresholds": thresholds,
        "audit": asdict(account) | {"line": account.line(), "clean": account.clean, "passes": account.passes},
        "generator_saturated": saturated,
        "limit": None if stepper is None else stepper.to_json(),
        "requests": _requests(recorder, from_s),
        "alerts": alerts,
        "faults": list(faults),
        "cores": cores_of(loaded, recorder),
        "series": series_of(recorder, samples, load_s),
        **machine_values(),
    }


# ---- values


def _rates(recorder: Recorder, from_s: float, load_s: float) -> Values:
    counted_s = max(1.0, int(load_s) - int(from_s))
    due, accepted = (recorder.counted(name, from_s, int(load_s)) for name in ("pings due", "pings accepted"))
    names = ping_names(recorder)
    sent = sum(len(recorder.between(name, from_s, load_s + 1)) for name in names)
    refused = sum(recorder.failed(name, from_s, load_s + 1) for name in names)
    return {
        "pings_due_per_s": due / counted_s,
        "pings_per_s": accepted / counted_s,
        "bytes_per_ping": recorder.counted("bytes sent") / max(1, recorder.counted("pings accepted")),
        "pings_unsent": float(recorder.counted("pings due") - recorder.counted("pings accepted")),
        "requests_per_s": sent / counted_s,
        "refused_share": refused / max(1, refused + sent),
        "connections_busy_share": recorder.counted("connections busy", from_s, load_s + 1) / max(1, sent),
    }


def _latencies(recorder: Recorder, from_s: float, alerts: list[dict[str, Any]]) -> Values:
    histograms = {
        "ping_request": merged(recorder.between(name, from_s, math.inf) for name in ping_names(recorder)),
        "ping_to_push": recorder.between(PROBES, from_s, math.inf),
        "decided_to_taken": recorder.between(DECIDED, from_s, math.inf),
        "hour_to_push": recorder.between(HOUR, 0, math.inf),
        "publish": recorder.between(PUBLISH, 0, math.inf),
        "acknowledge": recorder.between(ACK, from_s, math.inf),
        "alert_first_push": Histogram(),
        "alert_last_push": Histogram(),
    }
    for alert in alerts:
        if alert["first_push_ms"] is not None and not alert["is_watch"]:
            histograms["alert_first_push"].add(alert["first_push_ms"])
            histograms["alert_last_push"].add(alert["last_push_ms"])
    return {
        f"{name}_{quantile}_ms": value_ms
        for name, histogram in histograms.items()
        for quantile, value_ms in histogram.summary_ms().items()
    }


def alert_times(recorder: Recorder) -> list[dict[str, Any]]:
    """Of every alert of the run: publish due -> answered -> first push -> last push of those it was published to."""
    told: dict[str, list[Any]] = defaultdict(list)
    for (alert_id, kind, _), found in recorder.fan_outs.items():
        if kind == "alert":
            told[alert_id].append(found)
    rows = []
    for alert_id, facts in sorted(recorder.published.items(), key=lambda item: item[1].get("due_ms", 0.0)):
        if "due_ms" not in facts:
            continue  # its publish was told to another master
        pushes = told.get(alert_id, [])
        due_ms = float(facts["due_ms"])
        rows.append(
            {
                "alert_id": alert_id,
                "is_watch": bool(facts.get("is_watch")),
                "due_ms": due_ms,
                "answered_ms": round(facts["answered_ms"] - due_ms, 1),
                "first_push_ms": round(min(push.first_ms for push in pushes) - due_ms, 1) if pushes else None,
                "last_push_ms": round(max(push.last_ms for push in pushes) - due_ms, 1) if pushes else None,
                "devices": sum(push.devices for push in pushes),
            }
        )
    return rows


def _system(samples: list[Sample]) -> Values:
    found: Values = {}
    lag = Histogram()
    for sample in samples:
        if "lag_ms" in sample:
            lag.add(sample["lag_ms"])
    found |= {f"lag_{name}_ms": value for name, value in lag.summary_ms().items() if name in ("p50", "p99", "max")}
    if shares := [memory_share(sample) for sample in samples if sample.get("server_memory_max")]:
        found["server_memory_share"] = max(shares)
        found["server_memory_mb"] = (
            max(sample["server_memory"] for sample in samples if "server_memory" in sample) / 1e6
        )
    for role in sorted({role for sample in samples for role in sample.get("rss", {})}):
        found[f"{role}_rss_mb"] = max(sample["rss"].get(role, 0) for sample in samples) / 1e6
    if devices := [sample["devices"] for sample in samples if sample.get("devices")]:
        found["devices_live"] = float(devices[-1])
    if unread := [sum(sample["unread"].values()) for sample in samples if "unread" in sample]:
        found["unread_entries_max"] = float(max(unread))
    if matched := [sample["matched_per_s"] for sample in samples if "matched_per_s" in sample]:
        found["matched_pings_per_s"] = fmean(matched)
    for role in sorted({role for sample in samples for role in sample.get("cores", {})}):
        found[f"{role}_cores"] = fmean(sample["cores"].get(role, 0.0) for sample in samples)
    if samples:
        found["machine_cores_used"] = fmean(sample["machine_cores"] for sample in samples)
    return found


def _generator(recorder: Recorder, from_s: float, load_s: float) -> Values:
    loads = [load for load in recorder.loads if from_s <= load["at_s"] <= load_s]
    found: Values = {}
    late = recorder.between(LATE, from_s, load_s + 1)
    for name, value_ms in late.summary_ms().items():
        found[f"generator_late_{name}_ms"] = value_ms
    if loads:
        for key, name in (("cores", "generator_cores"), ("feeder_cores", "feeder_cores")):
            found[name] = fmean(load[key] for load in loads) * len({load["worker"] for load in loads})
        busy = sorted(max(load["cores"], load["feeder_cores"]) for load in loads)
        # A pause of the machine is no saturation: what nine seconds in ten stay below.
        found["generator_busy"] = busy[math.ceil(0.9 * len(busy)) - 1]
        found["generator_rss_mb"] = max(load["rss"] for load in loads) / 1e6
        found["feeder_behind_share"] = sum(load["ahead_s"] < AHEAD_S_MIN for load in loads) / len(loads)
    return found


def _saturation(values: Values) -> list[str]:
    """Why the generator, not the deployment, was the limit, by the thresholds; empty: it was not."""
    at_most = {threshold.name: threshold.at_most for threshold in read_thresholds()[0]}
    return [
        words.format(values[name])
        for name, words in SATURATION.items()
        if (most := at_most.get(name)) is not None and values.get(name, 0.0) > most
    ]


def _account(account: Account) -> Values:
    if account.skipped is not None:
        return {}
    found = {f"audit_{kind}": float(account.counts.get(kind, 0)) for kind in KINDS}
    found["audit_other"] = float(sum(account.counts.get(kind, 0) for kind in OTHERS))
    return found | {"audit_pushes": float(account.pushes), "audit_owed": float(account.owed)}


def _recovery(faults: list[dict[str, Any]], samples: list[Sample]) -> Values:
    """From each kill until the flow has caught up again: the slowest."""
    found: list[float] = []
    for fault in faults:
        back_s = fault["at_s"] + fault["took_s"]
        later = [sample for sample in samples if sample["at_s"] >= back_s and "lag_ms" in sample]
        caught_up = next((sample["at_s"] for sample in later if sample["lag_ms"] <= CAUGHT_UP_MS), None)
        found.append(math.inf if caught_up is None else caught_up - fault["at_s"])
        fault["recovered_s"] = None if caught_up is None else round(found[-1], 1)
    return {"recovery_max_s": max(found)} if found else {}


def _memory_growth(samples: list[Sample]) -> float | None:
    """Of the flow, gateway and server together, as a share an hour, behind the first hour; None: too short a run."""
    if not samples or samples[-1]["at_s"] < 2 * 3600:
        return None
    late = [sample for sample in samples if sample["at_s"] >= 3600 and sample.get("rss")]
    if len(late) < 2:
        return None
    quarter = max(1, len(late) // 4)
    first, last = (fmean(sum(sample["rss"].values()) for sample in part) for part in (late[:quarter], late[-quarter:]))
    hours = (late[-1]["at_s"] - late[0]["at_s"]) * 0.75 / 3600
    return float((last - first) / first / max(hours, 1e-9))


# ---- verdicts


def verdicts(values: Values, scenario: str, is_stepping: bool = False) -> list[dict[str, Any]]:
    """Every threshold that applies: met, missed, or not measured. A stepping run ends when something breaks, so that
    only correctness is judged there.
    """
    found = []
    for threshold in read_thresholds()[0]:
        if not threshold.applies(scenario):
            continue
        if is_stepping and not threshold.name.startswith(("audit_", "devices_told")):
            continue
        value = values.get(threshold.name)
        found.append(
            {
                "name": threshold.name,
                "value": value if value is None or math.isfinite(value) else None,
                "wanted": threshold.words(),
                "verdict": _verdict(threshold, value),
                "reason": threshold.reason,
            }
        )
    return found


def _verdict(threshold: Threshold, value: float | None) -> str:
    if value is None:
        return "not measured"
    return "met" if threshold.is_met(value) else "missed"


def _requests(recorder: Recorder, from_s: float) -> list[dict[str, Any]]:
    rows = []
    for name in recorder.names():
        histogram = recorder.between(name, from_s, math.inf)
        rows.append(
            {
                "name": name,
                "count": len(histogram),
                "failures": recorder.failed(name, from_s),
                "reasons": dict(recorder.failures.get(name, {})),
                **{f"{quantile}_ms": value for quantile, value in histogram.summary_ms().items()},
            }
        )
    return rows


# ---- over time


def series_of(recorder: Recorder, samples: list[Sample], load_s: float) -> dict[str, Any]:
    """Columns for plots; a second without a value is None."""
    seconds = list(range(max(1, math.ceil(load_s))))
    send_names = ping_names(recorder)
    refused = [recorder.failed_at[name] for name in send_names if name in recorder.failed_at]

    def counted(name: str) -> list[int]:
        amounts = recorder.counts.get(name, Counter[int]())
        return [amounts[at] for at in seconds]

    found: dict[str, Any] = {
        "seconds": seconds,
        "due_per_s": counted("pings due"),
        "accepted_per_s": counted("pings accepted"),
        "told_per_s": counted("devices told"),
        "refused_per_s": [sum(amounts[at] for amounts in refused) for at in seconds],
        "latency": {},
    }
    groups = {
        "ping request": send_names,
        "ping to push": [PROBES],
        "push decided to taken": [DECIDED],
        "generator late": [LATE],
    }
    for group, names in groups.items():
        columns: dict[str, list[float | None]] = {quantile: [] for quantile in PERCENTILES}
        for at in seconds:
            by_second = (recorder.latencies.get(name, {}).get(at) for name in names)
            summary = merged(histogram for histogram in by_second if histogram is not None).summary_ms()
            for quantile, column in columns.items():
                column.append(summary.get(quantile))
        found["latency"][group] = columns
    found["samples"] = [
        {
            "at_s": sample["at_s"],
            "lag_ms": sample.get("lag_ms"),
            "cores": sample.get("cores", {}),
            "machine_cores": sample["machine_cores"],
            "rss_mb": {role: round(rss / 1e6, 1) for role, rss in sample.get("rss", {}).items()},
            "server_memory_mb": round(sample["server_memory"] / 1e6, 1) if "server_memory" in sample else None,
            "unread": sample.get("unread", {}),
            "pending": sample.get("pending", {}),
            "devices": sample.get("devices"),
            "alarms": sample.get("alarms", []),
        }
        for sample in samples
    ]
    found["generator"] = [
        {key: load[key] for key in ("at_s", "cores", "feeder_cores", "ahead_s", "waiting", "worker")}
        for load in sorted(recorder.loads, key=lambda load: float(load["at_s"]))
        if load["at_s"] >= 0
    ]
    return found
