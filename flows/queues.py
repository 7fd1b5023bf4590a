"""Push queues: one stream a shard and partner, written exactly once and in log order (`flows.consumers` reads them).

The id of a push entry is derived from the log entry that caused it:

    log entry    <ms>-<seq>
    its pushes   <ms>-<seq << 24 | k>,   k = 1, 2, ... within one queue and log entry

so that writing the same pushes again, after a crash or by a second worker, is refused entry by entry: the server takes
no id that is not larger than the stream's last. This holds as long as the pushes of a shard go out in log order and
none is skipped, hence:

    submit ──> waiting entries of each shard ──> one MULTI {XADD ..., raise done:{s} to <last log id>} ──> confirmed
                                                   └── sent again, the same, until nothing but success or
                                                       "equal or smaller" comes back

A MULTI carries as many log entries as wait, in log order, up to a size: entries without pushes cost next to nothing.
A fan-out is written in several, of which only the last raises `done`: the first one is small, for the server shows its
pushes to nobody before all of it has come.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import redis

from flows.clock import CLOCK, Clock
from flows.log import LogId, RawEntry, done_key, format_id, parse_id
from flows.metrics import METRICS, Metrics
from flows.push_commands import PushCommands, Tally
from flows.resp import SKIPPED_BYTES_MAX
from flows.server import Link, LinkOpener, ServerRefused, packed, worth_a_line
from geoindex.columns import I64, Push, PushColumns, Pushes

logger = logging.getLogger(__name__)

FIRST_BLOCK_BYTES, BLOCK_GROWTH, BLOCK_BYTES_MAX = 64 << 10, 4, 2 << 20
"""Of one MULTI: of the first one, how much larger the next may be while more waits, and the most: about 75 full push
entries. *Measured* with 8 shards, fsync on a virtual disk: 256 KiB 3.0 M ids/s, 1 MiB 5.6, 2 MiB 6.5, 4 MiB 6.6; a
larger one holds up the server's other clients for longer. Beside appends the server takes 16 KB between two fsyncs."""
BLOCK_PARTS_MAX = 4096
DONE_INTERVAL_S = 0.02
"""`done` moves at most this often when there is nothing to push: every SET is an fsync."""
RAISE_DONE = b"""local known = redis.call('GET', KEYS[1])
if known then
  local known_ms, known_seq = string.match(known, '(%d+)-(%d+)')
  local ms, seq = string.match(ARGV[1], '(%d+)-(%d+)')
  known_ms, known_seq, ms, seq = tonumber(known_ms), tonumber(known_seq), tonumber(ms), tonumber(seq)
  if known_ms > ms or (known_ms == ms and known_seq >= seq) then return 0 end
end
redis.call('SET', KEYS[1], ARGV[1])
return 1"""
"""`done` only ever rises. A worker that is behind (a second one for the shard by mistake, one that was paused) would
set it back, and checkpoints that others have made final since would seem to be ahead of the queues: nobody could start
from them, and the log is trimmed behind them. Lua's numbers are exact up to 2^53: in ms, until the year 287396."""
BACKOFF_S = (0.02, 1.0)
"""Before a MULTI that failed is sent again: first, and at most."""

_TOO_SMALL = "equal or smaller"
"""What the server says of an id that is not larger than the last: that entry is there already."""


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One log entry that has passed through the shard machine, or, of a large fan-out, a part of it."""

    log_id: LogId
    run_id: str
    segments: Sequence[Push | PushColumns]
    push_count: int
    size_bytes: int
    """About as many as its commands have."""
    partners: Sequence[str]
    numbers: I64
    """Of the entry's last push in each partner's queue so far; shared by its parts, which are encoded in order."""
    is_end: bool
    """Whether this is all of the entry, or its last part."""


@dataclass(slots=True)
class _Block:
    """One MULTI, ready to be sent as often as it takes."""

    parts: list[bytes | memoryview]
    last: _Waiting
    done: LogId | None
    """The last log entry that ends in it, if one does."""
    entry_count: int
    """Log entries that end in it."""
    push_count: int
    tallies: list[tuple[int, Tally]]
    """What is written, with the ms of the log entry, for metrics."""


@dataclass(slots=True)
class _Lane:
    """The writer's view of one shard."""

    block_bytes_max: int
    """Of the next block."""
    waiting: deque[_Waiting] = field(default_factory=deque)
    push_count: int = 0
    """Of the waiting entries; without any, `done` can wait a little."""
    block: _Block | None = None
    """Sent, or to be sent again: nothing else of this shard goes out before it is confirmed."""
    done_at_s: float = 0.0
    retry_at_s: float = 0.0
    failures: int = 0


