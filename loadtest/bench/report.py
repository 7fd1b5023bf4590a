"""What a benchmark found: one JSON object whose keys carry their units, one table, and the goals beside it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

Say = Callable[[str], None]
"""Told what is being done, for a person who waits."""

Number = int | float
Value = Number | str | bool | list[float] | list[int] | dict[str, float] | dict[str, int] | None


@dataclass(frozen=True, slots=True)
class Goal:
    """What a number must reach. Meant for the full size: `devices` at least."""

    at_least: float | None = None
    at_most: float | None = None
    devices: int = 0

    def is_met(self, value: Number) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        return f">= {self.at_least:,}" if self.at_least is not None else f"<= {self.at_most:,}"


GOALS: dict[tuple[str, str], Goal] = {
    ("kernel", "pings_per_s_per_core"): Goal(at_least=20_000_000, devices=10_000_000),
    ("flow", "pings_per_s"): Goal(at_least=10_000_000, devices=10_000_000),
    ("sustained", "pings_per_s"): Goal(at_least=4_000_000, devices=10_000_000),
    ("growth", "cost_ratio"): Goal(at_most=2.5, devices=100_000_000),
    ("growth", "scan_seconds"): Goal(at_most=0.5, devices=100_000_000),
    ("memory", "bytes_per_device"): Goal(at_most=80, devices=100_000_000),
    ("fanout", "seconds"): Goal(at_most=2.0, devices=10_000_000),
    ("fanout", "ids_per_s"): Goal(at_least=5_000_000, devices=10_000_000),
    ("latency", "p99_ms"): Goal(at_most=50),
    ("checkpoint", "write_seconds"): Goal(at_most=10.0, devices=10_000_000),
    ("checkpoint", "load_seconds"): Goal(at_most=5.0, devices=10_000_000),
    ("checkpoint", "stop_ms_max"): Goal(at_most=50.0, devices=10_000_000),
    ("recovery", "seconds"): Goal(at_most=15.0, devices=10_000_000),
    ("coldstart", "seconds"): Goal(at_most=3.0),
    ("idle", "cpu_share"): Goal(at_most=0.03),
    ("audit", "pings_per_s"): Goal(at_least=500_000, devices=100_000),
    ("view", "view_cpu_percent"): Goal(at_most=2.0, devices=10_000_000),
    ("gateway", "json_pings_per_s"): Goal(at_least=250_000, devices=100_000),
    ("gateway", "columns_pings_per_s"): Goal(at_least=3_000_000, devices=100_000),
    ("gateway", "gcj02_error_m_max"): Goal(at_most=0.1),
    ("gateway", "bd09_error_m_max"): Goal(at_most=0.1),
    ("figures", "stop_ms_max"): Goal(at_most=5.0, devices=10_000_000),
    ("figures", "cpu_share_of_density"): Goal(at_most=0.005, devices=10_000_000),
    ("peers", "min_ratio"): Goal(at_least=50),
}


@dataclass(slots=True)
class Report:
    """One run of one benchmark.

    `values`: conditions and results, by names that end in a unit where there is one. `series`: columns over time or
    size, for plots. `notes`: what a reader of the numbers must know. `faults`: what the verification found wrong.
    """

    benchmark: str
    values: dict[str, Value] = field(default_factory=dict)
    series: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)

    @property
    def verified(self) -> bool:
        return not self.faults

    def expect(self, what: str, expected: object, got: object) -> None:
        """One check of the verification."""
        if expected != got:
            self.faults.append(f"{what}: expected {expected}, got {got}")

    def as_json(self) -> dict[str, object]:
        return {
            "benchmark": self.benchmark,
            **self.values,
            "verified": self.verified,
            "faults": self.faults,
            "notes": self.notes,
            "series": self.series,
            "duration_s": round(time.monotonic() - self.started_s, 1),
            "goals": {key: str(goal) for (benchmark, key), goal in GOALS.items() if benchmark == self.benchmark},
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            **machine_values(),
        }

    def print(self, console: Console) -> None:
        """The table, for a person."""
        table = Table(title=f"bench {self.benchmark}", title_justify="left", box=None, padding=(0, 3, 0, 0))
        table.add_column("measure")
        table.add_column("value", justify="right")
        table.add_column("goal", justify="right")
        for name, value in self.values.items():
            table.add_row(name, shown(value), self._goal_words(name, value))
        table.add_row("verified", "yes" if self.verified else "NO", "")
        console.print(table)
        for words in self.notes:
            console.print(f"- {words}", highlight=False, markup=False, soft_wrap=True)
        for words in self.faults:
            console.print(f"wrong: {words}", style="red", highlight=False, markup=False, soft_wrap=True)
        console.print(
            f"{machine_values()['machine']}; Python {platform.python_version()}", style="dim", highlight=False
        )

    def _goal_words(self, name: str, value: Value) -> str:
        goal = GOALS.get((self.benchmark, name))
        if goal is None or not isinstance(value, int | float):
            return ""
        devices = self.values.get("devices")
        if goal.devices and isinstance(devices, int) and devices < goal.devices:
            return f"{goal} at {goal.devices:,} devices"
        return f"{goal} {'met' if goal.is_met(value) else 'NOT met'}"


def goals_table(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every goal beside what was measured; `reports`: as `Report.as_json` gives them, by benchmark."""
    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("benchmark", "measure", "value", "goal", ""):
        table.add_column(name, justify="right" if name in ("value", "goal") else "left")
    for (benchmark, key), goal in GOALS.items():
        found = reports.get(benchmark, {})
        value = found.get(key)
        if not found.get("verified"):
            verdict = f"wrong: {'; '.join(found.get('faults', ['not run']))}"
        elif value is None:
            verdict = "not measured"
        elif found.get("devices", 0) < goal.devices:
            verdict = f"at {found['devices']:,} devices, the goal is for {goal.devices:,}"
        else:
            verdict = "met" if goal.is_met(value) else "NOT met"
        table.add_row(benchmark, key, "" if value is None else shown(value), str(goal), verdict)
    return table


def shown(value: Value) -> str:
    """A value for a person."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict):
        return " · ".join(f"{name} {shown(part)}" for name, part in value.items())
    return " ".join(shown(part) for part in value)


def machine_values() -> dict[str, object]:
    """The machine and the interpreter, for the record."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gib = round(psutil.virtual_memory().total / 2**30, 1)
    cpu = _cpu_model()
    kernel = f"{platform.system()} {platform.release()}"
    return {
        "machine": f"{cpu}, {cores} cores, {memory_gib} GiB, {kernel}",
        "machine_cpu": cpu,
        "machine_cores": cores,
        "machine_memory_gib": memory_gib,
        "machine_kernel": kernel,
        "python": platform.python_version(),
        "numba_cpu_name": os.environ.get("NUMBA_CPU_NAME", "host"),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    """The processor's name; on Linux with family and model, for clouds hide the rest of the name."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
