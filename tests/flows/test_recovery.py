"""Flows that die, start again and start elsewhere, checkpoints that break: nobody missed, nobody told twice.

Each story ends with the accounts of `loadtest.soak.accounts`. The lines of the fault table are played elsewhere
(`loadtest.soak`, `tests/loadtest/test_soak.py`): here is what they do not look at.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from flows.embedded import EmbeddedServer
from flows.log import format_id, last_id, log_key, parse_id
from flows.wire import decode_push
from loadtest.soak.flow import ForkedFlow
from tests.flows.deployment import (
    PATIENCE_S,
    SHARD_COUNT,
    SHARDS,
    Deployment,
    LogKeeper,
    QueueEntries,
    deployed,
    ping,
    told_in,
)
from tests.flows.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
OFTEN: dict[str, Any] = {"checkpoint_interval_s": 0.2}
KEEPING: dict[str, Any] = OFTEN | {"trim_logs": False}
AT_THE_END: dict[str, Any] = {"checkpoint_interval_s": 600.0, "trim_logs": False}

# ---- flows that die


def test_flows_that_are_killed_while_logs_are_trimmed_behind_them(tmp_path: Path) -> None:
    with deployed(tmp_path) as deployment:
        keeper = LogKeeper(deployment.server.url)
        keeper.start()
        sender = deployment.sender()
        flow = deployment.flow(**OFTEN)
        for life in range(3):
            deployment.alert_during(str(life), lambda: deployment.wait_for_checkpoints(2))
            flow.kill()
            flow = deployment.flow(**OFTEN)
        # The one that was killed may have done all there was: this one has to take its part before it is stopped.
        deployment.wait_for_checkpoints()
        sender.end()
        deployment.settle()
        assert flow.stop() == 0, flow.said
        for shard in SHARDS:
            newest, older = deployment.positions(shard)
            assert newest == deployment.done(shard) == last_id(deployment.client, log_key(shard))
            assert deployment.trimmed(shard) < older
            # The older checkpoint's own entry is the first that is left.
            ((first, _),) = cast(QueueEntries, deployment.client.xrange(log_key(shard), count=1))
            assert parse_id(first) == older
        logs = keeper.end()
        assert sum(map(len, logs.values())) > 2 * sum(map(len, deployment.logs().values()))
        deployment.check(logs, pushes_min=500)


def test_a_flow_that_is_stopped_as_soon_as_it_starts_ends_cleanly(tmp_path: Path) -> None:
    with deployed(tmp_path) as deployment:
        flow = deployment.flow(**OFTEN)
        assert flow.stop() == 0, flow.said
        assert "stopped cleanly" in flow.said


def test_a_clean_stop_leaves_checkpoints_and_nothing_to_replay(tmp_path: Path) -> None:
    with deployed(tmp_path) as deployment:
        flow = deployment.flow(**AT_THE_END)
        deployment.send_crowd(1)
        deployment.alert_during("a", lambda: time.sleep(0.2))
        deployment.publish("b", 0.15)
        deployment.settle()
        assert flow.stop() == 0
        heads = deployment.heads()
        assert [deployment.positions(shard) for shard in SHARDS] == [[head] for head in heads]
        logs, queues = deployment.logs(), deployment.queues()
        # The past is gone: whatever is written from now on comes from the checkpoints.
        for shard in SHARDS:
            deployment.client.xtrim(log_key(shard), minid=format_id(heads[shard]), approximate=False)
        flow = deployment.flow(**AT_THE_END)
        deployment.send_crowd(2)
        deployment.close("b")
        deployment.settle()
        assert flow.stop() == 0
        assert "warning" not in flow.said.lower()
        added = deployment.logs()
        deployment.check({shard: logs[shard] + added[shard][1:] for shard in SHARDS}, pushes_min=20)
        assert deployment.queues() != queues


def test_a_ring_that_grew_while_no_flow_ran_tells_whom_it_reached_then(tmp_path: Path) -> None:
    with deployed(tmp_path) as deployment:
        deployment.send([ping("amap", "phone", 1.5, 0.0, deployment.desk.now_ms())])
        flow = deployment.flow(**AT_THE_END)
        deployment.publish("a", step_s=1.0)
        deployment.settle()
        assert flow.stop() == 0
        known = deployment.desk.show("a")
        assert known is not None
        grows_ms = known.alert.missing_since_ms + 1000
        assert not told_in(deployment.queues())
        assert deployment.desk.now_ms() < grows_ms
        time.sleep((grows_ms + 100 - deployment.desk.now_ms()) / 1000)
        flow = deployment.flow(**AT_THE_END)
        eventually(lambda: told_in(deployment.queues()), timeout_s=PATIENCE_S)
        assert flow.stop() == 0
        ((_, fields),) = [entry for entries in deployment.queues().values() for entry in entries]
        push = decode_push(fields[b"alert"])
        assert (push.device_ids, push.ring_km, push.at_ms) == (("phone",), 2.0, grows_ms)
        deployment.check(pushes_min=1)


@contextmanager
def cluster(deployment: Deployment) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes of one Bytewax cluster on loopback; killed at the end if they still run."""
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        addresses = ";".join(f"127.0.0.1:{probe.getsockname()[1]}" for probe in (one, other))
    environment = os.environ | {
        "TUANYUAN_VALKEY": deployment.server.url,
        "TUANYUAN_VAR": str(deployment.var),
        "TUANYUAN_CHECKPOINT_INTERVAL_S": "0.2",
        "TUANYUAN_TRIM_LOGS": "no",
        "TUANYUAN_IDLE_WAIT_MS": "5",
    }
    command = [sys.executable, "-m", "bytewax.run", "tuanyuan.cluster:flow()", "-a", addresses, "-i"]
    processes: list[subprocess.Popen[bytes]] = []
    with (deployment.folder / "cluster.log").open("ab") as log:
        try:
            for number in ("0", "1"):
                processes.append(
                    subprocess.Popen([*command, number], cwd=ROOT, env=environment, stdout=log, stderr=log)
                )
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def test_a_bytewax_cluster_goes_on_where_single_processes_stopped_and_they_where_it_was_killed(tmp_path: Path) -> None:
    with deployed(tmp_path) as deployment:
        sender = deployment.sender()
        deployment.publish("all along", 0.3)
        flow = deployment.flow(**KEEPING)
        deployment.alert_during("before", deployment.wait_for_checkpoints)
        assert flow.stop() == 0, flow.said
        with cluster(deployment):
            deployment.alert_during("in a cluster that is killed", deployment.wait_for_checkpoints)
        flow = deployment.flow(**KEEPING)
        deployment.alert_during("between", deployment.wait_for_checkpoints)
        flow.kill()
        with cluster(deployment) as processes:
            deployment.alert_during("in a cluster that is stopped", deployment.wait_for_checkpoints)
            deployment.close("all along")
            sender.end()
            deployment.settle()
            for process in processes:
                process.terminate()
            assert [process.wait(PATIENCE_S) for process in processes] == [0, 0], (tmp_path / "cluster.log").read_text()
        for shard in SHARDS:
            assert deployment.positions(shard)[0] == deployment.done(shard)
        deployment.check(pushes_min=500)


