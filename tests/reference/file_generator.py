"""Adversarial files for offline runs: a generated log as rows and lines, with bad rows strewn in."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np

from geoindex.entries import Alert, AlertClose, AlertRevision
from tests.reference.choices import Choices, from_numpy
from tests.reference.events import PingEvent
from tests.reference.file_merge import AlertEvent
from tests.reference.generator import MINUTE_MS, generate_log

BEIJING_TIME = timezone(timedelta(hours=8))
BAD_CELLS = [
    ("lat", "north"),
    ("lat", ""),
    ("lat", "nan"),
    ("lat", "90.0000001"),
    ("lng", "inf"),
    ("lng", "-180.0000001"),
    ("lng", "1e3"),
    ("device_id", ""),
    ("device_id", "x" * 65),
    ("device_id", "号" * 22),
    ("observed_at", ""),
    ("observed_at", "yesterday"),
    ("observed_at", "2023-02-30T00:00:00Z"),
]


@dataclass(frozen=True, slots=True)
class FileCase:
    """A ping file (rows by column name) and an alert file (events with their `at`, sorted)."""

    rows: list[dict[str, str]]
    alert_events: list[AlertEvent]
    live_window_ms: int


def generate_files(
    rng: np.random.Generator, *, with_at: bool, with_partner: bool = True, event_count: int = 400
) -> FileCase:
    """A log as files. Ids with control characters are left out, bad rows are strewn in, some `at` run backwards."""
    log = generate_log(rng, event_count=event_count)
    choices = from_numpy(rng)
    rows: list[dict[str, str]] = []
    alert_events: list[AlertEvent] = []
    for at_ms, event in log.events:
        if isinstance(event, PingEvent) and event.device_id.isprintable():
            row = {
                "device_id": event.device_id,
                "lat": f"{event.lat_e7 / 1e7:.7f}",
                "lng": f"{event.lng_e7 / 1e7:.7f}",
                "observed_at": _time(choices, event.observed_at_ms),
            }
            if with_partner:
                row["partner"] = event.partner_name
            if with_at:
                row["at"] = _time(choices, at_ms - choices.weighted([(9, 0), (1, choices.whole(1, 10 * MINUTE_MS))]))
            rows.append(row)
            if choices.one_in(15):
                rows.append(row | dict([choices.pick(BAD_CELLS)]))
        elif isinstance(event, AlertRevision | AlertClose):
            alert_events.append((at_ms, event))
    return FileCase(rows, alert_events, log.settings.live_window_ms)


def _time(choices: Choices, time_ms: int) -> str:
    """Epoch ms, or ISO 8601 in UTC or Beijing time."""
    form = choices.weighted([(3, "epoch"), (1, "utc"), (1, "beijing")])
    if form == "epoch":
        return str(time_ms)
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time_ms)
    if form == "utc":
        return moment.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"
    return moment.astimezone(BEIJING_TIME).isoformat(timespec="milliseconds")


def write_ping_file(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """CSV with the columns of the first row; gzip if the name ends in `.gz`."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_alert_file(path: Path, alert_events: Sequence[AlertEvent]) -> None:
    """JSON lines; every event says its revision, if it has one."""
    with path.open("w", encoding="utf-8") as file:
        for at_ms, event in alert_events:
            file.write(json.dumps(_alert_line(at_ms, event), ensure_ascii=False) + "\n")


def _alert_line(at_ms: int, event: AlertRevision | AlertClose) -> dict[str, object]:
    if isinstance(event, AlertClose):
        line: dict[str, object] = {
            "at": at_ms,
            "event": "close",
            "alert_id": event.alert_id,
            "outcome": event.outcome,
        }
        return line if event.revision is None else line | {"revision": event.revision}
    return {"at": at_ms, "event": event.event, "alert": _alert_words(event.alert)}


def _alert_words(alert: Alert) -> dict[str, object]:
    return {
        "alert_id": alert.alert_id,
        "revision": alert.revision,
        "location": {"lat": alert.lat, "lng": alert.lng},
        "missing_since": alert.missing_since_ms,
        "schedule": alert.schedule,
        "expires_at": alert.expires_at_ms,
        "status": alert.status,
        "audience": alert.audience,
    }
