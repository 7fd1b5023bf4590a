"""The open alerts of a shard: slots, and what is next due."""

from __future__ import annotations

import random

import pytest

from geoindex import alerts as module
from geoindex.alerts import NEVER, AlertIndex, OpenAlert
from geoindex.entries import DEFAULT_EXPIRY_MS, DEFAULT_SCHEDULE, HOUR_MS, Alert


def alert(number: int, missing_since_ms: int = 0) -> Alert:
    return Alert(f"a{number}", 1, 30.0, 120.0, missing_since_ms, DEFAULT_SCHEDULE, missing_since_ms + DEFAULT_EXPIRY_MS)


def test_the_lowest_free_slot_is_given_and_room_grows_by_words() -> None:
    index = AlertIndex()
    index.set_partners(("amap",))
    opened = [index.add(alert(number), 0) for number in range(200)]
    assert [one.slot for one in opened] == list(range(200))
    assert index.slot_count == 256
    assert index.columns.audience.shape == (1, 4)
    assert index.columns.zone_mask.shape[2] >= 4
    index.remove(opened[70])
    index.remove(opened[3])
    assert [index.add(alert(number), 0).slot for number in (300, 301, 302)] == [3, 70, 200]


def test_what_is_due_next_is_what_looking_at_every_alert_finds() -> None:
    """Alerts that come, are edited, run and go at random, two of them often due at once."""
    chance = random.Random(7)
    index = AlertIndex()
    now_ms = 0
    made = 0
    for _ in range(3_000):
        now_ms += chance.randrange(0, HOUR_MS // 4)
        move = chance.random()
        held = list(index.open.values())
        if move < 0.4 or not held:
            made += 1
            opened = index.add(alert(made, now_ms - chance.randrange(5) * HOUR_MS // 2), now_ms)
            index.schedule(opened, now_ms)
        elif move < 0.6:
            opened = chance.choice(held)
            index.revise(opened, alert(int(opened.alert.alert_id[1:]), now_ms - HOUR_MS), now_ms)
            index.schedule(opened, now_ms)
        elif move < 0.8:
            index.remove(chance.choice(held))
        due = by_looking_at_all(index)
        assert index.next_due() is due
        assert index.next_due_ms() == (NEVER if due is None else due.due_ms)
        if due is not None and due.due_ms <= now_ms:
            index.schedule(due, now_ms)


def by_looking_at_all(index: AlertIndex) -> OpenAlert | None:
    return min(index.open.values(), key=lambda opened: (opened.due_ms, opened.slot), default=None)


def test_one_alert_too_many_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALERTS_MAX", 64)
    index = AlertIndex()
    for number in range(64):
        index.add(alert(number), 0)
    with pytest.raises(MemoryError, match="at most 64 open at once, got one more: 'a64'"):
        index.add(alert(64), 0)