# ---- checkpoints that cannot be used


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Deployment]:
    """A deployment that has stopped, with two checkpoints a shard, an open alert, and whole logs."""
    with deployed(tmp_path) as deployment:
        flow = deployment.flow(**KEEPING)
        sender = deployment.sender()
        deployment.publish("a", 0.1)
        deployment.wait_for_checkpoints(2)
        sender.end()
        deployment.settle()
        assert flow.stop() == 0, flow.said
        yield deployment


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 0x10
    path.write_bytes(raw)


def go_on(deployment: Deployment) -> ForkedFlow:
    """A flow that starts, tells the end of the alert, and stops."""
    flow = deployment.flow(**AT_THE_END)
    deployment.close("a")
    deployment.settle()
    assert flow.stop() == 0, flow.said
    return flow


def test_a_checkpoint_with_a_flipped_byte_is_passed_over_for_the_one_before(stopped: Deployment) -> None:
    damaged, good = stopped.store.finals(2)
    flip_a_byte(damaged.path)
    flow = go_on(stopped)
    assert f"shard 2: a checkpoint cannot be used: {damaged.path}: column " in flow.said
    assert f"shard 2: reads its log from a checkpoint, behind {format_id(good.position)}" in flow.said
    newest, older = stopped.positions(2)
    assert (newest, older) == (stopped.done(2), good.position)
    stopped.check()


def test_without_a_usable_checkpoint_a_whole_log_is_read_from_its_beginning(stopped: Deployment) -> None:
    for checkpoint in stopped.store.finals(1):
        flip_a_byte(checkpoint.path)
    for checkpoint in stopped.store.finals(3):
        checkpoint.path.unlink()
    flow = go_on(stopped)
    assert flow.said.count("a checkpoint cannot be used") == 2
    stopped.check()


def test_a_log_that_lost_its_tail_is_read_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    with deployed(tmp_path) as deployment:
        flow = deployment.flow(**AT_THE_END)
        deployment.send_crowd(1)
        deployment.publish("a", 0.1)
        deployment.settle()
        assert flow.stop() == 0
        (file,) = (tmp_path / "valkey" / "appendonlydir").glob("*.incr.aof")
        kept_bytes = file.stat().st_size
        flow = deployment.flow(**AT_THE_END)
        deployment.send_crowd(2)
        deployment.settle()
        assert flow.stop() == 0
        lost = [deployment.positions(shard)[0] for shard in SHARDS]
        deployment.server.close()
        with file.open("ab") as opened:
            opened.truncate(kept_bytes + 11)  # in the middle of an entry
        with EmbeddedServer.start(tmp_path / "valkey", port=None, memory_bytes_max=512 << 20):
            assert all(head < position for head, position in zip(deployment.heads(), lost, strict=True))
            deployment.send_crowd(3)
            flow = go_on(deployment)
            assert flow.said.count("the log has lost its tail") == SHARD_COUNT
            deployment.check()
