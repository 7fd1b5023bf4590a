"""Group commit: who is answered is on disk, whoever is not comes again, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
import redis

from flows.embedded import EmbeddedServer
from flows.guards import AppendsRefused, Guards, PingsRefused
from flows.log import LogWriter, ensure_settings, log_key
from flows.metrics import Metrics
from flows.server import connect
from flows.wire import PingColumns, decode_entry
from gateway import intake as intake_module
from gateway.flow_watch import FlowWatch
from gateway.intake import Hold, Intake, IntakeFull, IntakeStopped, merge, size_bytes
from geoindex.columns import PingBatch
from geoindex.entries import Settings
from tests.flows.waiting import eventually
from tests.geoindex.machines import batch_of
from tests.reference.events import PingEvent

PATIENCE_S = 60.0
SETTINGS = Settings(shard_count=3, partners=("amap", "baidu"))


def pings(*ids: str, partner: str = "amap") -> PingBatch:
    return batch_of([PingEvent(partner, name, 1, 2, 3) for name in ids], SETTINGS.partners)


def logged(client: redis.Redis) -> tuple[list[str], int]:
    """Ids of all pings in the logs, as often as they are there; and how many entries hold them."""
    ids: list[str] = []
    entries = 0
    for shard in range(SETTINGS.shard_count):
        for _, fields in cast(Any, client.xrange(log_key(shard))):
            for kind, payload in fields.items():
                entry = decode_entry(kind, payload)
                if isinstance(entry, PingColumns):
                    entries += 1
                    raw, ends = entry.id_bytes.tobytes(), entry.id_end.tolist()
                    ids += [raw[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return ids, entries


class Appends:
    """Stands in the writer's way: appends wait for `let_go`, and may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.failures: list[Exception] = []
        self.may_go = threading.Semaphore(0)
        genuine = LogWriter.append_pings

        def append_pings(writer: LogWriter, batch: PingBatch) -> Any:
            self.sizes.append(len(batch))
            assert self.may_go.acquire(timeout=PATIENCE_S)
            if self.failures:
                raise self.failures.pop(0)
            return genuine(writer, batch)

        monkeypatch.setattr(LogWriter, "append_pings", append_pings)


@pytest.fixture
def appends(monkeypatch: pytest.MonkeyPatch) -> Appends:
    return Appends(monkeypatch)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def intake(client: redis.Redis, metrics: Metrics) -> Iterator[Intake]:
    ensure_settings(client, SETTINGS)
    with_guards = Guards(client, metrics=metrics)
    with_guards.start()
    found = Intake(with_guards, FlowWatch(client, 0, metrics), metrics, writer_count=1)
    found.start()
    yield found
    found.stop()
    with_guards.stop()


def test_a_future_is_done_when_its_pings_are_in_the_logs(intake: Intake, client: redis.Redis) -> None:
    intake.submit(pings("a", "b")).result(PATIENCE_S)
    assert sorted(logged(client)[0]) == ["a", "b"]


def test_what_arrives_during_an_append_shares_the_next_one(
    intake: Intake, client: redis.Redis, appends: Appends
) -> None:
    first = intake.submit(pings("a"))
    eventually(lambda: appends.sizes == [1], PATIENCE_S)
    others = [intake.submit(pings(f"b{number}", "c", partner="baidu")) for number in range(20)]
    assert not first.done()
    appends.may_go.release(2)
    for future in (first, *others):
        future.result(PATIENCE_S)
    assert appends.sizes == [1, 40]
    ids, entries = logged(client)
    assert len(ids) == 41
    assert entries <= 1 + SETTINGS.shard_count


def test_nobody_is_answered_before_the_append_is_acknowledged(intake: Intake, appends: Appends) -> None:
    future = intake.submit(pings("a"))
    eventually(lambda: appends.sizes == [1], PATIENCE_S)
    with pytest.raises(TimeoutError):
        future.result(0.05)
    appends.may_go.release()
    future.result(PATIENCE_S)


def test_a_round_is_not_larger_than_its_limit_unless_one_body_is(
    intake: Intake, appends: Appends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "ROUND_PINGS_MAX", 5)
    futures = [intake.submit(pings("a"))]
    eventually(lambda: appends.sizes == [1], PATIENCE_S)
    futures += [intake.submit(pings(*"abc")), intake.submit(pings(*"de")), intake.submit(pings(*"fghijkl"))]
    appends.may_go.release(3)
    for future in futures:
        future.result(PATIENCE_S)
    assert appends.sizes == [1, 5, 7]


