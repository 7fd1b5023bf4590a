"""Pictures of a run: PNG files, one thought each, drawn from the report's JSON.

throughput.png   pings a second: due, accepted; refused requests
latency.png      percentiles over time, by the second in which requests were due
lag.png          how far the flow is behind its logs
queues.png       pushes that partners have not been given, by partner; devices told a second
memory.png       resident memory by role, and what the server says it uses
cpu.png          cores, by role: the system's, the generator's, what the machine has
steps.png        of a stepping run: figures and limits, step by step
alerts.png       of every alert: publish -> answer -> first push -> last push
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]

INK, GRID = "#1c2b3a", "#e3e8ed"
COLOURS = ("#0b7a75", "#c8553d", "#3a6ea5", "#d39f2a", "#7a4e9b", "#5d7052", "#a3586d")
ROLE_COLOURS = {
    "flow": "#0b7a75",
    "gateway": "#3a6ea5",
    "valkey": "#d39f2a",
    "generator": "#9aa5b1",
    "feeder": "#c3cbd3",
}
QUANTILE_COLOURS = {"p50": "#9fcfc9", "p90": "#4ea69f", "p99": "#0b7a75", "p99_9": "#c8553d", "max": "#c3cbd3"}
SIZE_INCHES = (9.0, 3.6)
DPI = 110


def draw(found: Found, folder: Path) -> list[Path]:
    """Draw what the report has figures for; the files."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    for name, (title, picture) in PICTURES.items():
        figure, axes = _figure(title)
        if picture(axes, found):
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI)
            drawn.append(path)
    return drawn


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8a96a3")
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    return figure, axes


def _time_axis(axes: Any, found: Found) -> None:
    axes.set_xlabel("seconds since the load began", color=INK)
    axes.set_xlim(0, max(1.0, found["values"]["load_s"]))
    if found["warm_up_s"] >= 1:
        axes.axvspan(0, found["warm_up_s"], color="#f2f4f6", zorder=0)
        axes.text(found["warm_up_s"] / 2, 0.98, "warm-up", transform=axes.get_xaxis_transform(), ha="center", va="top",
                  fontsize=7, color="#8a96a3")  # fmt: skip
    for fault in found["faults"]:
        axes.axvline(fault["at_s"], color="#c8553d", linewidth=1, linestyle="--")
        axes.text(fault["at_s"], 0.98, f" {fault['role']} killed", transform=axes.get_xaxis_transform(), va="top",
                  fontsize=7, color="#c8553d")  # fmt: skip


