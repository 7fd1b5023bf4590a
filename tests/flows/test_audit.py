"""The audit against the reference matcher, and its three verdicts pinned by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from flows.audit import AuditResult, OwedPush, OwedPushes, compare
from geoindex.entries import AlertClose, AlertRevision, LogEntry, Settings, Tick
from tests.geoindex.machines import batch_of, is_well_formed
from tests.reference.events import Event, Log, PingEvent
from tests.reference.examples.builders import HOME_LAT, HOME_LNG, T0
from tests.reference.generator import HORIZONS_MS, generate_log
from tests.reference.matcher import DevicePush, run_reference
from tests.reference.worked_examples import EXAMPLES, Example


def live_entries(settings: Settings, events: Iterable[tuple[int, Event]]) -> Iterator[tuple[int, LogEntry]]:
    """Events as a live log: neighbouring pings of one moment in one batch; what the wire sets aside leaves its time."""
    partners = settings.partners
    pings: list[PingEvent] = []
    pings_at_ms = 0
    yield 0, settings
    for at_ms, event in events:
        if isinstance(event, PingEvent) and pings and at_ms == pings_at_ms:
            pings.append(event)
            continue
        if pings:
            yield pings_at_ms, batch_of([ping for ping in pings if is_well_formed(ping, partners)], partners)
            pings = []
        match event:
            case PingEvent():
                pings, pings_at_ms = [event], at_ms
            case Settings():
                partners = event.partners
                yield at_ms, event
            case AlertRevision() if event.alert.revision < 1:
                pass  # refused by the wire
            case AlertRevision() | AlertClose() | Tick():
                yield at_ms, event
    if pings:
        yield pings_at_ms, batch_of([ping for ping in pings if is_well_formed(ping, partners)], partners)


def owed(settings: Settings, events: Iterable[tuple[int, Event]]) -> list[OwedPush]:
    audit = OwedPushes()
    for at_ms, entry in live_entries(settings, events):
        audit.apply(at_ms, entry)
    return audit.pushes


def as_owed(pushes: Iterable[DevicePush]) -> list[OwedPush]:
    return [OwedPush(push.kind, push.alert_id, push.revision, push.partner, push.device_id) for push in pushes]


def by_device_and_alert(pushes: Iterable[OwedPush]) -> dict[tuple[str, str, str], list[tuple[str, int]]]:
    told: dict[tuple[str, str, str], list[tuple[str, int]]] = {}
    for push in pushes:
        told.setdefault((push.partner, push.device_id, push.alert_id), []).append((push.kind, push.revision))
    return told


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name.replace(" ", "_"))
def test_a_worked_example_owes_what_was_worked_out_by_hand(example: Example) -> None:
    expected = as_owed(example.expected_pushes)
    assert by_device_and_alert(owed(example.settings, example.events)) == by_device_and_alert(expected)


@pytest.mark.parametrize("seed", range(1000, 1040))
def test_what_is_owed_by_a_log_is_what_the_reference_pushes(seed: int) -> None:
    log = generate_log(np.random.default_rng(seed))
    assert_owed_as_pushed(log)


def test_what_is_owed_by_a_log_of_many_open_alerts_is_what_the_reference_pushes() -> None:
    log = generate_log(
        np.random.default_rng(77), event_count=1500, alert_count_max=150, horizon_ms=HORIZONS_MS[0], device_count=40
    )
    assert_owed_as_pushed(log)


def assert_owed_as_pushed(log: Log) -> None:
    expected = as_owed(run_reference(log).pushes)
    assert len(expected) > 10, "a log that pushes next to nothing tests nothing"
    found = owed(log.settings, log.events)
    assert Counter(found) == Counter(expected)
    assert by_device_and_alert(found) == by_device_and_alert(expected)


def test_more_devices_than_the_first_rows_hold_are_all_owed() -> None:
    settings = Settings(shard_count=1, partners=("amap",))
    count = 2500
    pings: list[tuple[int, Event]] = [
        (T0, PingEvent("amap", f"phone-{number}", round(HOME_LAT * 1e7), round(HOME_LNG * 1e7), T0))
        for number in range(count)
    ]
    (published,) = (event for event in EXAMPLES[0].events if isinstance(event[1], AlertRevision))
    at_ms, publish = published
    assert isinstance(publish, AlertRevision)
    found = owed(settings, [*pings, (max(at_ms, T0), publish)])
    assert Counter(push.device_id for push in found) == Counter(f"phone-{number}" for number in range(count))


def test_a_batch_with_a_clock_of_its_own_is_refused() -> None:
    audit = OwedPushes()
    audit.apply(0, Settings(partners=("amap",)))
    recorded = batch_of([PingEvent("amap", "a", 0, 0, T0)], ("amap",), [T0])
    with pytest.raises(ValueError, match="must not carry a clock of its own"):
        audit.apply(T0, recorded)


# ---- the comparison

TOLD_A = OwedPush("alert", "a1", 1, "amap", "a")
TOLD_B = OwedPush("alert", "a1", 1, "amap", "b")
RESOLVED_A = OwedPush("resolved", "a1", 2, "amap", "a")


def test_queues_that_hold_what_was_owed_are_clean_in_any_order() -> None:
    result = compare([TOLD_A, TOLD_B, RESOLVED_A], [TOLD_B, TOLD_A, RESOLVED_A])
    assert result == AuditResult(3, [], [], [])
    assert result.clean
    assert result.line() == "3 pushes, 0 missed, 0 extra, 0 duplicate"


def test_a_push_that_was_owed_and_is_not_queued_is_missed() -> None:
    result = compare([TOLD_A, TOLD_B], [TOLD_A])
    assert result == AuditResult(1, [TOLD_B], [], [])
    assert not result.clean


def test_a_push_that_was_not_owed_is_extra() -> None:
    result = compare([TOLD_A], [TOLD_A, TOLD_B])
    assert result == AuditResult(2, [], [TOLD_B], [])
    assert not result.clean


def test_a_push_that_is_queued_three_times_is_a_duplicate_twice() -> None:
    result = compare([TOLD_A, TOLD_B], [TOLD_A, TOLD_B, TOLD_A, TOLD_A])
    assert result == AuditResult(4, [], [], [TOLD_A, TOLD_A])
    assert not result.clean


@pytest.mark.parametrize(
    "wrong",
    [
        TOLD_A._replace(kind="update"),
        TOLD_A._replace(alert_id="a2"),
        TOLD_A._replace(revision=2),
        TOLD_A._replace(partner="baidu"),
        TOLD_A._replace(device_id="A"),
    ],
    ids=["kind", "alert", "revision", "partner", "device"],
)
def test_a_push_that_differs_in_anything_is_both_missed_and_extra(wrong: OwedPush) -> None:
    assert compare([TOLD_A], [wrong]) == AuditResult(1, [TOLD_A], [wrong], [])


def test_all_three_faults_are_told_apart_and_counted() -> None:
    result = compare([TOLD_A, TOLD_B], [TOLD_A, TOLD_A, RESOLVED_A])
    assert result.line() == "3 pushes, 1 missed, 1 extra, 1 duplicate"


def test_a_large_number_of_pushes_is_written_with_separators() -> None:
    pushes = [TOLD_A._replace(device_id=str(number)) for number in range(1234)]
    assert compare(pushes, pushes).line() == "1,234 pushes, 0 missed, 0 extra, 0 duplicate"


def test_a_log_without_alerts_owes_nothing_to_anybody() -> None:
    assert owed(Settings(partners=("amap",)), [(T0, PingEvent("amap", "a", 300_000_000, 1_140_000_000, T0))]) == []
    assert compare([], []).clean