@pytest.mark.parametrize(
    "failure",
    [
        redis.ConnectionError("away"),
        redis.OutOfMemoryError("full"),
        PingsRefused("no pings are taken now"),
        AppendsRefused("the clock"),
        AssertionError("a fault of ours"),
    ],
)
def test_an_append_that_fails_fails_its_round_and_not_the_next(
    intake: Intake, client: redis.Redis, appends: Appends, metrics: Metrics, failure: Exception
) -> None:
    appends.failures.append(failure)
    first = intake.submit(pings("a"))
    eventually(lambda: appends.sizes == [1], PATIENCE_S)
    appends.failures.append(failure)
    second = [intake.submit(pings("b")), intake.submit(pings("c"))]
    appends.may_go.release(2)
    for future in (first, *second):
        with pytest.raises(type(failure), match=str(failure)):
            future.result(PATIENCE_S)
    assert metrics.value("intake_rounds_failed_total") == 2
    assert metrics.value("intake_pings_total") == 0
    appends.may_go.release()
    intake.submit(pings("d")).result(PATIENCE_S)
    assert logged(client)[0] == ["d"]


def test_a_request_that_gave_up_is_no_trouble(intake: Intake, appends: Appends) -> None:
    intake.submit(pings("a"))
    eventually(lambda: appends.sizes == [1], PATIENCE_S)
    given_up, other = intake.submit(pings("b")), intake.submit(pings("c"))
    assert given_up.cancel()
    appends.may_go.release(2)
    other.result(PATIENCE_S)


def test_the_end_appends_what_waits_and_takes_no_more(intake: Intake, client: redis.Redis, appends: Appends) -> None:
    futures = [intake.submit(pings("a"))]
    eventually(lambda: appends.sizes == [1], PATIENCE_S)
    futures.append(intake.submit(pings("b")))
    appends.may_go.release(2)
    intake.stop()
    assert all(future.done() and future.exception() is None for future in futures)
    assert sorted(logged(client)[0]) == ["a", "b"]
    with pytest.raises(IntakeStopped):
        intake.submit(pings("c"))


def test_room_is_bounded_and_comes_back(intake: Intake) -> None:
    with intake.hold() as first, intake.hold() as second:
        first.grow(intake_module.HELD_BYTES_MAX - 100)
        second.grow(100)
        with pytest.raises(IntakeFull):
            second.grow(1)
    with intake.hold() as third:
        third.grow(intake_module.HELD_BYTES_MAX)

    def holding(held: Hold) -> None:
        with held:
            held.grow(10)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        holding(intake.hold())
    assert intake._held_bytes == 0


def test_merged_batches_are_their_rows_one_after_the_other() -> None:
    batches = [pings("a", "bb"), pings(), pings("ccc", partner="baidu"), pings("d" * 64, "e")]
    merged = merge(batches)
    assert [merged.device_id(row) for row in range(len(merged))] == ["a", "bb", "ccc", "d" * 64, "e"]
    assert merged.partner.tolist() == [0, 0, 1, 0, 0]
    assert np.array_equal(merged.lat_e7, np.ones(5))
    assert merge(batches[:1]) is batches[0]
    assert size_bytes(merged) == 5 * (2 + 4 + 4 + 4 + 8) + 71


# ---- a server that dies


def wait_for_more(ids: list[str], count: int) -> None:
    wanted = len(ids) + count
    eventually(lambda: len(ids) >= wanted, PATIENCE_S)


def test_a_killed_server_loses_nothing_that_was_answered(own_server: EmbeddedServer) -> None:
    client = connect(own_server.url)
    metrics = Metrics()
    ensure_settings(client, SETTINGS)
    guards = Guards(client, metrics=metrics)
    guards.start()
    intake = Intake(guards, FlowWatch(client, 0, metrics), metrics)
    intake.start()
    accepted: list[str] = []
    refused: list[str] = []
    ending = threading.Event()

    def sender(name: str) -> None:
        """Sends one batch after the other, as a partner does; one that is refused is given up, to be counted."""
        number = 0
        while not ending.is_set():
            number += 1
            ids = [f"{name}-{number}-{row}" for row in range(50)]
            future: Future[None] = intake.submit(pings(*ids))
            try:
                future.result(PATIENCE_S)
            except (redis.RedisError, AppendsRefused):
                refused.extend(ids)
                time.sleep(0.01)
            else:
                accepted.extend(ids)

    with ThreadPoolExecutor(6) as threads:
        senders = [threads.submit(sender, f"s{number}") for number in range(6)]
        try:
            for _ in range(3):
                wait_for_more(accepted, 300)
                os.kill(own_server.pid, signal.SIGKILL)
                eventually(lambda: own_server.ended() is not None, PATIENCE_S)
                wait_for_more(refused, 1)
                own_server.revive(lambda _: None)
                client.connection_pool.disconnect()
                guards.look()
            wait_for_more(accepted, 300)
        finally:
            ending.set()
        for one in senders:
            one.result(PATIENCE_S)
    intake.stop()
    guards.stop()
    in_logs = set(logged(client)[0])
    client.close()
    assert len(accepted) > 1_000
    assert set(accepted) - in_logs == set()
    # What is there and was not answered was in flight: sending it again would have changed nothing.
    assert in_logs - set(accepted) <= set(refused)
