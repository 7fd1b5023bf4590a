"""One run, as it travels: what the options make of a scenario. Plain values only, so that workers get it as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loadtest.load.plan import Action, RatePlan, Stepping, actions_of, warm_up_s
from loadtest.load.scenarios import FORMATS, Format, Scenario, scenario_called

SECONDS_MIN = 2.0


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A scenario with everything decided."""

    scenario: str
    phones: int
    pings_per_s: float
    seconds: float
    seed: int = 1
    world: str = "life"
    """Key of `loadtest.load.sources.WORLDS`; with `pings_file` that file's pings instead."""
    pings_file: str | None = None
    warp: float = 1.0
    """How many times faster than recorded a file is replayed."""
    stepping: Stepping | None = None
    format: Format | None = None
    """How every partner sends; None: as the scenario says."""
    direct: bool = True
    """Write to the logs where the scenario says so; False, or no Valkey: those partners send columns."""

    def __post_init__(self) -> None:
        scenario_called(self.scenario)
        for name, holds, wanted in (
            ("phones", self.phones >= 1, "at least 1"),
            ("pings_per_s", self.pings_per_s > 0, "above 0"),
            ("seconds", self.seconds >= SECONDS_MIN, f"at least {SECONDS_MIN:g}"),
            ("warp", self.warp > 0, "above 0"),
            ("format", self.format is None or self.format in FORMATS, f"one of {', '.join(FORMATS)}"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    @classmethod
    def of(
        cls,
        name: str,
        phones: int | None = None,
        pings_per_s: float | None = None,
        minutes: float | None = None,
        stepping: Stepping | None = None,
        **more: Any,
    ) -> RunSpec:
        """What was not given is the scenario's. Raises ValueError."""
        scenario = scenario_called(name)
        seconds = (scenario.minutes if minutes is None else minutes) * 60
        return cls(
            name,
            scenario.phones if phones is None else phones,
            scenario.pings_per_s if pings_per_s is None else pings_per_s,
            stepping.seconds if stepping is not None else seconds,
            stepping=stepping,
            **more,
        )

    @property
    def plays(self) -> Scenario:
        return scenario_called(self.scenario)

    @property
    def rates(self) -> RatePlan:
        if self.stepping is not None:
            return RatePlan.of_steps(self.stepping)
        return RatePlan.of_profile(self.plays.profile, self.pings_per_s, self.seconds)

    @property
    def warm_up_s(self) -> float:
        return warm_up_s(self.seconds)

    def actions(self) -> list[Action]:
        return actions_of(self.plays.waves, self.seconds, self.seed)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RunSpec:
        stepping = fields.get("stepping")
        return cls(**{**fields, "stepping": None if stepping is None else Stepping(**stepping)})
