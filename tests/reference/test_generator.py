"""Generated logs are legal, repeatable, and hold what they promise; the reference keeps its invariants on them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from geoindex.entries import HOUR_MS, AlertRevision, Settings, Tick
from tests.reference.events import Log, PingEvent
from tests.reference.generator import HORIZONS_MS, LATE_PARTNER, generate_log, logs
from tests.reference.matcher import ReferenceMatcher, by_device_and_alert, great_circle_km, ring_km, run_reference
from tests.reference.places import PENTAGONS, edges_of, is_clear_of, travel

relaxed = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


def _pings(log: Log) -> list[PingEvent]:
    return [event for _, event in log.events if isinstance(event, PingEvent)]


def test_same_seed_gives_the_same_log() -> None:
    first, again, other = (generate_log(np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert first == again != other


@pytest.mark.parametrize("seed", range(5))
def test_clock_never_falls_and_desk_ids_rise(seed: int) -> None:
    log = generate_log(np.random.default_rng(seed))
    assert all(earlier <= later for (earlier, _), (later, _) in pairwise(log.events))
    desk_ids = [event.desk_id for _, event in log.events if isinstance(event, AlertRevision)]
    assert all(earlier < later for earlier, later in pairwise(desk_ids))


@pytest.mark.parametrize("seed", range(5))
def test_no_valid_ping_is_within_a_millimetre_of_any_ring(seed: int) -> None:
    log = generate_log(np.random.default_rng(seed))
    edges = edges_of(event.alert for _, event in log.events if isinstance(event, AlertRevision))
    for ping in _pings(log):
        if abs(ping.lat) <= 90 and abs(ping.lng) <= 180:
            assert is_clear_of(edges, (ping.lat_e7, ping.lng_e7))


def test_logs_hold_everything_that_is_hard() -> None:
    found: Counter[str] = Counter()
    for seed in range(60):
        log = generate_log(np.random.default_rng(seed))
        matcher = ReferenceMatcher(log.settings)
        expiry_passed = 0
        for at_ms, event in log.events:
            open_before, closes_before = set(matcher.open_alerts), len(matcher.closed_ids)
            matcher.feed(at_ms, event)
            found["30-day close"] += isinstance(event, Tick | PingEvent) and len(matcher.closed_ids) > closes_before
            found["partner joins"] += isinstance(event, Settings)
            for state in matcher.open_alerts.values():
                expiry_passed += at_ms > state.alert.expires_at_ms
                if isinstance(event, PingEvent) and abs(event.lat) <= 90:
                    off_km = great_circle_km(state.alert.lat, state.alert.lng, event.lat, event.lng)
                    found["at the edge"] += any(abs(off_km - km) < 2e-3 for _, km in state.alert.schedule)
            if isinstance(event, AlertRevision) and event.alert.alert_id in open_before:
                edited = matcher.open_alerts.get(event.alert.alert_id)
                found["edit" if edited and edited.alert is event.alert else "stale or refused edit"] += 1
        found.update(push.kind for push in matcher.pushes)
        found.update(matcher.refused)
        found["expired and open"] += expiry_passed > 0
        found["late partner told"] += any(push.partner == LATE_PARTNER for push in matcher.pushes)
        found["gap beyond the window"] += any(b - a > 6 * HOUR_MS for (a, _), (b, _) in pairwise(log.events))
        found["near a pentagon"] += sum(
            min(great_circle_km(*centre, ping.lat, ping.lng) for centre in PENTAGONS) < 20 for ping in _pings(log)[:50]
        )
    expected = {"alert", "update", "resolved", "bad_id", "bad_coordinates", "from_future", "too_old", "30-day close"}
    expected |= {"partner joins", "at the edge", "edit", "stale or refused edit", "expired and open"}
    expected |= {"late partner told", "gap beyond the window", "near a pentagon"}
    assert {name for name, count in found.items() if count >= 10} >= expected, found


def test_a_busy_log_keeps_more_alerts_open_than_a_machine_word_has_bits() -> None:
    log = generate_log(np.random.default_rng(1), event_count=2000, alert_count_max=300, horizon_ms=HORIZONS_MS[0])
    matcher = ReferenceMatcher(log.settings)
    open_max = 0
    for at_ms, event in log.events:
        matcher.feed(at_ms, event)
        open_max = max(open_max, len(matcher.open_alerts))
    assert open_max > 128


def test_travel_arrives_at_the_distance_it_set_out_for() -> None:
    for start in [(39.9, 116.4), (0.0, 180.0), (-17.0, -179.99), *PENTAGONS]:
        for bearing in range(0, 360, 30):
            for distance_km in (0.01, 100.0, 1000.0):
                lat, lng = travel(start, bearing, distance_km)
                assert -180 <= lng <= 180
                assert great_circle_km(*start, lat, lng) == pytest.approx(distance_km, abs=1e-6)


@relaxed
@given(log=logs())
def test_a_device_hears_one_alert_then_updates_then_one_resolved(log: Log) -> None:
    for pushes in by_device_and_alert(run_reference(log).pushes).values():
        kinds = [push.kind for push in pushes]
        assert kinds[0] == "alert"
        assert set(kinds[1:-1]) <= {"update"}
        assert kinds[-1] in {"update", "resolved"} or len(kinds) == 1
        assert all(earlier.at_ms <= later.at_ms for earlier, later in pairwise(pushes))
        assert all(earlier.revision <= later.revision for earlier, later in pairwise(pushes))


@relaxed
@given(log=logs())
def test_after_every_event_all_live_devices_inside_were_told(log: Log) -> None:
    matcher = ReferenceMatcher(log.settings)
    for at_ms, event in log.events:
        matcher.feed(at_ms, event)
        for state in matcher.open_alerts.values():
            alert = state.alert
            if at_ms > alert.expires_at_ms:
                continue
            for device, where in matcher.locations.items():
                assert where.observed_at_ms >= at_ms - matcher.current_settings.live_window_ms
                if alert.audience is None or device[0] in alert.audience:
                    distance_km = great_circle_km(alert.lat, alert.lng, where.lat, where.lng)
                    assert distance_km > ring_km(alert, at_ms) or device in state.told


@relaxed
@given(log=logs())
def test_ticks_change_nothing(log: Log) -> None:
    """Rule 11: a tick in each pause, and at each end of it, gives the same pushes in the same order."""
    ticked = [(at_ms, event) for at_ms, event in log.events[:1]]
    for (before_ms, _), (at_ms, event) in pairwise(log.events):
        ticked += [(before_ms, Tick()), ((before_ms + at_ms) // 2, Tick()), (at_ms, Tick()), (at_ms, event)]
    with_ticks = run_reference(Log(log.settings, tuple(ticked))).pushes
    without = [entry for entry in log.events[:-1] if not isinstance(entry[1], Tick)] + [log.events[-1]]
    assert by_device_and_alert(with_ticks) == by_device_and_alert(run_reference(log).pushes)
    assert by_device_and_alert(with_ticks) == by_device_and_alert(
        run_reference(Log(log.settings, tuple(without))).pushes
    )
