"""`thresholds.toml`, read: what a run must not exceed, and what ends a stepping run. Each with its reason."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent.parent / "thresholds.toml"


@dataclass(frozen=True, slots=True)
class Threshold:
    """One value of a report, and what it must be."""

    name: str
    """Key of the report's `values`."""
    reason: str
    at_most: float | None = None
    at_least: float | None = None
    scenarios: tuple[str, ...] = ()
    """Only there; empty: everywhere."""
    not_in: tuple[str, ...] = ()

    def applies(self, scenario: str) -> bool:
        return scenario not in self.not_in and (not self.scenarios or scenario in self.scenarios)

    def is_met(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    def words(self) -> str:
        return f"≤ {self.at_most:g}" if self.at_most is not None else f"≥ {self.at_least:g}"


@dataclass(frozen=True, slots=True)
class Limit:
    """What a step may reach before it counts as broken."""

    name: str
    at_most: float
    gave_way: str
    """What has then given way."""
    reason: str


def read_thresholds(path: Path = PATH) -> tuple[list[Threshold], list[Limit]]:
    """Raises ValueError naming file, entry and fault; OSError."""
    try:
        found = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    thresholds = [_entry(path, Threshold, fields) for fields in found.get("threshold", [])]
    for threshold in thresholds:
        if (threshold.at_most is None) == (threshold.at_least is None):
            raise ValueError(f"{path}: {threshold.name}: either at_most or at_least, and not both")
    return thresholds, [_entry(path, Limit, fields) for fields in found.get("limit", [])]


def _entry(path: Path, kind: Any, fields: Mapping[str, Any]) -> Any:
    name = fields.get("name", "an entry without a name")
    if not str(fields.get("reason", "")).strip():
        raise ValueError(f"{path}: {name}: a threshold says its reason")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{path}: {name}: {error}") from None
