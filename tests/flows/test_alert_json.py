"""Alert events as people write them."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.alert_json import (
    AlertFileState,
    AlertRefused,
    alert_to_json,
    event_time_ms,
    merge_alert,
    parse_alert,
    parse_alert_event,
    parse_changes,
    parse_content,
)
from geoindex.entries import DEFAULT_SCHEDULE, HOUR_MS, Alert, AlertClose, AlertRevision, Settings
from tests.flows.test_wire import alerts

T0 = 1_700_000_000_000
WORDS: dict[str, Any] = {"alert_id": "a17", "location": {"lat": 30, "lng": 114.5}, "missing_since": T0}
PUBLISH: dict[str, Any] = {"at": T0 + 1, "event": "publish", "alert": WORDS}
UPDATE: dict[str, Any] = {"at": T0 + 2, "event": "update", "alert": {"alert_id": "a17"}}
CLOSE: dict[str, Any] = {"at": T0 + 3, "event": "close", "alert_id": "a17", "outcome": "found"}
SETTINGS = Settings()


def refused(act: Any) -> str:
    with pytest.raises(AlertRefused) as caught:
        act()
    return str(caught.value)


# --- an alert ---------------------------------------------------------------------------------------------------------


def test_alert_that_says_only_what_it_must_gets_the_defaults() -> None:
    assert parse_alert(WORDS, "here") == Alert(
        "a17", 1, 30.0, 114.5, T0, DEFAULT_SCHEDULE, T0 + 72 * HOUR_MS, "actual", None
    )


def test_alert_that_says_everything_is_taken_by_its_word() -> None:
    words = WORDS | {
        "revision": 4,
        "schedule": [[0.5, 10], [None, 20.5]],
        "expires_at": "2023-11-15T00:00:00Z",
        "status": "exercise",
        "audience": ["amap"],
        "headline": "Missing in Wuhan",
    }
    assert parse_alert(words, "here") == Alert(
        "a17", 4, 30.0, 114.5, T0, ((0.5, 10.0), (None, 20.5)), 1_700_006_400_000, "exercise", ("amap",)
    )
    assert parse_content(words) == {"headline": "Missing in Wuhan"}


def test_null_is_the_default() -> None:
    nothing = dict.fromkeys(("schedule", "expires_at", "status", "audience", "revision", "headline"))
    assert parse_alert(WORDS | nothing, "here") == parse_alert(WORDS, "here")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alert_id": ""}, "f:3: alert_id must have 1 to 64 characters, got 0"),
        ({"alert_id": "x" * 65}, "f:3: alert_id must have 1 to 64 characters, got 65"),
        ({"alert_id": 17}, "f:3: alert_id must be text, got 17"),
        ({"alert_id": "a\n"}, "f:3: alert_id must not contain control characters, got 'a\\n'"),
        ({"alert_id": "a\ud800"}, "f:3: alert_id must not contain control characters, got 'a\\ud800'"),
        ({"location": None}, "f:3: alert 'a17': location is missing"),
        ({"location": [30, 114]}, 'f:3: alert \'a17\': location must be {"lat": degrees, "lng": degrees}'),
        ({"location": {"lat": 30}}, 'f:3: alert \'a17\': location must be {"lat": degrees, "lng": degrees}'),
        ({"location": {"lat": "30", "lng": 114}}, "f:3: alert 'a17': lat must be a number, got '30'"),
        ({"location": {"lat": True, "lng": 114}}, "f:3: alert 'a17': lat must be a number, got True"),
        ({"location": {"lat": float("nan"), "lng": 1}}, "f:3: alert 'a17': lat must be finite, got nan"),
        ({"location": {"lat": 10**400, "lng": 1}}, "f:3: alert 'a17': lat must be finite, got 1000"),
        ({"location": {"lat": 90.1, "lng": 1}}, "f:3: alert 'a17': lat must be from -90 to 90 degrees, got 90.1"),
        ({"location": {"lat": 1, "lng": -181}}, "f:3: alert 'a17': lng must be from -180 to 180 degrees, got -181.0"),
        ({"missing_since": None}, "f:3: alert 'a17': missing_since is missing"),
        ({"missing_since": "yesterday"}, "f:3: alert 'a17': missing_since must be ms since 1970 or an ISO 8601 time"),
        (
            {"missing_since": True},
            "f:3: alert 'a17': missing_since must be ms since 1970 or an ISO 8601 time, got True",
        ),
        ({"missing_since": 1.5}, "f:3: alert 'a17': missing_since must be ms since 1970 or an ISO 8601 time, got 1.5"),
        (
            {"missing_since": 10**15},
            "f:3: alert 'a17': missing_since must be in ms since 1970 and before the year 10000",
        ),
        ({"expires_at": T0}, f"f:3: alert 'a17': expires_at must be after missing_since, got {T0} and {T0}"),
        ({"schedule": [[3, 1], [2, 4], [None, 9]]}, "f:3: alert 'a17': schedule hours must rise, got 2 after 3"),
        ({"schedule": [[1, 9], [None, 4]]}, "f:3: alert 'a17': schedule km must rise, got 4 after 9"),
        ({"schedule": [[1, 9]]}, "f:3: alert 'a17': schedule's last hours must be null"),
        ({"schedule": []}, "f:3: alert 'a17': schedule must have a step, got none"),
        ({"schedule": [[None, 1001]]}, "f:3: alert 'a17': schedule km must be at most 1000, got 1001"),
        ({"schedule": [[None, True]]}, "f:3: alert 'a17': schedule km must be a number, got True"),
        ({"schedule": [[1]]}, "f:3: alert 'a17': schedule must be a list of [hours, km]"),
        ({"schedule": "wide"}, "f:3: alert 'a17': schedule must be a list of [hours, km]"),
        (
            {"schedule": [[hours, hours] for hours in range(1, 65)] + [[None, 99]]},
            "f:3: alert 'a17': schedule must have at most 64 steps, got 65",
        ),
        ({"status": "real"}, "f:3: alert 'a17': status must be one of actual, exercise, got 'real'"),
        ({"status": ""}, "f:3: alert 'a17': status must be one of actual, exercise, got ''"),
        ({"status": 1}, "f:3: alert 'a17': status must be one of actual, exercise, got 1"),
        ({"status": "exercise"}, "f:3: alert 'a17': an exercise must name its partners in audience"),
        ({"audience": []}, "f:3: alert 'a17': audience must name a partner; leave it out to reach all of them"),
        ({"audience": "amap"}, "f:3: alert 'a17': audience must be a list of partners, got 'amap'"),
        ({"audience": [1]}, "f:3: alert 'a17': a partner's name must be text, got 1"),
        ({"audience": ["x", "x"]}, "f:3: alert 'a17': audience must not name a partner twice"),
        ({"revision": 0}, "f:3: alert 'a17': revision must be a whole number, 1 or more, got 0"),
        ({"revision": True}, "f:3: alert 'a17': revision must be a whole number, 1 or more, got True"),
        (
            {"revision": 1 << 60},
            "f:3: alert 'a17': revision must be a whole number, 1 or more, got 1152921504606846976",
        ),
        ({"expire_at": T0}, "f:3: alert 'a17': unknown field 'expire_at'; known are alert_id, revision, location"),
        ({"headline": 1}, "f:3: alert 'a17': headline must be text of at most 4000 characters"),
    ],
)
def test_faulty_alert_is_refused_with_file_line_alert_and_reason(changed: dict[str, Any], message: str) -> None:
    assert refused(lambda: parse_alert(WORDS | changed, "f:3")).startswith(message)


def test_alert_that_is_no_object_is_refused() -> None:
    assert refused(lambda: parse_alert([1, 2], "f:3")) == "f:3: alert must be an object, got a list of 2"


@given(alerts())
def test_alert_written_as_json_reads_back_as_itself(alert: Alert) -> None:
    assert parse_alert(json.loads(json.dumps(alert_to_json(alert))), "here") == alert
    assert parse_alert(orjson.loads(orjson.dumps(alert_to_json(alert))), "here") == alert


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "time",
    [T0, float(T0), str(T0), "2023-11-14T22:13:20Z", "2023-11-14T22:13:20", "2023-11-15 06:13:20+08:00",
     "20231114T221320Z", "2023-11-14T22:13:20.0009Z"],
)  # fmt: skip
def test_times_are_epoch_ms_or_iso_8601(time: object) -> None:
    assert event_time_ms(time, "at") == T0


def test_time_before_1970_is_negative() -> None:
    assert event_time_ms("1969-12-31T23:59:59.5Z", "at") == -500
    assert event_time_ms("1969-12-31T23:59:59.9999Z", "at") == -1


@pytest.mark.parametrize("time", ["", "now", None, [], True, float("nan"), "9" * 30, "2023-13-01", "2023-11-14T25:00"])
def test_other_times_are_refused(time: object) -> None:
    with pytest.raises(ValueError, match=r"^at must be"):
        event_time_ms(time, "at")


# --- edits ------------------------------------------------------------------------------------------------------------


KNOWN = parse_alert(WORDS | {"schedule": [[None, 50]], "audience": ["amap", "didi"]}, "here")


def merged(words: dict[str, Any]) -> Alert:
    _, revision, changes = parse_changes({"alert_id": "a17"} | words, "here")
    return merge_alert(KNOWN, changes, revision or KNOWN.revision + 1)


def test_edit_leaves_alone_what_it_does_not_say() -> None:
    alert = merged({"location": {"lat": 31, "lng": 115}})
    assert (alert.lat, alert.lng, alert.revision) == (31.0, 115.0, 2)
    assert (alert.schedule, alert.audience, alert.expires_at_ms) == (
        KNOWN.schedule,
        KNOWN.audience,
        KNOWN.expires_at_ms,
    )


def test_edit_with_null_goes_back_to_the_default() -> None:
    alert = merged({"schedule": None, "audience": None, "expires_at": None, "status": None})
    assert (alert.schedule, alert.audience, alert.expires_at_ms) == (DEFAULT_SCHEDULE, None, T0 + 72 * HOUR_MS)


def test_default_expiry_follows_the_time_of_going_missing() -> None:
    assert merged({"missing_since": T0 - HOUR_MS}).expires_at_ms == T0 + 71 * HOUR_MS
    assert merged({"missing_since": T0 - HOUR_MS, "expires_at": T0 + 5}).expires_at_ms == T0 + 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"status": "exercise"}, "status never changes: it is actual, got 'exercise'"),
        ({"audience": []}, "audience must name a partner"),
        ({"expires_at": T0 - 1}, "expires_at must be after missing_since"),
    ],
)
def test_edit_that_cannot_be_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merged(words)


# --- files of events --------------------------------------------------------------------------------------------------


def run(*events: object, state: AlertFileState | None = None) -> list[AlertRevision | AlertClose | None]:
    state = state or AlertFileState()
    return [
        parse_alert_event(event, f"alerts.jsonl:{line}", state, SETTINGS, (0, line))
        for line, event in enumerate(events, start=1)
    ]


def test_events_of_a_file_get_revisions_and_desk_ids() -> None:
    publish, update, close = run(PUBLISH, UPDATE, CLOSE)
    assert publish == AlertRevision("publish", parse_alert(WORDS, "here"), (0, 1))
    assert update == AlertRevision("update", parse_alert(WORDS | {"revision": 2}, "here"), (0, 2))
    assert close == AlertClose("a17", None, "found", (0, 3))


def test_update_in_a_file_changes_what_it_says() -> None:
    publish = PUBLISH | {"alert": WORDS | {"schedule": [[None, 7]], "audience": ["amap"]}}
    _, update = run(publish, UPDATE | {"alert": {"alert_id": "a17", "location": {"lat": 1, "lng": 2}}})
    assert isinstance(update, AlertRevision)
    assert (update.alert.lat, update.alert.schedule, update.alert.audience) == (1.0, ((None, 7.0),), ("amap",))


def test_update_in_a_file_that_says_all_that_a_publish_must_is_complete() -> None:
    publish = PUBLISH | {"alert": WORDS | {"schedule": [[None, 7]], "audience": ["amap"], "status": "exercise"}}
    _, update = run(publish, UPDATE | {"alert": WORDS | {"audience": ["didi"]}})
    assert isinstance(update, AlertRevision)
    assert (update.alert.revision, update.alert.schedule) == (2, DEFAULT_SCHEDULE)
    assert (update.alert.audience, update.alert.status) == (("didi",), "exercise")


def test_revision_that_an_event_says_is_kept() -> None:
    _, update, close = run(PUBLISH, UPDATE | {"alert": {"alert_id": "a17", "revision": 7}}, CLOSE | {"revision": 8})
    assert isinstance(update, AlertRevision)
    assert isinstance(close, AlertClose)
    assert (update.alert.revision, close.revision) == (7, 8)


@pytest.mark.parametrize(
    ("events", "note"),
    [
        ([PUBLISH, PUBLISH], "alerts.jsonl:2: alert 'a17': this publish has no effect: revision 1 is not above 1"),
        ([PUBLISH, CLOSE, CLOSE], "alerts.jsonl:3: alert 'a17': this close has no effect: the alert is closed already"),
        ([PUBLISH, CLOSE, UPDATE], "alerts.jsonl:3: alert 'a17': this update has no effect: the alert is closed"),
        ([PUBLISH, CLOSE, PUBLISH], "alerts.jsonl:3: alert 'a17': this publish has no effect: the alert is closed"),
        (
            [PUBLISH, CLOSE | {"revision": 1}],
            "alerts.jsonl:2: alert 'a17': this close has no effect: revision 1 is not",
        ),
    ],
)
def test_event_without_effect_is_noted_and_left_out(events: list[object], note: str) -> None:
    state = AlertFileState()
    assert run(*events, state=state)[-1] is None
    assert len(state.notes) == 1
    assert state.notes[0].startswith(note)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (7, "alerts.jsonl:1: an event must be an object, got 7"),
        ({"at": T0}, "alerts.jsonl:1: event must be publish, update or close, got None"),
        (PUBLISH | {"event": ["publish"]}, "alerts.jsonl:1: event must be publish, update or close, got a list of 1"),
        (PUBLISH | {"alert_id": "a17"}, "alerts.jsonl:1: unknown field 'alert_id' of a publish; known are at, event,"),
        (CLOSE | {"reason": "x"}, "alerts.jsonl:1: unknown field 'reason' of a close; known are at, event, alert_id"),
        ({"event": "close", "alert_id": "a"}, "alerts.jsonl:1: at must be ms since 1970 or an ISO 8601 time, got None"),
        (
            CLOSE | {"outcome": None},
            "alerts.jsonl:1: alert 'a17': outcome must be one of found, false_report, cancelled",
        ),
        (CLOSE, "alerts.jsonl:1: alert 'a17': cannot be closed: it was never published"),
        (UPDATE, "alerts.jsonl:1: alert 'a17': cannot be updated: it was never published"),
        (PUBLISH | {"alert": None}, "alerts.jsonl:1: alert must be an object, got None"),
        (PUBLISH | {"alert": WORDS | {"colour": 1}}, "alerts.jsonl:1: alert 'a17': unknown field 'colour'"),
    ],
)
def test_faulty_event_is_refused_and_forgotten(event: object, message: str) -> None:
    state = AlertFileState()
    assert refused(lambda: run(event, state=state)).startswith(message)
    assert (state.known, state.closed) == ({}, set())


def test_change_of_status_is_refused_also_by_a_second_publish() -> None:
    exercise = WORDS | {"status": "exercise", "audience": ["amap"], "revision": 2}
    for kind in ("publish", "update"):
        message = refused(lambda kind=kind: run(PUBLISH, {"at": T0, "event": kind, "alert": exercise}))
        assert message == "alerts.jsonl:2: alert 'a17': status never changes: it is actual, got 'exercise'"


def test_second_publish_with_a_higher_revision_is_an_edit_that_says_everything() -> None:
    first = PUBLISH | {"alert": WORDS | {"schedule": [[None, 7]]}}
    _, second = run(first, PUBLISH | {"alert": WORDS | {"revision": 2}})
    assert isinstance(second, AlertRevision)
    assert second.alert.schedule == DEFAULT_SCHEDULE


json_values: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from([PUBLISH, UPDATE, CLOSE]),
    st.sampled_from(["at", "event", "alert", "alert_id", "outcome", "revision", "x"]),
    json_values,
)
def test_any_json_in_an_event_is_taken_or_refused(event: dict[str, Any], name: str, value: object) -> None:
    state = AlertFileState()
    run(PUBLISH, state=state)
    try:
        run(event | {name: value}, state=state)
    except AlertRefused:
        return


@given(st.sampled_from([*WORDS, "schedule", "expires_at", "status", "audience", "revision", "headline"]), json_values)
def test_any_json_in_an_alert_is_taken_or_refused(name: str, value: object) -> None:
    for kind in ("publish", "update"):
        state = AlertFileState()
        run(PUBLISH, state=state)
        try:
            run({"at": T0, "event": kind, "alert": WORDS | {name: value}}, state=state)
        except AlertRefused:
            continue
