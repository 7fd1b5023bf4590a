"""The guards: clock, memory, settings. Virtual clocks; the server is real."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
import redis

from flows.clock import Clock
from flows.desk import Desk, RelayThread
from flows.guards import (
    PINGS_HELD_KEY,
    AppendsRefused,
    ClockGuard,
    Guards,
    MemoryGuard,
    PingsRefused,
    refused_now,
)
from flows.log import LogWriter, ensure_settings, last_id, log_key, parse_id, relay_key
from flows.log_reader import LogReader
from flows.metrics import Metrics
from flows.server import Link
from geoindex.entries import DEFAULT_EXPIRY_MS, DEFAULT_SCHEDULE, Alert, Settings
from tests.flows.waiting import eventually, memory_limit
from tests.geoindex.machines import batch_of
from tests.reference.events import PingEvent

SETTINGS = Settings(shard_count=1, partners=("amap",), hash_key=5)
HOUR_AHEAD_MS = 3_600_000.0


# ---- arithmetic


@pytest.mark.parametrize(
    ("ahead_ms", "round_trip_s", "alarms", "refuses"),
    [
        (0, 0.001, False, False),
        (1_999, 0, False, False),
        (2_001, 0, True, False),
        (-2_001, 0, True, False),
        (30_000, 0, True, False),
        (30_001, 0, True, True),
        (-30_001, 0, True, True),
        # Of an answer that took four seconds, two are uncertain either way.
        (3_900, 4.0, False, False),
        (4_100, 4.0, True, False),
        (31_900, 4.0, True, False),
        (32_100, 4.0, True, True),
    ],
)
def test_clock_alarms_beyond_2_s_and_refuses_beyond_30(
    ahead_ms: float, round_trip_s: float, alarms: bool, refuses: bool
) -> None:
    guard = ClockGuard()
    # The answer was given in the middle of the round trip.
    guard.observe(1e12 + ahead_ms, 1e12 + 500 * round_trip_s, round_trip_s, now_s=100.0)
    assert guard.offset_ms == pytest.approx(ahead_ms)
    assert (guard.alarm() is not None) == alarms
    assert (guard.refusal(100.0) is not None) == refuses


def test_a_clock_that_was_never_or_long_ago_compared_is_not_trusted() -> None:
    guard = ClockGuard()
    assert guard.refusal(0.0) == "the server's clock has not been compared with ours yet"
    guard.observe(1e12, 1e12, 0.0, now_s=100.0)
    assert guard.refusal(110.0) is None
    assert guard.refusal(111.0) == "the server's clock was last compared with ours 11 s ago"
    assert guard.alarm() is None


def test_clock_says_which_is_ahead() -> None:
    guard = ClockGuard()
    guard.observe(1e12 + 45_000, 1e12, 0.0, 0.0)
    assert "the server's clock is 45.0 s ahead of this process's" in str(guard.refusal(0.0))
    guard.observe(1e12 - 3_000, 1e12, 0.0, 0.0)
    assert "the server's clock is 3.0 s behind this process's" in str(guard.alarm())


def test_memory_refuses_above_70_percent_until_it_is_below_65() -> None:
    guard = MemoryGuard()
    refused = []
    for used in (60, 70, 71, 80, 66, 65, 66, 70, 71):
        guard.observe(used, 100)
        refused.append(guard.refusal() is not None)
    assert refused == [False, False, True, True, True, False, False, False, True]


def test_a_server_without_a_limit_refuses_nothing() -> None:
    guard = MemoryGuard()
    guard.observe(1 << 50, 0)
    assert guard.refusal() is None


# ---- against a server


class WrongClock(Clock):
    """This machine's clocks, off by what a test says."""

    wrong_by_ms = 0.0
    skipped_s = 0.0

    def now_ms(self) -> float:
        return super().now_ms() + self.wrong_by_ms

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.skipped_s


class Watch:
    """A wall clock that a test sets wrong, and the guards that live by it."""

    def __init__(self, client: redis.Redis, unsafe: bool = False) -> None:
        self.clock = WrongClock()
        self.metrics = Metrics()
        self.guards = Guards(client, unsafe, self.metrics, self.clock, interval_s=0.01)

    def alarms(self) -> list[str]:
        return [alarm.kind for alarm in self.metrics.alarms.current()]


@pytest.fixture
def watch(client: redis.Redis) -> Iterator[Watch]:
    watch = Watch(client)
    yield watch
    watch.guards.stop()


