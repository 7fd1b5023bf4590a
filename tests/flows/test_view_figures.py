"""Figures: rates that are never negative, levels, quantiles, and nothing that points at few phones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.metrics import BUCKETS_MS, Stats
from flows.view_figures import DESCRIPTIONS, NO_FLOW, ViewFigures, view_figures


def snapshot(process: str, at_ms: int, counters: dict[tuple[str, str, str], float], **more: Any) -> dict[str, Any]:
    """`counters`: name, label, value of the label -> number."""
    return {
        "process": process,
        "role": "flow",
        "at_ms": at_ms,
        "started_ms": 1,
        "alarms": [],
        "counters": [[name, {label: value}, number] for (name, label, value), number in counters.items()],
        "gauges": [],
        "histograms": {},
    } | more


def pings(process: str, at_ms: int, number: float, **more: Any) -> dict[str, Any]:
    return snapshot(process, at_ms, {("pings_accepted_total", "partner", "amap"): number}, **more)


def figures(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> dict[str, float]:
    return dict(view_figures(Stats(before), Stats(now), 1).figures)


def test_a_rate_is_made_over_the_time_between_a_processs_own_snapshots() -> None:
    found = figures(
        [pings("a", 100_000, 0), pings("b", 100_000, 0)],
        [pings("a", 105_000, 500), pings("b", 104_000, 400)],
    )
    assert found["pings_per_s"] == found["pings_per_s:amap"] == 200
    assert found["flow_processes"] == 2


def test_a_process_that_ended_takes_nothing_away() -> None:
    found = figures([pings("a", 100_000, 10**6), pings("b", 100_000, 10**6)], [pings("a", 105_000, 10**6 + 50)])
    assert found["pings_per_s"] == 10


def test_a_process_that_began_counts_from_its_beginning() -> None:
    before = [pings("a", 100_000, 0)]
    found = figures(before, [pings("a", 105_000, 0), pings("b", 105_000, 30, started_ms=102_000)])
    assert found["pings_per_s"] == 10
    again = figures([pings("a", 100_000, 900)], [pings("a", 105_000, 30, started_ms=102_000)])
    assert again["pings_per_s"] == 10


def test_a_process_that_was_silent_for_a_while_makes_no_leap() -> None:
    found = figures([], [pings("a", 10**9, 10**9)])
    assert found["pings_per_s"] == 0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 10**6), st.integers(1, 10**6)), max_size=4),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 10**6), st.integers(1, 10**6)), max_size=4),
)
def test_no_rate_is_ever_negative(before: list[tuple[str, int, int]], now: list[tuple[str, int, int]]) -> None:
    found = figures([pings(*one) for one in before], [pings(*one) for one in now])
    assert all(value >= 0 for value in found.values())


def told(process: str, at_ms: int, number: float) -> dict[str, Any]:
    counters = [["pushes_total", {"partner": "amap", "kind": kind}, number] for kind in ("alert", "update")]
    return snapshot(process, at_ms, {}) | {"counters": counters}


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (1, 0), (19, 0), (20, 4), (500, 100)])
def test_matches_of_fewer_than_20_phones_are_not_shown(count: int, shown: float) -> None:
    assert figures([told("a", 0, 7)], [told("a", 5_000, 7 + count)])["matches_per_s"] == shown


@pytest.mark.parametrize(("phones", "shown"), [(0, None), (19, None), (20, 20), (29, 20), (1_234_567, 1_200_000)])
def test_live_phones_are_rounded_and_few_are_not_shown(phones: int, shown: int | None) -> None:
    now = snapshot("a", 1, {}, gauges=[["devices_live", {"shard": "0"}, phones]])
    assert figures([], [now]).get("devices_live") == shown


def latency(at_ms: int, buckets: dict[int, int]) -> dict[str, Any]:
    counts = [0] * (len(BUCKETS_MS) + 1)
    for bucket, count in buckets.items():
        counts[bucket] = count
    return snapshot("a", at_ms, {}, histograms={"ping_to_queue_ms": {"bucket_counts": counts, "sum_ms": 0.0}})


def test_quantiles_are_those_of_the_time_between_the_looks() -> None:
    found = figures([latency(0, {40: 10**6})], [latency(5_000, {4: 98, 8: 2, 40: 10**6})])
    assert (found["ping_to_queue_p50_ms"], found["ping_to_queue_p99_ms"]) == (BUCKETS_MS[4], BUCKETS_MS[8])
    assert "publish_to_queue_p50_ms" not in found
    nothing = figures([latency(0, {4: 20})], [latency(5_000, {4: 20})])
    assert "ping_to_queue_p50_ms" not in nothing
    beyond = figures([latency(0, {})], [latency(5_000, {len(BUCKETS_MS): 20})])
    assert beyond["ping_to_queue_p99_ms"] == BUCKETS_MS[-1]


@pytest.mark.parametrize(("phones", "is_shown"), [(1, False), (19, False), (20, True)])
def test_a_latency_of_fewer_than_20_phones_does_not_tell_of_them(phones: int, is_shown: bool) -> None:
    found = figures([latency(0, {4: 7})], [latency(5_000, {4: 7 + phones})])
    assert ("ping_to_queue_p50_ms" in found) == is_shown


@pytest.mark.parametrize(("entries", "shown"), [(0, 0), (1, 0), (19, 0), (20, 20), (29, 20), (1_234, 1_230)])
def test_a_queue_does_not_tell_of_few_entries(entries: int, shown: int) -> None:
    gauges = [[name, {"partner": "amap", "shards": "0-7"}, entries] for name in ("queue_entries", "queue_pending")]
    found = figures([], [snapshot("a", 1, {}, gauges=gauges)])
    assert {found[name] for name in ("queue_entries:amap", "queue_entries", "queue_pending:amap")} == {shown}


@pytest.mark.parametrize(("age_ms", "shown"), [(1, 0), (59_999, 0), (60_000, 60_000)])
def test_an_entry_that_is_not_acknowledged_is_told_after_a_minute(age_ms: int, shown: int) -> None:
    gauges = [["queue_oldest_unacknowledged_ms", {"partner": "amap", "shards": "0-7"}, age_ms]]
    assert figures([], [snapshot("a", 1, {}, gauges=gauges)])["queue_oldest_ms:amap"] == shown


def test_a_shard_without_a_process_is_behind_as_gateways_see_it() -> None:
    flow = snapshot("a", 1, {}, gauges=[["lag_ms", {"shard": "0"}, 5]])
    gateway = snapshot("g", 1, {}, role="gateway", gauges=[["intake_flow_lag_ms", {}, 9_000]])
    assert figures([], [flow, gateway])["lag_ms"] == 9_000


def test_gateways_without_a_flow_raise_an_alarm() -> None:
    gateway, flow = snapshot("g", 1, {}, role="gateway"), snapshot("a", 1, {})
    assert view_figures(Stats(), Stats([gateway]), 1).alarms == (NO_FLOW,)
    assert view_figures(Stats(), Stats([gateway, flow]), 1).alarms == ()


def test_levels_are_sums_or_the_worst_of_several() -> None:
    gauges = [
        ["lag_ms", {"shard": "0"}, 5],
        ["lag_ms", {"shard": "1"}, 70],
        ["queue_entries", {"partner": "amap", "shards": "0-3"}, 10],
        ["queue_entries", {"partner": "amap", "shards": "4-7"}, 20],
        ["queue_pending", {"partner": "amap", "shards": "0-3"}, 3],
        ["queue_oldest_unacknowledged_ms", {"partner": "amap", "shards": "0-3"}, 90_000],
        ["queue_oldest_unacknowledged_ms", {"partner": "amap", "shards": "4-7"}, 100],
        ["server_disk_free_bytes", {}, 50],
        ["server_disk_bytes", {}, 100],
        ["checkpoint_disk_free_bytes", {}, 20],
        ["checkpoint_disk_bytes", {}, 200],
    ]
    found = figures([], [snapshot("a", 1, {}, gauges=gauges, memory_bytes=77)])
    assert (found["lag_ms"], found["lag_ms:0"], found["lag_ms:1"]) == (70, 5, 70)
    assert (found["queue_entries"], found["queue_entries:amap"], found["queue_pending:amap"]) == (30, 30, 0)
    assert (found["queue_oldest_ms"], found["queue_oldest_ms:amap"]) == (90_000, 90_000)
    assert (found["disk_free_bytes"], found["disk_free_share"]) == (20, 0.1)
    assert found["flow_memory_bytes"] == 77


def test_nobody_there_is_told_as_such_and_nothing_is_invented() -> None:
    assert view_figures(Stats(), Stats(), 7) == ViewFigures(
        7, {"flow_processes": 0, "gateway_processes": 0}, (NO_FLOW,)
    )


def test_every_figure_is_described() -> None:
    gauges = [["lag_ms", {"shard": "0"}, 5]]
    found = figures([latency(0, {})], [latency(5_000, {4: 20}) | {"gauges": gauges, "memory_bytes": 1}])
    assert {name.partition(":")[0] for name in found} <= DESCRIPTIONS.keys()
