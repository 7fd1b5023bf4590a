"""How many devices an alert has told, and told of its end: counted by each shard, published, read by the desk.

    worker   begin ── who is told already ──┐
             after_entry ── pushes ─────────┴──> absolute numbers by alert and partner ──> publisher ──> tally:{s}
    gateway  read_tallies: all shards added up

The numbers are a function of the log, as the pushes are: told bits and what closed alerts had told are state of the
machine, so a shard that starts from a checkpoint knows them, and a replay comes to the same numbers again.

`tally:{s}` is a hash, alert id -> msgpack map:

    told      {partner: devices sent `alert`}
    resolved  {partner: devices sent `resolved`}
    at_ms     shard clock, and
    log_id    [ms, seq] of the log entry that the numbers include

A field is written when its numbers have changed, about once a second, and never over one that includes more of the
log: so a replay, or a second worker by mistake, does not turn it back. It expires TALLY_EXPIRY_S after it was last
written, on servers that can let a field expire (Valkey 9). An alert that told nobody in a shard has none there.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgpack
import numpy as np
import redis

from flows.log import FIRST, LogId
from flows.match import ShardPushes
from geoindex.columns import I64, PushColumns, ToldAs
from geoindex.figure_kernels import add_pushed
from geoindex.shard import ShardMachine

TALLY_EXPIRY_S = 400 * 86_400
"""The desk's figures of a year, and some time to draw them up."""

WRITE_IF_NEWER = """for at = 2, #ARGV, 4 do
  local known = redis.call('HGET', KEYS[1], ARGV[at])
  local is_newer = true
  if known then
    local readable, tally = pcall(cmsgpack.unpack, known)
    if readable and type(tally) == 'table' and type(tally.log_id) == 'table' then
      local ms, seq = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
      is_newer = ms > tally.log_id[1] or (ms == tally.log_id[1] and seq >= tally.log_id[2])
    end
  end
  if is_newer then
    redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 1])
    redis.pcall('HEXPIRE', KEYS[1], ARGV[1], 'FIELDS', 1, ARGV[at])
  end
end"""
"""Arguments: seconds to live; then field, value, ms and seq of each. Lua's numbers are exact up to 2^53."""


def tally_key(shard: int) -> str:
    """What the shard's alerts have told."""
    return f"tally:{{s{shard}}}"


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    """Devices by partner's name."""

    told: Counter[str] = field(default_factory=Counter)
    resolved: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Lane:
    """What is known of one shard, behind log entry `log_id`."""

    log_id: LogId
    at_ms: int
    partners: tuple[str, ...]
    tallies: dict[str, _Tally] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    """Of `tallies`: those that change no more, and are forgotten when they are written."""
    alerts: tuple[ToldAs | None, ...] = ()
    """Whom `sums` counts for, by alert slot."""
    sums: I64 = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """i64[slots, partners]: devices told by pushes in columns, not in `tallies` yet."""

    def tally(self, alert_id: str) -> _Tally:
        """To be added to."""
        self.changed.add(alert_id)
        return self.tallies.setdefault(alert_id, _Tally())

    def add_columns(self, pushes: PushColumns, partners: tuple[str, ...]) -> None:
        """Count many pushes: some ns each, and what is the same for all of them once a second."""
        if pushes.alerts is not self.alerts or partners is not self.partners:
            self.settle()
            self.alerts, self.partners = pushes.alerts, partners
            self.sums = np.zeros((len(pushes.alerts), len(partners)), np.int64)
        add_pushed(pushes.alert, pushes.partner, pushes.id_stop, self.sums)

    def settle(self) -> None:
        """Move `sums` into `tallies`."""
        if not self.sums.any():
            return
        for slot, partner in np.argwhere(self.sums).tolist():
            told_as = self.alerts[slot]
            assert told_as is not None, f"no alert stands at {slot}"
            self.tally(told_as[0]).told[self.partners[partner]] += int(self.sums[slot, partner])
        self.sums[:] = 0


@dataclass(frozen=True, slots=True)
class ChangedTallies:
    """What is to be written of one shard."""

    shard: int
    alert_ids: tuple[str, ...]
    arguments: list[str | bytes | int]
    """Of WRITE_IF_NEWER."""
    lane: _Lane


