"""Push queues: one stream a shard and partner, written exactly once and in log order, read by consumer groups.

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
"""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import redis

from flows.clock import CLOCK, Clock
from flows.log import LogId, RawEntry, done_key, format_id, parse_id, push_key
from flows.metrics import METRICS, Metrics
from flows.server import Link, LinkOpener, ServerRefused, packed, worth_a_line
from flows.wire import MalformedEntry, PushEntry, decode_push, encode_push
from geoindex.columns import Push

logger = logging.getLogger(__name__)

PUSH_BITS = 24
PUSH_COUNT_MAX = (1 << PUSH_BITS) - 1
"""Push entries of one queue that one log entry can cause: with 1,000 ids each, 16 thousand million phones."""
SEQ_MAX = 1 << (64 - PUSH_BITS)

BLOCK_BYTES_MAX = 2 << 20
"""Of one MULTI: about 75 full push entries. *Measured* with 8 shards, fsync on a virtual disk: 256 KiB 3.0 M ids/s,
1 MiB 5.6, 2 MiB 6.5, 4 MiB 6.6; a larger one holds up the server's other clients for longer."""
BLOCK_ENTRIES_MAX = 4096
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


def push_id(log_id: LogId, push_number: int) -> LogId:
    """Id of the k-th push entry of one queue that a log entry caused, k from 1."""
    ms, seq = log_id
    assert 1 <= push_number <= PUSH_COUNT_MAX, f"a log entry causes at most 2^24 - 1 entries a queue, got {push_number}"
    assert 0 <= seq < SEQ_MAX, f"a log entry's sequence number must be below 2^40, got {seq}"
    return ms, seq << PUSH_BITS | push_number


