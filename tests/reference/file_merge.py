"""An offline run over files, the obvious way: merge by time, feed the `ReferenceMatcher`.

The clock, given one row after the other (malformed rows do not count in any way):

    with an `at` column       new = max(clock, at). Observed after new + tolerance: from the future, refused, the
                              clock stays. Else clock = new.
    without                   the first row sets the clock. Observed up to clock + tolerance: clock =
                              max(clock, observed_at). Later than that: from the future, refused, if any of the next
                              100 rows was observed by clock + tolerance; else the file has a gap: clock = observed_at.

Alert events are sorted by `at`, equal ones in file order. Those with `at` <= the new clock of an accepted ping come
before it; the others after the last ping.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from geoindex.entries import (
    DEFAULT_EXPIRY_MS,
    DEFAULT_SCHEDULE,
    Alert,
    AlertClose,
    AlertRevision,
    Settings,
)
from tests.reference.events import DEGREE_E7
from tests.reference.matcher import CLOCK_UNSET_MS, FROM_FUTURE, DevicePush, ReferenceMatcher

MALFORMED = "malformed"
LOOKAHEAD_ROWS = 100
DEFAULT_PARTNER = "default"

Row = Mapping[str, str | None]
AlertEvent = tuple[int, AlertRevision | AlertClose]

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WHOLE_NUMBER = re.compile(r"-?\d+", re.ASCII)


@dataclass(frozen=True, slots=True)
class PingRow:
    """A well-formed row; `at_ms` None: the file has no such column."""

    partner: str
    device_id: str
    lat: float
    lng: float
    observed_at_ms: int
    at_ms: int | None


@dataclass(frozen=True, slots=True)
class FileRun:
    """Pushes of a run over files; refused rows by reason (`malformed`, `from_future`, `too_old`)."""

    pushes: list[DevicePush]
    refused: Counter[str]


def reference_pushes(
    pings: Path | str | Sequence[Row], alert_events: Path | str | Sequence[AlertEvent], live_window_ms: int
) -> list[DevicePush]:
    """Every push of a run over a ping file and an alert file (paths, or rows and events already read)."""
    return reference_run(pings, alert_events, live_window_ms).pushes


def reference_run(
    pings: Path | str | Sequence[Row], alert_events: Path | str | Sequence[AlertEvent], live_window_ms: int
) -> FileRun:
    """As `reference_pushes`, with the counts of refused rows."""
    rows = read_ping_rows(pings) if isinstance(pings, Path | str) else list(pings)
    events = read_alert_events(alert_events) if isinstance(alert_events, Path | str) else list(alert_events)
    events.sort(key=lambda event: event[0])

    parsed = [parse_ping_row(row) for row in rows]
    well_formed = [ping for ping in parsed if ping is not None]
    partners = tuple(dict.fromkeys(ping.partner for ping in well_formed))
    settings = Settings(partners=partners, live_window_ms=live_window_ms)
    matcher = ReferenceMatcher(settings)
    matcher.refused[MALFORMED] = len(parsed) - len(well_formed)

    clock_ms = CLOCK_UNSET_MS
    for index, ping in enumerate(well_formed):
        following = well_formed[index + 1 : index + 1 + LOOKAHEAD_ROWS]
        new_clock_ms = clock_after(clock_ms, ping, following, settings.future_tolerance_ms)
        if new_clock_ms is None:
            matcher.refused[FROM_FUTURE] += 1
            continue
        clock_ms = new_clock_ms
        while events and events[0][0] <= clock_ms:
            matcher.feed(*events.pop(0))
        matcher.ping(clock_ms, ping.partner, ping.device_id, ping.lat, ping.lng, ping.observed_at_ms)
    for at_ms, event in events:
        matcher.feed(at_ms, event)
    return FileRun(matcher.pushes, +matcher.refused)


def clock_after(clock_ms: int, ping: PingRow, following: Iterable[PingRow], future_tolerance_ms: int) -> int | None:
    """The file's clock once a row was read; None: the row is from the future and moves nothing."""
    if ping.at_ms is not None:
        new_clock_ms = max(clock_ms, ping.at_ms)
        return None if ping.observed_at_ms > new_clock_ms + future_tolerance_ms else new_clock_ms
    latest_ms = clock_ms + future_tolerance_ms
    if clock_ms == CLOCK_UNSET_MS or ping.observed_at_ms <= latest_ms:
        return max(clock_ms, ping.observed_at_ms)
    if any(later.observed_at_ms <= latest_ms for later in following):
        return None
    return ping.observed_at_ms


