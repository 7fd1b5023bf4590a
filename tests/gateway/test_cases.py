"""What is kept of a child, for how long, and what the sweeper does about it: under a clock of the test's own."""

from __future__ import annotations

from typing import cast

import msgspec
import pytest
import redis

from flows.desk import Desk
from flows.metrics import Metrics
from gateway.cases import (
    CLOSED_KEY,
    DAY_MS,
    OPEN_KEY,
    Case,
    ChildWords,
    Sweeper,
    Words,
    case_key,
    move_alarm,
    photo_key,
    read_case,
    with_move,
    write_case,
    write_closed,
)
from gateway.statistics import STATISTICS_KEY
from geoindex.entries import AUTO_CLOSE_MS, DEFAULT_SCHEDULE, HOUR_MS, Alert

DETAILS_DAYS = 30.0
CASE = Case(
    alert_id="a1",
    division="330106",
    officer="officer:值班",
    status="actual",
    published_at_ms=0,
    words=Words(child=ChildWords(name="王小明"), text="红色外套"),
    photo="ab" * 32,
)


@pytest.fixture
def desk(client: redis.Redis) -> Desk:
    return Desk(client)


@pytest.fixture
def published_ms(client: redis.Redis, desk: Desk) -> int:
    """An alert with a case and a picture; when it was published."""
    now_ms = desk.now_ms()
    desk.publish(Alert("a1", 1, 30.0, 120.0, now_ms, DEFAULT_SCHEDULE, now_ms + HOUR_MS))
    with client.pipeline() as pipeline:
        write_case(pipeline, msgspec.structs.replace(CASE, published_at_ms=now_ms))
        pipeline.set(photo_key("a1"), b"jpeg")
        pipeline.execute()
    return now_ms


def sweeper(client: redis.Redis, metrics: Metrics | None = None) -> Sweeper:
    return Sweeper(client, DETAILS_DAYS, metrics or Metrics())


def close_here(client: redis.Redis, desk: Desk, at_ms: int) -> None:
    desk.close("a1", "found")
    case = read_case(client, "a1")
    assert case is not None
    with client.pipeline() as pipeline:
        write_closed(pipeline, case, "found", "killed", at_ms)
        pipeline.execute()


def test_details_of_a_child_are_gone_some_days_after_closing_and_not_before(
    client: redis.Redis, desk: Desk, published_ms: int
) -> None:
    close_here(client, desk, published_ms)
    before = read_case(client, "a1")
    sweeper(client).sweep(published_ms + 30 * DAY_MS - 1)
    assert read_case(client, "a1") == before
    assert client.exists(photo_key("a1"))
    sweeper(client).sweep(published_ms + 30 * DAY_MS)
    after = read_case(client, "a1")
    assert before is not None and after is not None
    assert after == msgspec.structs.replace(
        before, words=None, photo=None, category=None, erased_at_ms=published_ms + 30 * DAY_MS
    )
    assert not client.exists(photo_key("a1"))
    raw = cast(bytes, client.get(case_key("a1")))
    assert "王小明".encode() not in raw and b"killed" not in raw
    assert (client.scard(OPEN_KEY), client.zcard(CLOSED_KEY)) == (0, 0)


def test_open_alert_keeps_its_details_however_old_it_is(client: redis.Redis, desk: Desk, published_ms: int) -> None:
    sweeper(client).sweep(published_ms + HOUR_MS + AUTO_CLOSE_MS - 1)
    case = read_case(client, "a1")
    assert case is not None and case.words is not None and case.closed_at_ms is None


def test_alert_that_closed_by_itself_is_noted_counted_and_erased(
    client: redis.Redis, desk: Desk, published_ms: int
) -> None:
    closed_ms = published_ms + HOUR_MS + AUTO_CLOSE_MS
    sweeper(client).sweep(closed_ms + 5 * DAY_MS)
    case = read_case(client, "a1")
    assert case is not None
    assert (case.outcome, case.category, case.closed_at_ms) == ("cancelled", None, closed_ms)
    (counted,) = cast("dict[bytes, bytes]", client.hgetall(STATISTICS_KEY)).items()
    assert counted[0].endswith(b":330106:cancelled:-") and counted[1] == b"1"
    sweeper(client).sweep(closed_ms + 30 * DAY_MS)
    erased = read_case(client, "a1")
    assert erased is not None and erased.words is None


def test_alert_that_was_closed_at_the_terminal_is_noted_once_by_however_many_sweepers(
    client: redis.Redis, desk: Desk, published_ms: int
) -> None:
    desk.close("a1", "false_report")
    sweepers = [sweeper(client) for _ in range(3)]
    for each in sweepers:
        each.sweep(published_ms + 1000)
    case = read_case(client, "a1")
    assert case is not None and case.outcome == "false_report"
    assert list(cast("dict[bytes, bytes]", client.hgetall(STATISTICS_KEY)).values()) == [b"1"]


