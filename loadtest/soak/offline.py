"""A partner that has not read its queue for hours, beside one that reads all the time.

Two deployments of the same kind, at work in turns of equal length, with the same phones:

    away     baidu has read nothing for hours, and reads nothing; amap is read by two consumers
    reads    baidu has no backlog, and a consumer; amap has one

`amap`'s consumer is the one that is measured. In both a second one is just as busy, in a process of its own like the
first, with entries that come as often: what is compared is the backlog and nobody to read it, and not a processor that
is less busy. Latency is from the log entry that caused a push until the consumer has it.

The backlog is made of what would have happened: phones that pinged in the rings of alerts, through the logs, as many
as give the entries of those hours at the rate of the turns.
"""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import cast

import numpy as np

from flows.consumers import Consumer
from flows.log import LogId, LogWriter, push_key
from flows.server import connect, link_opener
from geoindex.columns import PingBatch
from loadtest.soak.deployment import server_number, wait_until
from loadtest.soak.flow import CONTEXT
from loadtest.soak.life import DEGREES_PER_KM, HOME_LAT, PARTNERS, Delivered, Worker, growing_alert, phones, somewhere
from loadtest.soak.scenarios import Size
from loadtest.soak.stage import Measured, Stage

MEASURED, ABSENT = PARTNERS
WARM_S = 0.15
"""Of each turn, not measured: caches and processors that have to wake up."""
NEWCOMERS_PER_S = 100.0
"""Of each partner: the rate at which pushes go to it, and which its backlog stands for."""
OLD_ALERTS = 60
"""Open at once while the backlog is made: a phone that pings gives an entry for each."""
OLD_NORTH_KM = 300.0
"""From the places of the turns, whose phones they must not reach."""
OLD_BATCHES = 2000
"""Between two looks at how many entries there are."""
RATIO_MAX = 1.1
TURNS_JUDGED_MIN = 10
"""Pairs of turns below which nothing is said about a ratio."""
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Turns:
    """What a consumer waited for, turn by turn: its quantiles, in ms."""

    p50_ms: list[float]
    p99_ms: list[float]
    entries: int


class ReadingProcess:
    """A consumer in a process of its own. `group`: of the partner's queues."""

    def __init__(self, stage: Stage, partner: str, group: str = "soak") -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        arguments = stage.server.url, partner, group, stage.settings.shard_count, theirs
        self._process = CONTEXT.Process(target=_read, args=arguments, daemon=True)
        self._process.start()
        stage.exits.callback(self._process.kill)
        self._pipe.recv()

    def end(self) -> dict[tuple[str, LogId], Delivered]:
        """All that it was given."""
        self._pipe.send(None)
        found = cast("list[tuple[str, LogId, float]]", self._pipe.recv())
        self._process.join()
        return {(stream, entry_id): Delivered(at_s, at_s * 1000 - entry_id[0]) for stream, entry_id, at_s in found}