def a_ping(number: int = 1) -> PingEvent:
    return PingEvent("amap", f"phone-{number}", 300_000_000, 1_140_000_000, round(time.time() * 1000))


def test_nothing_is_appended_before_the_first_look(watch: Watch) -> None:
    with pytest.raises(AppendsRefused, match="has not been compared"):
        watch.guards.check_append()
    watch.guards.observe()
    watch.guards.check_append()
    watch.guards.check_pings()
    assert watch.alarms() == []
    assert abs(watch.metrics.value("clock_offset_ms")) < 1000


def test_a_process_that_stood_still_appends_nothing_before_it_has_looked_again(watch: Watch) -> None:
    watch.guards.observe()
    watch.clock.skipped_s = 3600.0
    with pytest.raises(AppendsRefused, match=r"last compared with ours 36\d\d s ago"):
        watch.guards.check_append()
    watch.guards.observe()
    watch.guards.check_append()


def test_a_wrong_clock_raises_an_alarm_and_the_right_one_clears_it(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watch.guards.observe()
    watch.clock.wrong_by_ms = -10_000
    watch.guards.observe()
    assert watch.alarms() == ["clock_offset"]
    assert watch.metrics.value("clock_offset_ms") == pytest.approx(10_000, abs=1000)
    watch.guards.check_append()  # not so wrong that nothing is appended
    watch.guards.observe()
    assert caplog.text.count("alarm clock_offset: the server's clock is 10.") == 1
    watch.clock.wrong_by_ms = 0
    watch.guards.observe()
    assert watch.alarms() == []
    assert "alarm clock_offset: is over" in caplog.text


def test_under_a_wrong_clock_no_ping_is_appended(client: redis.Redis, watch: Watch) -> None:
    settings = ensure_settings(client, SETTINGS)
    writer = LogWriter(watch.guards.open_link, settings, watch.guards.check_pings)
    watch.clock.wrong_by_ms = HOUR_AHEAD_MS
    watch.guards.observe()
    with pytest.raises(AppendsRefused, match="behind this process's") as caught:
        writer.append_pings(batch_of([a_ping()], settings.partners))
    assert not isinstance(caught.value, PingsRefused)
    assert client.xlen(log_key(0)) == 1
    watch.clock.wrong_by_ms = 0
    watch.guards.observe()
    assert len(writer.append_pings(batch_of([a_ping()], settings.partners))) == 1
    writer.close()


def test_under_a_wrong_clock_no_tick_is_written(client: redis.Redis, watch: Watch) -> None:
    ensure_settings(client, SETTINGS)
    head = last_id(client, log_key(0))
    reader = LogReader(
        watch.guards.open_link, {0: head}, metrics=watch.metrics, ticks_refused=watch.guards.appends_refused
    )
    watch.clock.wrong_by_ms = HOUR_AHEAD_MS
    watch.guards.observe()
    time.sleep(1.1)  # the log has been silent for long enough
    for _ in range(2):
        reader.step()
    assert last_id(client, log_key(0)) == head
    watch.clock.wrong_by_ms = 0
    watch.guards.observe()
    reader.step()
    assert last_id(client, log_key(0)) > head
    reader.stop()


def test_under_a_wrong_clock_no_alert_is_copied_and_afterwards_it_is(client: redis.Redis, watch: Watch) -> None:
    ensure_settings(client, SETTINGS)
    watch.clock.wrong_by_ms = HOUR_AHEAD_MS
    watch.guards.observe()
    now_ms = round(time.time() * 1000)
    alert = Alert("a", 1, 30.0, 114.0, now_ms, DEFAULT_SCHEDULE, now_ms + DEFAULT_EXPIRY_MS)
    answer = Desk(client).publish(alert)
    relay = RelayThread(client, watch.guards.open_link, watch.metrics, watch.guards.check_append)
    relay.start()
    time.sleep(0.3)
    assert client.get(relay_key(0)) is None
    watch.clock.wrong_by_ms = 0
    watch.guards.observe()

    def copied() -> bool:
        raw = client.get(relay_key(0))
        return isinstance(raw, bytes) and parse_id(raw) == answer.desk_id

    eventually(copied)
    relay.stop()


def test_pings_wait_while_memory_fills_up_and_alerts_do_not(client: redis.Redis, watch: Watch) -> None:
    settings = ensure_settings(client, SETTINGS)
    writer = LogWriter(watch.guards.open_link, settings, watch.guards.check_pings)
    with memory_limit(client, int(client.info("memory")["used_memory"] * 1.3)):
        watch.guards.observe()
        with pytest.raises(PingsRefused, match=r"memory is \d\d % full") as caught:
            writer.append_pings(batch_of([a_ping()], settings.partners))
        assert caught.value.retry_after_s == 1.0
        watch.guards.check_append()
        assert watch.alarms() == ["memory"]
        assert watch.metrics.value("server_memory_max_bytes") < 1.4 * watch.metrics.value("server_memory_bytes")
    watch.guards.observe()
    assert watch.alarms() == []
    assert len(writer.append_pings(batch_of([a_ping()], settings.partners))) == 1
    writer.close()


def test_pings_wait_while_somebody_says_so(client: redis.Redis, watch: Watch) -> None:
    client.set(PINGS_HELD_KEY, "the disk is full of films", px=60_000)
    watch.guards.observe()
    with pytest.raises(PingsRefused, match="the disk is full of films"):
        watch.guards.check_pings()
    watch.guards.check_append()
    client.delete(PINGS_HELD_KEY)
    watch.guards.observe()
    watch.guards.check_pings()


def test_a_server_without_a_limit_is_said_once(
    client: redis.Redis, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    with memory_limit(client, 0):
        watch.guards.observe()
        watch.guards.observe()
    assert caplog.text.count("has no maxmemory") == 1
    watch.guards.check_pings()


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("appendfsync", "everysec", "always"),
        ("no-appendfsync-on-rewrite", "yes", "no"),
        ("maxmemory-policy", "allkeys-lru", "noeviction"),
    ],
)
def test_settings_that_change_break_every_link_and_refuse_the_next(
    name: str, wrong: str, right: str, client: redis.Redis, watch: Watch
) -> None:
    watch.guards.observe()
    link = watch.guards.open_link()
    client.config_set(name, wrong)
    try:
        watch.guards.observe()
        assert link.ask("PING") == b"PONG"  # looked at every few seconds
        watch.clock.skipped_s += 5.0
        watch.guards.observe()
        assert watch.alarms() == ["unsafe_server"]
        assert watch.metrics.value("unsafe_server") == 1
        with pytest.raises(redis.ConnectionError):
            link.ask("PING")
        with pytest.raises(Exception, match=f"must run with {name} {right}"):
            watch.guards.open_link()
        with pytest.raises(AppendsRefused, match=f"must run with {name} {right}"):
            watch.guards.check_append()
    finally:
        client.config_set(name, right)
    watch.clock.skipped_s += 5.0
    watch.guards.observe()
    assert watch.alarms() == []
    watch.guards.check_append()
    watch.guards.open_link().close()


