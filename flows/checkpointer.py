"""When checkpoints are taken, made final and started from, and what of a log may be trimmed behind them.

    worker   after_entry ──copy──┐                                begin / machine_at ──> a machine, and where to read on
                                 v
    thread   due ──> room ──> snapshot ──> file ──> waits for `done` ──> final ──> XTRIM + SET trimmed, in one MULTI
                                                        ^
    writer   on_done ───────────────────────────────────┘

One thread takes one shard at a time, evenly over the interval, in room that it makes beforehand and keeps; the worker
copies the machine's columns into it between two entries and goes on. So a shard stands still for the time of a memory
copy, and one shard's columns are the most that is held twice.

What is started from is checked against the log: its entry must be there, not trimmed beyond, and `done` must have
passed it. A log that lost its tail fails that, and then the older checkpoint is right.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import redis

from flows.checkpoints import (
    Checkpoint,
    CheckpointAbandoned,
    CheckpointStore,
    CheckpointUnusable,
    OpenCheckpoint,
    WrittenCheckpoint,
)
from flows.clock import CLOCK, Clock
from flows.log import FIRST, LogId, RawEntry, done_key, format_id, log_key, parse_id, trimmed_key
from flows.metrics import METRICS, Metrics
from geoindex.columns import U8
from geoindex.shard import ShardMachine
from geoindex.snapshot import Snapshot

logger = logging.getLogger(__name__)

BYTES_PER_S = 128e6
"""Least pace of writing: 10 million devices in 7 s. *Measured*: the server's XADD of 100 KB on the same disk then has a
p99 of 8-12 ms, against 45-110 ms beside writing at full speed."""
TAKE_TIMEOUT_S = 5.0
"""A shard whose log says nothing for so long (a tick comes every second) is left alone."""
RETRY_S = 5.0
ROOM_SPARE = 1.02
"""Devices that come while room is made."""
AGE_ALARM_INTERVALS = 3
AGE_ALARM_MIN_S = 30.0

TRIM_WHEN_FULL = """#!lua flags=allow-oom
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then return 0 end
redis.call('SET', KEYS[2], ARGV[2])
return redis.call('XTRIM', KEYS[1], 'MINID', ARGV[1])
"""
"""A server at `maxmemory` refuses a MULTI with SET in it, though the trim would make room; a script may say that it is
worth it. It trims only if the entry that is to stay is there, as the MULTI does by its connection."""


class LogTooShort(Exception):
    """A shard can be started from no checkpoint, and its log does not reach back to its beginning."""


@dataclass(frozen=True, slots=True)
class _Seat:
    """A machine and the last entry it has seen. Written by the worker, after every entry."""

    machine: ShardMachine
    raw: RawEntry


@dataclass(slots=True)
class _Order:
    """A snapshot that the thread wants of a shard: open, then taken by the worker, which fills in the rest."""

    shard: int
    room: U8
    generation: int
    ordered_at_s: float
    taken: bool = False
    snapshot: Snapshot | None = None
    position: LogId = FIRST


@dataclass(slots=True)
class _Lane:
    """What is known of one shard."""

    due_s: float
    generation: int = 0
    """Raised when the shard gets another machine: what was taken of the one before is not wanted any more."""
    seat: _Seat | None = None
    done: LogId = FIRST
    written: WrittenCheckpoint | None = None
    """Waits for `done`."""
    final_ms: int | None = None
    """Log time of the newest final checkpoint."""
    tail_lost_at_s: float = 0.0
    unusable: set[LogId] = field(default_factory=set)
    """Final checkpoints that `begin` had to pass over."""


@dataclass(frozen=True, slots=True)
class _LogFacts:
    """What the server says of a shard's log."""

    done: LogId
    trimmed: LogId
    last: LogId
    present: frozenset[LogId]
    """Of the positions asked for: those whose entry is in the log."""

    def fault(self, position: LogId) -> tuple[str, bool] | None:
        """Why a machine that has seen `position` must not read on in this log, and whether the log is to blame."""
        if position < self.trimmed:
            return f"the log was trimmed up to {format_id(self.trimmed)} since", False
        if position not in self.present and position != self.trimmed:
            return f"the log has lost its tail: it ends with {format_id(self.last)}, without this entry", True
        if position > self.done:
            return f"the queues have lost their tail: they hold what was caused up to {format_id(self.done)}", True
        return None


