"""What must hold, while a world runs and at its end. Knows every entry that was ever in a log, trimmed or not.

While it runs, at the moment itself:

    a file becomes final only when `done` has passed it; a machine starts only from what was final
    a log is trimmed no further than the older of two final checkpoints (the newer, if pings were kept for too long)
    a push enters a queue only for an entry that is in its log
    one machine that never crashed, fed with the log up to `done`, emits the very bytes and ids that stand in the queues
    what an officer was told of an edit is what stands on the desk: one event if it was taken, none if it was refused

At the end, after a quiet phase:

    so it is for the whole log, nothing else stands in the queues, and the living machines are in that machine's state
    `flows.audit`, which knows nothing of machines, finds nobody missed, extra or told twice, and alert < update <
    resolved for each device
    what was acknowledged to senders and officers, and delivered to partners, is still there

A server that lost its tail is another past: what was acknowledged or delivered of it is held against nobody.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flows.audit import OwedPush, OwedPushes, compare
from flows.consumers import Delivery
from flows.log import LogId, RawEntry, done_key, format_id, log_key, parse_id, push_key, relay_key
from flows.match import Entry, Undecodable, decode, step
from flows.push_commands import log_id_of, push_id
from flows.wire import PingColumns, decode_entry, decode_push, encode_push, screen_pings
from geoindex.entries import Settings
from geoindex.shard import ShardMachine
from loadtest.simulation.server import EntryId, Fields, Observer, Stream
from loadtest.simulation.world import World

NOTHING: LogId = (0, 0)
REFUSALS_MAX = 3
"""Refusals to start before they are held against the program: what it saw may have been over a moment later."""


@dataclass(frozen=True, slots=True)
class _Delivered:
    key: bytes
    entry_id: EntryId
    payload: tuple[bytes, ...]


class _Account:
    """What one machine that never crashes, and the audit beside it, make of a shard's log."""

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.machine, self.audit = ShardMachine(), OwedPushes()
        self.partners: tuple[str, ...] = ()
        self.entry_count = 0
        """Entries of the log that were worked through."""
        self.expected: dict[bytes, list[tuple[EntryId, Fields]]] = {}
        """What the queues must hold, by key."""
        self.caused: list[tuple[LogId, bytes, EntryId, Fields]] = []
        """The same in the log's order: log entry, key, id and fields."""
        self.seen_in_queues = 0
        """How many of these have been found where they must be."""

    def work_through(self, log: Stream, up_to: LogId | None = None) -> None:
        """The entries that are new, up to one."""
        while self.entry_count < len(log.ids) and (up_to is None or log.ids[self.entry_count] <= up_to):
            log_id, (kind, payload) = log.ids[self.entry_count], log.fields[self.entry_count]
            self.entry_count += 1
            entry = decode(RawEntry(self.shard, *log_id, kind, payload, ""))
            assert isinstance(entry, Entry), "decoding an entry gives an entry"
            numbers: Counter[bytes] = Counter()
            caused = step(self.machine, entry)
            for push in caused.pushes:
                key = push_key(self.shard, caused.partners[push.partner]).encode()
                numbers[key] += 1
                found = push_id(log_id, numbers[key]), [push.kind.encode(), encode_push(push)]
                self.expected.setdefault(key, []).append(found)
                self.caused.append((log_id, key, *found))
            content = entry.content
            if isinstance(content, Settings):
                self.partners = content.partners
            if isinstance(content, PingColumns):
                content, _ = screen_pings(content, len(self.partners))
            assert not isinstance(content, Undecodable), "nobody here writes what cannot be decoded"
            self.audit.apply(log_id[0], content)


