"""A server that ends, loses its tail, is full, hangs or is cut off: the flow waits, goes on by itself, raises alarms.

Each story runs with a crowd that pings and an alert that grows all along, and ends with the two accounts of
`tests.flows.deployment`: nobody missed, nobody told twice, entry by entry.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from flows import embedded as embedded_module
from flows.log import push_key
from flows.metrics import Metrics, read_stats
from flows.supervisor import Supervisor
from loadtest import faults
from loadtest.soak.flow import ForkedFlow
from tests.flows.deployment import PARTNERS, PATIENCE_S, SHARDS, Deployment, deployed
from tests.flows.waiting import eventually, memory_limit

ALARM_S = 10.0
"""An alarm comes within this time of its cause."""
KEEPING: dict[str, Any] = {"checkpoint_interval_s": 0.2, "trim_logs": False}
HASTY: dict[str, Any] = {
    # What waits for an answer gives up sooner, so that a test need not wait for it.
    "flows.server.ANSWER_TIMEOUT_S": 1.5,
    "flows.server.CONNECT_TIMEOUT_S": 1.0,
    "flows.guards.GUARD_TIMEOUT_S": 1.0,
    "flows.guards.INTERVAL_S": 0.2,
    "flows.guards.SETTINGS_INTERVAL_S": 0.2,
    "flows.desk.RELAY_BLOCK_S": 0.5,
    "flows.log_reader.BLOCK_S": 0.5,
}


class Story:
    """A deployment under fire."""

    def __init__(self, deployment: Deployment, flow: ForkedFlow, supervisor_metrics: Metrics) -> None:
        self.deployment = deployment
        self.flow = flow
        self.supervisor_metrics = supervisor_metrics

    def wait_for_alarm(self, kind: str) -> None:
        eventually(lambda: f"alarm {kind}" in self.flow.said, timeout_s=ALARM_S)

    def wait_until_over(self, kind: str) -> None:
        """Until every alarm of this kind that was raised has been cleared."""

        def over() -> bool:
            lines = [line for line in self.flow.said.splitlines() if f"alarm {kind}" in line]
            return bool(lines) and 2 * sum(line.endswith("is over") for line in lines) == len(lines)

        eventually(over, timeout_s=PATIENCE_S)

    def reconnect(self) -> None:
        """The test's own client talks to the server that runs now."""
        client = self.deployment.client
        client.connection_pool.disconnect()
        eventually(lambda: answers(client), timeout_s=PATIENCE_S)

    def wait_for_restart(self, count: int) -> None:
        eventually(lambda: self.restarts() == count, timeout_s=ALARM_S)

    def restarts(self) -> float:
        return self.supervisor_metrics.value("server_restarts_total")


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@contextmanager
def told(
    folder: Path, pushes_min: int = 100, partition: bool = False
) -> Iterator[tuple[Story, faults.Partition | None]]:
    """Ping, publish, whatever the test does, publish and close once more, and check."""
    with ExitStack() as exits:
        deployment = exits.enter_context(deployed(folder))
        metrics = Metrics()
        supervisor = Supervisor(deployment.server, metrics)
        supervisor.start()
        exits.callback(supervisor.stop)
        way, url = None, None
        if partition:
            way = exits.enter_context(faults.Partition.best(deployment.server.url.removeprefix("unix://")))
            url = f"redis://{way.host}:{way.port}"
        flow = deployment.flow(constants=HASTY, url=url, **KEEPING)
        sender = deployment.sender()
        deployment.publish("before", 0.3)
        eventually(lambda: any(deployment.client.xlen(key) for key in queue_keys()), timeout_s=PATIENCE_S)
        story = Story(deployment, flow, metrics)
        yield story, way
        story.reconnect()
        deployment.alert_during("after", lambda: time.sleep(0.3))
        deployment.close("before")
        sender.end()
        deployment.settle()
        assert flow.stop() == 0, flow.said
        assert "Traceback" not in flow.said
        deployment.check(pushes_min=pushes_min)


def queue_keys() -> list[str]:
    return [push_key(shard, partner) for shard in SHARDS for partner in PARTNERS]


def test_a_server_that_is_killed_is_started_again_by_its_supervisor(tmp_path: Path) -> None:
    with told(tmp_path) as (story, _):
        url = story.deployment.server.url
        for life in (1, 2):
            os.kill(story.deployment.server.pid, signal.SIGKILL)
            story.wait_for_restart(life)
            story.reconnect()
        assert story.deployment.server.url == url
        story.wait_for_alarm("server_down")
        story.wait_until_over("server_down")
        eventually(lambda: "the server was restarted" in story.flow.said, timeout_s=PATIENCE_S)


def test_a_server_that_lost_the_tail_of_its_file_takes_the_shards_back_with_it(tmp_path: Path) -> None:
    with told(tmp_path) as (story, _):
        server, deployment = story.deployment.server, story.deployment
        deployment.wait_for_checkpoints(2)
        file = faults.append_only_file(server.directory)
        kept_bytes = file.stat().st_size
        deployment.wait_for_checkpoints(1)
        # Under the directory's lock nobody starts the server while its file is cut.
        with embedded_module._locked(server.directory):
            os.kill(server.pid, signal.SIGKILL)
            eventually(lambda: server.ended() is not None)
            faults.lose_tail(file, kept_bytes + 11)
        eventually(lambda: story.restarts() == 1, timeout_s=ALARM_S)
        story.wait_for_alarm("log_tail_lost")
        story.wait_until_over("log_tail_lost")