class TallyCounter:
    """Counts what the shards of a process tell, in the thread that runs their machines. `take`, `put_back`: another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: dict[int, _Lane] = {}

    def begin(self, shard: int, machine: ShardMachine, position: LogId) -> None:
        """The shard starts, or starts anew, behind log entry `position`: one look at its told bits."""
        partners = () if position == FIRST else machine.settings.partners
        lane = _Lane(position, machine.clock_ms, partners)
        for alert_id, counts in machine.told_counts().items():
            if counts.any():
                lane.tally(alert_id).told.update(_by_name(partners, counts.tolist()))
        for ended in machine.ended_alerts():
            tally = lane.tally(ended.alert_id)
            tally.told.update(_by_name(partners, ended.told))
            tally.resolved.update(tally.told)
            lane.closed.add(ended.alert_id)
        with self._lock:
            self._lanes[shard] = lane

    def after_entry(self, caused: ShardPushes) -> None:
        """A machine has seen an entry, and this is what came of it."""
        with self._lock:
            lane = self._lanes[caused.raw.shard]
            lane.log_id, lane.at_ms = caused.raw.log_id, caused.raw.ms
            for segment in caused.pushes.segments:
                if isinstance(segment, PushColumns):
                    lane.add_columns(segment, caused.partners)
                elif segment.kind == "alert":
                    told = lane.tally(segment.alert_id).told
                    told[caused.partners[segment.partner]] += len(segment.id_end)
                elif segment.kind == "resolved":
                    resolved = lane.tally(segment.alert_id).resolved
                    resolved[caused.partners[segment.partner]] += len(segment.id_end)
                    lane.closed.add(segment.alert_id)

    def take(self) -> list[ChangedTallies]:
        """What has changed since the last call; each is to be given to `written` or `put_back`."""
        with self._lock:
            lanes = list(self._lanes.items())
        taken: list[ChangedTallies] = []
        for shard, lane in lanes:
            with self._lock:
                lane.settle()
                log_id, at_ms = lane.log_id, lane.at_ms
                changed = [
                    (alert_id, dict(lane.tallies[alert_id].told), dict(lane.tallies[alert_id].resolved))
                    for alert_id in sorted(lane.changed)
                ]
                lane.changed.clear()
            if changed:
                taken.append(_encoded(shard, lane, log_id, at_ms, changed))
        return taken

    def written(self, taken: ChangedTallies) -> None:
        """It has been written: of closed alerts nothing is kept here any more."""
        lane = taken.lane
        with self._lock:
            for alert_id in lane.closed.intersection(taken.alert_ids) - lane.changed:
                lane.closed.remove(alert_id)
                del lane.tallies[alert_id]

    def put_back(self, taken: ChangedTallies) -> None:
        """It could not be written: it has still changed."""
        with self._lock:
            taken.lane.changed.update(taken.alert_ids)


def _encoded(
    shard: int, lane: _Lane, log_id: LogId, at_ms: int, changed: list[tuple[str, dict[str, int], dict[str, int]]]
) -> ChangedTallies:
    arguments: list[str | bytes | int] = [TALLY_EXPIRY_S]
    for alert_id, told, resolved in changed:
        fields = {"told": told, "resolved": resolved, "at_ms": at_ms, "log_id": log_id}
        arguments += (alert_id, cast(bytes, msgpack.packb(fields)), *log_id)
    return ChangedTallies(shard, tuple(alert_id for alert_id, _, _ in changed), arguments, lane)


def _by_name(partners: Sequence[str], counts: Sequence[int]) -> dict[str, int]:
    return {name: count for name, count in zip(partners, counts, strict=False) if count}


# --- reading ----------------------------------------------------------------------------------------------------------


def read_tallies(client: redis.Redis, shard_count: int, alert_id: str) -> dict[str, tuple[int, int]]:
    """Devices told about an alert, and of them those told of its end, by partner's name, over all shards.

    Partners without any are not in it. A second or two behind the queues. Exact numbers: who shows them to people hides
    small ones. Raises redis.RedisError.
    """
    with client.pipeline(transaction=False) as pipeline:
        for shard in range(shard_count):
            pipeline.hget(tally_key(shard), alert_id)
        payloads = cast("list[bytes | None]", pipeline.execute())
    told: Counter[str] = Counter()
    resolved: Counter[str] = Counter()
    for payload in payloads:
        if payload is not None:
            fields = cast("dict[str, Any]", msgpack.unpackb(payload))
            told.update(fields["told"])
            resolved.update(fields["resolved"])
    return {name: (told[name], resolved[name]) for name in sorted(told.keys() | resolved.keys())}
