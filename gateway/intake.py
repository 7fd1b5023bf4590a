"""Pings of many requests -> a few large appends, each request answered when its own pings are on disk.

    request ── hold ──> body ── read ──> submit ─┐
    request ── hold ──> body ── read ──> submit ─┼─ waiting ── a writer takes all that waits, as one ──> LogWriter
    request ── hold ──> body ── read ──> submit ─┘               acknowledged: all of them are answered

Every append costs an fsync, so requests that arrive while the writers are busy share the next one, whoever they are
from. The longer an append takes, the more of them it serves: nothing has to be tuned. There are two writers, each with
a link of its own, so that one round is sorted by shard and encoded while the server is busy with the other.

Nothing is answered before it is acknowledged, which under `appendfsync always` means: is on disk. If an append fails,
every request of that round is told to come again; some of its pings may be in the logs already, and a ping that comes
twice changes nothing. What requests hold, from their first byte to their answer, is bounded: whoever comes when it is
used up is told to come again, before anything of his body is read.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future
from types import TracebackType

import anyio
import numpy as np
import redis

from flows.clock import CLOCK, Clock
from flows.guards import AppendsRefused, Guards, PingsRefused
from flows.log import LogWriter
from flows.metrics import METRICS, Metrics
from flows.server import ServerRefused, worth_a_line
from flows.wire import encode_pings, slice_pings, split_by_shard
from gateway import ping_bodies
from gateway.flow_watch import FlowWatch
from gateway.ping_bodies import frozen
from geoindex.columns import PingBatch
from geoindex.entries import Settings

logger = logging.getLogger(__name__)

HELD_BYTES_MAX = 256 << 20
"""Bodies that are being received, and pings that wait, over all requests."""
ROUND_PINGS_MAX = 131_072
"""Of one append: a full entry for each of eight shards. What is more waits for the next one."""
WRITERS = 2
READERS = 2
"""Bodies taken apart at the same time: more would share one interpreter, and each needs some memory."""
STOP_TIMEOUT_S = 30.0


class IntakeFull(PingsRefused):
    """More is on its way than the gateway holds."""


class IntakeStopped(PingsRefused):
    """The gateway ends."""


class Intake:
    """The one way of pings into the logs of a gateway. Thread-safe."""

    def __init__(
        self,
        guards: Guards,
        watch: FlowWatch,
        metrics: Metrics = METRICS,
        clock: Clock = CLOCK,
        held_bytes_max: int = HELD_BYTES_MAX,
        writer_count: int = WRITERS,
    ) -> None:
        self._guards = guards
        self._watch = watch
        self._metrics = metrics
        self._clock = clock
        self._held_bytes_max = held_bytes_max
        self._held_bytes = 0
        self._waiting: deque[tuple[PingBatch, Future[None]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._failures_in_a_row = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"intake-{number}", daemon=True) for number in range(writer_count)
        ]
        self.readers = anyio.CapacityLimiter(READERS)
        """For whoever takes a body apart."""

    def start(self) -> None:
        """Start the watch and the writers."""
        self._watch.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Append what waits, and end. What is submitted later is refused."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(STOP_TIMEOUT_S)
        self._watch.stop()

    def check(self) -> Settings:
        """The settings in force: asked before a body is read. Raises AppendsRefused if no pings can be taken now."""
        self._guards.check_pings()
        return self._watch.check()

    def now_ms(self) -> int:
        """The server's clock: ms since 1970."""
        return self._watch.now_ms()

    def hold(self) -> Hold:
        """Room for one request, nothing yet. Leave it as a context when the request is answered."""
        return Hold(self)

    def submit(self, pings: PingBatch) -> Future[None]:
        """Have pings appended: screened, WGS-84, partners by the settings' list.

        The future is done when they are on disk. It fails with what `LogWriter.append_pings` raises: send the pings
        again then. Raises IntakeStopped; FlowBehind if there are no logs.
        """
        future: Future[None] = Future()
        with self._changed:
            if self._stopping:
                raise IntakeStopped("no pings are taken any more: the gateway ends")
            self._waiting.append((pings, future))
            self._changed.notify_all()
        return future

    def _grow(self, more_bytes: int) -> None:
        with self._changed:
            if self._held_bytes + more_bytes > self._held_bytes_max:
                raise IntakeFull(f"no pings are taken now: {self._held_bytes_max} bytes of them are on their way")
            self._held_bytes += more_bytes
            self._metrics.gauge("intake_held_bytes", self._held_bytes)

    def _shrink(self, fewer_bytes: int) -> None:
        with self._changed:
            self._held_bytes -= fewer_bytes
            self._metrics.gauge("intake_held_bytes", self._held_bytes)

    # --- a writer's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        writer: LogWriter | None = None
        try:
            while True:
                with self._changed:
                    while not self._waiting and not self._stopping:
                        self._changed.wait()
                    batches, futures = self._next_round()
                    self._metrics.gauge("intake_waiting_requests", len(self._waiting))
                if not batches:
                    return
                started_s = self._clock.monotonic_s()
                try:
                    if writer is None:
                        writer = LogWriter(self._guards.open_link, self._watch.check(), self._guards.check_pings)
                    merged = merge(batches)
                    writer.append_pings(merged)
                except Exception as error:  # whoever waits is answered, whatever it is
                    self._failed(futures, error)
                else:
                    self._done(futures, len(merged), 1000 * (self._clock.monotonic_s() - started_s))
        finally:
            if writer is not None:
                writer.close()

    def _next_round(self) -> tuple[list[PingBatch], list[Future[None]]]:
        batches: list[PingBatch] = []
        futures: list[Future[None]] = []
        ping_count = 0
        while self._waiting and (not batches or ping_count + len(self._waiting[0][0]) <= ROUND_PINGS_MAX):
            pings, future = self._waiting.popleft()
            batches.append(pings)
            futures.append(future)
            ping_count += len(pings)
        return batches, futures

    def _done(self, futures: list[Future[None]], ping_count: int, duration_ms: float) -> None:
        self._failures_in_a_row = 0
        self._metrics.count("intake_rounds_total")
        self._metrics.count("intake_pings_total", ping_count)
        self._metrics.observe("intake_append_ms", duration_ms)
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def _failed(self, futures: list[Future[None]], error: Exception) -> None:
        self._metrics.count("intake_rounds_failed_total")
        if not isinstance(error, redis.RedisError | ServerRefused | AppendsRefused):
            logger.error("pings of %d requests were not appended", len(futures), exc_info=error)
        else:
            self._failures_in_a_row += 1
            if worth_a_line(self._failures_in_a_row):
                logger.warning(
                    "pings of %d requests were not appended (try %d): %s", len(futures), self._failures_in_a_row, error
                )
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