def test_a_full_memory_holds_everything_back_and_loses_nothing(tmp_path: Path) -> None:
    with told(tmp_path) as (story, _):
        client = story.deployment.client
        with ExitStack() as limited:
            with faults.hung(story.flow.pid):
                # So that there is something to push when the memory is full.
                story.deployment.publish("meanwhile")
                limited.enter_context(memory_limit(client, 1 << 20))
            story.wait_for_alarm("pushes_held")
            story.wait_for_alarm("memory")
            # Statistics come through though nothing else does.
            eventually(lambda: {"memory", "pushes_held"} <= kinds(client), timeout_s=ALARM_S)
            assert read_stats(client).total("alarm", kind="memory") == 1
        story.wait_until_over("pushes_held")
        story.wait_until_over("memory")
        eventually(lambda: not kinds(client), timeout_s=ALARM_S)
        story.deployment.close("meanwhile")


def kinds(client: redis.Redis) -> set[str]:
    """Alarms that some process says are on."""
    return {alarm.kind for alarm in read_stats(client).alarms}


def test_a_server_that_hangs_is_waited_for(tmp_path: Path) -> None:
    with told(tmp_path) as (story, _):
        with faults.hung(story.deployment.server.pid):
            story.wait_for_alarm("server_down")
            # Longer than anybody waits for an answer: what was sent is sent again, and done twice by the server.
            eventually(lambda: "cannot read the logs" in story.flow.said, timeout_s=PATIENCE_S)
            time.sleep(1.5)
        story.wait_until_over("server_down")
        assert story.restarts() == 0


def test_a_server_that_is_cut_off_is_waited_for(tmp_path: Path) -> None:
    with told(tmp_path, partition=True) as (story, way):
        assert way is not None
        way.cut()
        story.wait_for_alarm("server_down")
        time.sleep(1.0)
        way.mend()
        story.wait_until_over("server_down")


def test_a_server_whose_disk_takes_no_more_is_started_again(tmp_path: Path) -> None:
    with told(tmp_path) as (story, _):
        try:
            faults.refuse_file_growth(story.deployment.server.pid)
        except faults.NotPermitted as problem:
            pytest.skip(str(problem))
        eventually(lambda: story.restarts() == 1, timeout_s=ALARM_S)
        story.wait_for_alarm("server_down")
        story.wait_until_over("server_down")


def test_a_full_disk_is_waited_for_until_there_is_room(tmp_path: Path) -> None:
    with ExitStack() as exits:
        try:
            exits.enter_context(faults.small_disk(tmp_path / "valkey", 128 << 20))
        except faults.NotPermitted as problem:
            pytest.skip(str(problem))
        story, _ = exits.enter_context(told(tmp_path))
        with faults.full(tmp_path / "valkey"):
            eventually(lambda: story.deployment.server.ended() is not None, timeout_s=ALARM_S)
            story.wait_for_alarm("server_down")
            alarms = story.supervisor_metrics.alarms
            eventually(lambda: {"supervisor", "disk"} <= {alarm.kind for alarm in alarms.current()}, timeout_s=ALARM_S)
            eventually(lambda: any("waits for room" in alarm.words for alarm in alarms.current()), timeout_s=ALARM_S)
            assert story.restarts() == 0
        eventually(lambda: story.restarts() == 1, timeout_s=PATIENCE_S)
        story.wait_until_over("server_down")
        eventually(lambda: not alarms.current(), timeout_s=PATIENCE_S)


def test_settings_changed_under_a_running_flow_stop_it_until_they_are_right_again(tmp_path: Path) -> None:
    with told(tmp_path) as (story, _):
        deployment, client = story.deployment, story.deployment.client
        client.config_set("appendfsync", "everysec")
        story.wait_for_alarm("unsafe_server")
        eventually(lambda: "cannot read the logs" in story.flow.said, timeout_s=PATIENCE_S)
        assert "appendfsync always" in story.flow.said
        done = [deployment.done(shard) for shard in SHARDS]
        queues = deployment.queues()
        time.sleep(0.5)
        assert [deployment.done(shard) for shard in SHARDS] == done
        assert deployment.queues() == queues
        client.config_set("appendfsync", "always")
        story.wait_until_over("unsafe_server")


def test_a_flow_that_goes_on_with_an_unsafe_server_says_so_in_every_line_and_metric(tmp_path: Path) -> None:
    with deployed(tmp_path) as deployment:
        deployment.send_crowd(1)
        deployment.client.config_set("appendfsync", "everysec")
        flow = deployment.flow(constants=HASTY, unsafe_server=True, **KEEPING)
        deployment.settle()
        eventually(lambda: read_stats(deployment.client).total("unsafe_server") == 1, timeout_s=PATIENCE_S)
        stats = read_stats(deployment.client)
        assert not stats.alarms
        assert flow.stop() == 0
        deployment.client.config_set("appendfsync", "always")
        lines = [line for line in flow.said.splitlines() if line.startswith(("INFO", "WARNING", "ERROR"))]
        assert lines
        assert [line for line in lines if "[unsafe server] " not in line] == []
        assert "appendfsync always" in flow.said