def read_ping_rows(path: Path | str) -> list[Row]:
    """Rows of a CSV file by column name; gzip if `.gz`. Bytes that are not UTF-8 spoil their row only."""
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def parse_ping_row(row: Row) -> PingRow | None:
    """A row as numbers, or None if it is malformed. Location rounded to 1e-7 degree, as the log holds it."""
    try:
        device_id = row.get("device_id") or ""
        if not 1 <= len(device_id.encode("utf-8")) <= 64:
            return None
        partner = row.get("partner") or DEFAULT_PARTNER
        partner.encode("utf-8")
        lat, lng = _degrees(row.get("lat"), 90), _degrees(row.get("lng"), 180)
        at_ms = parse_time_ms(row["at"]) if "at" in row else None
        return PingRow(partner, device_id, lat, lng, parse_time_ms(row.get("observed_at")), at_ms)
    except ValueError:
        return None


def _degrees(text: str | None, limit: float) -> float:
    if text is None or not _NUMBER.fullmatch(text):
        raise ValueError(f"a coordinate must be a decimal number, got {text!r}")
    degrees = float(text)
    if not (math.isfinite(degrees) and abs(degrees) <= limit):
        raise ValueError(f"a coordinate must lie within {limit} degrees, got {text!r}")
    return round(degrees * DEGREE_E7) / DEGREE_E7


def parse_time_ms(time: str | int | None) -> int:
    """Epoch ms or ISO 8601 -> epoch ms; without an offset: UTC; what is below a millisecond is cut off."""
    if isinstance(time, int):
        return time
    if time is None:
        raise ValueError("a time is missing")
    if _WHOLE_NUMBER.fullmatch(time):
        time_ms = int(time)
        if abs(time_ms) >= 1 << 62:
            raise ValueError(f"a time must be an epoch in ms, got {time!r}")
        return time_ms
    moment = datetime.fromisoformat(time)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    since_1970 = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since_1970.days * 86_400 + since_1970.seconds) * 1000 + since_1970.microseconds // 1000


def read_alert_events(path: Path | str) -> list[AlertEvent]:
    """Alert events of a JSON-lines file, sorted by `at`. An event without revision has the one after the known one."""
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        lines: list[dict[str, Any]] = [json.loads(line) for line in file if line.strip()]
    lines.sort(key=lambda line: parse_time_ms(line["at"]))
    known: dict[str, int] = {}
    events: list[AlertEvent] = []
    for index, line in enumerate(lines):
        at_ms = parse_time_ms(line["at"])
        desk_id = (at_ms, index)
        if line["event"] == "close":
            events.append(
                (at_ms, AlertClose(line["alert_id"], line.get("revision"), line.get("outcome", "found"), desk_id))
            )
            continue
        alert = _alert_from_json(line["alert"], known)
        known[alert.alert_id] = max(alert.revision, known.get(alert.alert_id, 0))
        events.append((at_ms, AlertRevision(line["event"], alert, desk_id)))
    return events


def _alert_from_json(words: dict[str, Any], known: dict[str, int]) -> Alert:
    alert_id = words["alert_id"]
    missing_since_ms = parse_time_ms(words["missing_since"])
    expires_at = words.get("expires_at")
    schedule = words.get("schedule") or DEFAULT_SCHEDULE
    audience = words.get("audience")
    return Alert(
        alert_id=alert_id,
        revision=words.get("revision", known.get(alert_id, 0) + 1),
        lat=words["location"]["lat"],
        lng=words["location"]["lng"],
        missing_since_ms=missing_since_ms,
        schedule=tuple((hours, float(km)) for hours, km in schedule),
        expires_at_ms=missing_since_ms + DEFAULT_EXPIRY_MS if expires_at is None else parse_time_ms(expires_at),
        status=words.get("status", "actual"),
        audience=None if audience is None else tuple(audience),
    )
