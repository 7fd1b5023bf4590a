"""The supervisor of the embedded server: starts it again when it ends, watches the disk that it writes to, keeps its
file out of the page cache, has deleted ones leave the disk piece by piece, and holds rewrites of it back.

    threads, in every process that started or joined the server; only the owner's act, until it is gone

Valkey ends on purpose when the disk refuses a write: under `appendfsync always` it must not answer for what is not on
disk. So an end is nothing unusual, and what is behind it decides when it is started again: at once, ever later if it
ends again and again, and with a full disk not before there is room. Nothing is repaired here: a file that was cut in
the middle of its last command is loaded without that (loudly), one that is damaged elsewhere is left alone.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable

import redis

from flows.embedded import EmbeddedServer
from flows.guards import PINGS_HELD_KEY
from flows.metrics import METRICS, Metrics
from flows.rewrite_pacing import hold_back
from flows.server import connect, worth_a_line

logger = logging.getLogger(__name__)

POLL_S = 0.1
"""The end of a child is noticed by a call that takes microseconds."""
SLOW_POLL_S = 1.0
"""Disk, and whether the owner is still there."""
BACKOFF_S = (0.1, 30.0)
"""Before the server is started again: first, and at most."""
STABLE_S = 10.0
"""A server that ran for so long ended for a new reason."""
DISK_SHORT_BYTES, DISK_SHORT_SHARE = 1 << 30, 0.10
"""Less than either: alarm, and pings are held back, so that pushes keep room. The smaller of the two counts."""
DISK_FULL_BYTES, DISK_FULL_SHARE = 64 << 20, 0.02
"""Likewise: the server is not started, for it would end at its first write."""
HELD_EXPIRY_S = 10
"""Pings go on by themselves when nobody says any more that they must wait."""


class Supervisor:
    """Keeps an embedded server running. `server` stays open for longer than this."""

    def __init__(
        self,
        server: EmbeddedServer,
        metrics: Metrics = METRICS,
        on_wait: Callable[[str], None] = lambda words: logger.info("%s", words),
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_wait` is told what takes long."""
        self._server = server
        self._metrics = metrics
        self._on_wait = on_wait
        self._monotonic_s = monotonic_s
        self._client = connect(server.url)
        self._slow_at_s = float("-inf")
        self._was_owner = server.owned
        self._started_at_s = float("-inf")
        self._ended_at_s: float | None = None
        self._failures = 0
        """Starts in a row that failed, or did not last."""
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name="supervisor", daemon=True),
            threading.Thread(
                target=hold_back, args=(server.rewriting_children, self._stopping), name="rewrite-pacer", daemon=True
            ),
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = 60.0) -> None:
        """Stop watching, ahead of `server.close()`. A start under way is given up."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout_s)
        self._client.close()

    def step(self) -> None:
        """One look, and a start if it is time. Public for tests. Raises OSError."""
        now_s = self._monotonic_s()
        if now_s - self._slow_at_s >= SLOW_POLL_S:
            self._slow_at_s = now_s
            if not self._server.take_over():
                return
            if not self._was_owner:
                self._was_owner = True
                logger.warning("the owner of the embedded server is gone; this process looks after it from now on")
            self._watch_disk()
        if not self._server.owned:
            return
        how = self._server.ended()
        if how is None:
            if self._failures and now_s - self._started_at_s >= STABLE_S:
                self._failures = 0
            if not self._failures:
                self._metrics.alarms.clear("supervisor")
            self._server.look_after_files()
            return
        if self._ended_at_s is None:
            self._ended_at_s = now_s
            logger.error("the embedded server (process %d) was %s; it is started again", self._server.pid, how)
            self._metrics.alarms.set("supervisor", f"the embedded server was {how}")
        if now_s - self._ended_at_s >= self._backoff_s():
            self._revive()

    def _revive(self) -> None:
        short = self._disk_words(DISK_FULL_BYTES, DISK_FULL_SHARE)
        try:
            if short is not None:
                raise RuntimeError(f"it waits for room on its disk: {short}")
            self._server.revive(self._on_wait, lambda: not self._stopping.is_set())
        except (RuntimeError, OSError) as problem:
            if self._stopping.is_set():
                return
            self._failures += 1
            self._ended_at_s = self._monotonic_s()
            self._metrics.alarms.set("supervisor", f"the embedded server is not running: {problem}")
            if worth_a_line(self._failures):
                logger.error("the embedded server is not running (try %d): %s", self._failures, problem)
            return
        now_s = self._monotonic_s()
        # One that does not last is as good as one that does not start.
        self._failures = self._failures + 1 if now_s - self._started_at_s < STABLE_S else 0
        self._started_at_s, self._ended_at_s = now_s, None
        self._metrics.count("server_restarts_total")
        logger.warning("the embedded server runs again (process %d)", self._server.pid)

    def _backoff_s(self) -> float:
        first_s, most_s = BACKOFF_S
        return min(most_s, first_s * 2.0 ** min(self._failures, 20)) if self._failures else 0.0

    def _watch_disk(self) -> None:
        words = self._disk_words(DISK_SHORT_BYTES, DISK_SHORT_SHARE)
        self._metrics.alarms.put("disk", words)
        if words is not None:
            self._server.free_deleted_files()
            try:
                self._client.set(PINGS_HELD_KEY, words, ex=HELD_EXPIRY_S)
            except redis.RedisError as error:
                # It does not run, or its memory is full as well: there are alarms for that.
                logger.info("pings are not held back: %s", error)

    def _disk_words(self, least_bytes: int, least_share: float) -> str | None:
        """What to say of a disk with less room than this; None if it has more."""
        usage = shutil.disk_usage(self._server.directory)
        self._metrics.gauge("server_disk_free_bytes", usage.free)
        self._metrics.gauge("server_disk_bytes", usage.total)
        if usage.free >= min(least_bytes, least_share * usage.total):
            return None
        return f"{usage.free / 1e6:,.0f} of {usage.total / 1e6:,.0f} MB are free where {self._server.directory} is"

    def _run(self) -> None:
        while not self._stopping.wait(POLL_S):
            try:
                self.step()
            except OSError as error:
                logger.error("the embedded server cannot be looked after: %s", error)
