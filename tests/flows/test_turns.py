"""Shards take turns between source and sink: what one causes goes out before the next is matched."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import cast

import pytest
import redis
from bytewax.testing import run_main

from flows.checkpointer import Checkpointer
from flows.live import LogSource, QueueSink, Turns
from flows.log import FIRST, RawEntry, append_entry, ensure_settings
from flows.log_reader import LogReader
from flows.match import ShardPushes, build_flow
from flows.metrics import Metrics
from flows.queues import PushWriter
from flows.server import Link, LinkOpener
from geoindex.columns import Pushes
from geoindex.entries import Settings, Tick
from geoindex.shard import ShardMachine
from tests.flows.waiting import eventually

SHARDS = range(4)
ENTRIES_EACH = 21
"""Of a log: settings, and 20 ticks."""


class Recorder:
    """Takes the place of the writer; ends the flow when everything has come."""

    def __init__(self, reader: LogReader, wanted: int, stopping: threading.Event) -> None:
        self._reader = reader
        self.steps: list[tuple[str, int]] = []
        self.written: list[RawEntry] = []
        self._wanted, self._stopping = wanted, stopping

    def matched(self, caused: ShardPushes, _machine: ShardMachine) -> None:
        self.steps.append(("matched", caused.raw.shard))

    def submit(self, raw: RawEntry, _pushes: Pushes, _partners: Sequence[str]) -> None:
        self.steps.append(("out", raw.shard))
        self.written.append(raw)
        self._reader.release(raw.shard, raw.log_id)
        if len(self.written) == self._wanted:
            self._stopping.set()


@pytest.fixture
def reader(client: redis.Redis, open_link: LinkOpener) -> Iterator[LogReader]:
    ensure_settings(client, Settings(shard_count=len(SHARDS), partners=("amap",), hash_key=7))
    for shard in SHARDS:
        for _ in range(ENTRIES_EACH - 1):
            append_entry(client, shard, Tick())
    reader = LogReader(open_link, dict.fromkeys(SHARDS, FIRST), metrics=Metrics(), writes_ticks=False)
    for _ in range(2):  # one read brings 16 of each
        reader.step()
    yield reader
    reader.stop()


def played(reader: LogReader, turns: Turns | None) -> Recorder:
    """All that was read, through the dataflow."""
    stopping = threading.Event()
    recorder = Recorder(reader, len(SHARDS) * ENTRIES_EACH, stopping)
    source = LogSource(reader, cast(Checkpointer, None), SHARDS, 0.0, stopping, turns=turns)
    sink = QueueSink(cast(PushWriter, recorder), SHARDS, Metrics(), turns)
    run_main(build_flow(source, sink, lambda _reload: ShardMachine(), recorder.matched))
    return recorder


def between(steps: list[tuple[str, int]]) -> int:
    """The most shards that were matched at any time without having gone out."""
    waiting: list[int] = []
    most = 0
    for step, shard in steps:
        if step == "matched":
            waiting.append(shard)
        else:
            waiting.remove(shard)
        most = max(most, len(set(waiting)))
    return most


def test_what_a_shard_causes_goes_out_before_the_next_is_matched(reader: LogReader) -> None:
    recorder = played(reader, Turns(reader))
    assert between(recorder.steps) == 1
    for shard in SHARDS:
        ids = [raw.log_id for raw in recorder.written if raw.shard == shard]
        assert ids == sorted(set(ids))
        assert len(ids) == ENTRIES_EACH


def test_without_turns_it_waits_for_the_others(reader: LogReader) -> None:
    assert between(played(reader, None).steps) > 1


def test_every_shard_has_its_turn_while_others_have_more(reader: LogReader) -> None:
    order = [shard for step, shard in played(reader, Turns(reader)).steps if step == "out"]
    turns = [shard for position, shard in enumerate(order) if position == 0 or order[position - 1] != shard]
    assert turns[: 2 * len(SHARDS)] == [*SHARDS, *SHARDS]


def test_the_turn_goes_on_when_what_a_shard_had_is_gone(reader: LogReader) -> None:
    turns = Turns(reader)
    assert turns.next() == 0
    reader.seek(0, (2**40, 0))
    turns.begin(0, len(reader.take(0, 8)))
    assert not turns.is_under_way
    assert turns.next() == 1


@pytest.mark.parametrize("in_turns", [True, False])
def test_a_flow_does_not_go_on_without_its_reader(in_turns: bool) -> None:
    def broken() -> Link:
        raise ZeroDivisionError

    reader = LogReader(broken, {0: FIRST})
    turns = Turns(reader) if in_turns else None
    source = LogSource(reader, cast(Checkpointer, None), [0], 0.0, threading.Event(), turns=turns)
    partition = source.build_part("log", "0000", None)
    assert partition.next_batch() == []
    reader.start()

    def raises() -> bool:
        try:
            partition.next_batch()
        except RuntimeError as error:
            return isinstance(error.__cause__, ZeroDivisionError)
        return False

    eventually(raises)
    reader.stop()


def test_nobodys_turn_is_it_when_there_is_nothing(open_link: LinkOpener) -> None:
    assert Turns(LogReader(open_link, dict.fromkeys(SHARDS, FIRST))).next() is None