def log_id_of(entry_id: LogId) -> LogId:
    """The log entry that caused a push entry."""
    return entry_id[0], entry_id[1] >> PUSH_BITS


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One log entry that has passed through the shard machine."""

    log_id: LogId
    run_id: str
    pushes: Sequence[Push]
    partners: Sequence[str]


@dataclass(slots=True)
class _Block:
    """One MULTI, ready to be sent as often as it takes."""

    parts: list[bytes]
    last: _Waiting
    entry_count: int
    tallies: list[tuple[str, str, int, int]]
    """(partner, kind, devices, ms of the log entry), for metrics."""


@dataclass(slots=True)
class _Lane:
    """The writer's view of one shard."""

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

    # Called by the flow, from its threads.

    def start(self) -> None:
        """Start the writing thread."""
        assert self._thread is None, "a writer starts once"
        self._thread = threading.Thread(target=self._run, name="push-writer", daemon=True)
        self._thread.start()

    def submit(self, raw: RawEntry, pushes: Sequence[Push], partners: Sequence[str]) -> None:
        """One log entry has passed through its machine. `partners`: names by `Push.partner`. Never blocks.

        Raises RuntimeError if the writing thread has died of a programming error.
        """
        with self._changed:
            if self._failure is not None:
                raise RuntimeError("the push writer has failed") from self._failure
            lane = self._lanes.setdefault(raw.shard, _Lane())
            was_empty = not lane.waiting
            lane.waiting.append(_Waiting(raw.log_id, raw.run_id, pushes, partners))
            lane.push_count += len(pushes)
            if pushes or was_empty:
                self._changed.notify_all()

    def waiting_count(self) -> int:
        """Log entries submitted and not confirmed yet."""
        with self._changed:
            return sum(
                len(lane.waiting) + (lane.block.entry_count if lane.block else 0) for lane in self._lanes.values()
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
                        taken = _next_block(lane.waiting)
            if taken:
                block = _block(shard, taken)  # not under the lock: it encodes
                with self._changed:
                    # In one step, so that an entry is always in one of the two.
                    lane.block = block
                    for entry in taken:
                        lane.waiting.popleft()
                        lane.push_count -= len(entry.pushes)
            if lane.block is not None and now_s >= lane.retry_at_s:
                due.append((shard, lane.block))
        return due

    def _replies(self, link: Link, block: _Block) -> tuple[str | None, list[bool]]:
        """Why the block was not taken, or None; and for each XADD whether the entry is new. Reads every reply."""
        problem: str | None = None
        for _ in range(len(block.tallies) + 2):  # MULTI, the XADDs, EVAL: "OK" and "QUEUED"
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
        now_ms = link.now_ms()
        for (partner, kind, device_count, caused_ms), new in zip(block.tallies, is_new, strict=False):
            if new:
                self._metrics.count("pushes_total", device_count, partner=partner, kind=kind)
                self._metrics.observe("publish_to_queue_ms", max(0.0, now_ms - caused_ms), device_count)
        if block.tallies:
            new_count = sum(is_new[: len(block.tallies)])
            self._metrics.count("push_entries_total", new_count)
            self._metrics.count("push_entries_known_total", len(block.tallies) - new_count)
        with self._changed:
            lane.block, lane.failures, lane.retry_at_s, lane.done_at_s = None, 0, 0.0, now_s
            self._changed.notify_all()
        self._on_done(shard, block.last.log_id)

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
        while lane.waiting and lane.waiting[0].run_id in self._former_runs:
            lane.push_count -= len(lane.waiting.popleft().pushes)
            dropped += 1
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
        """`on_done(shard, log_id)` is called from the thread, whenever `done` has moved."""
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
        told: dict[int, bytes] = {}
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
                if raw is not None and told.get(shard) != raw:
                    told[shard] = raw
                    self._on_done(shard, parse_id(raw))
        if link is not None:
            link.close()


def _next_block(waiting: Iterable[_Waiting]) -> list[_Waiting]:
    """The first entries that go into one block: as many as fit, one at least, all of one run of the server."""
    taken: list[_Waiting] = []
    size_bytes = 0
    for entry in waiting:
        size_bytes += sum(len(push.id_bytes) + 2 * len(push.id_end) + 200 for push in entry.pushes)
        if taken and (size_bytes > BLOCK_BYTES_MAX or entry.run_id != taken[0].run_id):
            break
        taken.append(entry)
        if len(taken) == BLOCK_ENTRIES_MAX:
            break
    return taken


def _block(shard: int, entries: Sequence[_Waiting]) -> _Block:
    """One MULTI for consecutive log entries of a shard: their pushes in order, then `done`."""
    parts = [packed("MULTI")]
    tallies: list[tuple[str, str, int, int]] = []
    keys: dict[str, bytes] = {}
    for entry in entries:
        ms = entry.log_id[0]
        push_numbers: dict[str, int] = {}
        for push in entry.pushes:
            partner = entry.partners[push.partner]
            number = push_numbers[partner] = push_numbers.get(partner, 0) + 1
            key = keys.get(partner)
            if key is None:
                key = keys[partner] = push_key(shard, partner).encode()
            entry_id = format_id(push_id(entry.log_id, number)).encode()
            kind = push.kind.encode()
            payload = encode_push(push)
            parts += (
                b"*5\r\n$4\r\nXADD\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n"
                % (len(key), key, len(entry_id), entry_id, len(kind), kind, len(payload)),
                payload,
                b"\r\n",
            )
            tallies.append((partner, push.kind, len(push.id_end), ms))
    last = entries[-1]
    parts.append(packed("EVAL", RAISE_DONE, 1, done_key(shard), format_id(last.log_id)) + packed("EXEC"))
    return _Block(parts, last, len(entries), tallies)


# --- reading ----------------------------------------------------------------------------------------------------------

CLAIM_AFTER_S = 60.0
"""A push that its consumer has not acknowledged for this long is given to another one."""
_NAME = re.compile(r"[^\s\x00-\x1f\x7f]{1,128}")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One queue entry as it was handed to a consumer. To be acknowledged when it has been dealt with."""

    stream: str
    entry_id: LogId
    push: PushEntry | None
    fault: str | None
    """Why there is no push: the entry cannot be decoded."""


class Consumer:
    """One consumer of a partner's queues, over all shards. At least once: whoever reads deduplicates on stream and id.

        consumer = Consumer(client, "amap", shard_count)
        while True:
            for delivery in consumer.read():
                ...
                consumer.acknowledge([delivery])

    For one thread. Methods raise redis.RedisError; reading again later loses nothing.
    """

    def __init__(
        self,
        client: redis.Redis,
        partner: str,
        shard_count: int,
        group: str = "default",
        consumer: str = "consumer",
        claim_after_s: float = CLAIM_AFTER_S,
        clock: Clock = CLOCK,
    ) -> None:
        """`group`: who shares the work; each group gets every push. `consumer`: a name unique in the group.

        Raises ValueError for names with spaces.
        """
        for name, value in (("group", group), ("consumer", consumer)):
            if not _NAME.fullmatch(value):
                raise ValueError(f"{name} must have 1 to 128 characters and no spaces, got {value[:140]!r}")
        self._client = client
        self._clock = clock
        self._streams = [push_key(shard, partner) for shard in range(shard_count)]
        self._group, self._consumer = group, consumer
        self._claim_after_s = claim_after_s
        self._claim_at_s = 0.0
        self._unfinished = dict.fromkeys(self._streams, "0-0")
        """Where to go on in what this consumer was given before and did not acknowledge."""

    def create_groups(self) -> None:
        """Make sure that the group exists on every shard's queue, from its beginning. Does nothing the second time."""
        for stream in self._streams:
            try:
                self._client.xgroup_create(stream, self._group, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    def read(self, entries_max: int = 100, block_s: float = 1.0) -> list[Delivery]:
        """The next entries: first those of an earlier life of this consumer, then others' that were given up, then new.

        Waits up to `block_s` (at most 5; 0: not at all) when there is nothing. `entries_max`: per shard.
        """
        found = self._own_unfinished(entries_max) or self._claimed(entries_max)
        if found:
            return found
        block_ms = max(1, round(min(block_s, 5.0) * 1000)) if block_s else None
        try:
            reply = self._client.xreadgroup(
                self._group, self._consumer, dict.fromkeys(self._streams, ">"), count=entries_max, block=block_ms
            )
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self.create_groups()
            return []
        return list(_deliveries(reply))

    def acknowledge(self, deliveries: Iterable[Delivery]) -> int:
        """These have been dealt with; how many were still this group's to acknowledge."""
        ids: dict[str, list[str]] = {}
        for delivery in deliveries:
            ids.setdefault(delivery.stream, []).append(format_id(delivery.entry_id))
        with self._client.pipeline(transaction=False) as pipeline:
            for stream, entry_ids in ids.items():
                pipeline.xack(stream, self._group, *entry_ids)
            return sum(cast(list[int], pipeline.execute()))

    def give_back(self, deliveries: Iterable[Delivery]) -> None:
        """These will not be dealt with here: whoever of the group reads next gets them, without a wait."""
        ids: dict[str, list[Any]] = {}
        for delivery in deliveries:
            ids.setdefault(delivery.stream, []).append(format_id(delivery.entry_id))
        idle_ms = round(self._claim_after_s * 1000) + 1
        with self._client.pipeline(transaction=False) as pipeline:
            for stream, entry_ids in ids.items():
                pipeline.xclaim(stream, self._group, self._consumer, 0, entry_ids, idle=idle_ms, justid=True)
            pipeline.execute()

    def _own_unfinished(self, entries_max: int) -> list[Delivery]:
        if not self._unfinished:
            return []
        try:
            reply = self._client.xreadgroup(self._group, self._consumer, cast(Any, self._unfinished), count=entries_max)
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self.create_groups()
            self._unfinished = {}  # of a group that did not exist
            return []
        unfinished: dict[str, str] = {}
        for stream, entries in cast(Any, reply):
            if entries:
                unfinished[stream.decode()] = entries[-1][0].decode()
        self._unfinished = unfinished
        return list(_deliveries(reply))

    def _claimed(self, entries_max: int) -> list[Delivery]:
        """What other consumers were given and did not acknowledge in time; asked for ten times in that time."""
        now_s = self._clock.monotonic_s()
        if now_s < self._claim_at_s:
            return []
        self._claim_at_s = now_s + self._claim_after_s / 10
        with self._client.pipeline(transaction=False) as pipeline:
            for stream in self._streams:
                pipeline.xautoclaim(
                    stream,
                    self._group,
                    self._consumer,
                    min_idle_time=round(self._claim_after_s * 1000),
                    count=entries_max,
                )
            replies = pipeline.execute(raise_on_error=False)
        found: list[Delivery] = []
        for stream, reply in zip(self._streams, replies, strict=True):
            if isinstance(reply, redis.ResponseError):
                if "NOGROUP" not in str(reply):
                    raise reply
                self.create_groups()
                continue
            found += _deliveries([(stream.encode(), reply[1])])
        return found


def _deliveries(reply: Any) -> Iterator[Delivery]:
    for stream, entries in reply or []:
        for raw_id, fields in entries:
            if fields is None:
                continue  # trimmed away since it was delivered
            push, fault = None, None
            try:
                (payload,) = fields.values()
                push = decode_push(payload)
            except MalformedEntry as malformed:
                fault = str(malformed)
            except ValueError:
                fault = f"must have one field, got {len(fields)}"
            yield Delivery(stream.decode(), parse_id(raw_id), push, fault)