class PushWriter:
    """Writes what the shard machines cause. One thread and one link for all shards of the process. Thread-safe.

        sink      writer.submit(raw, pushes, partners)      for *every* log entry, in log order; never blocks
        writer    on_done(shard, log_id)                    from its thread: all up to log_id is in the queues

    What bounds the waiting entries is the reader's credit, released by `on_done`. A block that the server does not take
    is sent again for as long as it takes, with a log line and `push_write_errors_total`; other shards go on meanwhile.
    Entries read under another run of the server are dropped: the shard reloads after a change of run, and they come
    again. A checkpoint may be made final up to what `on_done` said; `done:{s}` says the same to other processes.
    """

    def __init__(
        self,
        open_link: LinkOpener,
        on_done: Callable[[int, LogId], None] = lambda shard, log_id: None,
        metrics: Metrics = METRICS,
        clock: Clock = CLOCK,
    ) -> None:
        self._clock = clock
        self._open_link = open_link
        self._on_done = on_done
        self._metrics = metrics
        self._lanes: dict[int, _Lane] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._draining = False
        self._link: Link | None = None
        self._former_runs: set[str] = set()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._link_failures = 0
        self._link_retry_at_s = 0.0
        self.first_block_bytes = FIRST_BLOCK_BYTES
        """For simulators, whose fan-outs are small."""

    # Called by the flow, from its threads.

    def start(self) -> None:
        """Start the writing thread."""
        assert self._thread is None, "a writer starts once"
        self._thread = threading.Thread(target=self._run, name="push-writer", daemon=True)
        self._thread.start()

    def submit(self, raw: RawEntry, pushes: Pushes, partners: Sequence[str]) -> None:
        """One log entry has passed through its machine. `partners`: names by `Push.partner`. Never blocks.

        Raises RuntimeError if the writing thread has died of a programming error.
        """
        parts = list(_parts(raw, pushes, partners, self.first_block_bytes))
        with self._changed:
            if self._failure is not None:
                raise RuntimeError("the push writer has failed") from self._failure
            lane = self._lanes.setdefault(raw.shard, _Lane(self.first_block_bytes))
            was_empty = not lane.waiting
            lane.waiting += parts
            lane.push_count += len(pushes)
            if pushes or was_empty:
                self._changed.notify_all()

    def waiting_count(self) -> int:
        """Log entries submitted and not confirmed yet."""
        with self._changed:
            return sum(
                sum(part.is_end for part in lane.waiting) + (lane.block.entry_count if lane.block else 0)
                for lane in self._lanes.values()
            )

    def drain(self, timeout_s: float) -> bool:
        """Write `done` without delay and wait until everything is confirmed; whether it was within the timeout."""
        deadline_s = self._clock.monotonic_s() + timeout_s
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            try:
                while any(lane.waiting or lane.block for lane in self._lanes.values()):
                    left_s = deadline_s - self._clock.monotonic_s()
                    if left_s <= 0 or self._failure is not None or self._stopping:
                        return False
                    self._clock.wait(self._changed, left_s)
                return True
            finally:
                self._draining = False

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop, whatever still waits: it is in the log, and will be written by whoever replays it."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s / 2)
            if self._thread.is_alive() and self._link is not None:
                self._link.close()  # a server that hangs
                self._thread.join(timeout_s / 2)

    # The writing thread.

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._stopping and (pause_s := self._pause_s()) > 0:
                        self._changed.wait(None if pause_s == float("inf") else pause_s)
                    if self._stopping:
                        return
                self.step()
        except BaseException as error:
            logger.exception("the push writer has failed")
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            if self._link is not None:
                self._link.close()

    def _pause_s(self) -> float:
        """How long until a shard has something to send; infinity if nothing waits."""
        now_s = self._clock.monotonic_s()
        pause_s = float("inf")
        for lane in self._lanes.values():
            if lane.block is not None:
                pause_s = min(pause_s, lane.retry_at_s - now_s)
            elif lane.waiting:
                soon = lane.push_count or self._draining
                pause_s = min(pause_s, 0.0 if soon else lane.done_at_s + DONE_INTERVAL_S - now_s)
        return max(pause_s, self._link_retry_at_s - now_s) if pause_s != float("inf") else pause_s

    def step(self) -> None:
        """One round: a block of every shard that has one due, all sent before the first reply is read.

        Public for simulators, which call it instead of `start`.
        """
        try:
            self._check_runs()
            link = self._opened_link()
            due = self._due_blocks()
            for _, block in due:
                link.send(block.parts)
            for shard, block in due:
                self._settle(link, shard, block, *self._replies(link, block))
        except (redis.RedisError, ServerRefused) as error:
            self._break_link(error)

    def _due_blocks(self) -> list[tuple[int, _Block]]:
        now_s = self._clock.monotonic_s()
        due: list[tuple[int, _Block]] = []
        with self._changed:
            lanes = list(self._lanes.items())
        for shard, lane in lanes:
            with self._changed:
                taken: list[_Waiting] = []
                if lane.block is None and lane.waiting:
                    soon = lane.push_count or self._draining
                    if soon or now_s >= lane.done_at_s + DONE_INTERVAL_S:
                        taken = _next_block(lane.waiting, lane.block_bytes_max)
            if taken:
                block = _block(shard, taken)  # not under the lock: it encodes
                with self._changed:
                    # In one step, so that an entry is always in one of the two.
                    lane.block = block
                    for entry in taken:
                        lane.waiting.popleft()
                        lane.push_count -= entry.push_count
            if lane.block is not None and now_s >= lane.retry_at_s:
                due.append((shard, lane.block))
        return due

    def _replies(self, link: Link, block: _Block) -> tuple[str | None, list[bool]]:
        """Why the block was not taken, or None; and for each XADD whether the entry is new. Reads every reply."""
        problem: str | None = None
        count = block.push_count + (block.done is not None)  # the XADDs, EVAL; before them, MULTI
        expected = b"+OK\r\n" + b"+QUEUED\r\n" * count
        if len(expected) > SKIPPED_BYTES_MAX or not link.skip(expected):
            for _ in range(count + 1):
                reply = link.receive()
                if isinstance(reply, redis.ResponseError) and problem is None:
                    problem = str(reply)
        results = link.receive()
        if isinstance(results, redis.ResponseError):
            return problem or str(results), []
        is_new: list[bool] = []
        for result in cast(list[object], results):
            if isinstance(result, Exception) and _TOO_SMALL not in str(result):
                return str(result), []
            is_new.append(not isinstance(result, Exception))
        return problem, is_new

    def _settle(self, link: Link, shard: int, block: _Block, problem: str | None, is_new: list[bool]) -> None:
        lane = self._lanes[shard]
        now_s = self._clock.monotonic_s()
        if problem is not None:
            lane.failures += 1
            lane.retry_at_s = now_s + min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(lane.failures, 10))
            self._metrics.count("push_write_errors_total", shard=str(shard))
            self._metrics.alarms.set("pushes_held", f"pushes wait: {problem}", f"shard {shard}")
            if worth_a_line(lane.failures):
                logger.warning(
                    "shard %d: pushes up to log entry %s were not taken (try %d), and are sent again: %s",
                    shard,
                    format_id(block.last.log_id),
                    lane.failures,
                    problem,
                )
            return
        if lane.failures:
            logger.warning("shard %d: pushes go out again, after %d failed tries", shard, lane.failures)
            self._metrics.alarms.clear("pushes_held", f"shard {shard}")
        now_ms = link.now_ms()
        first = 0
        for caused_ms, tally in block.tallies:
            devices = tally.devices_by_partner(is_new[first : first + len(tally)])
            first += len(tally)
            for partner, device_count in devices.items():
                self._metrics.count("pushes_total", device_count, partner=partner, kind=tally.kind)
            if devices:
                name = "ping_to_queue_ms" if tally.of_pings else "publish_to_queue_ms"
                self._metrics.observe(name, max(0.0, now_ms - caused_ms), sum(devices.values()))
        if block.push_count:
            new_count = sum(is_new[: block.push_count])
            self._metrics.count("push_entries_total", new_count)
            self._metrics.count("push_entries_known_total", block.push_count - new_count)
        with self._changed:
            lane.block, lane.failures, lane.retry_at_s = None, 0, 0.0
            larger = min(BLOCK_BYTES_MAX, lane.block_bytes_max * BLOCK_GROWTH)
            lane.block_bytes_max = larger if lane.push_count else self.first_block_bytes
            if block.done is not None:
                lane.done_at_s = now_s
            self._changed.notify_all()
        if block.done is not None:
            self._on_done(shard, block.done)

    # The link, and the run of the server it belongs to.

    def _opened_link(self) -> Link:
        if self._link is None:
            self._link = self._open_link()
            self._link_failures = 0
        return self._link

    def _check_runs(self) -> None:
        """Find out which run of the server is the present one, and drop entries that were read under another.

        Nobody knows whether this run still has their log entries. An entry of a run that is neither the link's nor
        known to be over means that one of the two is out of date: a fresh link tells which.
        """
        with self._changed:
            heads = {
                lane.block.last.run_id if lane.block else lane.waiting[0].run_id
                for lane in self._lanes.values()
                if lane.block or lane.waiting
            }
        link = self._opened_link()
        unknown = heads - {link.run_id} - self._former_runs
        if unknown:
            former = link.run_id
            link.close()
            self._link = None
            present = self._opened_link().run_id
            self._former_runs |= (unknown | {former}) - {present}
        if heads & self._former_runs:
            with self._changed:
                for shard, lane in self._lanes.items():
                    self._drop_former(shard, lane)
                self._changed.notify_all()

    def _drop_former(self, shard: int, lane: _Lane) -> None:
        dropped = 0
        if lane.block is not None and lane.block.last.run_id in self._former_runs:
            dropped += lane.block.entry_count
            lane.block, lane.failures, lane.retry_at_s = None, 0, 0.0
            self._metrics.alarms.clear("pushes_held", f"shard {shard}")
        while lane.waiting and lane.waiting[0].run_id in self._former_runs:
            part = lane.waiting.popleft()
            lane.push_count -= part.push_count
            dropped += part.is_end
        if dropped:
            logger.warning("shard %d: dropped %d entries read from a run of the server that is over", shard, dropped)
            self._metrics.count("push_drops_total", dropped, shard=str(shard))

    def _break_link(self, error: Exception) -> None:
        """Close the link after an error and say so. Every block that was under way is sent again on the next."""
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._stopping:
            return
        self._link_failures += 1
        pause_s = min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(self._link_failures, 10))
        self._link_retry_at_s = self._clock.monotonic_s() + pause_s
        self._metrics.count("push_link_errors_total")
        if worth_a_line(self._link_failures):
            logger.warning("pushes wait for the server (try %d): %s", self._link_failures, error)