class Hold:
    """What one request holds of the intake's room."""

    def __init__(self, intake: Intake) -> None:
        """Made by `Intake.hold`."""
        self._intake = intake
        self._bytes = 0

    def grow(self, more_bytes: int) -> None:
        """Raises IntakeFull."""
        self._intake._grow(more_bytes)
        self._bytes += more_bytes

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._intake._shrink(self._bytes)
        self._bytes = 0


def size_bytes(pings: PingBatch) -> int:
    """Of a batch's columns."""
    return sum(
        column.nbytes
        for column in (
            pings.partner, pings.id_bytes, pings.id_end, pings.lat_e7, pings.lng_e7, pings.observed_at_ms
        )
    )  # fmt: skip


def merge(batches: list[PingBatch]) -> PingBatch:
    """Batches one after the other, as one; none of them with `at_ms`."""
    if len(batches) == 1:
        return batches[0]
    starts = np.cumsum([0, *(len(batch.id_bytes) for batch in batches[:-1])])
    assert int(starts[-1]) + len(batches[-1].id_bytes) < 1 << 32, "a round's ids end within u32"
    merged = PingBatch(
        np.concatenate([batch.partner for batch in batches]),
        np.concatenate([batch.id_bytes for batch in batches]),
        np.concatenate(
            [batch.id_end + np.uint32(start) for batch, start in zip(batches, starts.tolist(), strict=True)]
        ),
        np.concatenate([batch.lat_e7 for batch in batches]),
        np.concatenate([batch.lng_e7 for batch in batches]),
        np.concatenate([batch.observed_at_ms for batch in batches]),
    )
    return frozen(merged)


def run_every_kernel() -> None:
    """Everything between a body and the log, once, so that no partner waits for a compiler."""
    batch = merge(ping_bodies.run_every_kernel())
    for part in split_by_shard(batch, Settings(shard_count=2)):
        if part is not None:
            encode_pings(slice_pings(part, 0, len(part)))
