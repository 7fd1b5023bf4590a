"""Alarms: raised once, cleared once, and on their way to whoever asks."""

from __future__ import annotations

import logging

import pytest
import redis

from flows.alarms import ALARM_KINDS, Alarm, AlarmBoard
from flows.metrics import Metrics, Stats, StatsPublisher, read_stats
from tests.flows.waiting import memory_limit


def test_an_alarm_is_one_line_when_it_is_raised_and_one_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    board = AlarmBoard()
    with caplog.at_level(logging.WARNING):
        board.clear("memory")
        board.set("memory", "71 % full")
        board.set("memory", "80 % full")
        assert board.current() == [Alarm("memory", "", "80 % full")]
        board.clear("memory")
        board.clear("memory")
    assert board.current() == []
    assert caplog.messages == ["alarm memory: 71 % full", "alarm memory: is over"]


def test_sources_of_one_kind_are_told_apart() -> None:
    board = AlarmBoard()
    board.set("pushes_held", "full", "shard 1")
    board.put("pushes_held", "full", "shard 0")
    board.put("pushes_held", None, "shard 1")
    assert board.current() == [Alarm("pushes_held", "shard 0", "full")]


def test_an_unknown_kind_is_a_mistake_in_the_program() -> None:
    with pytest.raises(AssertionError, match="unknown alarm 'nonsense'"):
        AlarmBoard().set("nonsense", "")


def test_every_kind_is_a_gauge_that_is_1_if_it_is_on_in_any_process() -> None:
    calm, alarmed = Metrics(), Metrics()
    alarmed.alarms.set("memory", "71 % full")
    alarmed.alarms.set("checkpoint_age", "old", "shard 1")
    alarmed.alarms.set("checkpoint_age", "old", "shard 2")
    for first, second in ((1, 2), (2, 1)):  # whoever spoke last
        stats = Stats([calm.snapshot() | {"at_ms": first}, alarmed.snapshot() | {"at_ms": second}])
        on = {kind for kind in ALARM_KINDS if stats.total("alarm", kind=kind)}
        assert on == {"memory", "checkpoint_age"}
        assert stats.by_label("alarm", "kind").keys() == ALARM_KINDS.keys()
        assert len(stats.alarms) == 3


def test_alarms_are_published_by_a_server_that_takes_nothing_else(client: redis.Redis) -> None:
    metrics = Metrics()
    metrics.alarms.set("pushes_held", "the server is full", "shard 3")
    with memory_limit(client, 1):
        StatsPublisher(client, metrics).publish()
        stats = read_stats(client)
    assert stats.alarms == [Alarm("pushes_held", "shard 3", "the server is full")]
    assert stats.process_count == 1
