"""The logs of a process's shards, read: a few threads, blocking reads, bounded queues, ticks for a log that is silent.

log:{s} ──LogReader: threads─────> bounded queue a shard ──take──> source partitions
^                                                     │
└────────── release (when `done` has advanced) ───────┘
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import redis

from flows.clock import CLOCK, Clock
from flows.log import FIRST, LogId, RawEntry, format_id, log_key, parse_id, trimmed_key
from flows.metrics import METRICS, Metrics
from flows.server import Link, LinkOpener, ServerRefused, packed, worth_a_line
from flows.wire import CLOSE, PUBLISH, UPDATE, encode_entry
from geoindex.entries import Tick

logger = logging.getLogger(__name__)

REPLY_ENTRIES_MAX = 64
REPLY_BYTES_MAX = 16 << 20
"""Of one read over all shards, by the mean size of entries so far; the number of entries bounds the rest."""
ALERT_EVENTS = frozenset({PUBLISH, UPDATE, CLOSE})
"""Kinds of entries of which each is the last that is taken at once."""
TICK_S = 1.0
"""A log silent for this long gets a tick."""
BLOCK_S = 1.0
FULL_BLOCK_S = 0.005
"""Instead, while a shard waits for room: it must not wait for another shard's next entry."""
STOPPED_BLOCK_S = 0.05
"""Instead, while a shard waits for a `seek`."""
NOT_STARTED = "it has not been read yet"
"""Why a shard waits for its first `seek`."""


@dataclass(frozen=True, slots=True)
class ReaderLimits:
    """How far the reader runs ahead, per shard: entries read and not released yet."""

    entries_max: int = 128
    process_bytes_max: int = 256 << 20
    """Over all shards of the process; each gets an equal part, and may always hold one entry."""
    in_flight_max: int = 64
    """Entries taken and not released: Bytewax's own queues are unbounded (design section 6)."""


@dataclass(slots=True)
class _Shard:
    position: LogId
    """The last entry read, or what `seek` said."""
    generation: int = 0
    """Raised by every seek: what was asked for before it is thrown away when it arrives."""
    queue: deque[RawEntry] = field(default_factory=deque)
    in_flight: deque[tuple[LogId, int]] = field(default_factory=deque)
    held_bytes: int = 0
    """Of queue and in_flight."""
    at_head: bool = False
    quiet_since_s: float = 0.0
    stopped: str | None = None
    """Why nothing is read: the shard must be reloaded, and `seek` be called."""


@dataclass(slots=True)
class _Lane:
    """Some of the shards, the link they are read by, and its thread."""

    shards: tuple[int, ...]
    link: Link | None = None
    thread: threading.Thread | None = None
    failures_in_a_row: int = 0


