"""Token buckets under a clock of their own."""

from __future__ import annotations

import pytest

from flows.clock import Clock
from gateway.errors import Problem
from gateway.limits import Buckets, address_bucket


class StillClock(Clock):
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s


def test_a_bucket_gives_its_burst_at_once_and_its_rate_from_then_on() -> None:
    clock = StillClock()
    buckets = Buckets(clock)
    assert [buckets.take("a", 2.0, 3.0).allowed for _ in range(4)] == [True, True, True, False]
    clock.now_s += 0.5
    assert [buckets.take("a", 2.0, 3.0).allowed for _ in range(2)] == [True, False]
    clock.now_s += 1000
    assert [buckets.take("a", 2.0, 3.0).allowed for _ in range(4)] == [True, True, True, False]


def test_buckets_do_not_share() -> None:
    buckets = Buckets(StillClock())
    assert buckets.take("a", 1.0, 1.0).allowed
    assert not buckets.take("a", 1.0, 1.0).allowed
    assert buckets.take("b", 1.0, 1.0).allowed


def test_what_is_larger_than_the_burst_passes_once_the_bucket_is_full_and_is_paid_off() -> None:
    clock = StillClock()
    buckets = Buckets(clock)
    assert buckets.take("pings", 100.0, 400.0, cost=1000).allowed
    refused = buckets.take("pings", 100.0, 400.0, cost=1000)
    assert not refused.allowed
    assert refused.wait_s == pytest.approx(10.0)
    clock.now_s += refused.wait_s - 0.01
    assert not buckets.take("pings", 100.0, 400.0, cost=1000).allowed
    clock.now_s += 0.02
    assert buckets.take("pings", 100.0, 400.0, cost=1000).allowed


def test_a_refusal_is_a_problem_that_says_when_to_come_again() -> None:
    buckets = Buckets(StillClock())
    buckets.check("k", "key", 0.5, 2.0, cost=2.0)
    with pytest.raises(Problem) as caught:
        buckets.check("k", "key", 0.5, 2.0)
    assert caught.value.status_code == 429
    assert caught.value.headers == {
        "RateLimit-Policy": '"key";q=2;w=4',
        "RateLimit": '"key";r=0;t=4',
        "Retry-After": "2",
    }


def test_the_bucket_asked_least_recently_is_forgotten_first() -> None:
    buckets = Buckets(StillClock(), buckets_max=2)
    for name in ("a", "b", "a", "c"):
        buckets.take(name, 1.0, 2.0)
    assert not buckets.take("a", 1.0, 2.0).allowed
    assert buckets.take("b", 1.0, 2.0, cost=2).allowed  # forgotten, so full


def test_an_ipv6_subscriber_has_one_bucket_for_all_addresses() -> None:
    assert address_bucket("2001:db8::1") == address_bucket("2001:db8::ffff:1")
    assert address_bucket("2001:db8::1") != address_bucket("2001:db8:0:1::1")
    assert address_bucket("::ffff:192.0.2.7") == address_bucket("192.0.2.7") != address_bucket("192.0.2.8")
    assert address_bucket("no address") == address_bucket("")