class DoneFollower:
    """Learns from `done:{s}` what other processes have written. One thread, one link; the shards' keys on one node."""

    def __init__(
        self,
        open_link: LinkOpener,
        shards: Iterable[int],
        on_done: Callable[[int, LogId], None],
        interval_s: float = DONE_INTERVAL_S,
        clock: Clock = CLOCK,
    ) -> None:
        """`on_done(shard, log_id)` is called from the thread at every look, whether `done` has moved or not.

        A shard that replays from a checkpoint takes entries that were done long ago: no move of `done` tells of them.
        """
        self._open_link = open_link
        self._shards = list(shards)
        self._on_done = on_done
        self._interval_s = interval_s
        self._clock = clock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="done-follower", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop and wait for the thread's end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def wait(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Until what `on_done` has been told makes `holds()` true; whether it did within the timeout."""
        deadline_s = self._clock.monotonic_s() + timeout_s
        while not holds():
            if self._clock.monotonic_s() > deadline_s:
                return False
            self._clock.sleep(self._interval_s)
        return True

    def _run(self) -> None:
        link: Link | None = None
        failures = 0
        while not self._stopping.wait(self._interval_s if failures == 0 else min(1.0, 0.02 * 2 ** min(failures, 6))):
            try:
                link = link or self._open_link()
                raws = cast("list[bytes | None]", link.ask("MGET", *map(done_key, self._shards)))
            except (redis.RedisError, ServerRefused) as error:
                failures += 1
                if worth_a_line(failures):
                    logger.warning("`done` cannot be read (try %d): %s", failures, error)
                if link is not None:
                    link.close()
                link = None
                continue
            failures = 0
            for shard, raw in zip(self._shards, raws, strict=True):
                if raw is not None:
                    self._on_done(shard, parse_id(raw))
        if link is not None:
            link.close()