def _thousands(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _log_axis(axes: Any) -> None:
    """Numbers as they are, at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    axes.yaxis.set_minor_formatter(plain)
    axes.tick_params(axis="y", which="minor", labelsize=7, colors=INK)


def short(value: float) -> str:
    """1200 as 1.2 k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _legend(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8, labelcolor=INK)


def _throughput(axes: Any, found: Found) -> bool:
    series = found["series"]
    seconds = series["seconds"]
    axes.plot(seconds, series["due_per_s"], color="#9aa5b1", linewidth=1.2, label="due")
    axes.plot(seconds, series["accepted_per_s"], color=COLOURS[0], linewidth=1.2, label="accepted")
    axes.set_ylabel("pings a second", color=INK)
    axes.set_ylim(bottom=0)
    _thousands(axes)
    if any(series["refused_per_s"]):
        right = axes.twinx()
        right.bar(seconds, series["refused_per_s"], color=COLOURS[1], alpha=0.5, width=1.0)
        right.set_ylabel("requests refused a second", color=COLOURS[1], fontsize=9)
        right.spines[["top"]].set_visible(False)
        axes.plot([], [], color=COLOURS[1], alpha=0.5, linewidth=6, label="refused")
        axes.legend(loc="lower right", fontsize=8, labelcolor=INK, framealpha=0.9)
    else:
        _legend(axes)
    _time_axis(axes, found)
    return True


def _latency_of(group: str) -> Callable[[Any, Found], bool]:
    def picture(axes: Any, found: Found) -> bool:
        columns = found["series"]["latency"].get(group)
        if columns is None or not any(value for value in columns["max"]):
            return False
        seconds = found["series"]["seconds"]
        for quantile, color in reversed(QUANTILE_COLOURS.items()):
            points = [(at, value) for at, value in zip(seconds, columns[quantile], strict=True) if value]
            axes.plot(
                [at for at, _ in points],
                [value for _, value in points],
                color=color,
                linewidth=1.2,
                marker="." if len(points) < 40 else None,
                label=quantile.replace("_", "."),
            )
        _log_axis(axes)
        axes.set_ylabel("ms from the due moment (log scale)", color=INK)
        _time_axis(axes, found)
        _legend(axes)
        return True

    return picture


def _samples(found: Found, key: str) -> tuple[list[float], list[Any]]:
    rows = [sample for sample in found["series"]["samples"] if sample.get(key) is not None]
    return [sample["at_s"] for sample in rows], [sample[key] for sample in rows]


def _lag(axes: Any, found: Found) -> bool:
    seconds, lag = _samples(found, "lag_ms")
    if not lag:
        return False
    axes.plot(seconds, lag, color=COLOURS[0], linewidth=1.2)
    axes.set_ylabel("lag of the slowest shard, ms", color=INK)
    axes.set_ylim(bottom=0)
    _thousands(axes)
    _time_axis(axes, found)
    return True


def _queues(axes: Any, found: Found) -> bool:
    seconds, unread = _samples(found, "unread")
    partners = sorted({name for counts in unread for name in counts})
    if not partners:
        return False
    for name, color in zip(partners, COLOURS * 4, strict=False):
        axes.plot(seconds, [counts.get(name, 0) for counts in unread], color=color, linewidth=1.2, label=name)
    axes.set_ylabel("queue entries not yet taken", color=INK)
    axes.set_ylim(bottom=0)
    _thousands(axes)
    _time_axis(axes, found)
    _legend(axes)
    return True


def _memory(axes: Any, found: Found) -> bool:
    seconds, rss = _samples(found, "rss_mb")
    roles = sorted({role for row in rss for role in row})
    for role in roles:
        axes.plot(seconds, [row.get(role) for row in rss], color=ROLE_COLOURS.get(role, INK), linewidth=1.4, label=role)
    at_s, used = _samples(found, "server_memory_mb")
    if used:
        axes.plot(at_s, used, color=ROLE_COLOURS["valkey"], linewidth=1.2, linestyle=":", label="valkey's own count")
    if not roles and not used:
        return False
    axes.set_ylabel("resident memory, MB", color=INK)
    axes.set_ylim(bottom=0)
    _time_axis(axes, found)
    _legend(axes)
    return True


def _cpu(axes: Any, found: Found) -> bool:
    samples = found["series"]["samples"]
    generator: dict[int, dict[str, float]] = {}
    for load in found["series"]["generator"]:
        row = generator.setdefault(int(load["at_s"]), {"generator": 0.0, "feeder": 0.0})
        row["generator"] += load["cores"]
        row["feeder"] += load["feeder_cores"]
    rows = [
        (sample["at_s"], {**sample["cores"], **generator.get(int(sample["at_s"]), {})})
        for sample in samples
        if sample["cores"] or generator
    ]
    if not rows:
        return False
    roles = [
        role for role in ("flow", "valkey", "gateway", "generator", "feeder") if any(role in row for _, row in rows)
    ]
    axes.stackplot(
        [at_s for at_s, _ in rows],
        [[row.get(role, 0.0) for _, row in rows] for role in roles],
        colors=[ROLE_COLOURS[role] for role in roles],
        labels=[role if role in ("flow", "valkey", "gateway") else f"{role} (load)" for role in roles],
        linewidth=0,
    )
    cores = found.get("machine_cores")
    if cores:
        axes.axhline(cores, color=INK, linewidth=1, linestyle="--", label=f"all {cores} cores")
    axes.set_ylabel("cores in use", color=INK)
    axes.set_ylim(bottom=0)
    _time_axis(axes, found)
    _legend(axes)
    return True


def _steps(axes: Any, found: Found) -> bool:
    limit = found.get("limit")
    if not limit or not limit["steps"]:
        return False
    steps = limit["steps"]
    rates = [step["pings_per_s"] for step in steps]
    for (name, label), color in zip(
        (
            ("request_p99_ms", "request p99, ms"),
            ("lag_ms", "lag, ms"),
            ("generator_late_ms", "generator late p99, ms"),
        ),
        COLOURS,
        strict=False,
    ):
        values = [step["figures"].get(name) for step in steps]
        axes.plot(rates, [None if value is None else max(value, 0.5) for value in values], color=color, marker="o",
                  markersize=4, linewidth=1.2, label=label)  # fmt: skip
    axes.set_xscale("log")
    _log_axis(axes)
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(rates, [short(rate) for rate in rates], fontsize=8)
    if limit["held_per_s"]:
        axes.axvline(limit["held_per_s"], color="#5d7052", linewidth=1, linestyle="--", label="held")
    if limit["broken_per_s"]:
        axes.axvline(limit["broken_per_s"], color="#c8553d", linewidth=1, linestyle="--", label="broke")
    axes.set_xlabel("pings a second, step by step", color=INK)
    axes.set_ylabel("ms (log scale)", color=INK)
    _legend(axes)
    return True


def _alerts(axes: Any, found: Found) -> bool:
    alerts = [alert for alert in found["alerts"] if alert["first_push_ms"] is not None and not alert["is_watch"]]
    if not alerts:
        return False
    numbers = list(range(1, len(alerts) + 1))
    for key, label, color in (
        ("answered_ms", "answered to the officer", "#9aa5b1"),
        ("first_push_ms", "first push taken", COLOURS[0]),
        ("last_push_ms", "last push taken", COLOURS[1]),
    ):
        axes.plot(numbers, [max(1.0, alert[key]) for alert in alerts], color=color, marker="o", markersize=4,
                  linestyle="none", label=label)  # fmt: skip
    _log_axis(axes)
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("alerts, in the order in which they were published", color=INK)
    axes.set_ylabel("ms from the due moment (log scale)", color=INK)
    _legend(axes)
    return True


PICTURES: dict[str, tuple[str, Callable[[Any, Found], bool]]] = {
    "steps": ("Stepping up", _steps),
    "throughput": ("Pings a second", _throughput),
    "latency": ("Requests with pings: due → on disk and answered", _latency_of("ping request")),
    "ping-to-push": ("Phones newly in a ring: ping due → push in the partner's hands", _latency_of("ping to push")),
    "decided-to-taken": ("Pushes: decided → in the partner's hands", _latency_of("push decided to taken")),
    "alerts": ("Alerts: publish due → answered → first push → last push", _alerts),
    "lag": ("Lag of the flow", _lag),
    "queues": ("Push queues", _queues),
    "memory": ("Memory", _memory),
    "cpu": ("CPU: system and generator", _cpu),
    "generator": ("The generator's own lateness", _latency_of("generator late")),
}
"""File name -> (title, what draws it; False: there is nothing to draw)."""