def _read(url: str, partner: str, group: str, shard_count: int, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # its pauses would be measured, and grow with what has been noted
    client = connect(url)
    consumer = Consumer(client, partner, shard_count, group, "one")
    consumer.create_groups()
    found: list[tuple[str, LogId, float]] = []
    pipe.send(None)
    while not pipe.poll():
        deliveries = consumer.read(200, 0.2)
        at_s = time.time()
        found += [(delivery.stream, delivery.entry_id, at_s) for delivery in deliveries]
        consumer.acknowledge(deliveries)
    pipe.send(found)
    client.close()


class Newcomers(Worker):
    """New phones in the ring of an alert, one of each partner at a time, so that pushes come one by one and evenly, and
    none waits for others of its own burst. At work only while `going`.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__("newcomers")
        self._stage = stage
        self._going = threading.Event()

    def work(self) -> None:
        stage = self._stage
        client = connect(stage.server.url)
        writer = LogWriter(link_opener(client), stage.settings)
        number, due_s = 0, 0.0
        while not self.ending.is_set():
            if not self._going.wait(0.05):
                continue
            writer.append_pings(
                somewhere(phones(number, 2), np.random.default_rng(number), round(time.time() * 1000), 0.3)
            )
            number += 1
            due_s = max(due_s + 1 / NEWCOMERS_PER_S, time.monotonic() - 0.1)
            self.ending.wait(due_s - time.monotonic())
        writer.close()
        client.close()

    @contextmanager
    def going(self) -> Iterator[None]:
        """They come; behind it what they caused is done."""
        self._going.set()
        yield
        self._going.clear()
        if self.problem is not None:
            raise self.problem
        self._stage.settle()


def partner_offline(stage: Stage, size: Size) -> None:
    """One partner has read nothing for hours; what the other waits for is compared with a deployment where it reads."""
    stages = {"reads": stage.beside("reads"), "is_away": stage}
    newcomers = {name: Newcomers(one) for name, one in stages.items()}
    for name, one in stages.items():
        one.flow()
        one.desk.publish(growing_alert("open", one.desk.now_ms(), 0.001))
        one.begin(newcomers[name])
    measured = {name: ReadingProcess(one, MEASURED) for name, one in stages.items()}
    beside = {"reads": ReadingProcess(stages["reads"], ABSENT), "is_away": ReadingProcess(stage, MEASURED, "second")}
    for name, one in stages.items():
        with newcomers[name].going():
            one.spend(size.seconds)
    per_s = NEWCOMERS_PER_S  # one push of each partner for each
    _make_backlog(stage, round(per_s * 3600 * size.hours))
    waiting = _entries(stage, ABSENT)
    stage.measured |= {"hours_it_stands_for": round(waiting / per_s / 3600, 3), "entries_waiting": waiting}
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in stages}
    for _ in stage.rounds(size.times):
        for name, one in stages.items():
            with newcomers[name].going():
                time.sleep(WARM_S)
                started_s = time.time()
                one.spend(size.seconds)
                spans[name].append((started_s, time.time()))
    for worker in newcomers.values():
        worker.end()
    compare_turns(stage.measured, *_end(stages, measured, beside, spans))
    away = stage.partner(ABSENT)
    started_s = time.monotonic()
    wait_until(lambda: len(away.delivered) >= waiting, "the partner to have read its backlog", 120.0, 0.05)
    stage.measured["backlog_read_in_s"] = round(time.monotonic() - started_s, 1)
    other = stages["reads"]
    other.quiet()
    if not other.account().clean or other.broken_promises():
        raise RuntimeError(f"the deployment beside it: {other.account().line()}; {other.broken_promises()}")


def _end(
    stages: Mapping[str, Stage],
    measured: Mapping[str, ReadingProcess],
    beside: Mapping[str, ReadingProcess],
    spans: Mapping[str, list[tuple[float, float]]],
) -> list[Turns]:
    """The processes end, and consumers of the same groups go on where they were; what was measured, by deployment."""
    found = []
    for name, one in stages.items():
        given = measured[name].end()
        found.append(_turns(given, spans[name]))
        one.partner(MEASURED, delivered=given)
    stages["reads"].partner(ABSENT, delivered=beside["reads"].end())
    beside["is_away"].end()
    return found


def _turns(given: Mapping[tuple[str, LogId], Delivered], spans: list[tuple[float, float]]) -> Turns:
    at_s = np.array([entry.at_s for entry in given.values()])
    latency_ms = np.array([entry.latency_ms for entry in given.values()])
    parts = [latency_ms[(at_s >= start_s) & (at_s < stop_s)] for start_s, stop_s in spans]
    p50_ms, p99_ms = ([float(np.percentile(part, quantile)) for part in parts] for quantile in (50, 99))
    return Turns(p50_ms, p99_ms, sum(map(len, parts)))


def compare_turns(measured: Measured, reads: Turns, away: Turns) -> None:
    """Medians over turns, and their ratio; its 5th and 95th percentile over resampled pairs of turns (Efron 1979).

    Raises RuntimeError if the p99 is surely more than RATIO_MAX times what it was.
    """
    measured |= {"entries_measured_while_it_reads": reads.entries, "entries_measured_while_away": away.entries}
    pairs = len(reads.p99_ms)
    picks = np.random.default_rng(1).integers(0, pairs, (RESAMPLES, pairs))
    for name, one, other in (("p50", reads.p50_ms, away.p50_ms), ("p99", reads.p99_ms, away.p99_ms)):
        before_ms, after_ms = np.array(one), np.array(other)
        ratios = np.median(after_ms[picks], axis=1) / np.median(before_ms[picks], axis=1)
        ratio = float(np.median(after_ms) / np.median(before_ms))
        low, high = (float(np.percentile(ratios, percent)) for percent in (5, 95))
        measured[f"{name}_ms_while_it_reads"] = round(float(np.median(before_ms)), 2)
        measured[f"{name}_ms_while_it_is_away"] = round(float(np.median(after_ms)), 2)
        measured[f"{name}_ratio"] = round(ratio, 3)
        measured[f"{name}_ratio_from"], measured[f"{name}_ratio_to"] = round(low, 3), round(high, 3)
        if name == "p99" and pairs >= TURNS_JUDGED_MIN and min(ratio, low) > RATIO_MAX:
            found = f"{ratio:.3f} times ({low:.3f} to {high:.3f})"
            raise RuntimeError(f"the other's p99 must stay within {RATIO_MAX:g} times what it was, it is {found}")


# ---- the backlog


def _entries(stage: Stage, partner: str) -> int:
    """That stand in a partner's queues."""
    return sum(stage.client.xlen(push_key(shard, partner)) for shard in stage.shards)


def _make_backlog(stage: Stage, wanted: int) -> None:
    """Let the absent partner's phones be told of old alerts, which are all closed, until so many entries wait."""
    started_s, before_bytes = time.monotonic(), server_number(stage.client, "memory", "used_memory")
    began = _entries(stage, ABSENT)
    since_ms = stage.desk.now_ms()
    lat = HOME_LAT + OLD_NORTH_KM * DEGREES_PER_KM
    for number in range(OLD_ALERTS):
        stage.desk.publish(growing_alert(f"old-{number}", since_ms, 0.001, lat=lat, audience=(ABSENT,)))
    stage.wait_copied()
    writer = LogWriter(link_opener(stage.client), stage.settings)
    sent = 0
    while (there := _entries(stage, ABSENT)) < began + wanted:
        stage.say(f"backlog: {there - began:,} of {wanted:,} entries")
        missing = -(-(began + wanted - there) // OLD_ALERTS)
        for _ in range(min(OLD_BATCHES, missing)):
            sent += 1
            writer.append_pings(_old_phone(sent, stage.desk.now_ms()))
        stage.settle()
    writer.close()
    for number in range(OLD_ALERTS):
        stage.desk.close(f"old-{number}", "found")
    stage.wait_copied()
    stage.settle()
    stage.measured["backlog_made_in_s"] = round(time.monotonic() - started_s, 1)
    keys = [push_key(shard, ABSENT) for shard in stage.shards]
    stage.measured["backlog_mb"] = round(sum(cast(int, stage.client.memory_usage(key, 0)) for key in keys) / 1e6)
    grown = server_number(stage.client, "memory", "used_memory") - before_bytes
    stage.measured["server_memory_grown_mb"] = round(grown / 1e6)


def _old_phone(number: int, observed_at_ms: int) -> PingBatch:
    """A new one every time, of the absent partner, where the old alerts are."""
    batch = somewhere(phones(10_000_000 + number, 1), np.random.default_rng(number), observed_at_ms, 0.3)
    north_e7 = round(OLD_NORTH_KM * DEGREES_PER_KM * 1e7)
    partner = np.full(len(batch), PARTNERS.index(ABSENT), np.uint16)
    return replace(batch, partner=partner, lat_e7=(batch.lat_e7 + north_e7).astype(np.int32))
