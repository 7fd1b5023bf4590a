"""Stepping upwards: which step it is, which limit broke first, and which part of the system was busiest then."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from loadtest.load.histogram import merged
from loadtest.load.limits import Limit
from loadtest.load.plan import Stepping
from loadtest.load.recorder import Recorder
from loadtest.load.senders import LATE
from loadtest.load.watch import Sample

SETTLE_S = 3.0
"""Of a step that is not judged: what was on its way from the last one arrives."""
SEEN_AFTER_S = 3.0
"""What was due so long ago has been answered and told to the master, if all is well."""
GENERATOR = ("generator", "feeder")
MACHINE_BUSY = 0.92
"""Share of a machine's cores above which whatever runs on it waits for one."""
BUSY_CORES = 0.85
"""A single-threaded process that uses so much of a core has none to spare."""


@dataclass(slots=True)
class Step:
    """What was seen of one step."""

    number: int
    rate: float
    """Pings a second, asked for."""
    figures: dict[str, float] = field(default_factory=dict)
    cores: dict[str, float] = field(default_factory=dict)
    broke: list[str] = field(default_factory=list)
    """Names of limits, in the order of the file."""
    is_complete: bool = False


class Stepper:
    """One stepping run. `look` once a second."""

    def __init__(self, stepping: Stepping, limits: list[Limit]) -> None:
        self._stepping, self._limits = stepping, limits
        self.steps: list[Step] = [Step(0, stepping.rate(0))]

    @property
    def step(self) -> int:
        return self.steps[-1].number

    @property
    def rate(self) -> float:
        return self.steps[-1].rate

    @property
    def broken(self) -> Step | None:
        return self.steps[-1] if self.steps[-1].broke else None

    @property
    def held(self) -> Step | None:
        """The last step that was played to its end without a limit breaking."""
        whole = [step for step in self.steps if step.is_complete and not step.broke]
        return whole[-1] if whole else None

    def look(self, now_s: float, recorder: Recorder, samples: list[Sample]) -> bool:
        """Judge the step that it is; whether a limit broke."""
        number = self._stepping.step_at(now_s)
        if number != self.step:
            self.steps[-1].is_complete = True
            self.steps.append(Step(number, self._stepping.rate(number)))
        step = self.steps[-1]
        started_s = number * self._stepping.step_s
        if now_s - started_s < min(SETTLE_S + SEEN_AFTER_S, 0.6 * self._stepping.step_s):
            return False
        settle_s = min(SETTLE_S, 0.3 * self._stepping.step_s)
        step.figures = figures_of(started_s + settle_s, now_s, step.rate, recorder, samples)
        step.cores = cores_of([sample for sample in samples if sample["at_s"] >= started_s + settle_s], recorder)
        step.broke = [
            limit.name for limit in self._limits if step.figures.get(limit.name, float("-inf")) > limit.at_most
        ]
        return bool(step.broke)

    def finish(self) -> None:
        """The last step was played to its end, and nothing broke."""
        if not self.steps[-1].broke:
            self.steps[-1].is_complete = True

    def words(self) -> str:
        """What gave way first, and who was busiest."""
        step = self.broken
        if step is None:
            return "nothing gave way"
        (first, *others) = [limit for limit in self._limits if limit.name in step.broke]
        words = f"{first.gave_way} ({first.name} {step.figures[first.name]:,.4g}, limit {first.at_most:,g})"
        if others:
            words += "; then " + ", ".join(f"{limit.name} {step.figures[limit.name]:,.4g}" for limit in others)
        return words

    def to_json(self) -> dict[str, Any]:
        held, broken = self.held, self.broken
        return {
            "held_per_s": None if held is None else held.rate,
            "broken_per_s": None if broken is None else broken.rate,
            "gave_way": self.words(),
            "busiest": busiest(broken.cores) if broken is not None else "",
            "steps": [
                {
                    "number": step.number + 1,
                    "pings_per_s": step.rate,
                    "figures": step.figures,
                    "cores": step.cores,
                    "broke": step.broke,
                    "held": step.is_complete and not step.broke,
                }
                for step in self.steps
                if step.figures or step.is_complete
            ],
        }


def figures_of(from_s: float, now_s: float, rate: float, recorder: Recorder, samples: list[Sample]) -> dict[str, float]:
    """What the limits look at, of the part of a step that was played so far."""
    seen_s = max(from_s + 1, now_s - SEEN_AFTER_S)
    found: dict[str, float] = {}
    recent = [sample for sample in samples if sample["at_s"] >= max(from_s, now_s - 5)]
    if lags := [sample["lag_ms"] for sample in recent if "lag_ms" in sample]:
        found["lag_ms"] = float(median(lags))
    if shares := [memory_share(sample) for sample in recent if sample.get("server_memory_max")]:
        found["server_memory_share"] = max(shares)
    # Those that wait are in no histogram yet: pings that were due and are not accepted tell of them.
    due = recorder.counted("pings due", 0, seen_s)
    accepted = recorder.counted("pings accepted", 0, now_s + 1)
    found["behind_s"] = max(0.0, due - accepted) / rate
    sent = merged(recorder.between(name, from_s, seen_s) for name in ping_names(recorder))
    if (p99 := sent.percentile_ms(0.99)) is not None:
        found["request_p99_ms"] = p99
    refused = sum(recorder.failed(name, from_s, seen_s) for name in ping_names(recorder))
    if refused or len(sent):
        found["refused_share"] = refused / (refused + len(sent))
    if (late := recorder.between(LATE, from_s, seen_s).percentile_ms(0.99)) is not None:
        found["generator_late_ms"] = late
    return found


def ping_names(recorder: Recorder) -> list[str]:
    """Names under which pings are sent."""
    return [name for name in recorder.names() if name.startswith(("POST /v1/pings", "LOG "))]


def memory_share(sample: Sample) -> float:
    """Of the server's memory."""
    return float(sample["server_memory"]) / float(sample["server_memory_max"])


def cores_of(samples: list[Sample], recorder: Recorder) -> dict[str, float]:
    """Mean use of cores by role, the generator's own parts among them."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        for role, used in sample.get("cores", {}).items():
            found.setdefault(role, []).append(used)
        found.setdefault("machine", []).append(sample["machine_cores"])
    since_s = samples[0]["at_s"] if samples else 0.0
    workers = {load["worker"] for load in recorder.loads}
    for part, key in (("generator", "cores"), ("feeder", "feeder_cores")):
        if used := [load[key] for load in recorder.loads if load["at_s"] >= since_s]:
            found[part] = [fmean(used) * len(workers)]
    return {role: round(fmean(used), 3) for role, used in found.items()}


def busiest(cores: dict[str, float], machine_cores: int = os.cpu_count() or 1) -> str:
    """Roles without a core to spare, and whether the machine has none."""
    used = cores.get("machine", 0.0)
    ours = sum(cores.get(role, 0.0) for role in GENERATOR)
    machine = f"; {used:.1f} of the machine's {machine_cores} cores in use, {ours:.1f} of them by the generator"
    return _busiest_roles(cores) + (machine if used >= MACHINE_BUSY * machine_cores else "")


def _busiest_roles(cores: dict[str, float]) -> str:
    full = [
        f"{role} ({used:.2f} of a core)" for role, used in cores.items() if used >= BUSY_CORES and role != "machine"
    ]
    if full:
        return "no core to spare: " + ", ".join(full)
    most = sorted(((used, role) for role, used in cores.items() if role != "machine"), reverse=True)[:3]
    return "busiest: " + ", ".join(f"{role} {used:.2f} cores" for used, role in most) if most else ""
