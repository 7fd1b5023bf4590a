"""The live flow of one process: its threads, its Bytewax source and sink, its start and its end.

    log-reader thread ──> LogSource ──> [ Bytewax, this thread ] ──> QueueSink ──> push-writer thread
                             ^                                                        │ on_done
                             └───────────────── credit, `done` ──────────────────────┘
    desk-relay thread: alert events from the desk to the logs        stats-publisher thread: numbers once a second
    checkpoints thread: files, and trimming behind them              queue-keeper thread: trims and watches the queues
    guards thread: the server's clock, memory, settings              file-rewriter thread, if wanted: the server's file
    figures thread: phones and told devices, for the gateway         without what was trimmed

Starting: check the server, read the settings (or write them, on a server without logs). Each shard then starts behind
its newest usable checkpoint, or from its log's first entry, and does so again when the server was restarted or the log
was trimmed beyond what was read. Entries whose pushes stand in the queues already are refused there one by one, so a
replay adds nothing.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import redis
from bytewax.dataflow import Dataflow
from bytewax.errors import BytewaxRuntimeError
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from bytewax.testing import run_main

from flows.checkpointer import Checkpointer, LogTooShort
from flows.checkpoints import CheckpointStore
from flows.clock import CLOCK, Clock
from flows.config import FlowConfig
from flows.desk import RelayThread
from flows.disk import DISK, Disk
from flows.figures import Figures
from flows.guards import Guards
from flows.log import FIRST, LogId, RawEntry, check_server, ensure_settings, format_id, read_settings
from flows.log_reader import NOT_STARTED, LogReader, ReaderLimits
from flows.match import Reload, ShardPushes, build_flow, shard_key, shard_of_key
from flows.metrics import METRICS, Metrics, StatsPublisher
from flows.queue_keeper import QueueKeeper
from flows.queues import DoneFollower, PushWriter
from flows.rewriting import FileRewriter
from flows.server import worth_a_line
from geoindex.entries import HOUR_MS, Settings
from geoindex.shard import SettingsRefused, ShardMachine

logger = logging.getLogger(__name__)

BEGIN_RETRY_S = 0.2
ENTRIES_PER_BATCH = 8
"""Log entries that a partition hands over at once."""
_AT_ONCE = datetime(2000, 1, 1, tzinfo=UTC)
"""A next_awake in the past: Bytewax then sleeps nowhere, and the reader's wait is the only one."""


class Turns:
    """One shard at a time: a partition hands over entries when all of another's have reached the sink. For one thread.

    Bytewax takes what all partitions have before any machine sees it, and the sink gets what they cause when all have
    seen theirs. Without turns the first push of an alert waits until it was matched in every shard.
    """

    def __init__(self, reader: LogReader) -> None:
        self._reader = reader
        self._next: int | None = None
        self._last = -1
        self._entry_count = 0
        """On their way from source to sink."""

    @property
    def is_under_way(self) -> bool:
        """Whether entries are between source and sink."""
        return self._entry_count > 0

    def next(self) -> int | None:
        """Whose turn it is now that none is under way: the next shard in a round that has entries; None: none has."""
        if self._next is None:
            self._next = self._reader.next_to_take(self._last)
        return self._next

    def begin(self, shard: int, entry_count: int) -> None:
        """The shard, whose turn it is, hands over so many entries: none, if they are gone."""
        self._next, self._last, self._entry_count = None, shard, entry_count

    def arrive(self, entry_count: int) -> None:
        """So many entries have reached the sink."""
        self._entry_count -= entry_count


class LogSource(FixedPartitionedSource[tuple[str, RawEntry | Reload], None]):
    """The shard logs as Bytewax partitions. Never blocks longer than `idle_wait_s`; ends when told to stop."""

    def __init__(
        self,
        reader: LogReader,
        checkpointer: Checkpointer,
        shards: Sequence[int],
        idle_wait_s: float,
        stopping: threading.Event,
        clock: Clock = CLOCK,
        turns: Turns | None = None,
    ) -> None:
        """`turns`: shared with the sink of the same thread; None in a cluster, where it may be in another process."""
        self._reader = reader
        self._checkpointer = checkpointer
        self._turns = turns
        self._shards = shards
        self._idle_wait_s = idle_wait_s
        self._stopping = stopping
        self._clock = clock
        self._waiting_workers: set[int] = set()
        self.problem: Exception | None = None
        """Why a shard cannot start, now or ever; the flow then ends."""

    def list_parts(self) -> list[str]:
        return [shard_key(shard) for shard in self._shards]

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _LogPartition:
        # One partition of a worker waits for all: a wait in each would add up.
        worker = threading.get_ident()
        waits_for = () if worker in self._waiting_workers else self._shards
        self._waiting_workers.add(worker)
        return _LogPartition(
            self._reader,
            shard_of_key(for_part),
            self._shards,
            waits_for,
            self._idle_wait_s,
            self._stopping,
            self._begin,
            self._clock,
            self._turns,
        )

    def _begin(self, shard: int) -> LogId | None:
        """Where a shard starts; None if it cannot. Raises redis.RedisError, OSError: then try again."""
        try:
            return self._checkpointer.begin(shard)
        except (LogTooShort, SettingsRefused, MemoryError) as problem:
            # Bytewax would wrap an exception in errors of its own, and print the stack of its engine.
            self.problem = problem
            self._stopping.set()
            return None