def test_sweeper_takes_up_what_another_left_undone(
    client: redis.Redis, desk: Desk, published_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_here(client, desk, published_ms)
    due_ms = published_ms + 30 * DAY_MS
    dying = sweeper(client)

    def dies(*_: object) -> None:
        raise redis.ConnectionError("died")

    monkeypatch.setattr(dying, "_erase", dies)
    with pytest.raises(redis.ConnectionError):
        dying.sweep(due_ms)
    assert client.exists(photo_key("a1"))
    sweeper(client).sweep(due_ms)
    assert not client.exists(photo_key("a1"))


def test_alarm_of_a_wandering_ring_is_on_for_an_hour_in_every_gateway(client: redis.Redis, published_ms: int) -> None:
    case = msgspec.structs.replace(CASE, moves_ms=(published_ms, published_ms + 1, published_ms + 2))
    with client.pipeline() as pipeline:
        write_case(pipeline, case)
        pipeline.execute()
    metrics = Metrics()
    other = sweeper(client, metrics)
    other.sweep(published_ms + 3)
    (alarm,) = metrics.alarms.current()
    assert (alarm.kind, alarm.source) == ("alert_moved", "a1")
    assert alarm.words == "alert 'a1' of division 330106 was moved or shrunk 3 times within an hour"
    other.sweep(published_ms + HOUR_MS + 3)
    assert metrics.alarms.current() == []


def test_sweeper_thread_sweeps_and_ends(client: redis.Redis, desk: Desk, published_ms: int) -> None:
    desk.close("a1", "cancelled")
    each = Sweeper(client, 0.0, Metrics())
    each.start()
    each.stop()
    case = read_case(client, "a1")
    assert case is not None and case.closed_at_ms is not None  # one sweep is made in any case


def test_words_that_were_given_at_the_terminal_are_erased_as_well(client: redis.Redis, desk: Desk) -> None:
    now_ms = desk.now_ms()
    for alert_id in ("t1", "t2"):
        alert = Alert(alert_id, 1, 30.0, 120.0, now_ms, DEFAULT_SCHEDULE, now_ms + HOUR_MS)
        desk.publish(alert, {"headline": "王小明"})
    desk.close("t1", "found")
    due_ms = desk.now_ms() + 30 * DAY_MS
    each = sweeper(client)
    each.sweep(due_ms - DAY_MS)
    assert [alert.content for alert in desk.list()] == [{"headline": "王小明"}] * 2
    each.sweep(due_ms)
    contents = {alert.alert.alert_id: alert.content for alert in desk.list()}
    assert contents == {"t1": {}, "t2": {"headline": "王小明"}}
    known = desk.show("t1")
    assert known is not None and (known.outcome, known.alert.revision) == ("found", 2)


def test_sweeper_that_fails_again_and_again_says_so_and_goes_on(
    client: redis.Redis, desk: Desk, published_ms: int
) -> None:
    metrics = Metrics()
    each = Sweeper(client, 0.0, metrics)
    kept = cast(bytes, client.get(case_key("a1")))
    client.set(case_key("a1"), b"no case")
    for _ in range(10):
        assert metrics.alarms.current() == []
        each.look()
    assert [alarm.kind for alarm in metrics.alarms.current()] == ["cases_unswept"]
    client.set(case_key("a1"), kept)
    each.look()
    assert metrics.alarms.current() == []


NOW_MS = 1_800_000_000_000
RING = Alert("a1", 1, 30.0, 120.0, NOW_MS, ((1.0, 100.0), (None, 200.0)), NOW_MS + HOUR_MS)


@pytest.mark.parametrize(
    ("edited", "is_move"),
    [
        (RING, False),
        (Alert("a1", 2, 30.0, 120.0, NOW_MS, ((None, 300.0),), NOW_MS + HOUR_MS), False),
        (Alert("a1", 2, 30.0, 120.0, NOW_MS - HOUR_MS, RING.schedule, NOW_MS + HOUR_MS), False),
        (Alert("a1", 2, 30.0, 120.0, NOW_MS, RING.schedule, NOW_MS + 9 * HOUR_MS), False),
        (Alert("a1", 2, 30.0, 120.001, NOW_MS, RING.schedule, NOW_MS + HOUR_MS), True),
        (Alert("a1", 2, 30.0, 120.0, NOW_MS, ((1.0, 99.0), (None, 200.0)), NOW_MS + HOUR_MS), True),
        (Alert("a1", 2, 30.0, 120.0, NOW_MS, ((1.0, 100.0), (None, 150.0)), NOW_MS + HOUR_MS), True),
    ],
)
def test_move_or_shrinking_is_noted_and_growth_is_not(edited: Alert, is_move: bool) -> None:
    assert (with_move(CASE, RING, edited, NOW_MS).moves_ms != ()) == is_move


def test_moves_of_more_than_an_hour_ago_are_forgotten() -> None:
    case = CASE
    moved = Alert("a1", 2, 30.0, 120.1, NOW_MS, RING.schedule, NOW_MS + HOUR_MS)
    for minutes in (0, 29, 61, 95):
        at_ms = NOW_MS + minutes * 60_000
        case = with_move(case, RING, moved, at_ms)
        assert move_alarm(case, at_ms) is None
    assert move_alarm(with_move(case, RING, moved, NOW_MS + 96 * 60_000), NOW_MS + 96 * 60_000) is not None
