"""What a CAP message asks of the alert desk: to publish, to edit, to close, or nothing at all; or why it is refused.

    status    Actual -> actual    Exercise -> exercise    Test, Draft, System -> looked at, never done
    msgType   Alert -> publish    Update -> update        Cancel -> close     Ack, Error -> refused

A message decides where (one circle), since when (onset) and until when (expires) a child is looked for, and says so in
words. How far the ring reaches is the platform's own schedule, not the circle's radius, unless the message brings a
schedule of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import orjson

from flows.alert_json import check_partner_name, parse_changes
from gateway.cap_alerts import (
    CHILD_PARAMETERS,
    EVENT_CODE,
    PLACE_PARAMETER,
    SCHEDULE_PARAMETER,
    TEXT_PARAMETER,
    AlertWords,
)
from gateway.cap_messages import CapInfo, CapMessage, Circle, Reference, cap_time
from gateway.cap_xml import CapRefused, brief
from geoindex.entries import OUTCOMES, Schedule
from geoindex.rings import check_schedule

AHEAD_MS_MAX = 5 * 60_000
"""A sender's clock may be so far ahead, as a phone's may (matching rule 2)."""
OUTCOME_PARAMETER = "tuanyuan:outcome"
"""Of a Cancel: how the search ended. CAP has no element for it."""
CATEGORY_PARAMETER = "tuanyuan:category"
"""Of a Cancel with the outcome found: the category of the Ministry's statistics."""
DIVISION_GEOCODE = "GB/T 2260"
"""valueName of the geocode that holds an administrative division code."""

_STATUSES = {"Actual": "actual", "Exercise": "exercise"}
_HEADLINE_CHARS_MAX = 160
_PLACE_CHARS_MAX = 200
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class CapOrder:
    """What is to be done. Times in ms since 1970; None: the message does not say."""

    action: Literal["publish", "update", "close"]
    only_checked: bool
    """Test, Draft, System: nothing is done, and nobody is told."""
    status: str = "actual"
    references: tuple[Reference, ...] = ()
    """Which alert to edit or close: any message about it."""
    circle: Circle | None = None
    missing_since_ms: int | None = None
    expires_at_ms: int | None = None
    schedule: Schedule | None = None
    audience: tuple[str, ...] | None = None
    words: AlertWords = field(default_factory=AlertWords)
    division: str | None = None
    outcome: str = "cancelled"
    category: str | None = None
    notes: tuple[str, ...] = ()
    """What of the message was not used, for the sender to know."""


def message_digest(reference: Reference) -> str:
    """One name for a message, wherever it is named: 32 hex digits of what makes it unique."""
    text = f"{reference.sender},{reference.identifier},{reference.sent_ms}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_order(message: CapMessage, now_ms: int) -> CapOrder:
    """What a message asks for. Raises CapRefused."""
    if message.kind not in ("Alert", "Update", "Cancel"):
        raise _refused("msgType", "Alert, Update or Cancel", message.kind)
    if message.sent_ms > now_ms + AHEAD_MS_MAX:
        raise _refused("sent", f"a time up to now, {cap_time(now_ms)}", cap_time(message.sent_ms))
    if message.kind == "Alert" and message.references:
        raise _refused(
            "references", "none in an Alert: an Update continues another message", f"{len(message.references)}"
        )
    if message.kind != "Alert" and not message.references:
        raise _refused("references", f"the messages that this {message.kind} is about, sender,identifier,sent", "none")
    only_checked = message.status not in _STATUSES
    if message.kind == "Cancel":
        return _close(message, only_checked)
    return _revision(message, only_checked, now_ms)


def _refused(element: str, expected: str, came: str) -> CapRefused:
    return CapRefused("meaning", element, expected, came)