class _LogPartition(StatefulSourcePartition[tuple[str, RawEntry | Reload], None]):
    def __init__(
        self,
        reader: LogReader,
        shard: int,
        shards: Sequence[int],
        waits_for: Sequence[int],
        idle_wait_s: float,
        stopping: threading.Event,
        begin: Callable[[int], LogId | None],
        clock: Clock,
        turns: Turns | None,
    ) -> None:
        self._reader = reader
        self._turns = turns
        self._waits_for_turn = False
        self._shard = shard
        self._position_of = begin
        self._clock = clock
        self._begin_at_s = float("-inf")
        self._begin_failures = 0
        self._key = shard_key(shard)
        self._shards = shards
        self._waits_for = waits_for
        self._idle_wait_s = idle_wait_s
        self._stopping = stopping

    def next_batch(self) -> list[tuple[str, RawEntry | Reload]]:
        if self._stopping.is_set():
            raise StopIteration
        if self._turns is not None and self._turns.is_under_way:
            self._waits_for_turn = True
            return []
        if self._waits_for:
            self._reader.wait(self._waits_for, self._idle_wait_s)
        entries = self._take()
        if not entries:
            reason = self._reader.stopped().get(self._shard)
            # Not before the reader knows its run of the server: it then notices when what `begin` sees is over.
            if reason is not None and self._reader.run_id is not None:
                return self._begin(reason)
        return [(self._key, entry) for entry in entries]

    def _take(self) -> list[RawEntry]:
        if self._turns is None:
            return self._reader.take(self._shard, ENTRIES_PER_BATCH)
        turn = self._turns.next()
        self._waits_for_turn = turn is not None and turn != self._shard
        if turn != self._shard:
            return []
        entries = self._reader.take(self._shard, ENTRIES_PER_BATCH)
        self._turns.begin(self._shard, len(entries))
        return entries

    def _begin(self, reason: str) -> list[tuple[str, RawEntry | Reload]]:
        """Start the shard, or start it anew; nothing yet if the server or the disk does not answer."""
        if self._clock.monotonic_s() < self._begin_at_s:
            return []
        try:
            position = self._position_of(self._shard)
        except (redis.RedisError, OSError) as error:
            self._begin_failures += 1
            self._begin_at_s = self._clock.monotonic_s() + BEGIN_RETRY_S
            if worth_a_line(self._begin_failures):
                logger.warning("shard %d cannot start yet (try %d): %s", self._shard, self._begin_failures, error)
            return []
        if position is None:
            return []
        self._begin_failures = 0
        where = "from the beginning" if position == FIRST else f"from a checkpoint, behind {format_id(position)}"
        if reason != NOT_STARTED:
            logger.warning("shard %d: reads its log again %s: %s", self._shard, where, reason)
        elif position != FIRST:
            logger.info("shard %d: reads its log %s", self._shard, where)
        self._reader.seek(self._shard, position)
        return [(self._key, Reload(self._shard, position))]

    def next_awake(self) -> datetime | None:
        # While entries are in the flow, at Bytewax's own pace: asked for at once, it would spin and starve the writer.
        # A turn ends without a wait, in this thread.
        return _AT_ONCE if self._waits_for_turn or self._reader.is_idle(self._shards) else None

    def snapshot(self) -> None:
        return None


