"""`/metrics`: names, units, and sums that never fall."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from flows.metrics import GATEWAY, Metrics, Stats
from gateway.view_metrics import CounterSums, exposed_name, exposition


def snapshot(process: str, at_ms: int, pings: float, started_ms: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "process": process,
        "role": "flow",
        "at_ms": at_ms,
        "started_ms": started_ms,
        "alarms": [],
        "counters": [["pings_accepted_total", {"partner": "amap"}, pings]],
        "gauges": [],
        "histograms": {},
    } | more


def pings(sums: CounterSums) -> float:
    return sums.counters["pings_accepted_total", (("partner", "amap"),)]


def samples(stats: Stats, sums: CounterSums | None = None) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    body, media_type = exposition(stats, sums or CounterSums())
    assert media_type.startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_a_sum_does_not_fall_when_a_process_ends() -> None:
    sums = CounterSums()
    sums.add(Stats([snapshot("a", 100_000, 1000), snapshot("b", 100_000, 500)]))
    assert pings(sums) == 0
    sums.add(Stats([snapshot("a", 101_000, 1010)]))
    assert pings(sums) == 10
    sums.add(Stats([snapshot("a", 102_000, 1020), snapshot("b", 102_000, 530)]))  # it was merely silent
    assert pings(sums) == 50


def test_a_gateway_that_begins_makes_no_leap() -> None:
    """The one before it had counted a process that has ended since: a sum of what is left would look like a restart."""
    sums = CounterSums()
    sums.add(Stats([snapshot("a", 100_000, 10**9, started_ms=1), snapshot("b", 100_000, 3, started_ms=99_500)]))
    assert pings(sums) == 3


def test_a_look_that_comes_late_counts_nothing_twice() -> None:
    sums = CounterSums()
    for at_ms, number in ((100_000, 0), (102_000, 200), (101_000, 100), (103_000, 300)):
        sums.add(Stats([snapshot("a", at_ms, number, started_ms=99_900)]))
    assert pings(sums) == 300


def test_a_process_that_begins_anew_under_its_name_is_counted_from_its_beginning() -> None:
    sums = CounterSums()
    sums.add(Stats([snapshot("a", 100_000, 1000, started_ms=1)]))
    sums.add(Stats([snapshot("a", 200_000, 7, started_ms=199_000)]))
    assert pings(sums) == 7


def test_a_process_that_was_silent_at_the_first_look_makes_no_leap() -> None:
    sums = CounterSums()
    sums.add(Stats([snapshot("a", 100_000, 1000, started_ms=1)]))
    sums.add(Stats([snapshot("a", 101_000, 1000, started_ms=1), snapshot("b", 101_000, 10**9, started_ms=1)]))
    assert pings(sums) == 0
    sums.add(Stats([snapshot("b", 102_000, 10**9 + 5, started_ms=1)]))
    assert pings(sums) == 5
    sums.add(Stats([snapshot("c", 103_000, 3, started_ms=102_500)]))
    assert pings(sums) == 8


def test_units_are_base_units_and_buckets_add_up() -> None:
    metrics = Metrics()
    metrics.gauge("lag_ms", 1500, shard="3")
    metrics.count("pings_accepted_total", 5, partner="amap")
    for value_ms in (0.2, 3.0, 700.0, 1e9):
        metrics.observe("publish_to_queue_ms", value_ms)
    found = samples(Stats([metrics.snapshot()]))
    assert found["tuanyuan_lag_seconds", (("shard", "3"),)] == 1.5
    assert found["tuanyuan_pings_accepted_total", (("partner", "amap"),)] == 5
    buckets = {
        float(dict(labels)["le"]): value
        for (name, labels), value in found.items()
        if name == "tuanyuan_publish_to_queue_seconds_bucket"
    }
    assert len(buckets) == 37
    assert list(buckets) == sorted(buckets)
    assert (buckets[0.00025], buckets[0.003], buckets[0.768], buckets[float("inf")]) == (1, 2, 3, 4)
    assert list(buckets.values()) == sorted(buckets.values())
    assert found["tuanyuan_publish_to_queue_seconds_count", ()] == 4
    assert found["tuanyuan_publish_to_queue_seconds_sum", ()] == (0.2 + 3.0 + 700.0 + 1e9) / 1000


def test_processes_and_their_memory_are_told_by_role() -> None:
    flow = snapshot("a", 1, 0, memory_bytes=100)
    found = samples(
        Stats([flow, snapshot("b", 1, 0, memory_bytes=50), snapshot("g", 1, 0, role=GATEWAY, memory_bytes=7)])
    )
    assert found["tuanyuan_processes", (("role", "flow"),)] == 2
    assert found["tuanyuan_resident_memory_bytes", (("role", "flow"),)] == 150
    assert found["tuanyuan_resident_memory_bytes", (("role", "gateway"),)] == 7


def test_names_follow_the_conventions() -> None:
    assert exposed_name("lag_ms") == "tuanyuan_lag_seconds"
    assert exposed_name("pushes_total") == "tuanyuan_pushes_total"
    assert exposed_name("server_memory_bytes") == "tuanyuan_server_memory_bytes"


def test_open_metrics_are_given_to_whoever_asks() -> None:
    body, media_type = exposition(Stats(), CounterSums(), "application/openmetrics-text; version=1.0.0")
    assert media_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
