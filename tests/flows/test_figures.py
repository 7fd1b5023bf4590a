"""Figures of live flows: equal to the queues after every crash, and never in anybody's way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis

from flows import figures as figures_module
from flows.density import density_key, phones_in_circle, read_density
from flows.figures import Figures
from flows.log import FIRST, RawEntry
from flows.match import ShardNotes, ShardPushes
from flows.metrics import Metrics
from flows.server import connect
from flows.tallies import TallyCounter, read_tallies
from geoindex.columns import Pushes
from geoindex.entries import Settings
from geoindex.shard import ShardMachine
from tests.flows.deployment import HOME_LAT, HOME_LNG, PATIENCE_S, SHARD_COUNT, SHARDS, Deployment, deployed, told_in
from tests.flows.test_density import SetClock
from tests.flows.waiting import eventually

OFTEN: dict[str, Any] = {"checkpoint_interval_s": 0.2, "trim_logs": False}
T0_MS = 1_700_000_000_000


def counted_in_queues(deployment: Deployment) -> dict[str, dict[str, tuple[int, int]]]:
    """Devices sent `alert` and `resolved`, by alert and partner."""
    counts = Counter((push.alert_id, push.partner, push.kind) for push in told_in(deployment.queues()))
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for alert_id, partner, _ in counts:
        both = counts[alert_id, partner, "alert"], counts[alert_id, partner, "resolved"]
        found.setdefault(alert_id, {})[partner] = both
    return found


def published(deployment: Deployment, alert_ids: list[str]) -> dict[str, dict[str, tuple[int, int]]]:
    return {alert_id: read_tallies(deployment.client, SHARD_COUNT, alert_id) for alert_id in alert_ids}


def test_tallies_equal_the_queues_after_every_crash(tmp_path: Path) -> None:
    """A flow is killed while phones move and rings grow; the next starts from a checkpoint in the middle of an alert,
    and behind the end of another whose numbers nobody had published.
    """
    with deployed(tmp_path) as deployment:
        sender = deployment.sender()
        silent = {"flows.figures.INTERVAL_S": 3600.0}
        alert_ids = ["all along"]
        deployment.publish("all along", 0.3)
        for life in range(4):
            flow = deployment.flow(constants=silent if life % 2 else {}, **OFTEN)
            alert_ids += [f"short {life}", f"cut off {life}"]
            deployment.alert_during(f"short {life}", lambda: deployment.wait_for_checkpoints(1))
            deployment.wait_for_checkpoints(1)  # behind the end
            deployment.publish(f"cut off {life}", 0.05)
            deployment.settle()
            if life % 2:
                assert read_tallies(deployment.client, SHARD_COUNT, f"short {life}") == {}
            flow.kill()
        flow = deployment.flow(**OFTEN)
        for life in range(4):
            deployment.close(f"cut off {life}")
        sender.end()
        deployment.settle()
        expected = counted_in_queues(deployment)
        assert expected.keys() == set(alert_ids)
        assert all(told == resolved > 0 for told, resolved in expected["cut off 1"].values())
        assert all(told > resolved == 0 for told, resolved in expected["all along"].values())
        eventually(lambda: published(deployment, alert_ids) == expected, timeout_s=PATIENCE_S)
        # The last of a clean stop are not left to the next second.
        deployment.close("all along")
        deployment.settle()
        assert flow.stop() == 0, flow.said
        assert published(deployment, alert_ids) == counted_in_queues(deployment)
        deployment.check(pushes_min=500)


def test_phones_of_a_live_flow_are_found_by_circle(tmp_path: Path) -> None:
    with deployed(tmp_path) as deployment:
        deployment.send_crowd(1)
        flow = deployment.flow()

        def has_counted() -> bool:
            density = read_density(deployment.client, SHARD_COUNT)
            return density.missing == () and density.phone_count > 150  # some doubling of the 300, of each shard

        eventually(has_counted, timeout_s=PATIENCE_S)
        density = read_density(deployment.client, SHARD_COUNT)
        amap, both = (phones_in_circle(density, HOME_LAT, HOME_LNG, 50, names) for names in (["amap"], None))
        assert 0.4 * both < amap < 0.6 * both
        assert both == pytest.approx(density.phone_count)
        assert all(0 < deployment.client.ttl(density_key(shard)) <= 600 for shard in SHARDS)
        assert flow.stop() == 0, flow.said


def test_without_figures_nothing_is_published(tmp_path: Path) -> None:
    with deployed(tmp_path) as deployment:
        deployment.send_crowd(1)
        flow = deployment.flow(figures=False)
        deployment.alert_during("a", deployment.settle)
        deployment.settle()
        assert flow.stop() == 0, flow.said
        assert list(deployment.client.scan_iter("tally:*")) + list(deployment.client.scan_iter("density:*")) == []
        deployment.check(pushes_min=1)


# ---- in nobody's way


def caused(ms: int) -> ShardPushes:
    return ShardPushes(RawEntry(0, ms, 0, b"", b"", "run"), Pushes(), (), ShardNotes())


def machine_at(ms: int) -> ShardMachine:
    machine = ShardMachine()
    machine.apply(ms, Settings(shard_count=1))
    return machine


def test_a_density_that_cannot_be_written_is_counted_and_forgotten(tmp_path: Path) -> None:
    metrics, clock = Metrics(), SetClock(T0_MS)
    figures = Figures(connect(f"unix://{tmp_path}/nobody.sock"), [0], metrics, clock)
    machine = machine_at(T0_MS)
    figures.begin(0, machine, FIRST)
    figures.after_entry(caused(T0_MS), machine)
    figures.publish()
    figures.publish()
    assert metrics.value("figure_write_errors_total", figure="density") == 1
    assert metrics.alarms.current() == []


def test_the_age_of_a_density_is_that_of_the_count_on_the_server(client: redis.Redis) -> None:
    metrics, clock = Metrics(), SetClock(T0_MS)
    figures = Figures(client, [0], metrics, clock)
    clock.set_ms = T0_MS + 5_000
    figures.set_gauges()
    assert metrics.value("density_age_ms", shard="0") == 5_000
    machine = machine_at(T0_MS + 4_000)
    figures.begin(0, machine, FIRST)
    figures.after_entry(caused(T0_MS + 4_000), machine)
    figures.set_gauges()
    assert metrics.value("density_age_ms", shard="0") == 5_000
    figures.publish()
    figures.set_gauges()
    assert metrics.value("density_age_ms", shard="0") == 1_000
    assert read_density(client, 1).at_ms == T0_MS + 4_000


@pytest.mark.parametrize("where", ["begin", "after_entry", "take"])
def test_a_mistake_in_counting_raises_an_alarm_and_stops_no_flow(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    def mistaken(*_: object) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(TallyCounter, where, mistaken)
    monkeypatch.setattr(figures_module, "INTERVAL_S", 0.001)
    metrics = Metrics()
    figures = Figures(client, [0], metrics, SetClock(T0_MS))
    machine = machine_at(T0_MS)
    figures.start()
    for _ in range(2):
        figures.begin(0, machine, FIRST)
        figures.after_entry(caused(T0_MS), machine)
    eventually(metrics.alarms.current)
    figures.stop()
    assert [alarm.kind for alarm in metrics.alarms.current()] == ["figures"]
    assert caplog.text.count("ZeroDivisionError: a mistake") == 1