class QueueSink(FixedPartitionedSink[ShardPushes, None]):
    """Hands what the machines cause to the push writer, entry by entry, and counts."""

    def __init__(self, writer: PushWriter, shards: Sequence[int], metrics: Metrics, turns: Turns | None = None) -> None:
        """`turns`: as for the source."""
        self._writer, self._shards, self._metrics, self._turns = writer, shards, metrics, turns

    def list_parts(self) -> list[str]:
        return [shard_key(shard) for shard in self._shards]

    def part_fn(self, item_key: str) -> int:
        return self._shards.index(shard_of_key(item_key))

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _QueuePartition:
        return _QueuePartition(self._writer, self._metrics, self._turns)


class _QueuePartition(StatefulSinkPartition[ShardPushes, None]):
    def __init__(self, writer: PushWriter, metrics: Metrics, turns: Turns | None) -> None:
        self._writer, self._metrics, self._turns = writer, metrics, turns

    def write_batch(self, values: list[ShardPushes]) -> None:
        if self._turns is not None:
            self._turns.arrive(len(values))
        for caused in values:
            self._writer.submit(caused.raw, caused.pushes, caused.partners)
            notes = caused.notes
            if notes.pings_accepted:
                self._metrics.count_each("pings_accepted_total", "partner", notes.accepted_by_partner)
            for reason, count in notes.pings_refused.items():
                self._metrics.count("pings_refused_total", count, reason=reason)
            if notes.undecodable is not None:
                self._metrics.count("malformed_entries_total")
                log_id = f"{caused.raw.ms}-{caused.raw.seq}"
                logger.error("shard %d: log entry %s is set aside: %s", caused.raw.shard, log_id, notes.undecodable)

    def snapshot(self) -> None:
        return None