class Oracle(Observer):
    """Watches one world."""

    def __init__(self, world: World, shard_count: int, keep_ms: int) -> None:
        self._world = world
        self.shards = range(shard_count)
        self._keep_ms = keep_ms
        self._shard_of_log = {log_key(shard).encode(): shard for shard in self.shards}
        self._shard_of_done = {done_key(shard).encode(): shard for shard in self.shards}
        self._done_max: dict[int, LogId] = dict.fromkeys(self.shards, NOTHING)
        self.last_final_ms = 0
        """When a checkpoint last became final, by the world's time."""
        self._ever_final: dict[int, set[LogId]] = {shard: set() for shard in self.shards}
        self.spoilt: set[Path] = set()
        """Checkpoints that the adversary damaged."""
        self.tails_lost = 0
        self._accounts = {shard: _Account(shard) for shard in self.shards}
        self._refusals = 0
        self.is_beyond_repair = False
        """Disk faults took every checkpoint that could be started from: the run ends, and nobody is to blame."""
        self.desk_events: Counter[str] = Counter()
        """Events on the desk, by the process that put them there."""
        self._acknowledged: list[tuple[bytes, EntryId]] = []
        self._delivered: dict[tuple[bytes, EntryId], _Delivered] = {}
        self.pushes = 0

    # --- while it runs ----------------------------------------------------------------------------------------------

    def added(self, key: bytes, entry_id: EntryId, fields: Fields) -> None:
        if key.startswith(b"push:"):
            shard = int(key[key.index(b"{s") + 2 : key.index(b"}")])
            log = self._world.server.stream(log_key(shard).encode())
            caused_by = log_id_of(entry_id)
            if log.place_of(caused_by) is None:
                self._world.violate(
                    "pushes follow the log",
                    f"{key.decode()} got {entry_id}, whose log entry {caused_by} does not exist",
                )
        elif key == b"desk" and self._world.running:
            self.desk_events[self._world.running[-1].process.name] += 1

    def set(self, key: bytes, value: bytes) -> None:
        shard = self._shard_of_done.get(key)
        if shard is not None:
            self._done_max[shard] = max(self._done_max[shard], parse_id(value))
            self._check_done(shard, parse_id(value))

    def _check_done(self, shard: int, done: LogId) -> None:
        """All that the log caused up to `done` is in the queues."""
        server = self._world.server
        account = self._accounts[shard]
        account.work_through(server.stream(log_key(shard).encode()), done)
        for log_id, key, entry_id, fields in islice(account.caused, account.seen_in_queues, None):
            if log_id > done:
                break
            account.seen_in_queues += 1
            queue = server.stream(key)
            place = queue.place_of(entry_id)
            if place is None or queue.fields[place] != fields:
                found = [] if place is None else [(entry_id, queue.fields[place])]
                words = f"wanted {_shown([(entry_id, fields)])}, found {_shown(found)}"
                self._world.violate(_AS_EXPECTED, f"{key.decode()}, done up to {format_id(done)}: {words}")
                return

    def trimmed(self, key: bytes, first_kept: EntryId) -> None:
        shard = self._shard_of_log.get(key)
        if shard is None:
            return
        world = self._world
        positions = self.positions(shard)
        allowed = positions[1] if len(positions) > 1 else NOTHING
        if positions and allowed[0] < world.server.clock_ms - self._keep_ms:
            allowed = positions[0]
        if first_kept > allowed:
            words = f"shard {shard}: trimmed up to {first_kept}, checkpoints are {positions}"
            world.violate("a log is trimmed behind the older checkpoint", words)

    def renamed(self, target: Path) -> None:
        """A checkpoint has become final."""
        shard, position = int(target.parent.name[1:]), parse_id(target.stem)
        self._ever_final[shard].add(position)
        self.last_final_ms = self._world.now_ms
        if position > self._done_max[shard]:
            words = f"shard {shard}: {format_id(position)} is final, done is {format_id(self._done_max[shard])}"
            self._world.violate("a checkpoint is final only behind done", words)

    def started(self, shard: int, position: LogId) -> None:
        """A machine starts behind a log entry."""
        if position != NOTHING and position not in self._ever_final[shard]:
            words = f"shard {shard}: started behind {format_id(position)}"
            self._world.violate("a machine starts only from a final checkpoint", words)

    def refused(self, name: str, problem: Exception) -> None:
        """A flow refuses to start: it must have had a reason, and that reason must be a disk's fault."""
        world = self._world
        self._refusals += 1
        startable = [self._is_startable(shard) for shard in self.shards]
        if not all(startable):
            if self.tails_lost or self.spoilt:
                world.note("no checkpoint is left that agrees with the log: beyond repair")
                self.is_beyond_repair = True
            else:
                world.violate("a flow can always start again", f"{name}: {problem}")
        elif self._refusals >= REFUSALS_MAX:
            world.violate("a flow refuses only for a reason", f"{name}: {problem}")

    def _is_startable(self, shard: int) -> bool:
        server = self._world.server
        log = server.stream(log_key(shard).encode())
        if log.first == 0:
            return True
        done = self._value(done_key(shard))
        for path, position in self._finals(shard):
            place = log.place_of(position)
            if path not in self.spoilt and position <= done and place is not None and place + 1 >= log.first:
                return True
        return False

    def _finals(self, shard: int) -> list[tuple[Path, LogId]]:
        folder = f"s{shard:03d}"
        return [
            (path, parse_id(path.stem))
            for path in self._world.disk.files
            if path.suffix == ".checkpoint" and path.parent.name == folder
        ]

    def positions(self, shard: int) -> list[LogId]:
        """Of the shard's final checkpoints, the newest first."""
        return sorted((position for _, position in self._finals(shard)), reverse=True)

    def _value(self, key: str) -> LogId:
        raw = self._world.server.values.get(key.encode())
        return NOTHING if raw is None else parse_id(raw)

    def acknowledged(self, key: bytes, entry_id: EntryId) -> None:
        """A client was told that this entry is in that stream."""
        self._acknowledged.append((key, entry_id))

    def delivered(self, delivery: Delivery, payload: tuple[bytes, ...]) -> None:
        """A consumer got a push."""
        key = delivery.stream.encode(), delivery.entry_id
        before = self._delivered.get(key)
        if before is not None and before.payload != payload:
            self._world.violate("a push is delivered as it was before", f"{key} was another push before")
        self._delivered[key] = _Delivered(*key, payload)

    def tail_was_lost(self) -> None:
        """The server has another past now."""
        self.tails_lost += 1
        server = self._world.server
        for shard, account in self._accounts.items():
            if account.entry_count > len(server.stream(log_key(shard).encode()).ids):
                self._accounts[shard] = _Account(shard)
            account.seen_in_queues = 0  # queues may have lost what logs have not
        self._acknowledged = [
            (key, entry) for key, entry in self._acknowledged if server.stream(key).place_of(entry) is not None
        ]
        self._delivered = {
            place: delivered
            for place, delivered in self._delivered.items()
            if server.stream(delivered.key).place_of(delivered.entry_id) is not None
        }

    # --- at the end -------------------------------------------------------------------------------------------------

    def unsettled(self, partners: tuple[str, ...]) -> str | None:
        """What in logs, desk and queues has not gone its way yet; None: nothing."""
        server = self._world.server
        desk = server.stream(b"desk").last_id
        for shard in self.shards:
            done, head = self._value(done_key(shard)), server.stream(log_key(shard).encode()).last_id
            if done != head:
                return f"shard {shard} is done up to {done}, and its log ends with {head}"
            copied = self._value(relay_key(shard))
            if copied != desk:
                return f"shard {shard} has the desk's events up to {copied}, of {desk}"
            for partner in partners:
                queue = server.stream(push_key(shard, partner).encode())
                for group in queue.groups.values():
                    if group.pending or group.last_delivered < queue.last_id:
                        return f"{partner} has read shard {shard} up to {group.last_delivered}, of {queue.last_id}"
                if len(queue) and not queue.groups:
                    return f"{partner} has not read shard {shard}"
        return None

    def check(self, machines: dict[int, ShardMachine]) -> None:
        """Every account, once the world is settled. `machines`: those that live, by shard."""
        told: list[OwedPush] = []
        owed: list[OwedPush] = []
        for shard in self.shards:
            self._check_shard(shard, machines.get(shard), told, owed)
        result = compare(owed, told)
        self.pushes = result.pushes
        if not result.clean:
            some = [*result.missed[:2], *result.extra[:2], *result.duplicate[:2]]
            self._world.violate("nobody missed, extra or told twice", f"{result.line()}, say {some}")
        self._check_order(told)
        server = self._world.server
        for key, entry_id in self._acknowledged:
            if server.stream(key).place_of(entry_id) is None:
                self._world.violate("what was acknowledged stays", f"{key.decode()} {entry_id} is gone")
        for delivered in self._delivered.values():
            queue = server.stream(delivered.key)
            place = queue.place_of(delivered.entry_id)
            if place is None:
                self._world.violate(
                    "what was delivered stays", f"{delivered.key.decode()} {delivered.entry_id} is gone"
                )
            elif tuple(queue.fields[place]) != delivered.payload:
                self._world.violate(
                    "what was delivered stays", f"{delivered.key.decode()} {delivered.entry_id} differs"
                )
        self._check_desk()

    def _check_shard(self, shard: int, living: ShardMachine | None, told: list[OwedPush], owed: list[OwedPush]) -> None:
        server = self._world.server
        account = self._accounts[shard]
        account.work_through(server.stream(log_key(shard).encode()))
        owed += account.audit.pushes
        for partner in account.partners:
            key = push_key(shard, partner).encode()
            queue = server.stream(key)
            found = list(zip(queue.ids, queue.fields, strict=True))
            wanted = account.expected.get(key, [])
            if found != wanted:
                self._world.violate(_AS_EXPECTED, _difference(key, wanted, found))
            for _, fields in found:
                push_entry = decode_push(fields[1])
                told += [
                    OwedPush(push_entry.kind, push_entry.alert_id, push_entry.revision, partner, device_id)
                    for device_id in push_entry.device_ids
                ]
        if living is not None:
            self._check_machine(shard, living, account.machine)

    def _check_machine(self, shard: int, living: ShardMachine, fresh: ShardMachine) -> None:
        """A machine that was copied, stored and started again is bit for bit what it would have been."""
        state, fresh_state = living.state(), fresh.state()
        differing = [name for name in _STATE_FIELDS if getattr(state, name) != getattr(fresh_state, name)]
        fresh_columns = fresh.columns()
        for name, column in living.columns().items():
            if column.tobytes() != fresh_columns[name].tobytes():
                differing.append(name)
        if differing:
            self._world.violate(
                "a machine is what its log makes of it", f"shard {shard}: {', '.join(differing)} differ"
            )

    def _check_order(self, told: list[OwedPush]) -> None:
        last: dict[tuple[str, str, str], tuple[int, int]] = {}
        for push in told:
            key = push.partner, push.device_id, push.alert_id
            rank = (_RANKS[push.kind], push.revision if push.kind == "update" else 0)
            if (key in last and rank <= last[key]) or (key not in last and push.kind != "alert"):
                self._world.violate("alert, then updates, then resolved", f"{push} after {last.get(key)}")
            last[key] = rank

    def _check_desk(self) -> None:
        """Every event on the desk is in every log, in desk order; no edit stands there twice."""
        server = self._world.server
        desk = server.stream(b"desk")
        revisions: Counter[tuple[str, int | None]] = Counter()
        for kind, payload in desk.fields:
            event: Any = decode_entry(kind, payload)
            alert = getattr(event, "alert", event)
            revisions[alert.alert_id, alert.revision] += 1
        for (alert_id, revision), count in revisions.items():
            if count > 1:
                self._world.violate("a revision is given once", f"{alert_id} {revision}: {count} times")
        for shard in self.shards:
            log = server.stream(log_key(shard).encode())
            seen: set[EntryId] = set()
            for kind, payload in log.fields:
                if kind in (b"publish", b"update", b"close"):
                    copied: Any = decode_entry(kind, payload)
                    seen.add(tuple(copied.desk_id))
            for missing in set(desk.ids) - seen:
                self._world.violate("an event is in every log", f"shard {shard} has no {missing}")


_AS_EXPECTED = "queues hold what a machine that never crashed emits"
_RANKS = {"alert": 0, "update": 1, "resolved": 2}
_STATE_FIELDS = (
    *("settings", "clock_ms", "sweep_due_ms", "last_desk_id", "closed", "alerts", "alert_slot_count", "told_words"),
    *("table_counts", "counters"),
)


def _difference(key: bytes, wanted: list[Any], found: list[Any]) -> str:
    place = next(
        (index for index, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]),
        min(len(wanted), len(found)),
    )
    return (
        f"{key.decode()}: {len(found)} entries instead of {len(wanted)}; at {place} wanted "
        f"{_shown(wanted[place : place + 1])}, found {_shown(found[place : place + 1])}"
    )


def _shown(entries: list[Any]) -> str:
    if not entries:
        return "nothing"
    entry_id, (_, payload) = entries[0]
    return f"{entry_id} {decode_push(payload)}"