def _close(message: CapMessage, only_checked: bool) -> CapOrder:
    outcome = _parameter(message.infos, OUTCOME_PARAMETER) or "cancelled"
    if outcome not in OUTCOMES:
        raise _refused("info/parameter", f"{OUTCOME_PARAMETER} to be one of {', '.join(OUTCOMES)}", brief(outcome))
    category = _parameter(message.infos, CATEGORY_PARAMETER)
    return CapOrder(
        "close",
        only_checked,
        status=_STATUSES.get(message.status, "actual"),
        references=message.references,
        outcome=outcome,
        category=category,
    )


def _revision(message: CapMessage, only_checked: bool, now_ms: int) -> CapOrder:
    audience = _audience(message)
    if not message.infos:
        raise _refused("info", "an info that says where and whom to look for", "none")
    for info in message.infos:
        if EVENT_CODE not in info.event_codes:
            codes = ", ".join(f"{name}={value}" for name, value in info.event_codes) or "none"
            raise _refused("info/eventCode", "SAME=CAE, a child abduction emergency", codes)
    notes: list[str] = []
    circle = _circle(message.infos, notes)
    missing_since_ms = _common(message.infos, "onset", lambda info: info.onset_ms)
    if missing_since_ms is None and message.kind == "Alert":
        missing_since_ms = message.sent_ms
        notes.append("onset is not given: the child counts as missing since the message was sent")
    if missing_since_ms is not None and missing_since_ms > now_ms + AHEAD_MS_MAX:
        raise _refused("info/onset", f"a time up to now, {cap_time(now_ms)}", cap_time(missing_since_ms))
    expires_at_ms = _common(message.infos, "expires", lambda info: info.expires_ms)
    if expires_at_ms is not None and expires_at_ms <= now_ms:
        raise _refused("info/expires", f"a time to come, after {cap_time(now_ms)}", cap_time(expires_at_ms))
    if expires_at_ms is not None and missing_since_ms is not None and expires_at_ms <= missing_since_ms:
        raise _refused("info/expires", f"a time after onset, {cap_time(missing_since_ms)}", cap_time(expires_at_ms))
    schedule = _schedule(message.infos)
    if schedule is None:
        notes.append(f"the circle's {circle.km:g} km are not used: the ring follows the schedule of the platform")
    return CapOrder(
        "publish" if message.kind == "Alert" else "update",
        only_checked,
        status=_STATUSES.get(message.status, "actual"),
        references=message.references,
        circle=circle,
        missing_since_ms=missing_since_ms,
        expires_at_ms=expires_at_ms,
        schedule=schedule,
        audience=audience,
        words=_words(message.infos, notes),
        division=_common(message.infos, "area/geocode", _division),
        notes=tuple(notes),
    )


def _audience(message: CapMessage) -> tuple[str, ...] | None:
    """Private with addresses names partners; Public is for all of them."""
    if message.scope == "Restricted":
        expected = "Public, or Private with addresses that name partners: a restriction in words cannot be kept to"
        raise _refused("scope", expected, "Restricted")
    if message.scope == "Public":
        if message.addresses:
            raise _refused(
                "addresses", "none in a Public message; Private is for some", brief(" ".join(message.addresses))
            )
        if message.status == "Exercise":
            raise _refused("scope", "Private, with the partners of the exercise in addresses", "Public")
        return None
    if not message.addresses:
        raise _refused("addresses", "the partners that a Private message is for", "none")
    try:
        audience = tuple(check_partner_name(name) for name in message.addresses)
    except ValueError as error:
        raise _refused("addresses", "names of partners", str(error)) from None
    if len(set(audience)) != len(audience):
        raise _refused("addresses", "each partner once", brief(" ".join(audience)))
    return audience


def _common(infos: tuple[CapInfo, ...], element: str, value: Callable[[CapInfo], _T | None]) -> _T | None:
    """What all infos say that say it at all. Raises CapRefused if they differ."""
    values = {found for info in infos if (found := value(info)) is not None}
    if len(values) > 1:
        raise _refused(f"info/{element}", "the same in every info, whatever its language", f"{len(values)} different")
    return values.pop() if values else None