class LiveFlow:
    """One flow process against a server that is up. `run` blocks until `stop` is called, from a signal or a thread.

    Its parts are public for simulators, which take their steps one by one instead of `run`.
    """

    def __init__(
        self,
        config: FlowConfig,
        client: redis.Redis,
        settings: Settings,
        in_cluster: bool = False,
        clock: Clock = CLOCK,
        disk: Disk = DISK,
    ) -> None:
        """`in_cluster`: source, machine and sink of a shard may be in different processes of a Bytewax cluster."""
        self.settings = settings
        self.metrics = METRICS
        self._shards = config.shard_list(settings.shard_count)
        self._machines: dict[int, ShardMachine] = {}
        self._stopping = threading.Event()
        self._idle_wait_s = config.idle_wait_ms / 1000
        self._checkpoint_directory = config.checkpoint_directory
        keep_ms = settings.live_window_ms + HOUR_MS
        self.guards = guards = Guards(client, config.unsafe_server, self.metrics, clock)
        open_link = guards.open_link
        limits = ReaderLimits(
            entries_max=2 * config.in_flight_max,
            process_bytes_max=config.read_ahead_mb << 20,
            in_flight_max=config.in_flight_max,
        )
        self.reader = LogReader(
            open_link,
            dict.fromkeys(self._shards),
            limits,
            self.metrics,
            ticks_refused=guards.appends_refused,
            clock=clock,
            link_count=config.reader_links,
        )
        self.checkpointer = Checkpointer(
            CheckpointStore(config.checkpoint_directory, settings, disk, clock),
            client,
            self._shards,
            config.checkpoint_interval_s,
            keep_ms,
            self.metrics,
            config.trim_logs,
            clock,
        )
        turns = None if in_cluster else Turns(self.reader)
        self.source = LogSource(
            self.reader, self.checkpointer, self._shards, self._idle_wait_s, self._stopping, clock, turns
        )
        # Who writes the pushes of a shard knows first what is done; in a cluster that may be another process.
        self._follower = DoneFollower(open_link, self._shards, self._on_done) if in_cluster else None
        self.writer = PushWriter(open_link, self._on_done if not in_cluster else _nothing, self.metrics, clock)
        self.sink = QueueSink(self.writer, self._shards, self.metrics, turns)
        self._keeper = QueueKeeper(
            open_link, self._shards, self.metrics, config.keep_pushes, 1000 * config.queue_unread_alarm_s
        )
        self._relay = RelayThread(client, open_link, self.metrics, guards.check_append)
        self._rewriter = FileRewriter(client, settings.shard_count, config.rewrite_interval_s, keep_ms, self.metrics)
        self._figures = Figures(client, self._shards, self.metrics, clock) if config.figures else None
        self._stats = StatsPublisher(client, self.metrics, self._set_gauges)

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Start the threads and the dataflow; return after a clean stop.

        Raises SettingsRefused if the log's settings are not this program's; LogTooShort if a shard can be started from
        nothing; whatever a broken invariant raises.
        """
        self.start()
        on_ready()
        try:
            run_main(self.dataflow())
            self.finish()
        except BytewaxRuntimeError as error:
            refusal = _refusal_behind(error)
            if refusal is None:
                raise
            raise refusal from None
        finally:
            self.end()

    def start(self) -> None:
        """Start the threads."""
        threads = self.reader, self.writer, self._follower, self.checkpointer, self._keeper
        for thread in (self.guards, *threads, self._relay, self._rewriter, self._figures, self._stats):
            if thread is not None:
                thread.start()

    def dataflow(self) -> Dataflow:
        """The dataflow, to be run once, by Bytewax in this process or in a cluster."""
        return build_flow(self.source, self.sink, self.machine_of, self.after_entry)

    def finish(self) -> None:
        """After a dataflow that ended by itself: the last pushes, then a checkpoint of every shard.

        Raises LogTooShort or SettingsRefused if that was why it ended.
        """
        if self.source.problem is not None:
            raise self.source.problem
        if not self.writer.drain(10.0):
            logger.warning("stopped with pushes that the server has not taken; the next start writes them")
        self.checkpointer.stop()
        if self._follower is not None:
            self._follower.wait(self.checkpointer.is_done, 10.0)
        self.checkpointer.finish()

    def end(self) -> None:
        """Stop the threads."""
        self._stopping.set()
        threads = self.reader, self.writer, self._follower, self.checkpointer, self._keeper
        for thread in (self._relay, self._rewriter, *threads, self.guards, self._figures, self._stats):
            if thread is not None:
                thread.stop()

    def stop(self) -> None:
        """Ask the flow to end: what is in it still goes out. May be called from a signal handler."""
        self._stopping.set()

    @property
    def stopping(self) -> bool:
        """Whether the flow was asked to end, or has to."""
        return self._stopping.is_set()

    def machine_of(self, reload: Reload) -> ShardMachine:
        """The machine that a shard starts with; raises as `Checkpointer.machine_at`."""
        self._machines.pop(reload.shard, None)
        machine = self._machines[reload.shard] = self.checkpointer.machine_at(reload.shard, reload.position)
        if self._figures is not None:
            self._figures.begin(reload.shard, machine, reload.position)
        return machine

    def after_entry(self, caused: ShardPushes, machine: ShardMachine) -> None:
        """What is looked at and copied between two entries; raises as `Checkpointer.after_entry`."""
        self.checkpointer.after_entry(caused.raw, machine)
        if self._figures is not None:
            self._figures.after_entry(caused, machine)

    def _on_done(self, shard: int, log_id: LogId) -> None:
        self.reader.release(shard, log_id)
        self.checkpointer.on_done(shard, log_id)

    def _set_gauges(self) -> None:
        self.checkpointer.set_gauges()
        if self._figures is not None:
            self._figures.set_gauges()
        self._set_disk_gauges()
        for shard in self._shards:
            self.metrics.gauge("lag_ms", self.reader.lag_ms(shard), shard=str(shard))
        for shard, machine in list(self._machines.items()):
            size = machine.size
            self.metrics.gauge("devices_live", size.located_count, shard=str(shard))
            self.metrics.gauge("table_memory_bytes", size.memory_bytes, shard=str(shard))

    def _set_disk_gauges(self) -> None:
        folder = self._checkpoint_directory.absolute()
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent  # nothing was kept there yet
        try:
            usage = shutil.disk_usage(folder)
        except OSError:
            return  # a disk that fails is the checkpointer's to tell
        self.metrics.gauge("checkpoint_disk_free_bytes", usage.free)
        self.metrics.gauge("checkpoint_disk_bytes", usage.total)


def _nothing(_shard: int, _log_id: LogId) -> None:
    pass


def _refusal_behind(error: BaseException | None) -> SettingsRefused | None:
    """What a shard machine raised, in the errors that Bytewax wraps it in."""
    while error is not None and not isinstance(error, SettingsRefused):
        error = error.__cause__
    return error


def open_flow(config: FlowConfig, client: redis.Redis, first_settings: Settings, in_cluster: bool = False) -> LiveFlow:
    """A flow on a server; `first_settings` are written if its logs do not exist yet. `in_cluster`: see `LiveFlow`.

    Raises ServerRefused, SettingsMismatch, ValueError (shards that do not exist), redis.RedisError.
    """
    check_server(client, config.unsafe_server)
    settings = read_settings(client)
    if settings is None:
        settings = ensure_settings(client, replace(first_settings, hash_key=secrets.randbits(64)))
    return LiveFlow(config, client, settings, in_cluster)
