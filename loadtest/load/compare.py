"""Two runs beside each other: what has changed, and whether that is better or worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

CHANGE_MIN = 0.05
"""Smaller changes are noise, and not marked."""
HIGHER_IS_BETTER = {"pings_per_s", "requests_per_s", "held_pings_per_s", "matched_pings_per_s"}
NEUTRAL = {
    "alerts",
    "audit_owed",
    "audit_pushes",
    "bytes_per_ping",
    "devices_live",
    "devices_told",
    "drain_s",
    "load_s",
    "phones_known",
    "pings_due_per_s",
}
"""What follows from the load alone."""


def read_report(path: Path) -> dict[str, Any]:
    """Raises ValueError saying what is wrong with the file."""
    try:
        found = orjson.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path}: must be a report of a load test: {error}") from None
    if not isinstance(found, dict) or "values" not in found or "scenario" not in found:
        raise ValueError(f"{path}: must be a report of a load test, with scenario and values")
    return found


def compared(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Row by row; `differs`: what makes the two runs no fair comparison."""
    rows = []
    for name in sorted(new["values"].keys() | old["values"].keys()):
        now, before = new["values"].get(name), old["values"].get(name)
        rows.append({"name": name, "old": before, "new": now, **_change(name, before, now)})
    differs = [
        f"{what}: {old_value} then, {new_value} now"
        for what, old_value, new_value in [
            ("scenario", old["scenario"], new["scenario"]),
            ("machine", old.get("machine"), new.get("machine")),
            *(
                (name, old["spec"].get(name), new["spec"].get(name))
                for name in ("phones", "pings_per_s", "seconds", "seed", "world", "pings_file")
            ),
        ]
        if old_value != new_value
    ]
    return {"old_at": old.get("at"), "new_at": new.get("at"), "rows": rows, "differs": differs}


def _change(name: str, before: float | None, now: float | None) -> dict[str, Any]:
    if before is None or now is None or before == 0:
        worse = before == 0 and now not in (None, 0) and name.startswith("audit_") and name not in NEUTRAL
        return {"change": None, "mark": "worse" if worse else ""}
    change = now / before - 1
    if name in NEUTRAL or abs(change) < CHANGE_MIN:
        mark = ""
    else:
        mark = "better" if (change > 0) == (name in HIGHER_IS_BETTER) else "worse"
    return {"change": change, "mark": mark}


def table(comparison: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [f"then {comparison['old_at']}, now {comparison['new_at']}"]
    lines += [f"  not the same: {words}" for words in comparison["differs"]]
    width = max((len(row["name"]) for row in comparison["rows"]), default=0)
    for row in comparison["rows"]:
        change = "" if row["change"] is None else f"{row['change']:+.1%}"
        lines.append(
            f"  {row['name']:{width}} {shown(row['old']):>14} {shown(row['new']):>14} {change:>9} {row['mark']}"
        )
    return "\n".join(lines)


def shown(value: float | None) -> str:
    """A value for a person."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