def _parameter(infos: tuple[CapInfo, ...], name: str) -> str | None:
    found = {value for info in infos for known, value in info.parameters if known == name and value}
    if len(found) > 1:
        raise _refused("info/parameter", f"one value of {name}", f"{len(found)} different")
    return found.pop() if found else None


def _division(info: CapInfo) -> str | None:
    codes = {value for name, value in info.geocodes if name == DIVISION_GEOCODE and value}
    if len(codes) > 1:
        raise _refused("info/area/geocode", f"one {DIVISION_GEOCODE}", f"{len(codes)}")
    return codes.pop() if codes else None


def _circle(infos: tuple[CapInfo, ...], notes: list[str]) -> Circle:
    need = 'one circle "lat,lng km" around the place where the child was last seen'
    for info in infos:
        if len(info.circles) == 1:
            continue
        came = f"{len(info.circles)} circles" if info.circles else "none"
        if not info.circles and info.polygon_count:
            came = (
                "polygons alone, which have no middle"
                if info.polygon_count > 1
                else "a polygon alone, which has no middle"
            )
        raise _refused("info/area/circle", need, came)
    if any(info.polygon_count for info in infos):
        notes.append("polygons are not used: the ring is a circle")
    circle = _common(infos, "area/circle", lambda info: info.circles[0])
    assert circle is not None, "every info has one"
    return circle


def _schedule(infos: tuple[CapInfo, ...]) -> Schedule | None:
    text = _parameter(infos, SCHEDULE_PARAMETER)
    if text is None:
        return None
    expected = f"{SCHEDULE_PARAMETER} like [[1, 100], [2, 200], [null, 500]], hours and km"
    try:
        changes: dict[str, Any] = parse_changes({"alert_id": "cap", "schedule": orjson.loads(text)}, "")[2]
        schedule: Schedule | None = changes["schedule"]
        if schedule is None:
            raise ValueError("null")
        check_schedule(schedule, "schedule")
    except ValueError as error:
        raise _refused("info/parameter", expected, f"{brief(text)} ({str(error).rpartition(': ')[2]})") from None
    return schedule


def _words(infos: tuple[CapInfo, ...], notes: list[str]) -> AlertWords:
    """The words of all languages: Chinese first, the others behind or below it."""
    ordered = sorted(infos, key=lambda info: not info.language.lower().startswith("zh"))
    if any(info.photo_url for info in ordered):
        notes.append("the picture is not fetched from elsewhere: it has to be sent to the alert itself")
    headlines = _distinct(info.headline for info in ordered)
    headline = " / ".join(headlines)
    if len(headline) > _HEADLINE_CHARS_MAX and len(headlines) > 1:
        headline = headlines[0]
        notes.append(f"the headlines exceed {_HEADLINE_CHARS_MAX} characters together: the first one is used")
    texts = _distinct(text for info in ordered for text in (_text(info), info.instruction))
    place = _parameter(infos, PLACE_PARAMETER) or next(iter(_distinct(info.area for info in ordered)), "")
    if len(place) > _PLACE_CHARS_MAX:
        place = place[: _PLACE_CHARS_MAX - 1] + "…"
        notes.append(f"areaDesc exceeds {_PLACE_CHARS_MAX} characters: it is cut")
    return AlertWords(
        headline=headline,
        text="\n\n".join(texts),
        place=place,
        contact=" / ".join(_distinct(info.contact for info in ordered)),
        **{name: _parameter(infos, parameter) or "" for name, parameter in CHILD_PARAMETERS.items()},
    )


def _text(info: CapInfo) -> str | None:
    """The description; or, of a message that says its parts apart as ours do, the free text in it."""
    return dict(info.parameters).get(TEXT_PARAMETER, info.description)


def _distinct(texts: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))
