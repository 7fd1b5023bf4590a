"""What the gateway sees of the flow, without a flow: the keys that one would write."""

from __future__ import annotations

import pytest
import redis

from flows.clock import Clock
from flows.log import add_partner, append_entry, done_key, ensure_settings, last_id, log_key
from flows.metrics import Metrics
from gateway.flow_watch import STALE_S, FlowBehind, FlowWatch
from geoindex.entries import Settings, Tick

SETTINGS = Settings(shard_count=3, partners=("amap",))


class SetClock(Clock):
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.ahead_ms = 0.0
        self.passed_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.passed_s

    def now_ms(self) -> float:
        return super().now_ms() + self.ahead_ms


def finish(client: redis.Redis, shard: int) -> None:
    """As the flow does when all pushes of the shard's last entry are in the queues."""
    ms, seq = last_id(client, log_key(shard))
    client.set(done_key(shard), f"{ms}-{seq}")


def wait_ms(client: redis.Redis, since: tuple[int, int], ms: int) -> None:
    """Until the server's clock is so far on."""
    while True:
        seconds, microseconds = client.time()
        if seconds * 1000 + microseconds // 1000 > since[0] + ms:
            return


@pytest.fixture
def watch(client: redis.Redis) -> FlowWatch:
    return FlowWatch(client, 0.02, Metrics())


def test_nothing_is_taken_before_the_first_look_and_before_there_are_logs(client: redis.Redis) -> None:
    watch = FlowWatch(client, 60, Metrics())
    with pytest.raises(FlowBehind, match="not been seen"):
        watch.check()
    watch.look()
    with pytest.raises(FlowBehind, match="no logs yet"):
        watch.check()
    ensure_settings(client, SETTINGS)
    watch.look()
    assert watch.check() == SETTINGS


def test_a_shard_with_an_entry_that_waits_too_long_holds_pings_back(client: redis.Redis, watch: FlowWatch) -> None:
    ensure_settings(client, SETTINGS)
    for shard in range(3):
        finish(client, shard)
    waiting = append_entry(client, 1, Tick())
    wait_ms(client, waiting, 25)
    watch.look()
    with pytest.raises(FlowBehind, match=r"behind in shard 1, more than 0\.02 s"):
        watch.check()
    finish(client, 1)
    watch.look()
    watch.check()


def test_a_flow_that_has_finished_everything_is_not_behind_however_long_ago(
    client: redis.Redis, watch: FlowWatch
) -> None:
    ensure_settings(client, SETTINGS)
    for shard in range(3):
        finish(client, shard)
    wait_ms(client, last_id(client, log_key(2)), 30)
    watch.look()
    watch.check()


def test_a_limit_of_0_lets_pings_pile_up(client: redis.Redis) -> None:
    ensure_settings(client, SETTINGS)
    wait_ms(client, last_id(client, log_key(2)), 2)
    metrics = Metrics()
    watch = FlowWatch(client, 0, metrics)
    watch.look()
    watch.check()
    assert metrics.value("intake_flow_lag_ms") > 0


def test_what_was_seen_long_ago_is_not_believed(client: redis.Redis) -> None:
    ensure_settings(client, SETTINGS)
    clock = SetClock()
    watch = FlowWatch(client, 60, Metrics(), clock)
    watch.look()
    watch.check()
    clock.passed_s = STALE_S + 1
    with pytest.raises(FlowBehind, match="not been seen lately"):
        watch.check()


def test_partners_that_are_added_are_seen(client: redis.Redis) -> None:
    ensure_settings(client, SETTINGS)
    watch = FlowWatch(client, 60, Metrics())
    watch.look()
    add_partner(client, ["baidu"])
    assert watch.check().partners == ("amap",)
    watch.look()
    assert watch.check().partners == ("amap", "baidu")


def test_the_clock_that_counts_is_the_servers(client: redis.Redis) -> None:
    clock = SetClock()
    clock.ahead_ms = -7 * 86_400_000
    watch = FlowWatch(client, 60, Metrics(), clock)
    watch.look()
    seconds, _ = client.time()
    assert abs(watch.now_ms() - 1000 * seconds) < 60_000
