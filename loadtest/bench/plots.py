"""Pictures of what benchmarks found, from their JSON objects: PNG files, one thought each.

goals.png      every goal and how far from it: 1 is the goal, right of it is better
peers.png      pings a second, ours and others'
sustained.png  lag and pings sent over time
latency.png    share of alerts whose first push was there after so many milliseconds
growth.png     cost of a ping by the size of the table
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loadtest.bench.report import GOALS

Found = Mapping[str, Any]
"""A report as `Report.as_json` gives it."""

INK, OURS, OTHERS, WRONG = "#1c2b3a", "#0b7a75", "#9aa5b1", "#c8553d"
SIZE_INCHES = (8.0, 4.5)
DPI = 120


class NoPlots(RuntimeError):
    """The library that draws is not installed."""


def draw(reports: Mapping[str, Found], folder: Path) -> list[Path]:
    """Draw whatever the reports (by benchmark) allow; returns the files. Raises NoPlots."""
    try:
        import matplotlib
    except ImportError:
        raise NoPlots("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    drawn = []
    for name, (needs, picture) in PICTURES.items():
        if needs in reports or (needs == "" and reports):
            figure, axes = _figure()
            picture(axes, reports if needs == "" else reports[needs])
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI)
            drawn.append(path)
    return drawn


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return figure, axes


def _goals(axes: Any, reports: Mapping[str, Found]) -> None:
    names: list[str] = []
    ratios: list[float] = []
    for (benchmark, key), goal in GOALS.items():
        value = reports.get(benchmark, {}).get(key)
        if not value:
            continue
        ratios.append(value / goal.at_least if goal.at_least is not None else (goal.at_most or 0.0) / value)
        names.append(f"{benchmark}: {key} {_short(value)} (goal {goal})")
    colors = [OURS if ratio >= 1 else WRONG for ratio in ratios]
    axes.barh(names, ratios, color=colors)
    axes.axvline(1.0, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("times as good as the goal")
    axes.tick_params(axis="y", labelsize=7)


def _peers(axes: Any, found: Found) -> None:
    rates = found["pings_per_s"]
    names = sorted(rates, key=lambda name: -float(rates[name]))
    bars = axes.barh(
        names, [rates[name] for name in names], color=[OURS if name.startswith("ours") else OTHERS for name in names]
    )
    axes.bar_label(bars, [_short(rates[name]) for name in names], padding=3)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("pings a second, the same pings and rings for all")


def _sustained(axes: Any, found: Found) -> None:
    lag = found["series"]["lag"]
    axes.plot(lag["at_s"], lag["lag_ms"], color=OURS)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("lag, ms")
    axes.set_title(f"{_short(found['pings_per_s'])} pings/s appended durably and matched", loc="left", color=INK)


def _latency(axes: Any, found: Found) -> None:
    values = sorted(found["series"]["latency"]["latency_ms"])
    axes.step(values, [(rank + 1) / len(values) * 100 for rank in range(len(values))], where="post", color=OURS)
    axes.set_xlim(left=0)
    axes.set_xlabel("publish to first push in a queue, ms")
    axes.set_ylabel("% of alerts")
    axes.set_title(f"while {_short(found['pings_per_s'])} pings/s flow in", loc="left", color=INK)


def _growth(axes: Any, found: Found) -> None:
    cost = found["series"]["cost"]
    axes.plot(cost["devices"], cost["ns_per_ping"], color=OURS, marker="o")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("devices in the table")
    axes.set_ylabel("ns a ping, one core")


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


PICTURES: dict[str, tuple[str, Callable[[Any, Any], None]]] = {
    "goals": ("", _goals),
    "peers": ("peers", _peers),
    "sustained": ("sustained", _sustained),
    "latency": ("latency", _latency),
    "growth": ("growth", _growth),
}
"""File name -> (benchmark it needs; all of them if empty, what draws it)."""
