"""An alert as messages of CAP 1.2: what the world reads, and how its messages name each other.

    published   edited     ring grew    edited     closed
    Alert ──────> Update ──> Update ────> Update ──> Cancel        time ──>
    a17.1.0     a17.2.0    a17.2.1      a17.3.0    a17.4.0         identifiers: alert, revision, growth step

A CAP message never changes once it was sent. So the growth of a ring, which is no revision, is a message of its own,
sent at the moment of growing; each message names all before it in `references`. All of this follows from the desk's
stream, so every gateway gives the same bytes. The last message stands for the alert; `Cancel` says in neutral words
that the search has ended, whatever its outcome was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import cast
from urllib.parse import quote, unquote_to_bytes

import redis

from flows.alert_json import check_alert_id
from flows.desk import DESK_KEY, DeskAlert
from flows.log import format_id, parse_id
from flows.wire import MalformedEntry, decode_entry
from gateway.cap_messages import CapInfo, CapMessage, Circle, Reference
from geoindex.entries import AUTO_CLOSE_MS, Alert, AlertClose, AlertRevision, Schedule
from geoindex.rings import growth_times_ms, radius_km

LANGUAGE = "zh-CN"
EVENT = "儿童失踪 Child Abduction Emergency"
EVENT_CODE = ("SAME", "CAE")
"""Child Abduction Emergency, of the codes that EAS and NOAA Weather Radio use (47 CFR 11.31)."""
ENDED_HEADLINE = "搜寻已结束 The search has ended"
EXERCISE_NOTE = "演习，没有儿童失踪。Exercise: no child is missing."
SCHEDULE_PARAMETER = "tuanyuan:schedule"
"""The ring's own schedule, [[hours, km], ..., [null, km]]: CAP's circle is the ring at the moment of sending."""
CHILD_PARAMETERS = {
    "name": "tuanyuan:name",
    "sex": "tuanyuan:sex",
    "age": "tuanyuan:age",
    "clothes": "tuanyuan:clothes",
    "features": "tuanyuan:features",
}
"""The child's details, by name of parameter: CAP has no elements for them, so they also stand in its description."""
TEXT_PARAMETER = "tuanyuan:text"
"""The alert's free text alone, where the description also holds the child's details."""
PLACE_PARAMETER = "tuanyuan:place"
"""Where the child was last seen, in words."""

_PAGE = 500
"""Events of the desk that are read at once."""


@dataclass(frozen=True, slots=True)
class AlertWords:
    """What is told of an alert in words, to everybody, while it is open. Empty: nothing is said."""

    headline: str = ""
    text: str = ""
    place: str = ""
    contact: str = ""
    name: str = ""
    sex: str = ""
    """female, male, or empty."""
    age: str = ""
    """Years."""
    clothes: str = ""
    features: str = ""
    photo_url: str = ""

    def description(self) -> str:
        """All of it but headline and contact, for people: a line of details, then the text."""
        labelled = (
            ("姓名", self.name),
            ("性别", {"female": "女", "male": "男"}.get(self.sex, "")),
            ("年龄", f"{self.age}岁" if self.age else ""),
            ("衣着", self.clothes),
            ("特征", self.features),
            ("最后出现地点", self.place),
        )
        details = "；".join(f"{label}：{value}" for label, value in labelled if value)
        return "\n".join(part for part in (details, self.text) if part)


@dataclass(frozen=True, slots=True)
class Step:
    """One message's place in an alert's life."""

    revision: int
    growth: int
    """0: the revision itself; then one for each growth of its ring."""
    sent_ms: int


@dataclass(frozen=True, slots=True)
class History:
    """All messages of an alert up to now, in the order of sending; at least one."""

    alert: Alert
    """The newest revision that is no closing."""
    steps: tuple[Step, ...]
    is_ended: bool
    next_growth_ms: int | None
    """When the next message is due without anybody's doing: the ring grows. None: never."""

    @property
    def last(self) -> Step:
        return self.steps[-1]

    @property
    def ring_km(self) -> float:
        """At the time of the last message."""
        return radius_km(self.alert.schedule, self.last.sent_ms - self.alert.missing_since_ms)


def desk_events(client: redis.Redis, known: DeskAlert) -> list[tuple[AlertRevision | AlertClose, int]]:
    """The events of one alert on the desk, each with the ms of its place there. Raises redis.RedisError.

    The desk's stream is read from the alert's publishing on, up to its newest revision.
    """
    events: list[tuple[AlertRevision | AlertClose, int]] = []
    after = f"{max(0, known.published_at_ms - 1000)}-0"
    while True:
        entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(DESK_KEY, min=f"({after}", count=_PAGE))
        for raw_id, fields in entries:
            desk_id = parse_id(raw_id)
            try:
                event = decode_entry(*next(iter(fields.items())))
            except MalformedEntry:
                continue  # the relay counts and logs it
            if isinstance(event, AlertRevision) and event.alert.alert_id == known.alert.alert_id:
                events.append((event, desk_id[0]))
                revision = event.alert.revision
            elif isinstance(event, AlertClose) and event.alert_id == known.alert.alert_id:
                events.append((event, desk_id[0]))
                revision = event.revision or known.alert.revision
            else:
                continue
            if revision >= known.alert.revision:
                return events
        if len(entries) < _PAGE:
            return events
        after = format_id(parse_id(entries[-1][0]))