class Checkpointer:
    """Takes and gives checkpoints of the shards of one process.

        source   position = begin(shard)             at the start, and whenever the shard has to be reloaded
        worker   machine = machine_at(shard, position); after_entry(raw, machine) behind every entry
        writer   on_done(shard, log_id)
        owner    start(), stop(), and when no entry will come any more, finish()

    `interval_s` 0: none are taken. Source and worker may be in different processes. Thread-safe.
    """

    def __init__(
        self,
        store: CheckpointStore,
        client: redis.Redis,
        shards: Iterable[int],
        interval_s: float,
        keep_ms: int,
        metrics: Metrics = METRICS,
        trims: bool = True,
        clock: Clock = CLOCK,
    ) -> None:
        """`keep_ms`: no raw ping may be in a log for longer. `trims` False: the logs keep everything."""
        self._store = store
        self._client = client
        self._interval_s = interval_s
        self._keep_ms = keep_ms
        self._metrics = metrics
        self._trims = trims
        self._clock = clock
        self._room = np.empty(0, np.uint8)
        """Kept from one checkpoint to the next: new memory would have to be cleared again."""
        self.prepare_room: Callable[[int], U8] = room
        """Public for simulators, whose machines are too small to be worth preparing memory for."""
        self._changed = threading.Condition()
        now_s = clock.monotonic_s()
        shards = list(shards)
        self._lanes = {
            shard: _Lane(due_s=now_s + interval_s * (index + 1) / len(shards)) for index, shard in enumerate(shards)
        }
        self._started_ms = round(clock.now_ms())
        self._held: dict[int, OpenCheckpoint] = {}
        self._order: _Order | None = None
        """Open: the worker may take it."""
        self._wanted: _Order | None = None
        """What the thread waits for: open, taken, or called off."""
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)

    # --- starting from a checkpoint ---------------------------------------------------------------------------------

    def begin(self, shard: int) -> LogId:
        """Where to read a shard's log on from: behind the newest checkpoint that can be used, or from its first entry.

        A checkpoint that cannot be used is passed over, loudly.
        Raises LogTooShort; SettingsRefused; redis.RedisError, OSError: then call again.
        """
        self._store.sweep(shard)
        # In this order: when a checkpoint is final, `done` has passed it.
        finals = self._store.finals(shard)
        facts = self._log_facts(shard, [checkpoint.position for checkpoint in finals])
        reasons: list[str] = []
        for checkpoint in finals:
            problem = self._try(checkpoint, facts)
            if problem is None:
                return checkpoint.position
            reasons.append(problem)
        self._hold(shard, None)
        if facts.trimmed != FIRST:
            raise LogTooShort(
                f"shard {shard} cannot be started: {'; '.join(reasons) or 'there is no checkpoint'} "
                f"(in {self._store.directory}), and its log was trimmed up to {format_id(facts.trimmed)}. "
                "Put the checkpoints back where they were written, or point `var` there"
            )
        return FIRST

    def machine_at(self, shard: int, position: LogId) -> ShardMachine:
        """The machine behind the entry that `begin` named; what was taken of the shard's last machine is given up.

        Raises CheckpointUnusable if the checkpoint has changed since; SettingsRefused, MemoryError.
        """
        with self._changed:
            lane = self._lanes[shard]
            lane.generation += 1
            written, lane.written = lane.written, None
            lane.seat, lane.done = None, FIRST
            if self._order is not None and self._order.shard == shard:
                self._order = None
            self._changed.notify_all()
        if written is not None:
            self._store.give_up(written)
        held = self._held.pop(shard, None)
        finals = self._store.finals(shard)
        # `begin` has passed over these; it may have done so in another process.
        lane.unusable = {checkpoint.position for checkpoint in finals if checkpoint.position > position}
        lane.final_ms = None if position == FIRST else position[0]
        if position == FIRST:
            return ShardMachine()
        if held is None or held.checkpoint.position != position:
            held = self._store.open(self._store.final(shard, position))
        with contextlib.closing(held):
            started_s = self._clock.monotonic_s()
            machine = held.load()
        self._metrics.gauge("checkpoint_load_ms", 1000 * (self._clock.monotonic_s() - started_s), shard=str(shard))
        return machine

    def _hold(self, shard: int, opened: OpenCheckpoint | None) -> None:
        """Keep a checkpoint open until it is loaded: somebody else may replace it by newer ones meanwhile."""
        before = self._held.pop(shard, None)
        if before is not None:
            before.close()
        if opened is not None:
            self._held[shard] = opened

    def _try(self, checkpoint: Checkpoint, facts: _LogFacts) -> str | None:
        """Whether a checkpoint can be used: None, or else why not."""
        shard = checkpoint.shard
        fault = facts.fault(checkpoint.position)
        if fault is not None:
            reason, tail_lost = f"{checkpoint.path}: {fault[0]}", fault[1]
            self._metrics.count("log_tail_lost_total" if tail_lost else "checkpoints_outdated_total", shard=str(shard))
            if tail_lost:
                words = f"it does not go on behind {format_id(checkpoint.position)}, from where there is a checkpoint"
                self._metrics.alarms.set("log_tail_lost", words, f"shard {shard}")
                self._lanes[shard].tail_lost_at_s = self._clock.monotonic_s()
        else:
            try:
                opened = self._store.open(checkpoint)
                self._hold(shard, opened)
                # Not loaded yet: a shard that starts anew would be in memory twice.
                opened.verify()
                return None
            except CheckpointUnusable as unusable:
                reason = str(unusable)
                self._metrics.count("checkpoints_damaged_total", shard=str(shard))
        logger.error("shard %d: a checkpoint cannot be used: %s", shard, reason)
        return reason

    def _log_facts(self, shard: int, positions: list[LogId]) -> _LogFacts:
        with self._client.pipeline(transaction=True) as pipeline:
            pipeline.get(done_key(shard))
            pipeline.get(trimmed_key(shard))
            pipeline.xrevrange(log_key(shard), count=1)
            for position in positions:
                pipeline.xrange(log_key(shard), min=format_id(position), max=format_id(position))
            done, trimmed, last, *entries = pipeline.execute()
        return _LogFacts(
            done=FIRST if done is None else parse_id(done),
            trimmed=FIRST if trimmed is None else parse_id(trimmed),
            last=parse_id(last[0][0]) if last else FIRST,
            present=frozenset(position for position, found in zip(positions, entries, strict=True) if found),
        )

    # --- called by the flow -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread, unless no checkpoints are wanted."""
        if self._interval_s:
            self._thread.start()

    def after_entry(self, raw: RawEntry, machine: ShardMachine) -> None:
        """A machine has seen an entry, and the next one waits: the moment to copy it, if that is due.

        Raises RuntimeError if the checkpoint thread has died of a programming error.
        """
        self._lanes[raw.shard].seat = _Seat(machine, raw)
        if self._failure is not None:
            raise RuntimeError("checkpoints have failed") from self._failure
        order = self._order
        if order is None or order.shard != raw.shard:
            return
        with self._changed:
            if self._order is not order:
                return
            self._order, order.taken = None, True
        started_s = time.perf_counter()
        snapshot = machine.snapshot(order.room)
        self._metrics.observe("checkpoint_stop_ms", 1000 * (time.perf_counter() - started_s))
        with self._changed:
            order.snapshot, order.position = snapshot, raw.log_id
            self._changed.notify_all()

    def on_done(self, shard: int, log_id: LogId) -> None:
        """All pushes up to a log entry are in the queues."""
        with self._changed:
            lane = self._lanes[shard]
            lane.done = log_id
            if lane.written is not None and lane.written.position <= log_id:
                self._changed.notify_all()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop the thread; what it was writing is given up."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        with self._changed:
            unfinished = [lane.written for lane in self._lanes.values() if lane.written is not None]
            for lane in self._lanes.values():
                lane.written = None
        for written in unfinished:
            self._store.give_up(written)

    def is_done(self) -> bool:
        """Whether `done` has come to the last entry of every machine here."""
        return all(lane.seat is None or lane.done >= lane.seat.raw.log_id for lane in self._lanes.values())

    def finish(self) -> None:
        """The last checkpoint of every shard, behind its last entry, after `stop`: no entry will come any more.

        Only of shards whose pushes are all in the queues. A failure is logged: the next start replays more.
        """
        if not self._interval_s:
            return
        for shard, lane in self._lanes.items():
            seat = lane.seat
            if seat is None or lane.done < seat.raw.log_id:
                continue
            position = seat.raw.log_id
            try:
                finals = [final.position for final in self._store.finals(shard)]
                if position in finals and position not in lane.unusable:
                    continue
                started_s = self._clock.monotonic_s()
                lane.written = self._store.write(shard, position, seat.machine.state(), seat.machine.columns())
                self._measure(shard, lane.written, started_s)
            except OSError as error:
                self._failed(shard, error)
            else:
                self._settle(shard)

    def set_gauges(self) -> None:
        """Age of each shard's newest checkpoint: how much log a restart would replay."""
        if not self._interval_s:
            return
        now_ms = self._clock.now_ms()
        limit_ms = 1000 * max(AGE_ALARM_MIN_S, AGE_ALARM_INTERVALS * self._interval_s)
        for shard, lane in self._lanes.items():
            since_ms = self._started_ms if lane.final_ms is None else lane.final_ms
            self._metrics.gauge("checkpoint_age_ms", max(0.0, now_ms - since_ms), shard=str(shard))
            # After a long pause the last one is old, and the next is given its time.
            late_ms = now_ms - max(since_ms, self._started_ms)
            is_late = lane.seat is not None and late_ms > limit_ms  # its machine may be in another process
            words = f"no checkpoint for {late_ms / 1000:.0f} s" if is_late else None
            self._metrics.alarms.put("checkpoint_age", words, f"shard {shard}")
            if lane.seat is None and self._clock.monotonic_s() - lane.tail_lost_at_s > limit_ms / 1000:
                self._metrics.alarms.clear("log_tail_lost", f"shard {shard}")

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._stopping and self._is_free()) and (pause_s := self.pause_s()) > 0:
                        self._changed.wait(pause_s)
                    if self._stopping and self._is_free():
                        return
                self.step()
        except BaseException as error:
            logger.exception("checkpoints have failed")
            with self._changed:
                self._failure = error

    def _is_free(self) -> bool:
        """Whether nothing is under way that only this thread can end."""
        return not self._ready() and (self._wanted is None or not self._wanted.taken)

    def pause_s(self) -> float:
        """How long until there is something to do, unless something changes."""
        if self._ready():
            return 0.0
        order, now_s = self._wanted, self._clock.monotonic_s()
        if order is None:
            return min(lane.due_s for lane in self._lanes.values()) - now_s
        if order.snapshot is not None or self._is_called_off(order):
            return 0.0
        # Once the worker has begun it needs no more than moments.
        return 0.1 if order.taken else order.ordered_at_s + TAKE_TIMEOUT_S - now_s

    def _is_called_off(self, order: _Order) -> bool:
        """Whether an order was withdrawn before the worker took it."""
        return self._order is not order and not order.taken

    def step(self) -> None:
        """One round: what `done` has passed becomes final; of what is due, the next part.

        Public for simulators, which call it instead of `start`.
        """
        with self._changed:
            ready = self._ready()
        for shard in ready:
            self._settle(shard)
        order = self._wanted
        if order is None:
            shard = min(self._lanes, key=lambda shard: self._lanes[shard].due_s)
            if not self._stopping and self._lanes[shard].due_s <= self._clock.monotonic_s():
                self._take(shard)
            return
        with self._changed:
            late = self._clock.monotonic_s() >= order.ordered_at_s + TAKE_TIMEOUT_S or self._stopping
            if late and self._order is order:
                self._order = None
            ended = order.snapshot is not None or self._is_called_off(order)
        if ended:
            self._wanted = None
            self._done_with(order.shard, self._soon_s() if order.snapshot is None else self._write(order))

    def _soon_s(self) -> float:
        return min(RETRY_S, self._interval_s)

    def _done_with(self, shard: int, pause_s: float) -> None:
        """The next checkpoint of the shard is due after `pause_s`."""
        lane = self._lanes[shard]
        lane.due_s = self._clock.monotonic_s() + pause_s
        if lane.seat is not None:
            self._trim(shard)

    def _ready(self) -> list[int]:
        """Shards whose written checkpoint `done` has passed."""
        return [
            shard
            for shard, lane in self._lanes.items()
            if lane.written is not None and lane.written.position <= lane.done
        ]

    def _take(self, shard: int) -> None:
        """Order a snapshot of a shard, in room that is ready, for the worker to take behind its next entry."""
        lane = self._lanes[shard]
        with self._changed:
            seat, generation, waits = lane.seat, lane.generation, lane.written is not None
        if seat is None:
            # Nothing has been read yet, or its machine is in another process.
            self._hold(shard, None)
        if seat is None or waits:
            # Waits: pushes are held up, and so would be a newer checkpoint.
            self._done_with(shard, self._soon_s())
            return
        try:
            wanted_bytes = round(seat.machine.snapshot_bytes * ROOM_SPARE) + (1 << 20)
            if len(self._room) < wanted_bytes:
                self._room = np.empty(0, np.uint8)
                self._room = self.prepare_room(wanted_bytes)
        except (OSError, MemoryError) as error:
            self._failed(shard, error)
            self._done_with(shard, self._interval_s)
            return
        with self._changed:
            self._order = self._wanted = _Order(shard, self._room, generation, self._clock.monotonic_s())

    def _write(self, order: _Order) -> float:
        """Write what the worker copied; in how many seconds the shard's next checkpoint is due."""
        shard, generation = order.shard, order.generation
        lane = self._lanes[shard]
        assert order.snapshot is not None, "the worker has taken the order"
        try:
            written = self._store.write(
                shard,
                order.position,
                order.snapshot.state,
                order.snapshot.columns,
                lambda: not self._stopping and lane.generation == generation,
                max(BYTES_PER_S, 2 * len(order.room) * len(self._lanes) / self._interval_s),
            )
        except CheckpointAbandoned:
            return self._soon_s()
        except (OSError, MemoryError) as error:
            self._failed(shard, error)
            return self._interval_s
        with self._changed:
            wanted = lane.generation == generation
            if wanted:
                lane.written = written
        if not wanted:
            self._store.give_up(written)
            return self._soon_s()
        self._measure(shard, written, order.ordered_at_s)
        return max(0.0, self._interval_s - (self._clock.monotonic_s() - order.ordered_at_s))

    def _settle(self, shard: int) -> None:
        """Make a shard's written checkpoint final, and trim behind the one before."""
        with self._changed:
            lane = self._lanes[shard]
            written = lane.written
            if written is None or written.position > lane.done:
                return
            lane.written = None
        try:
            self._store.finalise(written, lane.unusable)
        except OSError as error:
            self._failed(shard, error)
            return
        lane.final_ms = written.position[0]
        lane.unusable.discard(written.position)
        self._metrics.count("checkpoints_total", shard=str(shard))
        # From here on a restart knows nothing of a tail that was lost before.
        self._metrics.alarms.clear("log_tail_lost", f"shard {shard}")
        self._trim(shard)

    def _measure(self, shard: int, written: WrittenCheckpoint, started_s: float) -> None:
        self._metrics.gauge("checkpoint_duration_ms", 1000 * (self._clock.monotonic_s() - started_s), shard=str(shard))
        self._metrics.gauge("checkpoint_bytes", written.size_bytes, shard=str(shard))

    def _failed(self, shard: int, error: Exception) -> None:
        self._metrics.count("checkpoint_failures_total", shard=str(shard))
        logger.error("shard %d: no checkpoint: %s", shard, error)

    # --- trimming ---------------------------------------------------------------------------------------------------

    def _trim(self, shard: int) -> None:
        """Trim what lies behind the older of two final checkpoints; a failure is logged, and made up for next time."""
        if not self._trims:
            return
        try:
            with self._client.pipeline(transaction=True) as pipeline:
                # One connection throughout: a server that is restarted in between, maybe without its tail, ends it.
                cast(Any, pipeline).watch(trimmed_key(shard))
                cut = self._cut(shard, cast(Any, pipeline))
                if cut is None:
                    return
                behind = cast(Any, pipeline).xrevrange(log_key(shard), max=f"({format_id(cut)}", count=1)
                if not behind:
                    return
                pipeline.multi()
                pipeline.xtrim(log_key(shard), minid=format_id(cut), approximate=False)
                pipeline.set(trimmed_key(shard), behind[0][0])
                try:
                    trimmed_count = pipeline.execute()[0]
                except redis.OutOfMemoryError:
                    keys = log_key(shard), trimmed_key(shard)
                    trimmed_count = cast(int, self._client.eval(TRIM_WHEN_FULL, 2, *keys, format_id(cut), behind[0][0]))
            self._metrics.count("log_entries_trimmed_total", trimmed_count, shard=str(shard))
        except redis.WatchError:
            pass  # another process trims as well
        except (redis.RedisError, OSError) as error:
            self._metrics.count("log_trim_errors_total", shard=str(shard))
            logger.warning("shard %d: the log is not trimmed: %s", shard, error)

    def _cut(self, shard: int, connection: Any) -> LogId | None:
        """The oldest entry that stays: that of the older checkpoint, or of the newer, if pings would be kept too long.

        Never an entry that is newer than both: without it a restart would not know who was told.
        """
        unusable = self._lanes[shard].unusable
        finals = [final.position for final in self._store.finals(shard) if final.position not in unusable]
        first = connection.xrange(log_key(shard), count=1)
        if not first or not finals:
            return None
        seconds, microseconds = connection.time()
        now_ms = seconds * 1000 + microseconds // 1000
        kept_from_ms = now_ms - self._keep_ms
        cut = finals[1] if len(finals) > 1 else parse_id(first[0][0])
        if cut[0] < kept_from_ms:
            cut = finals[0]
        self._metrics.gauge("log_kept_ms", max(0, now_ms - cut[0]), shard=str(shard))
        words = f"raw pings are kept for too long: no checkpoint since log entry {format_id(cut)}"
        too_long = words if cut[0] < kept_from_ms else None
        self._metrics.alarms.put("raw_pings_kept", too_long, f"shard {shard}")
        present = connection.xrange(log_key(shard), min=format_id(cut), max=format_id(cut))
        return cut if present else None


def room(size_bytes: int) -> U8:
    """Memory that is backed already: the first write to a page costs more than ten later ones.

    In large pages, where there are any: 0.1 ns a byte to make and free, *measured*, against 1.1 for small ones.
    """
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    prepared = np.frombuffer(memory, np.uint8)
    prepared[:: mmap.PAGESIZE] = 0
    return prepared
