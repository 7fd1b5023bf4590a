"""The dataflow: one picture, one step a line.

    log entries ──> decoded entries ──> pushes of a shard, entry by entry ──> push queues
       source            decode                shard machine                     sink

An item is a whole log entry (thousands of pings) keyed by its shard, never one phone. Order within a shard holds from
source partition to sink partition. Nothing here raises on bad input: what cannot be decoded travels on as
`Undecodable`, is counted, and still moves `done` forward. A broken invariant does raise, and stops the worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.inputs import FixedPartitionedSource
from bytewax.operators import StatefulBatchLogic
from bytewax.outputs import FixedPartitionedSink

from flows.log import FIRST, LogId, RawEntry
from flows.wire import MalformedEntry, PingColumns, decode_entry, screen_pings
from geoindex.columns import Pushes
from geoindex.entries import LogEntry
from geoindex.shard import ShardMachine

MachineOf = Callable[["Reload"], ShardMachine]
"""The machine that a shard starts with."""
AfterEntry = Callable[["ShardPushes", ShardMachine], None]
"""Told of every entry that a machine has seen, and of what came of it, before it sees the next."""


def shard_key(shard: int) -> str:
    """Bytewax's key of a shard, and the name of its partitions: `0007`. It sorts names, so all are equally long."""
    return f"{shard:04d}"


def shard_of_key(key: str) -> int:
    """The shard that a key names."""
    return int(key)


@dataclass(frozen=True, slots=True)
class Undecodable:
    """An entry that is not one: counted, set aside, passed over."""

    reason: str


@dataclass(frozen=True, slots=True)
class Reload:
    """In place of an entry: the shard's machine starts, or starts anew, behind log entry `position`."""

    shard: int
    position: LogId = FIRST


@dataclass(frozen=True, slots=True)
class Entry:
    """A log entry with its columns in place of its bytes."""

    raw: RawEntry
    content: LogEntry | PingColumns | Undecodable


@dataclass(frozen=True, slots=True)
class ShardPushes:
    """Everything that one log entry caused, in queue order; often nothing, but `done` moves all the same."""

    raw: RawEntry
    pushes: Pushes
    partners: tuple[str, ...]
    """Names by partner index."""
    notes: ShardNotes


@dataclass(frozen=True, slots=True)
class ShardNotes:
    """What happened besides pushes, for counters: pings refused by reason, and why the entry was set aside."""

    pings_accepted: int = 0
    pings_refused: dict[str, int] = field(default_factory=dict)
    undecodable: str | None = None
    accepted_by_partner: dict[str, int] = field(default_factory=dict)
    """By partner's name; those without any are not in it."""


def decode(raw: RawEntry | Reload) -> Entry | Reload:
    """Bytes to columns. Never raises."""
    if isinstance(raw, Reload):
        return raw
    try:
        return Entry(raw, decode_entry(raw.kind, raw.payload))
    except MalformedEntry as malformed:
        return Entry(raw, Undecodable(str(malformed)))


class ShardLogic(StatefulBatchLogic[Entry | Reload, ShardPushes, None]):
    """Bytewax's view of one shard machine. Its state is the log's, so there is nothing for Bytewax to store."""

    def __init__(self, machine_of: MachineOf, after_entry: AfterEntry) -> None:
        self._machine_of = machine_of
        self._after_entry = after_entry
        self.machine: ShardMachine | None = None
        """None before the shard has started. To be looked at, by simulators."""

    def on_batch(self, values: list[Entry | Reload]) -> tuple[Iterable[ShardPushes], bool]:
        caused: list[ShardPushes] = []
        for entry in values:
            if isinstance(entry, Reload):
                self.machine = None  # its memory first
                self.machine = self._machine_of(entry)
                continue
            if self.machine is None:
                # Bytewax does not say which key it builds a logic for; the first entry does.
                self.machine = self._machine_of(Reload(entry.raw.shard))
            caused.append(step(self.machine, entry))
            self._after_entry(caused[-1], self.machine)
        return caused, StatefulBatchLogic.RETAIN

    def snapshot(self) -> None:
        return None


def step(machine: ShardMachine, entry: Entry) -> ShardPushes:
    """One entry through its shard's machine.

    Raises SettingsRefused: a program that does not follow the log's settings must not go on.
    """
    raw, content = entry.raw, entry.content
    if isinstance(content, Undecodable):
        return ShardPushes(raw, Pushes(), (), ShardNotes(undecodable=content.reason))
    refused: dict[str, int] = {}
    if isinstance(content, PingColumns):
        content, refused = screen_pings(content, len(machine.settings.partners))
    counters = machine.counters
    accepted_before, refused_before = counters.pings_accepted, dict(counters.pings_refused)
    pushes = machine.apply(raw.ms, content)
    for reason, count in counters.pings_refused.items():
        if count != refused_before[reason]:
            refused[reason] = count - refused_before[reason]
    partners = machine.settings.partners
    accepted, by_partner = counters.pings_accepted - accepted_before, {}
    if accepted:
        counts = machine.accepted_by_partner.tolist()
        by_partner = {name: count for name, count in zip(partners, counts, strict=True) if count}
    return ShardPushes(raw, pushes, partners, ShardNotes(accepted, refused, accepted_by_partner=by_partner))


def build_flow(
    source: FixedPartitionedSource[Any, Any],
    sink: FixedPartitionedSink[ShardPushes, Any],
    machine_of: MachineOf,
    after_entry: AfterEntry = lambda caused, machine: None,
) -> Dataflow:
    """The flow from logs to queues."""
    flow = Dataflow("tuanyuan")
    raw_entries = op.input("log", flow, source)
    entries = op.map_value("decode", raw_entries, decode)
    pushes = op.stateful_batch("shard_machine", entries, lambda _nothing_stored: ShardLogic(machine_of, after_entry))
    op.output("queues", pushes, sink)
    return flow
