"""The audit against the reference matcher, and its three verdicts pinned by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from flows.audit import AuditResult, OwedPush, OwedPushes, compare
from flows.reconcile import facts_of
from geoindex.entries import HOUR_MS, AlertClose, AlertRevision, LogEntry, Settings, Tick
from geoindex.shard import ShardMachine
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


@pytest.mark.parametrize("seed", range(2000, 2012))
def test_an_account_that_goes_on_from_a_shard_machine_owes_what_the_whole_account_owes(seed: int) -> None:
    log = generate_log(np.random.default_rng(seed))
    entries = list(live_entries(log.settings, log.events))
    whole, machine = OwedPushes(), ShardMachine()
    starts = set(np.random.default_rng(seed).integers(1, len(entries), 5).tolist())
    accounts: list[tuple[int, OwedPushes]] = []
    for number, (at_ms, entry) in enumerate(entries):
        if number in starts:
            accounts.append((len(whole.pushes), OwedPushes(facts_of(machine))))
        for account in (whole, *(account for _, account in accounts)):
            account.apply(at_ms, entry, number)
        machine.apply(at_ms, entry)
    pushes = whole.pushes
    assert len(pushes) > 10
    for behind, account in accounts:
        assert Counter(account.pushes) == Counter(pushes[behind:])
        assert account.closed == whole.closed


def test_a_location_that_has_expired_stays_expired_when_the_live_window_gets_longer() -> None:
    (published,) = (event for event in EXAMPLES[0].events if isinstance(event[1], AlertRevision))
    assert isinstance(published[1], AlertRevision)
    at_ms = max(T0, published[0])
    home = PingEvent("amap", "a", round(HOME_LAT * 1e7), round(HOME_LNG * 1e7), at_ms - 2 * HOUR_MS)
    fresh = replace(home, device_id="b", observed_at_ms=at_ms - HOUR_MS // 2)
    settings = Settings(partners=("amap",), live_window_ms=HOUR_MS)
    audit = OwedPushes()
    audit.apply(0, settings)
    audit.apply(home.observed_at_ms, batch_of([home], ("amap",)))
    audit.apply(fresh.observed_at_ms, batch_of([fresh], ("amap",)))
    audit.apply(at_ms, replace(settings, live_window_ms=6 * HOUR_MS))
    audit.apply(at_ms, published[1])
    assert [push.device_id for push in audit.pushes] == ["b"]


def test_what_is_owed_is_owed_by_a_log_entry() -> None:
    (published,) = (event for event in EXAMPLES[0].events if isinstance(event[1], AlertRevision))
    audit = OwedPushes()
    audit.apply(0, Settings(partners=("amap",)))
    home = PingEvent("amap", "a", round(HOME_LAT * 1e7), round(HOME_LNG * 1e7), T0)
    audit.apply(T0, batch_of([home, replace(home, device_id="b")], ("amap",)), 7)
    audit.apply(max(T0, published[0]), published[1], 9)  # type: ignore[arg-type]
    audit.apply(max(T0, published[0]) + 1, batch_of([replace(home, device_id="c")], ("amap",)), 11)
    assert [(owed.log_id[1], len(owed.rows)) for owed in audit.owed] == [(9, 2), (11, 1)]


def test_more_alerts_than_a_word_of_bits_are_told_apart() -> None:
    (published,) = (event for event in EXAMPLES[0].events if isinstance(event[1], AlertRevision))
    revision = published[1]
    assert isinstance(revision, AlertRevision)
    audit = OwedPushes()
    audit.apply(0, Settings(partners=("amap",)))
    at_ms = max(T0, published[0])
    home = PingEvent("amap", "a", round(HOME_LAT * 1e7), round(HOME_LNG * 1e7), at_ms)
    for number in range(150):
        alert = replace(revision.alert, alert_id=f"alert-{number}")
        audit.apply(at_ms, replace(revision, alert=alert, desk_id=(1, number + 1)))
    audit.apply(at_ms, batch_of([home], ("amap",)))
    audit.apply(at_ms, batch_of([home], ("amap",)))
    assert Counter(push.alert_id for push in audit.pushes) == {f"alert-{number}": 1 for number in range(150)}


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
    assert result.line() == "3 pushes, 0 missed, 0 extra, 0 duplicate, 0 unretracted"


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
    assert result.line() == "3 pushes, 1 missed, 1 extra, 1 duplicate, 0 unretracted"


def test_a_device_told_of_an_alert_that_has_ended_and_not_that_it_has_is_unretracted() -> None:
    result = compare([TOLD_A, TOLD_B, RESOLVED_A], [TOLD_A, TOLD_B, RESOLVED_A], closed={"a1"})
    assert result == AuditResult(3, [], [], [], [TOLD_B])
    assert not result.clean
    assert compare([TOLD_A], [TOLD_A], closed={"a2"}).clean


def test_a_large_number_of_pushes_is_written_with_separators() -> None:
    pushes = [TOLD_A._replace(device_id=str(number)) for number in range(1234)]
    assert compare(pushes, pushes).line() == "1,234 pushes, 0 missed, 0 extra, 0 duplicate, 0 unretracted"


def test_a_log_without_alerts_owes_nothing_to_anybody() -> None:
    assert owed(Settings(partners=("amap",)), [(T0, PingEvent("amap", "a", 300_000_000, 1_140_000_000, T0))]) == []
    assert compare([], []).clean