def _parts(raw: RawEntry, pushes: Pushes, partners: Sequence[str], bytes_max: int) -> Iterator[_Waiting]:
    """What an entry caused, in parts of so many bytes: one, but for a fan-out."""
    numbers = np.zeros(len(partners), np.int64)
    part: list[Push | PushColumns] = []
    size_bytes = push_count = 0
    for segment in pushes.segments:
        segment_count = len(segment) if isinstance(segment, PushColumns) else 1
        segment_bytes = len(segment.id_bytes) + 2 * len(segment.id_end) + 200 * segment_count
        if part and size_bytes + segment_bytes > bytes_max:
            yield _Waiting(raw.log_id, raw.run_id, part, push_count, size_bytes, partners, numbers, is_end=False)
            part, size_bytes, push_count = [], 0, 0
        part.append(segment)
        size_bytes += segment_bytes
        push_count += segment_count
    yield _Waiting(raw.log_id, raw.run_id, part, push_count, size_bytes, partners, numbers, is_end=True)


def _next_block(waiting: Iterable[_Waiting], bytes_max: int) -> list[_Waiting]:
    """The first parts that go into one block: as many as fit, one at least, all of one run of the server."""
    taken: list[_Waiting] = []
    size_bytes = 0
    for part in waiting:
        size_bytes += part.size_bytes
        if taken and (size_bytes > bytes_max or part.run_id != taken[0].run_id):
            break
        taken.append(part)
        if len(taken) == BLOCK_PARTS_MAX:
            break
    return taken


def _block(shard: int, parts: Sequence[_Waiting]) -> _Block:
    """One MULTI for consecutive log entries of a shard: their pushes in order, then `done`."""
    commands = PushCommands(shard)
    tallies: list[tuple[int, Tally]] = []
    done: LogId | None = None
    for part in parts:
        known = len(commands.tallies)
        commands.add(part.log_id, part.segments, part.partners, part.numbers)
        tallies += ((part.log_id[0], tally) for tally in commands.tallies[known:])
        if part.is_end:
            done = part.log_id
    end = b"" if done is None else packed("EVAL", RAISE_DONE, 1, done_key(shard), format_id(done))
    sent = [packed("MULTI"), *commands.parts, end + packed("EXEC")]
    push_count = sum(part.push_count for part in parts)
    return _Block(sent, parts[-1], done, sum(part.is_end for part in parts), push_count, tallies)
