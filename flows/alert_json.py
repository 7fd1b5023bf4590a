"""Alert events as people write them: JSON in, checked entries out, with errors that say what to change.

    {"at": TIME, "event": "publish" | "update",
     "alert": {"alert_id", "location": {"lat", "lng"}, "missing_since": TIME, ...}}
    {"at": TIME, "event": "close", "alert_id", "outcome": "found" | "false_report" | "cancelled"}

TIME: an integer, ms since 1970 (UTC), or ISO 8601 text; without an offset it is UTC. Locations: degrees, WGS-84.
An alert may also say `schedule` ([[hours, km], ..., [null, km]]), `expires_at`, `status`, `audience`, `revision`, and
its words (`CONTENT_FIELDS`), which never travel through the matcher. A field with any other name is refused: a typo in
`expires_at` must not become an alert that expires when nobody meant it to.

An update says what changes: a field it leaves out stays as it is, and null means the default again. In a file, an
update that names location and missing_since is a complete revision: what it leaves out is at its default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, cast

from geoindex.entries import (
    DEFAULT_EXPIRY_MS,
    DEFAULT_SCHEDULE,
    OUTCOMES,
    STATUSES,
    Alert,
    AlertClose,
    AlertRevision,
    Schedule,
    Settings,
)
from geoindex.rings import check_schedule

ALERT_ID_CHARS_MAX = 64
PARTNER_NAME_BYTES_MAX = 64
SCHEDULE_STEPS_MAX = 64
TIME_MS_MAX = 253_402_300_800_000
"""The year 10000: beyond it, ISO 8601 and most clients end."""
REVISION_MAX = (1 << 53) - 1
"""The largest integer that every JSON reader keeps exact (RFC 8259, section 6)."""

CONTENT_FIELDS = ("headline", "description", "instruction", "contact", "web", "photo_url")
"""The words and the picture of an alert, named as in CAP 1.2 (`photo_url`: the uri of its resource)."""
CONTENT_CHARS_MAX = 4000

_ALERT_FIELDS = (
    "alert_id",
    "revision",
    "location",
    "missing_since",
    "schedule",
    "expires_at",
    "status",
    "audience",
    *CONTENT_FIELDS,
)
_WHOLE_NUMBER = re.compile(r"-?[0-9]+")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Changes = Mapping[str, Any]
"""What an edit changes: names and values of `entries.Alert` fields; None means the default again."""


class AlertRefused(ValueError):
    """An alert event that must not go on. The message says where it came from, which alert, and what is wrong."""


# --- checks shared with the wire and the desk -------------------------------------------------------------------------


def check_alert_id(alert_id: object) -> str:
    """The id itself: text of 1 to 64 characters, none of them a control character. Raises ValueError."""
    if not isinstance(alert_id, str):
        raise ValueError(f"alert_id must be text, got {_brief(alert_id)}")
    if not 1 <= len(alert_id) <= ALERT_ID_CHARS_MAX:
        raise ValueError(f"alert_id must have 1 to {ALERT_ID_CHARS_MAX} characters, got {len(alert_id)}")
    if not alert_id.isprintable():
        raise ValueError(f"alert_id must not contain control characters, got {alert_id!r}")
    return alert_id


def check_partner_name(name: object) -> str:
    """The name itself: 1 to 64 bytes of UTF-8, as in recordings. Raises ValueError."""
    if not isinstance(name, str):
        raise ValueError(f"a partner's name must be text, got {_brief(name)}")
    try:
        size_bytes = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"a partner's name must be UTF-8, got {_brief(name)}") from None
    if not 1 <= size_bytes <= PARTNER_NAME_BYTES_MAX:
        raise ValueError(f"a partner's name must have 1 to {PARTNER_NAME_BYTES_MAX} bytes, got {size_bytes}")
    return name


def check_alert(alert: Alert) -> None:
    """Every rule that one revision can be held to by itself. Raises ValueError with the reason."""
    check_alert_id(alert.alert_id)
    if not 1 <= alert.revision <= REVISION_MAX:
        raise ValueError(f"revision must be 1 or more, got {alert.revision}")
    for name, degrees, most in (("lat", alert.lat, 90), ("lng", alert.lng, 180)):
        if not abs(degrees) <= most:  # NaN too
            raise ValueError(f"{name} must be from -{most} to {most} degrees, got {degrees}")
    for name, time_ms in (("missing_since", alert.missing_since_ms), ("expires_at", alert.expires_at_ms)):
        if abs(time_ms) > TIME_MS_MAX:
            raise ValueError(f"{name} must be in ms since 1970 and before the year 10000, got {time_ms}")
    if len(alert.schedule) > SCHEDULE_STEPS_MAX:
        raise ValueError(f"schedule must have at most {SCHEDULE_STEPS_MAX} steps, got {len(alert.schedule)}")
    try:
        check_schedule(alert.schedule, "alert")
    except ValueError as error:
        raise ValueError(str(error).removeprefix("alert: ")) from None
    if alert.expires_at_ms <= alert.missing_since_ms:
        raise ValueError(
            f"expires_at must be after missing_since, got {alert.expires_at_ms} and {alert.missing_since_ms}"
        )
    if alert.status not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {_brief(alert.status)}")
    if alert.audience is not None:
        if not alert.audience:
            raise ValueError("audience must name a partner; leave it out to reach all of them")
        for name in alert.audience:
            check_partner_name(name)
        if len(set(alert.audience)) != len(alert.audience):
            raise ValueError("audience must not name a partner twice")
    elif alert.status == "exercise":
        raise ValueError("an exercise must name its partners in audience")


def check_outcome(outcome: object) -> str:
    """The outcome itself: one of `entries.OUTCOMES`. Raises ValueError."""
    if not isinstance(outcome, str) or outcome not in OUTCOMES:
        raise ValueError(f"outcome must be one of {', '.join(OUTCOMES)}, got {_brief(outcome)}")
    return outcome


def merge_alert(known: Alert, changes: Changes, revision: int, default_schedule: Schedule = DEFAULT_SCHEDULE) -> Alert:
    """The known revision with what an edit changes: a complete, checked new one.

    An expiry that stood at its default follows `missing_since_ms`, unless the edit sets it. Raises ValueError.
    """
    values = dict(changes)
    if "schedule" in values and values["schedule"] is None:
        values["schedule"] = default_schedule
    if values.get("status", known.status) is None:
        values["status"] = STATUSES[0]
    was_default = known.expires_at_ms == known.missing_since_ms + DEFAULT_EXPIRY_MS
    if ("expires_at_ms" not in values and was_default) or values.get("expires_at_ms", 0) is None:
        values["expires_at_ms"] = values.get("missing_since_ms", known.missing_since_ms) + DEFAULT_EXPIRY_MS
    alert = replace(known, **values, revision=revision)
    if alert.alert_id != known.alert_id:
        raise ValueError(f"an alert's id never changes, got {alert.alert_id!r} for {known.alert_id!r}")
    if alert.status != known.status:
        raise ValueError(f"status never changes: it is {known.status}, got {_brief(alert.status)}")
    check_alert(alert)
    return alert


def event_time_ms(value: object, name: str) -> int:
    """Epoch ms, as a number or as text, or ISO 8601 -> ms since 1970 (UTC); what is below a ms is cut off.

    Raises ValueError.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value) and len(value) <= 20:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > TIME_MS_MAX:
            raise ValueError(f"{name} must be in ms since 1970 and before the year 10000, got {_brief(value)}")
        return value
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            moment = None
        if moment is not None:
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=UTC)
            since = moment - _EPOCH
            return (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000
    raise ValueError(f"{name} must be ms since 1970 or an ISO 8601 time, got {_brief(value)}")


# --- an alert's own object --------------------------------------------------------------------------------------------


def parse_alert(words: object, where: str, default_schedule: Schedule = DEFAULT_SCHEDULE) -> Alert:
    """A whole alert, as published; revision 1 unless it says another.

    `where`: what error messages begin with, say "alerts.jsonl:3". Raises AlertRefused.
    """
    fields = _alert_object(words, where)
    try:
        for name in ("location", "missing_since"):
            if fields.get(name) is None:
                raise ValueError(f"{name} is missing")
        changes = _alert_changes(fields)
        missing_since_ms = changes["missing_since_ms"]
        expires_at_ms, schedule, status = (changes.get(name) for name in ("expires_at_ms", "schedule", "status"))
        alert = Alert(
            alert_id=fields["alert_id"],
            revision=_revision(fields) or 1,
            lat=changes["lat"],
            lng=changes["lng"],
            missing_since_ms=missing_since_ms,
            schedule=default_schedule if schedule is None else schedule,
            expires_at_ms=missing_since_ms + DEFAULT_EXPIRY_MS if expires_at_ms is None else expires_at_ms,
            status=STATUSES[0] if status is None else status,
            audience=changes.get("audience"),
        )
        check_alert(alert)
        parse_content(fields)
    except ValueError as error:
        raise _refused(where, fields["alert_id"], error) from None
    return alert


def parse_changes(words: object, where: str) -> tuple[str, int | None, dict[str, Any]]:
    """An edit as people write it -> (alert id, revision or None, changes for `merge_alert`). Raises AlertRefused."""
    fields = _alert_object(words, where)
    try:
        parse_content(fields)
        return fields["alert_id"], _revision(fields), _alert_changes(fields)
    except ValueError as error:
        raise _refused(where, fields["alert_id"], error) from None


def parse_content(words: Mapping[str, object]) -> dict[str, str]:
    """The words and the picture of an alert, of all its fields. Raises ValueError."""
    content: dict[str, str] = {}
    for name in CONTENT_FIELDS:
        text = words.get(name)
        if text is None:
            continue
        if not isinstance(text, str) or len(text) > CONTENT_CHARS_MAX:
            raise ValueError(f"{name} must be text of at most {CONTENT_CHARS_MAX} characters")
        content[name] = text
    return content


def alert_to_json(alert: Alert) -> dict[str, object]:
    """The object that `parse_alert` reads back as the same alert. Times in ms since 1970."""
    return {
        "alert_id": alert.alert_id,
        "revision": alert.revision,
        "location": {"lat": alert.lat, "lng": alert.lng},
        "missing_since": alert.missing_since_ms,
        "schedule": [list(step) for step in alert.schedule],
        "expires_at": alert.expires_at_ms,
        "status": alert.status,
        "audience": None if alert.audience is None else list(alert.audience),
    }


def _alert_object(words: object, where: str) -> dict[str, Any]:
    """The alert's fields: an object with an id and with no field that we do not know."""
    if not isinstance(words, dict):
        raise AlertRefused(f"{where}: alert must be an object, got {_brief(words)}")
    fields = cast(dict[str, Any], words)
    try:
        alert_id = check_alert_id(fields.get("alert_id"))
    except ValueError as error:
        raise AlertRefused(f"{where}: {error}") from None
    unknown = [name for name in fields if name not in _ALERT_FIELDS]
    if unknown:
        raise _refused(where, alert_id, f"unknown field {_brief(unknown[0])}; known are {', '.join(_ALERT_FIELDS)}")
    return fields


def _alert_changes(fields: dict[str, Any]) -> dict[str, Any]:
    """What the object says, by names of `Alert` fields; null as None where there is a default. Raises ValueError."""
    changes: dict[str, Any] = {}
    if "location" in fields:
        location = fields["location"]
        if not isinstance(location, dict) or location.keys() != {"lat", "lng"}:
            raise ValueError('location must be {"lat": degrees, "lng": degrees}')
        changes["lat"] = _number(location["lat"], "lat")
        changes["lng"] = _number(location["lng"], "lng")
    if "missing_since" in fields:
        changes["missing_since_ms"] = event_time_ms(fields["missing_since"], "missing_since")
    if "expires_at" in fields:
        expires_at = fields["expires_at"]
        changes["expires_at_ms"] = None if expires_at is None else event_time_ms(expires_at, "expires_at")
    if "schedule" in fields:
        changes["schedule"] = None if fields["schedule"] is None else _schedule(fields["schedule"])
    if "status" in fields:
        status = fields["status"]
        if status is not None and not isinstance(status, str):
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {_brief(status)}")
        changes["status"] = status
    if "audience" in fields:
        audience = fields["audience"]
        if audience is not None and not isinstance(audience, list | tuple):
            raise ValueError(f"audience must be a list of partners, got {_brief(audience)}")
        changes["audience"] = None if audience is None else tuple(check_partner_name(name) for name in audience)
    return changes


def _schedule(steps: object) -> Schedule:
    if not isinstance(steps, list | tuple) or not all(
        isinstance(step, list | tuple) and len(step) == 2 for step in steps
    ):
        raise ValueError("schedule must be a list of [hours, km]")
    return tuple(
        (None if hours is None else _number(hours, "schedule hours"), _number(km, "schedule km")) for hours, km in steps
    )


def _revision(fields: Mapping[str, Any]) -> int | None:
    revision = fields.get("revision")
    if revision is None:
        return None
    if not isinstance(revision, int) or isinstance(revision, bool) or not 1 <= revision <= REVISION_MAX:
        raise ValueError(f"revision must be a whole number, 1 or more, got {_brief(revision)}")
    return revision


def _number(value: object, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {_brief(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {_brief(value)}")
    return number


def _refused(where: str, alert_id: str, reason: object) -> AlertRefused:
    return AlertRefused(f"{where}: alert {alert_id!r}: {reason}")


def _brief(value: object) -> str:
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 48 else text[:45] + "..."


# --- files of events --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class AlertFileState:
    """What a file of events has said so far. Feed it events as they happen: by `at`, then in file order."""

    known: dict[str, Alert] = field(default_factory=dict)
    """Newest revision of each alert that is open."""
    closed: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    """Events without effect, and why: worth telling, not worth refusing."""


def parse_alert_event(
    event: object, where: str, state: AlertFileState, settings: Settings, desk_id: tuple[int, int]
) -> AlertRevision | AlertClose | None:
    """One event of a file, checked against those before it; `state` is changed only if it is accepted.

    An update that names location and missing_since is a complete revision; one that leaves either out changes only what
    it names. Revisions: a publish without one gets 1, an update without one the known + 1. None for an event without
    effect (a revision not above the known one, an alert that is closed), which is noted in `state.notes`.
    `desk_id`: the event's place among the events, rising. `where`: what messages begin with, say "alerts.jsonl:3".
    Raises AlertRefused (a ValueError): malformed, an update or close of an alert never published, a change of status.
    """
    if not isinstance(event, dict):
        raise AlertRefused(f"{where}: an event must be an object, got {_brief(event)}")
    fields = cast(dict[str, Any], event)
    kind = fields.get("event")
    if kind not in ("publish", "update", "close"):
        raise AlertRefused(f"{where}: event must be publish, update or close, got {_brief(kind)}")
    known_fields = ("at", "event", "alert_id", "outcome", "revision") if kind == "close" else ("at", "event", "alert")
    unknown = [name for name in fields if name not in known_fields]
    if unknown:
        raise AlertRefused(
            f"{where}: unknown field {_brief(unknown[0])} of a {kind}; known are {', '.join(known_fields)}"
        )
    try:
        event_time_ms(fields.get("at"), "at")
    except ValueError as error:
        raise AlertRefused(f"{where}: {error}") from None
    if kind == "close":
        return _parse_close(fields, where, state, desk_id)
    return _parse_revision(kind, fields.get("alert"), where, state, settings.default_schedule, desk_id)


def _parse_revision(
    kind: str, words: object, where: str, state: AlertFileState, default_schedule: Schedule, desk_id: tuple[int, int]
) -> AlertRevision | None:
    alert_id, revision, changes = parse_changes(words, where)
    known = state.known.get(alert_id)
    if alert_id in state.closed:
        state.notes.append(f"{where}: alert {alert_id!r}: this {kind} has no effect: the alert is closed")
        return None
    if kind == "publish":
        alert = parse_alert(words, where, default_schedule)
        if known is not None and alert.status != known.status:
            raise _refused(where, alert_id, f"status never changes: it is {known.status}, got {alert.status!r}")
    elif known is None:
        raise _refused(where, alert_id, "cannot be updated: it was never published")
    else:
        try:
            if "lat" in changes and "missing_since_ms" in changes:
                # Complete: what it does not name is at its default, but for the status, which never changes.
                alert = parse_alert({"status": known.status, **cast(dict[str, Any], words)}, where, default_schedule)
                if alert.status != known.status:
                    raise ValueError(f"status never changes: it is {known.status}, got {alert.status!r}")
                alert = replace(alert, revision=revision or known.revision + 1)
            else:
                alert = merge_alert(known, changes, revision or known.revision + 1, default_schedule)
        except AlertRefused:
            raise
        except ValueError as error:
            raise _refused(where, alert_id, error) from None
    if known is not None and alert.revision <= known.revision:
        state.notes.append(
            f"{where}: alert {alert_id!r}: this {kind} has no effect: "
            f"revision {alert.revision} is not above {known.revision}"
        )
        return None
    state.known[alert_id] = alert
    return AlertRevision(kind, alert, desk_id)


def _parse_close(
    fields: Mapping[str, Any], where: str, state: AlertFileState, desk_id: tuple[int, int]
) -> AlertClose | None:
    try:
        alert_id = check_alert_id(fields.get("alert_id"))
    except ValueError as error:
        raise AlertRefused(f"{where}: {error}") from None
    try:
        revision = _revision(fields)
        outcome = check_outcome(fields.get("outcome"))
    except ValueError as error:
        raise _refused(where, alert_id, error) from None
    known = state.known.get(alert_id)
    if alert_id in state.closed:
        state.notes.append(f"{where}: alert {alert_id!r}: this close has no effect: the alert is closed already")
        return None
    if known is None:
        raise _refused(where, alert_id, "cannot be closed: it was never published")
    if revision is not None and revision <= known.revision:
        state.notes.append(
            f"{where}: alert {alert_id!r}: this close has no effect: revision {revision} is not above {known.revision}"
        )
        return None
    del state.known[alert_id]
    state.closed.add(alert_id)
    return AlertClose(alert_id, revision, outcome, desk_id)
