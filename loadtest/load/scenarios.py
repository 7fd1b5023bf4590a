"""Scenarios by name: how many phones, at which rate, who is slow, what breaks, which alerts are published.

Times inside a run are parts of its length, so that the same scenario is ten seconds long in a test and hours at night.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["json", "ndjson", "columns", "log"]
"""How a partner sends pings: three kinds of HTTP body, or straight to the logs."""
FORMATS: tuple[Format, ...] = ("json", "ndjson", "columns", "log")


@dataclass(frozen=True, slots=True)
class Stream:
    """How one partner of the world sends its pings."""

    partner: str
    format: Format
    encoding: Literal["gzip", "zstd"] | None = None
    pings_each: int = 2_000
    """Of a request, on average: what has gathered since the last one."""


@dataclass(frozen=True, slots=True)
class Wave:
    """Alerts that are published one after the other, at moments drawn beforehand."""

    count: int
    at: float
    """Part of the run at which the first is due."""
    over: float
    """Part of the run within which all are."""
    over_s_max: float = float("inf")
    """Never longer than that: "50 alerts in a minute" stay 50 in a minute in an hour's run."""
    missing_h: float = 0.0
    """Hours that the child has been missing by then: what decides the first ring."""
    hour_at: float | None = None
    """Part of the run at which the child has been missing for exactly an hour, whenever the alert is published."""
    edited: float = 0.0
    """Share that is edited, a moment before the end is announced."""
    lasts: float = 0.4
    """Part of the run after which an alert is closed; all are, before the run ends."""
    in_densest: bool = False
    """At the place with most people around, not drawn by population."""


@dataclass(frozen=True, slots=True)
class Kill:
    """A process of the system that is killed (SIGKILL) and started again; only where the run has started it."""

    role: Literal["flow", "valkey", "gateway"]
    at: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """One named load. `pings_per_s` and `phones` are defaults for a laptop: options give others."""

    name: str
    about: str
    """One sentence for the list."""
    phones: int = 200_000
    pings_per_s: float = 40_000.0
    minutes: float = 1.5
    profile: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    """(part of the run, times the rate): straight lines between them."""
    streams: tuple[Stream, ...] = (
        Stream("amap", "columns", "zstd", 4_000),
        Stream("ditu", "json", "gzip", 1_000),
        Stream("chuxing", "ndjson", None, 1_000),
        Stream("xinwen", "columns", None, 4_000),
        Stream("zhifu", "log", None, 4_000),
        Stream("dianxin", "json", None, 500),
    )
    connections: int = 24
    """Requests that may be on their way at the same time, per worker."""
    waves: tuple[Wave, ...] = (Wave(8, 0.05, 0.55, edited=0.5, lasts=0.3),)
    slow_partners: tuple[str, ...] = ()
    """Their programs take few pushes at a time and think about each."""
    dying: float = 0.02
    """Share of deliveries after which a partner's program dies before it acknowledges: they come again in a minute."""
    dying_partners: tuple[str, ...] = ("chuxing",)
    operators: int = 2
    map_apps: int = 2
    in_one_city: bool = False
    """All phones live within 100 km of the densest place."""
    kills: tuple[Kill, ...] = ()


_ALL = (
    Scenario("steady", "An ordinary evening: pings at a constant rate, a few alerts, everybody reads."),
    Scenario(
        "rush-hour",
        "The rate doubles within a third of the run and falls again; alerts come meanwhile.",
        profile=((0.0, 0.5), (0.2, 0.6), (0.45, 2.0), (0.6, 2.0), (0.85, 0.7), (1.0, 0.5)),
        waves=(Wave(6, 0.2, 0.5, edited=0.5, lasts=0.25),),
    ),
    Scenario(
        "alert-storm",
        "50 alerts in a minute, half of them edited, all closed again.",
        pings_per_s=20_000.0,
        phones=100_000,
        minutes=2.0,
        waves=(Wave(50, 0.1, 0.6, over_s_max=60.0, edited=0.5, lasts=0.25),),
    ),
    Scenario(
        "big-city",
        "One ring over all phones of the world: every one lives within 100 km. At full size: --phones 30000000.",
        phones=500_000,
        waves=(Wave(1, 0.2, 0.0, lasts=0.5, in_densest=True),),
        in_one_city=True,
    ),
    Scenario(
        "growth-at-the-hour",
        "20 children have been missing for an hour at the same moment: 20 rings grow at once, from 100 to 200 km.",
        waves=(Wave(20, 0.05, 0.25, hour_at=0.6, lasts=0.9),),
    ),
    Scenario(
        "slow-partner",
        "The largest partner takes its pushes slowly and another one dies over them: nobody else may notice.",
        slow_partners=("amap",),
        dying=0.2,
        waves=(Wave(12, 0.05, 0.55, edited=0.5, lasts=0.3),),
    ),
    Scenario(
        "crash",
        "Flow, Valkey and gateway are killed while alerts are open and pings come in.",
        pings_per_s=20_000.0,
        minutes=2.0,
        waves=(Wave(12, 0.05, 0.6, edited=0.5, lasts=0.3),),
        kills=(Kill("flow", 0.25), Kill("valkey", 0.45), Kill("gateway", 0.65)),
    ),
    Scenario(
        "soak",
        "Hours at a moderate rate, an alert every now and then: what leaks, shows.",
        pings_per_s=20_000.0,
        minutes=8 * 60.0,
        waves=(Wave(96, 0.01, 0.9, edited=0.3, lasts=0.05),),
    ),
)
SCENARIOS = {scenario.name: scenario for scenario in _ALL}

assert len(SCENARIOS) == len(_ALL), "names are unique"


def scenario_called(name: str) -> Scenario:
    """Raises ValueError with the names there are."""
    found = SCENARIOS.get(name)
    if found is None:
        raise ValueError(f"scenario must be one of {', '.join(SCENARIOS)}, got {name!r}")
    return found