def history(known: DeskAlert, events: list[tuple[AlertRevision | AlertClose, int]], now_ms: int) -> History:
    """The messages of an alert up to `now_ms`, from its `desk_events`."""
    revisions = [(event.alert, at_ms) for event, at_ms in events if isinstance(event, AlertRevision)]
    closings = [(event, at_ms) for event, at_ms in events if isinstance(event, AlertClose)]
    if not revisions:  # the desk's stream was cut: what is known by itself
        revisions = [(known.alert, known.changed_at_ms)]
    alert = revisions[-1][0]
    ended_at_ms: int | None = None
    if known.outcome is not None:
        ended_at_ms = closings[-1][1] if closings else known.changed_at_ms
    elif not known.is_open(now_ms):
        ended_at_ms = known.alert.expires_at_ms + AUTO_CLOSE_MS
    steps: list[Step] = []
    next_growth_ms: int | None = None
    for index, (revision, at_ms) in enumerate(revisions):
        until_ms = revisions[index + 1][1] if index + 1 < len(revisions) else ended_at_ms
        steps.append(Step(revision.revision, 0, at_ms))
        growth = 0
        for grown_ms, _ in growth_times_ms(revision.schedule, revision.missing_since_ms):
            if (
                grown_ms <= at_ms
                or grown_ms >= revision.expires_at_ms
                or (until_ms is not None and grown_ms >= until_ms)
            ):
                continue
            if grown_ms > now_ms:
                next_growth_ms = grown_ms if until_ms is None else None
                break
            growth += 1
            steps.append(Step(revision.revision, growth, grown_ms))
    if ended_at_ms is not None:
        steps.append(Step(max(known.alert.revision, alert.revision + 1), 0, ended_at_ms))
    return History(alert, tuple(steps), ended_at_ms is not None, next_growth_ms)


def message_identifier(alert_id: str, step: Step) -> str:
    """What CAP calls a message of ours: no spaces, commas, < or & in it, whatever the alert's id holds."""
    return f"{quote(alert_id, safe='')}.{step.revision}.{step.growth}"


def alert_id_of(identifier: str) -> str | None:
    """The alert that a message of ours is about; None: no message of ours is called so."""
    parts = identifier.rsplit(".", 2)
    if len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        return None
    try:
        return check_alert_id(unquote_to_bytes(parts[0]).decode())
    except ValueError:
        return None


def alert_message(past: History, words: AlertWords, sender: str, page_url: str) -> CapMessage:
    """The last message of an alert, which stands for it. Of an alert that has ended: none of its words."""
    alert, last = past.alert, past.last
    references = tuple(
        Reference(sender, message_identifier(alert.alert_id, step), step.sent_ms // 1000 * 1000)
        for step in past.steps[:-1]
    )
    if past.is_ended:
        kind, info = "Cancel", _ended_info(page_url)
    else:
        kind, info = "Update" if references else "Alert", _open_info(past, words, page_url)
    return CapMessage(
        identifier=message_identifier(alert.alert_id, last),
        sender=sender,
        sent_ms=last.sent_ms // 1000 * 1000,
        status="Exercise" if alert.status == "exercise" else "Actual",
        kind=kind,
        scope="Public" if alert.audience is None else "Private",
        addresses=alert.audience or (),
        references=references,
        infos=(info,),
        note=EXERCISE_NOTE if alert.status == "exercise" else None,
    )


def _ended_info(page_url: str) -> CapInfo:
    return CapInfo(
        language=LANGUAGE,
        event=EVENT,
        event_codes=(EVENT_CODE,),
        headline=ENDED_HEADLINE,
        web=page_url,
        response_types=("AllClear",),
        urgency="Past",
        severity="Unknown",
        certainty="Observed",
    )


def _open_info(past: History, words: AlertWords, page_url: str) -> CapInfo:
    alert, ring_km = past.alert, past.ring_km
    parameters = [(SCHEDULE_PARAMETER, schedule_text(alert.schedule)), (TEXT_PARAMETER, words.text)]
    parameters += [(name, getattr(words, key)) for key, name in CHILD_PARAMETERS.items() if getattr(words, key)]
    if words.place:
        parameters.append((PLACE_PARAMETER, words.place))
    return CapInfo(
        language=LANGUAGE,
        event=EVENT,
        event_codes=(EVENT_CODE,),
        onset_ms=alert.missing_since_ms // 1000 * 1000,
        # Rounded up: an alert must not expire before it begins.
        expires_ms=-(-alert.expires_at_ms // 1000) * 1000,
        headline=words.headline or None,
        description=words.description() or None,
        web=page_url,
        contact=words.contact or None,
        parameters=tuple(parameters),
        photo_url=words.photo_url or None,
        area=f"{words.place or '最后出现地点'}周围 {ring_km:g} 公里 / {ring_km:g} km around the place last seen",
        circles=(Circle(round(alert.lat, 7), round(alert.lng, 7), ring_km),),
        response_types=("Monitor",),
    )


def schedule_text(schedule: Schedule) -> str:
    """As the parameter holds it."""
    return json.dumps([list(step) for step in schedule])