def test_with_unsafe_server_it_goes_on_and_every_line_says_so(
    client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(client, unsafe=True)
    client.config_set("appendfsync", "no")
    try:
        watch.guards.observe()
        watch.guards.check_pings()
        watch.guards.open_link().close()
        assert watch.alarms() == []
        assert watch.metrics.value("unsafe_server") == 1
        logging.getLogger("elsewhere").error("100 %% of %s", "it")
        assert caplog.messages[-1] == "[unsafe server] 100 % of it"
    finally:
        client.config_set("appendfsync", "always")
        watch.clock.skipped_s += 5.0
        watch.guards.observe()
        watch.guards.stop()
    assert watch.metrics.value("unsafe_server") == 0
    logging.getLogger("elsewhere").error("safe")
    assert caplog.messages[-1] == "safe"


def test_a_server_that_does_not_answer_raises_an_alarm_and_one_that_does_clears_it(
    client: redis.Redis, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Link:
        raise redis.ConnectionError("nobody there")

    with monkeypatch.context() as patched:
        patched.setattr("flows.guards.Link", refuse)
        watch.guards.start()
        eventually(lambda: watch.alarms() == ["server_down"])
        assert "nobody there" in watch.metrics.alarms.current()[0].words
    eventually(lambda: watch.alarms() == [])
    client.client_kill_filter(_type="normal", skipme=True)
    eventually(lambda: watch.metrics.value("server_runs_total") == 1)
    eventually(lambda: watch.alarms() == [])


def test_a_moments_question_is_answered_without_a_thread(client: redis.Redis) -> None:
    assert refused_now(client) is None
