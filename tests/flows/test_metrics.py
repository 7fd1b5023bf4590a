"""Counters, gauges, histograms, and their way over the server."""

from __future__ import annotations

import itertools
import logging
import threading

import pytest
import redis

from flows.metrics import BUCKETS_MS, STATS_KEY, Metrics, Stats, StatsPublisher, process_name, read_stats
from flows.server import connect
from tests.flows.waiting import eventually


def test_counters_add_up_by_label() -> None:
    metrics = Metrics()
    metrics.count("pushes_total", 3, partner="amap", kind="alert")
    metrics.count("pushes_total", partner="amap", kind="alert")
    metrics.count("pushes_total", 5, partner="didi", kind="update")
    assert metrics.value("pushes_total", partner="amap", kind="alert") == 4
    assert metrics.value("pushes_total", partner="nobody", kind="alert") == 0
    stats = Stats([metrics.snapshot()])
    assert stats.total("pushes_total") == 9
    assert stats.total("pushes_total", kind="update") == 5
    assert stats.by_label("pushes_total", "partner") == {"amap": 4, "didi": 5}


def test_processes_are_added_up_and_the_newer_gauge_counts() -> None:
    old, new = Metrics(), Metrics()
    for metrics, value in ((old, 10), (new, 20)):
        metrics.count("pings_accepted_total", value)
        metrics.gauge("lag_ms", value, shard="0")
    new.gauge("lag_ms", 70, shard="1")
    snapshots = [new.snapshot() | {"at_ms": 2}, old.snapshot() | {"at_ms": 1}]
    stats = Stats(snapshots)
    assert stats.process_count == 2
    assert stats.total("pings_accepted_total") == 30
    assert stats.total("lag_ms", shard="0") == 20
    assert stats.largest("lag_ms") == 70
    assert stats.largest("unknown") == 0


def test_buckets_are_four_to_a_doubling() -> None:
    assert BUCKETS_MS[:5] == (0.25, 0.3125, 0.375, 0.4375, 0.5)
    assert BUCKETS_MS[-1] == 57_344
    assert all(later / earlier <= 1.25 for earlier, later in itertools.pairwise(BUCKETS_MS))


def test_quantiles_are_upper_bounds_within_a_quarter() -> None:
    metrics = Metrics()
    for value_ms in range(1, 1001):
        metrics.observe("publish_to_queue_ms", value_ms)
    stats = Stats([metrics.snapshot(), metrics.snapshot()])
    for quantile, exact_ms in ((0.5, 500), (0.99, 990), (1.0, 1000), (0.001, 1)):
        found_ms = stats.quantile_ms("publish_to_queue_ms", quantile)
        assert found_ms is not None
        assert exact_ms <= found_ms <= exact_ms * 1.25


def test_quantile_without_observations_is_unknown_and_beyond_the_buckets_infinite() -> None:
    metrics = Metrics()
    assert Stats([metrics.snapshot()]).quantile_ms("publish_to_queue_ms", 0.5) is None
    metrics.observe("publish_to_queue_ms", 1e9)
    assert Stats([metrics.snapshot()]).quantile_ms("publish_to_queue_ms", 0.5) == float("inf")


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(2000):
            metrics.count("x_total")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.value("x_total") == 8000


def test_published_snapshot_is_read_back(client: redis.Redis) -> None:
    metrics = Metrics()
    metrics.count("pings_refused_total", 2, reason="latitude")
    metrics.observe("publish_to_queue_ms", 5)
    publisher = StatsPublisher(client, metrics, before=lambda: metrics.gauge("devices_live", 7, shard="0"))
    assert read_stats(client).process_count == 0
    publisher.publish()
    stats = read_stats(client)
    assert stats.process_count == 1
    assert stats.total("pings_refused_total", reason="latitude") == 2
    assert stats.total("devices_live") == 7
    assert stats.quantile_ms("publish_to_queue_ms", 0.5) == 5
    assert client.zcard(STATS_KEY) == 1
    assert 0 < client.ttl(f"stats:{process_name()}") <= 5


def test_publisher_publishes_by_itself_and_once_more_at_its_end(client: redis.Redis) -> None:
    metrics = Metrics()
    publisher = StatsPublisher(client, metrics, interval_s=0.01)
    publisher.start()
    eventually(lambda: read_stats(client).process_count == 1)
    metrics.count("x_total")
    publisher.stop()
    assert read_stats(client).total("x_total") == 1


def test_publisher_without_a_server_says_so_once(tmp_path: object, caplog: pytest.LogCaptureFixture) -> None:
    client = connect(f"unix://{tmp_path}/nobody.sock")
    publisher = StatsPublisher(client, Metrics())
    with caplog.at_level(logging.WARNING):
        publisher.publish()
        publisher.publish()
    assert caplog.text.count("statistics cannot be published") == 1
