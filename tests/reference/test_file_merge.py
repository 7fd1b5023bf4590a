"""The reference of offline runs follows the file rules: results worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.reference.examples.builders import (
    FAR,
    HOME_LAT,
    HOME_LNG,
    HOUR,
    KM_55,
    KM_101,
    MINUTE,
    SECOND,
    T0,
    TOLERANCE,
    WINDOW,
    close,
    publish,
    update,
)
from tests.reference.file_generator import generate_files, write_alert_file, write_ping_file
from tests.reference.file_merge import AlertEvent, Row, parse_time_ms, read_alert_events, reference_run
from tests.reference.matcher import DevicePush


def _row(device_id: str, lat: float | str, observed_at: int | str, at: int | str | None = None) -> dict[str, str]:
    row = {"device_id": device_id, "lat": str(lat), "lng": str(HOME_LNG), "observed_at": str(observed_at)}
    return row if at is None else row | {"at": str(at)}


def _run(rows: list[Row], *alert_events: object) -> tuple[list[DevicePush], dict[str, int]]:
    events: list[AlertEvent] = list(alert_events)  # type: ignore[arg-type]
    run = reference_run(rows, events, WINDOW)
    return run.pushes, dict(run.refused)


def _push(at_ms: int, device_id: str, ring_km: float = 100, kind: str = "alert", revision: int = 1) -> DevicePush:
    return DevicePush(at_ms, kind, "a1", revision, "default", device_id, ring_km)


def test_clock_of_a_file_without_at_is_the_running_maximum_of_observed_at() -> None:
    rows: list[Row] = [_row("a", KM_55, T0 + MINUTE), _row("b", KM_55, T0)]
    assert _run(rows, publish(T0)) == ([_push(T0 + MINUTE, "a"), _push(T0 + MINUTE, "b")], {})


def test_clock_of_a_file_with_at_is_the_running_maximum_of_at() -> None:
    rows: list[Row] = [
        _row("a", KM_55, T0, at=T0 + MINUTE),
        _row("b", KM_55, T0, at=T0),
        _row("c", KM_55, T0, at=T0 + HOUR),
    ]
    pushes = [_push(T0 + MINUTE, "a"), _push(T0 + MINUTE, "b"), _push(T0 + HOUR, "c", 200)]
    assert _run(rows, publish(T0)) == (pushes, {})


def test_growth_comes_before_alert_events_and_those_before_pings_of_the_same_time() -> None:
    rows: list[Row] = [
        _row("grown", KM_101, T0),
        _row("edited", FAR, T0 + SECOND),
        _row("grown", FAR, T0 + HOUR),
        _row("edited", HOME_LAT, T0 + HOUR),
    ]
    pushes = [
        _push(T0 + HOUR, "grown", 200),
        _push(T0 + HOUR, "grown", 200, "update", 2),
        _push(T0 + HOUR, "edited", 200, "alert", 2),
    ]
    assert _run(rows, publish(T0), update(T0 + HOUR, 2, lat=FAR)) == (pushes, {})


def test_alert_event_at_the_time_of_a_ping_comes_before_it() -> None:
    assert _run([_row("a", KM_55, T0)], publish(T0)) == ([_push(T0, "a")], {})
    assert _run([_row("a", KM_55, T0)], publish(T0 + 1)) == ([_push(T0 + 1, "a")], {})
    assert _run([_row("a", KM_55, T0)], publish(T0), close(T0)) == ([], {})


def test_alert_events_are_sorted_by_at_and_equal_ones_keep_their_order() -> None:
    rows: list[Row] = [_row("a", KM_55, T0)]
    events = (close(T0 + 2), update(T0 + 1, 2), update(T0 + 1, 3), publish(T0))
    assert _run(rows, *events)[0] == [
        _push(T0, "a"),
        _push(T0 + 1, "a", kind="update", revision=2),
        _push(T0 + 1, "a", kind="update", revision=3),
        _push(T0 + 2, "a", kind="resolved", revision=3),
    ]


def test_alert_events_after_the_last_ping_run_at_their_own_time() -> None:
    rows: list[Row] = [_row("a", KM_101, T0)]
    pushes = [_push(T0 + HOUR, "a", 200), _push(T0 + 2 * HOUR, "a", 300, "resolved")]
    assert _run(rows, publish(T0), close(T0 + 2 * HOUR)) == (pushes, {})


def test_with_at_a_ping_more_than_the_tolerance_ahead_is_refused_and_moves_no_clock() -> None:
    rows: list[Row] = [
        _row("a", KM_55, T0, at=T0),
        _row("limit", KM_55, T0 + 1 + TOLERANCE, at=T0 + 1),
        _row("future", KM_55, T0 + 9 * HOUR + TOLERANCE + 1, at=T0 + 9 * HOUR),
        _row("b", KM_55, T0, at=T0 + 2),
    ]
    pushes = [_push(T0, "a"), _push(T0 + 1, "limit"), _push(T0 + 2, "b")]
    assert _run(rows, publish(T0)) == (pushes, {"from_future": 1})


def test_with_at_a_ping_is_judged_by_the_later_of_clock_and_its_own_at() -> None:
    rows: list[Row] = [_row("a", KM_55, T0 + HOUR, at=T0 + HOUR), _row("b", KM_55, T0 + HOUR + TOLERANCE, at=T0)]
    assert _run(rows, publish(T0)) == ([_push(T0 + HOUR, "a", 200), _push(T0 + HOUR, "b", 200)], {})


def test_with_at_a_gap_is_a_gap() -> None:
    rows: list[Row] = [_row("a", KM_55, T0, at=T0), _row("b", KM_55, T0 + 9 * HOUR, at=T0 + 9 * HOUR)]
    assert _run(rows, publish(T0))[0] == [_push(T0, "a"), _push(T0 + 9 * HOUR, "b", 500)]


def test_without_at_a_ping_up_to_the_tolerance_ahead_moves_the_clock() -> None:
    rows: list[Row] = [_row("a", KM_55, T0), _row("b", KM_55, T0 + TOLERANCE), _row("c", KM_55, T0)]
    pushes = [_push(T0, "a"), _push(T0 + TOLERANCE, "b"), _push(T0 + TOLERANCE, "c")]
    assert _run(rows, publish(T0)) == (pushes, {})


def test_without_at_a_ping_from_the_future_is_one_after_which_the_file_goes_back() -> None:
    rows: list[Row] = [
        _row("a", KM_55, T0),
        _row("future", KM_55, T0 + TOLERANCE + 1),
        _row("b", KM_55, T0 + TOLERANCE),
    ]
    assert _run(rows, publish(T0)) == ([_push(T0, "a"), _push(T0 + TOLERANCE, "b")], {"from_future": 1})


def test_without_at_a_return_within_the_next_100_rows_makes_a_ping_from_the_future() -> None:
    ahead: list[Row] = [_row(f"ahead{index}", KM_55, T0 + HOUR) for index in range(100)]
    rows: list[Row] = [_row("a", KM_55, T0), *ahead, _row("back", KM_55, T0)]
    assert _run(rows, publish(T0)) == ([_push(T0, "a"), _push(T0, "back")], {"from_future": 100})


def test_without_at_a_return_after_the_next_100_rows_is_a_late_ping_after_a_gap() -> None:
    ahead: list[Row] = [_row(f"ahead{index}", KM_55, T0 + HOUR) for index in range(101)]
    rows: list[Row] = [_row("a", KM_55, T0), *ahead, _row("back", KM_55, T0)]
    pushes = [_push(T0 + HOUR, f"ahead{index}", 200) for index in range(101)] + [_push(T0 + HOUR, "back", 200)]
    assert _run(rows, publish(T0)) == ([_push(T0, "a"), *pushes], {})


def test_without_at_malformed_rows_are_none_of_the_next_100() -> None:
    ahead: list[Row] = [_row(f"ahead{index}", KM_55, T0 + HOUR) for index in range(100)]
    bad: list[Row] = [_row("bad", "north", T0)] * 50
    rows: list[Row] = [_row("a", KM_55, T0), *ahead, *bad, _row("back", KM_55, T0)]
    assert _run(rows, publish(T0)) == ([_push(T0, "a"), _push(T0, "back")], {"from_future": 100, "malformed": 50})


def test_without_at_a_gap_moves_the_clock_and_runs_what_is_due() -> None:
    rows: list[Row] = [_row("a", KM_101, T0), _row("b", KM_55, T0 + 9 * HOUR), _row("c", FAR, T0 + 9 * HOUR)]
    pushes, refused = _run(rows, publish(T0), close(T0 + 2 * HOUR))
    assert pushes == [_push(T0 + HOUR, "a", 200), _push(T0 + 2 * HOUR, "a", 300, "resolved")]
    assert refused == {}


def test_without_at_the_last_ping_of_a_file_is_never_from_the_future() -> None:
    rows: list[Row] = [_row("a", KM_55, T0), _row("b", KM_55, T0 + HOUR)]
    assert _run(rows, publish(T0)) == ([_push(T0, "a"), _push(T0 + HOUR, "b", 200)], {})


def test_without_at_the_first_ping_sets_the_clock() -> None:
    rows: list[Row] = [_row("a", KM_55, T0 + WINDOW + 1), _row("old", KM_55, T0), _row("b", KM_55, T0 + 1)]
    now = T0 + WINDOW + 1
    assert _run(rows, publish(T0)) == ([_push(now, "a", 500), _push(now, "b", 500)], {"too_old": 1})


@pytest.mark.parametrize(
    "bad",
    [
        {"lat": "90.0000001"},
        {"lat": "-90.0000001"},
        {"lng": "180.0000001"},
        {"lng": "nan"},
        {"lat": "inf"},
        {"lat": ""},
        {"lat": "thirty"},
        {"device_id": ""},
        {"device_id": "x" * 65},
        {"device_id": "号" * 22},
        {"observed_at": "soon"},
        {"observed_at": ""},
        {"at": ""},
        {"at": "later"},
    ],
)
def test_malformed_row_is_set_aside_and_moves_no_clock(bad: dict[str, str]) -> None:
    spoilt = _row("phone", KM_55, T0 + HOUR, at=T0 + HOUR) | bad
    rows: list[Row] = [spoilt, _row("a", KM_55, T0, at=T0), spoilt, _row("b", KM_55, T0, at=T0 + 1)]
    assert _run(rows, publish(T0)) == ([_push(T0, "a"), _push(T0 + 1, "b")], {"malformed": 2})


def test_too_old_ping_is_refused_but_its_at_moves_the_clock() -> None:
    rows: list[Row] = [_row("old", KM_55, T0 - WINDOW, at=T0 + 1), _row("a", KM_55, T0, at=T0)]
    assert _run(rows, publish(T0)) == ([_push(T0 + 1, "a")], {"too_old": 1})


def test_partner_is_default_where_the_file_names_none() -> None:
    rows: list[Row] = [_row("a", KM_55, T0), _row("a", KM_55, T0) | {"partner": "amap"}]
    pushes, _ = _run(rows, publish(T0))
    assert [push.partner for push in pushes] == ["default", "amap"]


def test_times_are_epoch_milliseconds_or_iso_8601() -> None:
    moment = "2023-11-14T22:13:20"
    assert [parse_time_ms(text) for text in (str(T0), f"{moment}Z", f"{moment}+00:00", moment)] == [T0] * 4
    assert parse_time_ms("2023-11-15T06:13:20.250+08:00") == T0 + 250
    assert parse_time_ms("2023-11-14 22:13:20.123999Z") == T0 + 123


def test_alert_event_in_json_says_only_what_is_not_the_default(tmp_path: Path) -> None:
    alerts, pings = tmp_path / "alerts.jsonl", tmp_path / "pings.csv"
    alerts.write_text(
        '{"at":1700000060000,"event":"update","alert":{"alert_id":"a1","location":{"lat":45,"lng":114},'
        '"missing_since":"2023-11-14T22:13:20Z"}}\n'
        '{"at":1700000000000,"event":"publish","alert":{"alert_id":"a1","location":{"lat":30,"lng":114},'
        '"missing_since":1700000000000}}\n\n'
        '{"at":"2023-11-14T22:14:20.001Z","event":"close","alert_id":"a1","outcome":"found"}\n'
    )
    pings.write_text(f"device_id,lat,lng,observed_at\na,30.5,114,{T0}\n")
    assert reference_run(pings, alerts, WINDOW).pushes == [
        _push(T0, "a"),
        _push(T0 + MINUTE, "a", kind="update", revision=2),
        _push(T0 + MINUTE + 1, "a", kind="resolved", revision=2),
    ]


@pytest.mark.parametrize("name", ["pings.csv", "pings.csv.gz"])
@pytest.mark.parametrize("with_at", [True, False])
def test_generated_files_run_as_the_rows_they_were_written_from(name: str, with_at: bool, tmp_path: Path) -> None:
    for seed in range(5):
        case = generate_files(np.random.default_rng(seed), with_at=with_at, with_partner=seed != 3)
        write_ping_file(tmp_path / name, case.rows)
        write_alert_file(tmp_path / "alerts.jsonl", case.alert_events)
        assert len(read_alert_events(tmp_path / "alerts.jsonl")) == len(case.alert_events)
        from_rows = reference_run(case.rows, case.alert_events, case.live_window_ms)
        assert reference_run(tmp_path / name, tmp_path / "alerts.jsonl", case.live_window_ms) == from_rows


def test_generated_files_hold_every_kind_of_row() -> None:
    refused: set[str] = set()
    kinds: set[str] = set()
    for seed in range(30):
        case = generate_files(np.random.default_rng(seed), with_at=seed % 2 == 0)
        run = reference_run(case.rows, case.alert_events, case.live_window_ms)
        refused |= set(run.refused)
        kinds |= {push.kind for push in run.pushes}
    assert refused == {"malformed", "from_future", "too_old"}
    assert kinds == {"alert", "update", "resolved"}
