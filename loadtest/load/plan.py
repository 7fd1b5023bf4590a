"""When things are due: rates by time, steps upwards, moments of officers' actions. All drawn before the run begins.

Nothing here depends on how the deployment answers, which is what keeps the load open-loop: whatever is slow is asked
again and again at the moments that were drawn, and its slowness counts.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from loadtest.load.scenarios import Wave

WARM_UP_PART = 0.05
WARM_UP_S_MAX = 10.0
"""At the beginning of a run caches fill and connections open: not counted in its figures, but drawn in its plots."""
END_PART = 0.93
"""By then every alert is closed, so that its end reaches everybody within the run."""


@dataclass(frozen=True, slots=True)
class Stepping:
    """Upwards from `from_per_s`, by `factor` every `step_s`, until something breaks."""

    from_per_s: float
    factor: float = 1.25
    step_s: float = 15.0
    steps_max: int = 20

    def __post_init__(self) -> None:
        for name, value, holds in (
            ("from_per_s", self.from_per_s, self.from_per_s > 0),
            ("factor", self.factor, self.factor > 1),
            ("step_s", self.step_s, self.step_s >= 1),
            ("steps_max", self.steps_max, 1 <= self.steps_max <= 200),
        ):
            if not holds:
                raise ValueError(f"stepping: {name} cannot be {value:g}")

    @property
    def seconds(self) -> float:
        return self.step_s * self.steps_max

    def step_at(self, at_s: float) -> int:
        """Which step it is."""
        return max(0, min(self.steps_max - 1, int(at_s / self.step_s)))

    def rate(self, step: int) -> float:
        """Pings a second."""
        return self.from_per_s * self.factor**step


@dataclass(frozen=True, slots=True)
class RatePlan:
    """Pings a second over time: straight lines through (seconds, rate)."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of_profile(cls, profile: tuple[tuple[float, float], ...], pings_per_s: float, seconds: float) -> RatePlan:
        return cls(tuple((part * seconds, times * pings_per_s) for part, times in profile))

    @classmethod
    def of_steps(cls, stepping: Stepping) -> RatePlan:
        """A staircase, whose risers take no time."""
        points: list[tuple[float, float]] = []
        for step in range(stepping.steps_max):
            points += [
                (step * stepping.step_s, stepping.rate(step)),
                ((step + 1) * stepping.step_s, stepping.rate(step)),
            ]
        return cls(tuple(points))

    def rate_at(self, at_s: float) -> float:
        """On a riser: behind it."""
        index = bisect_right([point[0] for point in self.points], at_s)
        if index == 0 or index == len(self.points):
            return self.points[min(index, len(self.points) - 1)][1]
        (left_s, left), (right_s, right) = self.points[index - 1], self.points[index]
        return left + (right - left) * (at_s - left_s) / (right_s - left_s)

    def pings_until(self, at_s: float) -> float:
        """Pings due from the beginning on: the area under the lines."""
        total, last_s, last = 0.0, 0.0, self.points[0][1]
        for point_s, rate in (*self.points, (float("inf"), self.points[-1][1])):
            if point_s >= at_s:
                return total + (at_s - last_s) * (last + self._limit_at(at_s, last_s, last, point_s, rate)) / 2
            total += (point_s - last_s) * (last + rate) / 2
            last_s, last = point_s, rate
        raise AssertionError("the last point lies at infinity")

    @staticmethod
    def _limit_at(at_s: float, left_s: float, left: float, right_s: float, right: float) -> float:
        """The rate just before `at_s` on one line."""
        if right_s == float("inf") or right_s == left_s:
            return left if right_s == left_s else right
        return left + (right - left) * (at_s - left_s) / (right_s - left_s)


@dataclass(frozen=True, slots=True)
class Action:
    """Something an officer does. `number` tells alerts of one run apart."""

    due_s: float
    kind: Literal["publish", "edit", "close"]
    number: int
    wave: int
    missing_since_s: float
    """On the run's own clock; negative: before it began."""
    in_densest: bool


def actions_of(waves: tuple[Wave, ...], seconds: float, seed: int) -> list[Action]:
    """Everything officers do in a run of such length, by due time."""
    chance = random.Random(seed)
    actions: list[Action] = []
    number = 0
    for wave_index, wave in enumerate(waves):
        first_s = wave.at * seconds
        over_s = min(wave.over * seconds, wave.over_s_max)
        moments = sorted(chance.uniform(0.0, over_s) for _ in range(wave.count))
        for order, moment_s in enumerate(moments):
            due_s = first_s + moment_s
            close_s = min(due_s + wave.lasts * seconds, END_PART * seconds)
            missing_s = due_s - wave.missing_h * 3600 if wave.hour_at is None else wave.hour_at * seconds - 3600
            is_edited = int((order + 1) * wave.edited) > int(order * wave.edited)
            for kind, at_s, wanted in (
                ("publish", due_s, True),
                ("edit", due_s + 0.6 * (close_s - due_s), is_edited),
                ("close", close_s, True),
            ):
                if wanted:
                    actions.append(Action(at_s, kind, number, wave_index, missing_s, wave.in_densest))  # type: ignore[arg-type]
            number += 1
    return sorted(actions, key=lambda action: action.due_s)


def arrivals(chance: random.Random, per_s: float, from_s: float, until_s: float) -> list[float]:
    """Moments of a Poisson process."""
    found: list[float] = []
    at_s = from_s + chance.expovariate(per_s)
    while at_s < until_s:
        found.append(at_s)
        at_s += chance.expovariate(per_s)
    return found


def warm_up_s(seconds: float) -> float:
    """How much of the beginning is not counted."""
    return min(WARM_UP_PART * seconds, WARM_UP_S_MAX)


assert all(left < right for left, right in pairwise((0.0, WARM_UP_PART, END_PART, 1.0)))