class LogReader:
    """Reads the logs of this process's shards: a few threads, blocking reads, bounded queues. Thread-safe.

    For a source partition, which must not keep others from working and must not be late:

        next_batch   in the worker's first partition: reader.wait(shards of this worker, 0.05)
                     in each: reader.take(shard, n)
        next_awake   a time in the past if reader.is_idle(shards of this worker), so that the wait above is the only
                     one; otherwise None, so that the worker does not spin while entries are in the flow

    The wait ends at once when an entry arrives, and does not begin while entries of these shards are in the flow.
    *Measured* (Bytewax 0.21.1, 8 shards, all threads of the process, ticks included): 0.4 to 0.8 % of a core when idle,
    against 5 to 6 % without the wait; from XADD to the push in its queue p50 2.6 ms and p99 7 to 10 ms either way, two
    fsyncs of 0.7 ms included. next_awake alone, 5 ms ahead, costs 2.6 % and 5 ms; always in the past, p50 7 ms.
    A shard stops (`stopped()` says why) when the server has another run id than before, or when its log was trimmed
    beyond its position. Nothing of it is delivered until the owner has loaded a checkpoint and called `seek`.
    """

    def __init__(
        self,
        open_link: LinkOpener,
        positions: Mapping[int, LogId | None],
        limits: ReaderLimits | None = None,
        metrics: Metrics = METRICS,
        writes_ticks: bool = True,
        ticks_refused: Callable[[], str | None] = lambda: None,
        clock: Clock = CLOCK,
        link_count: int = 1,
    ) -> None:
        """`positions`: for each shard the id of the last entry that is *not* to be read again; None: `seek` says.

        `link_count`: links among which the shards are divided, each with a thread of its own.

        `ticks_refused`: why no tick may be written now (`Guards.appends_refused`), or None.
        """
        self._open_link = open_link
        self._limits = limits or ReaderLimits()
        self._metrics = metrics
        self._writes_ticks = writes_ticks
        self._ticks_refused = ticks_refused
        self._clock = clock
        self._bytes_max = self._limits.process_bytes_max // max(1, len(positions))
        self._shards = {
            shard: _Shard(FIRST, stopped=NOT_STARTED) if position is None else _Shard(position)
            for shard, position in positions.items()
        }
        self._shard_of_key = {log_key(shard).encode(): shard for shard in positions}
        self._entry_bytes = 64 << 10  # running mean, for COUNT
        shards = list(positions)
        self._lanes = [_Lane(tuple(shards[first::link_count])) for first in range(max(1, min(link_count, len(shards))))]
        self._lane_of = {shard: lane for lane in self._lanes for shard in lane.shards}
        self._run_id: str | None = None
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._failure: BaseException | None = None

    # Called by the flow, from its threads.

    def start(self) -> None:
        """Start the reading threads."""
        for number, lane in enumerate(self._lanes):
            assert lane.thread is None, "a reader starts once"
            lane.thread = threading.Thread(target=self._run, args=(lane,), name=f"log-reader-{number}", daemon=True)
            lane.thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop reading; what was read can still be taken. Returns when the threads have ended."""
        self._stopping.set()
        for lane in self._lanes:
            link = lane.link
            if link is not None:
                link.close()
        with self._changed:
            self._changed.notify_all()
        for lane in self._lanes:
            if lane.thread is not None:
                lane.thread.join(timeout_s)

    def take(self, shard: int, entries_max: int) -> list[RawEntry]:
        """The next entries of a shard, in log order; empty if there are none yet, or no credit. Never blocks.

        An alert event is the last of them: what it causes goes out before anything else is matched.
        Raises RuntimeError if a reading thread has died of a programming error.
        """
        with self._changed:
            self._raise_failure()
            state = self._shards[shard]
            count = min(entries_max, len(state.queue), self._limits.in_flight_max - len(state.in_flight))
            taken: list[RawEntry] = []
            while len(taken) < count and not (taken and taken[-1].kind in ALERT_EVENTS):
                taken.append(state.queue.popleft())
            state.in_flight.extend((entry.log_id, _held_bytes(entry)) for entry in taken)
            return taken

    def next_to_take(self, behind: int) -> int | None:
        """The next shard that `take` has something of, cyclically behind a shard, by number; None if there is none.

        Raises RuntimeError as `take`.
        """
        with self._changed:
            self._raise_failure()
            found = [
                shard
                for shard, state in self._shards.items()
                if state.queue and len(state.in_flight) < self._limits.in_flight_max
            ]
        return min(found, key=lambda shard: (shard <= behind, shard), default=None)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the log reader has failed") from self._failure

    def release(self, shard: int, log_id: LogId) -> None:
        """Everything taken up to `log_id` has left the flow: its pushes are in the queues."""
        with self._changed:
            state = self._shards[shard]
            was_full = self._is_full(state)
            while state.in_flight and state.in_flight[0][0] <= log_id:
                state.held_bytes -= state.in_flight.popleft()[1]
            if was_full:
                self._changed.notify_all()

    def is_idle(self, shards: Iterable[int]) -> bool:
        """Whether no entry of these shards can be taken, and none is in flight."""
        with self._changed:
            return self._is_idle(shards)

    def wait(self, shards: Iterable[int], timeout_s: float) -> None:
        """Until an entry of one of the shards can be taken; not at all while one of theirs is in flight."""
        with self._changed:
            if self._is_idle(shards) and not self._stopping.is_set():
                self._clock.wait(self._changed, timeout_s)

    def _is_idle(self, shards: Iterable[int]) -> bool:
        return self._failure is None and not any(
            self._shards[shard].queue or self._shards[shard].in_flight for shard in shards
        )

    def seek(self, shard: int, position: LogId) -> None:
        """Go on reading a shard behind `position`, whatever was read of it before."""
        with self._changed:
            state = self._shards[shard]
            self._shards[shard] = _Shard(position, state.generation + 1)
            self._changed.notify_all()

    def stopped(self) -> dict[int, str]:
        """The shards that wait for `seek`, and why."""
        with self._changed:
            return {shard: state.stopped for shard, state in self._shards.items() if state.stopped is not None}

    @property
    def run_id(self) -> str | None:
        """The run of the server that is read from; None before the first connection."""
        return self._run_id

    def at_head(self, shard: int) -> bool:
        """Whether the shard's log had nothing more when it was last read, and nothing of it waits or is in flight."""
        with self._changed:
            state = self._shards[shard]
            return state.at_head and not state.queue and not state.in_flight

    def lag_ms(self, shard: int) -> float:
        """Age of the oldest entry read and not released yet, by the server's clock; 0 if there is none.

        Without a server, or while the shard is stopped: the age of the last entry read.
        """
        with self._changed:
            state = self._shards[shard]
            link = self._lane_of[shard].link
            if state.in_flight:
                oldest_ms = state.in_flight[0][0][0]
            elif state.queue:
                oldest_ms = state.queue[0].ms
            elif link is not None and state.stopped is None:
                return 0.0  # what has come since is being read
            else:
                oldest_ms = state.position[0]
            now_ms = link.now_ms() if link is not None else self._clock.now_ms()
            return max(0.0, now_ms - oldest_ms) if oldest_ms else 0.0

    # The reading threads.

    def _run(self, lane: _Lane) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._step(lane)
                    lane.failures_in_a_row = 0
                except (redis.RedisError, ServerRefused) as error:
                    self._stopping.wait(self._break_link(lane, error))
        except BaseException as error:
            logger.exception("the log reader has failed")
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            if lane.link is not None:
                lane.link.close()

    def step(self) -> None:
        """One round of a reader with one link, for simulators, which call it instead of `start`.

        Raises redis.RedisError, ServerRefused: then call `break_link`.
        """
        (lane,) = self._lanes
        self._step(lane)

    def break_link(self, error: Exception) -> float:
        """Close the link after an error of `step` and say so; in how many seconds to try again."""
        (lane,) = self._lanes
        return self._break_link(lane, error)

    def _step(self, lane: _Lane) -> None:
        """Ticks that are due, one (blocking) read over all shards of the lane that have room."""
        link = self._opened_link(lane)
        with self._changed:
            states = {shard: self._shards[shard] for shard in lane.shards}
            open_to_read = {
                shard: (state.generation, state.position)
                for shard, state in states.items()
                if state.stopped is None and not self._is_full(state)
            }
            if not open_to_read:
                self._clock.wait(self._changed, STOPPED_BLOCK_S)
        if not open_to_read:
            # Nothing else would tell that the server was restarted: the writer drops what was read of the run before,
            # and no credit ever comes back for it.
            link.ask("PING")
            return
        with self._changed:
            held_up = len(open_to_read) < len(states)
            any_stopped = any(state.stopped is not None for state in states.values())
            room_bytes = min(self._bytes_max - self._shards[shard].held_bytes for shard in open_to_read)
            room = min(
                self._limits.entries_max - len(self._shards[shard].queue) - len(self._shards[shard].in_flight)
                for shard in open_to_read
            )
            tick_shards, block_s = self._ticks_due(open_to_read)
        if any_stopped:
            block_s = min(block_s, STOPPED_BLOCK_S)
        elif held_up:
            block_s = min(block_s, FULL_BLOCK_S)
        # Per stream. At least 2, so that one entry alone shows that there are no more.
        reply_bytes_max = REPLY_BYTES_MAX // len(self._lanes)
        per_reply = min(REPLY_ENTRIES_MAX, reply_bytes_max // self._entry_bytes) // len(open_to_read)
        count = max(2, min(room, room_bytes // self._entry_bytes, per_reply))

        # One write: the server answers the ticks, blocks in XREAD, and then answers MGET. `trimmed` only ever rises and
        # is set together with the trim, so one read *after* the entries says at least as much as one read with them.
        shards = list(open_to_read)
        parts = [_TICK % (len(key), key) for key in (log_key(shard).encode() for shard in tick_shards)]
        parts.append(
            packed(
                *("XREAD", "COUNT", count, "BLOCK", max(1, round(block_s * 1000)), "STREAMS"),
                *(log_key(shard) for shard in shards),
                *(format_id(open_to_read[shard][1]) for shard in shards),
            )
        )
        parts.append(packed("MGET", *(trimmed_key(shard) for shard in shards)))
        link.send(parts)
        for shard in tick_shards:
            reply = link.receive()
            if isinstance(reply, redis.ResponseError):
                # The clock of a silent shard stands still until this is over: rings do not grow.
                self._metrics.count("tick_errors_total", shard=str(shard))
            problem = f"no tick: {reply}" if isinstance(reply, redis.ResponseError) else None
            self._metrics.alarms.put("ticks_held", problem, log_key(shard))
        streams, trimmed = link.receive(), link.receive()
        for reply in (streams, trimmed):
            if isinstance(reply, redis.ResponseError):
                raise reply
        self._accept(link, open_to_read, count, streams, dict(zip(shards, cast(list[Any], trimmed), strict=True)))

    def _accept(
        self,
        link: Link,
        asked: dict[int, tuple[int, LogId]],
        count: int,
        streams: object,
        trimmed: dict[int, bytes | None],
    ) -> None:
        """Put what was read into the queues, unless its shard was trimmed beyond what it had read, or was moved."""
        entries_of: dict[int, list[Any]] = {
            self._shard_of_key[key]: entries for key, entries in cast(list[Any], streams or [])
        }
        now_s = self._clock.monotonic_s()
        with self._changed:
            if link.run_id != self._run_id:
                raise redis.ConnectionError("another link has met a later run of the server")
            for shard, (generation, position) in asked.items():
                state = self._shards[shard]
                if state.generation != generation:
                    continue
                trimmed_id = trimmed[shard]
                if trimmed_id is not None and parse_id(trimmed_id) > position:
                    self._stop_shard(
                        shard, f"its log was trimmed up to {trimmed_id.decode()}, it had read {format_id(position)}"
                    )
                    continue
                entries = entries_of.get(shard, [])
                for raw_id, fields in entries:
                    ms, seq = state.position = parse_id(raw_id)
                    # Every entry of ours has one field; any other is no entry, which decoding will find out.
                    kind, payload = fields if len(fields) == 2 else (b"", b"")
                    entry = RawEntry(shard, ms, seq, kind, payload, link.run_id)
                    state.queue.append(entry)
                    state.held_bytes += _held_bytes(entry)
                    self._entry_bytes += (_held_bytes(entry) - self._entry_bytes) // 16
                if entries:
                    state.quiet_since_s = now_s
                    self._metrics.alarms.clear("ticks_held", log_key(shard))
                elif not state.at_head:
                    # Silent since its last entry, by the server's clock: on a quiet log that may be long ago.
                    quiet_s = max(0.0, link.now_ms() - position[0]) / 1000
                    state.quiet_since_s = now_s - min(TICK_S, quiet_s)
                state.at_head = len(entries) < count
            if entries_of:
                self._changed.notify_all()

    def _ticks_due(self, open_to_read: Iterable[int]) -> tuple[list[int], float]:
        """Shards at the head of their logs that have been silent for long enough, and how long to block otherwise."""
        if not self._writes_ticks or self._ticks_refused() is not None:
            return [], BLOCK_S
        now_s = self._clock.monotonic_s()
        quiet_s = {shard: now_s - self._shards[shard].quiet_since_s for shard in open_to_read if self._at_head(shard)}
        if not quiet_s or max(quiet_s.values()) < TICK_S:
            return [], min(BLOCK_S, TICK_S - max(quiet_s.values(), default=0.0))
        # Those that would be due shortly go along: one round for all instead of one for each.
        due = [shard for shard, quiet in quiet_s.items() if quiet > 0.8 * TICK_S]
        return due, BLOCK_S

    def _at_head(self, shard: int) -> bool:
        state = self._shards[shard]
        return state.at_head and state.position != FIRST  # never a tick before the settings

    def _is_full(self, state: _Shard) -> bool:
        held = len(state.queue) + len(state.in_flight)
        return held >= self._limits.entries_max or (held > 0 and state.held_bytes >= self._bytes_max)

    def _opened_link(self, lane: _Lane) -> Link:
        if lane.link is not None:
            return lane.link
        link = self._open_link()
        if self._stopping.is_set():
            link.close()
            raise redis.ConnectionError("the log reader stops")
        with self._changed:
            if self._run_id is not None and link.run_id != self._run_id:
                for shard in self._shards:
                    self._stop_shard(shard, f"the server was restarted (run {self._run_id[:8]} -> {link.run_id[:8]})")
            self._run_id = link.run_id
            lane.link = link
        return link

    def _stop_shard(self, shard: int, reason: str) -> None:
        state = self._shards[shard]
        self._metrics.count("shard_reloads_total", shard=str(shard))
        logger.warning("%s: must be reloaded: %s", log_key(shard), reason)
        self._shards[shard] = _Shard(state.position, state.generation + 1, stopped=reason)
        self._changed.notify_all()

    def _break_link(self, lane: _Lane, error: Exception) -> float:
        if lane.link is not None:
            lane.link.close()
            lane.link = None
        if self._stopping.is_set():
            return 0.0
        lane.failures_in_a_row += 1
        self._metrics.count("log_read_errors_total")
        if worth_a_line(lane.failures_in_a_row):
            logger.warning("cannot read the logs (try %d): %s", lane.failures_in_a_row, error)
        return min(1.0, 0.02 * (1 << min(lane.failures_in_a_row, 8)))


def _tick_command() -> bytes:
    """XADD of a tick, with the length of the key and the key left open."""
    kind, payload = encode_entry(Tick())
    # NOMKSTREAM: a tick never begins a log.
    return b"*6\r\n$4\r\nXADD\r\n$%%d\r\n%%b\r\n$10\r\nNOMKSTREAM\r\n$1\r\n*\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
        len(kind),
        kind,
        len(payload),
        payload,
    )


_TICK = _tick_command()


def _held_bytes(entry: RawEntry) -> int:
    return len(entry.payload) + 200  # the objects around it
