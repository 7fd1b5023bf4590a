"""The server's append-only file, rewritten regularly: only that removes raw pings that were trimmed from the logs.

The file holds every command since its last rewrite, so also the pings that a trim has taken from memory (rule 14). A
rewrite is a new file of what is in memory, written by a forked child; the old one is deleted when it is complete.

    oldest entry still in a log when the rewrite began   is the oldest raw ping that the file can hold from then on
    file:{rewritten}                                     both moments of the last good rewrite, for whoever comes next

Whoever starts one, this thread, another process's or the server itself (`auto-aof-rewrite-percentage`, which bounds
the file's size and stays on): what counts is when the last good one began. Alarm raw_pings_kept: overdue, or too late.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import redis

from flows.log import log_key, parse_id, trimmed_key
from flows.metrics import METRICS, Metrics

logger = logging.getLogger(__name__)

REWRITTEN_KEY = "file:{rewritten}"
"""`<ms when the last good rewrite began> <ms of the oldest log entry then>`."""
POLL_S = 5.0
RETRY_S = 60.0
"""After a rewrite that failed, say for want of disk or memory."""
OVERDUE_SHARE = 1.25
"""Of the interval: a rewrite is overdue, and the alarm raised."""


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A rewrite of the file. By the server's clock, ms since 1970."""

    began_ms: int
    oldest_entry_ms: int
    """No log entry that was in memory when it began is older."""


class FileRewriter:
    """Has the file rewritten every `interval_s`; 0: never. One thread. Several processes may do this at once."""

    def __init__(
        self,
        client: redis.Redis,
        shard_count: int,
        interval_s: float,
        keep_ms: int,
        metrics: Metrics = METRICS,
        poll_s: float | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`keep_ms`: no raw ping may be in the file for longer. `poll_s`: between two looks."""
        self._client = client
        self._shard_count = shard_count
        self._interval_s = interval_s
        self._keep_ms = keep_ms
        self._metrics = metrics
        self._poll_s = min(POLL_S, interval_s / 4) if poll_s is None else poll_s
        self._monotonic_s = monotonic_s
        self._run_id: str | None = None
        self._seen_count = 0
        """Of the server's rewrites, when it was last looked at."""
        self._under_way: Rewrite | None = None
        self._before = Rewrite(0, 0)
        """What was true when it was last looked at: what a rewrite that began since can be held to."""
        self._last: Rewrite | None = None
        self._first_ms: dict[int, int] = {}
        """Of logs that were never trimmed: when their first entry came."""
        self._known_since_ms = 0
        self._retry_at_s = float("-inf")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="file-rewriter", daemon=True)

    def start(self) -> None:
        """Start the thread, unless nothing is to be rewritten."""
        if self._interval_s:
            self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop the thread; a rewrite under way goes on in the server."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def step(self) -> None:
        """One look, and a rewrite if it is time. Public for tests. Raises redis.RedisError."""
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            pipeline.info("server")
            pipeline.info("persistence")
            pipeline.get(REWRITTEN_KEY)
            pipeline.mget([trimmed_key(shard) for shard in range(self._shard_count)])
            (seconds, microseconds), server, facts, stored, trimmed = pipeline.execute()
        now_ms = seconds * 1000 + microseconds // 1000
        now = Rewrite(now_ms, self._oldest_entry_ms(trimmed, now_ms))
        self._follow(server["run_id"], facts, now)
        self._remember(stored)
        self._report(now_ms)
        if self._is_due(facts, now_ms):
            self._begin(now)

    def _follow(self, run_id: str, facts: dict[str, Any], now: Rewrite) -> None:
        """Find out whether a rewrite has begun or ended since the last look, whoever wanted it."""
        count, in_progress = facts["aof_rewrites"], bool(facts["aof_rewrite_in_progress"])
        if run_id != self._run_id:
            # Nothing is known of what this run has done before.
            self._run_id, self._seen_count, self._under_way, self._before = run_id, count, None, Rewrite(0, 0)
            self._first_ms = {}
            self._known_since_ms = self._known_since_ms or now.began_ms
        elif count != self._seen_count:
            self._seen_count = count
            self._under_way = self._before
        if self._under_way is not None and not in_progress:
            ended, self._under_way = self._under_way, None
            self._end(ended, facts)
        self._before = now

    def _end(self, ended: Rewrite, facts: dict[str, Any]) -> None:
        if facts["aof_last_bgrewrite_status"] != "ok":
            self._metrics.count("aof_rewrite_failures_total")
            self._retry_at_s = self._monotonic_s() + min(RETRY_S, self._interval_s)
            logger.error("the server's append-only file was not rewritten: the server's own log says why")
            return
        self._retry_at_s = float("-inf")
        self._metrics.count("aof_rewrites_total")
        self._metrics.gauge("aof_rewrite_duration_ms", 1000 * facts["aof_last_rewrite_time_sec"])
        if self._last is None or ended.began_ms > self._last.began_ms:
            self._last = ended
            self._client.set(REWRITTEN_KEY, f"{ended.began_ms} {ended.oldest_entry_ms}")

    def _remember(self, stored: bytes | None) -> None:
        """What another process, or this one's predecessor, has seen."""
        if stored is None:
            return
        began_ms, oldest_ms = map(int, stored.split())
        if self._last is None or began_ms > self._last.began_ms:
            self._last = Rewrite(began_ms, oldest_ms)

    def _report(self, now_ms: int) -> None:
        # Never seen one: counted from when this thread began to look, which gives the first its time.
        since_ms = self._known_since_ms if self._last is None else self._last.began_ms
        age_ms = max(0, now_ms - since_ms)
        self._metrics.gauge("aof_rewrite_age_ms", age_ms)
        words = None
        if age_ms > OVERDUE_SHARE * 1000 * self._interval_s:
            words = f"the append-only file was last rewritten {age_ms / 60_000:.0f} min ago, and should be every "
            words += f"{self._interval_s / 60:.0f} min"
        if self._last is not None:
            kept_ms = max(0, now_ms - self._last.oldest_entry_ms)
            self._metrics.gauge("raw_pings_age_ms", kept_ms)
            if kept_ms > self._keep_ms:
                words = f"raw pings of {kept_ms / 60_000:.0f} min ago may be in the append-only file, which is allowed "
                words += f"{self._keep_ms / 60_000:.0f} min"
        self._metrics.alarms.put("raw_pings_kept", words, "append-only file")

    def _is_due(self, facts: dict[str, Any], now_ms: int) -> bool:
        if facts["aof_rewrite_in_progress"] or facts["aof_rewrite_scheduled"] or not facts["aof_enabled"]:
            return False
        if self._monotonic_s() < self._retry_at_s:
            return False
        return self._last is None or now_ms - self._last.began_ms >= 1000 * self._interval_s

    def _begin(self, now: Rewrite) -> None:
        try:
            self._client.bgrewriteaof()
        except redis.ResponseError as error:
            # Another process was faster, or the server is at something else.
            self._retry_at_s = self._monotonic_s() + min(RETRY_S, self._interval_s)
            logger.warning("the server does not rewrite its append-only file now: %s", error)

    def _oldest_entry_ms(self, trimmed: list[bytes | None], now_ms: int) -> int:
        """No log entry in memory is older than this: all up to `trimmed` are gone, of every shard."""
        oldest_ms = now_ms
        for shard, raw in enumerate(trimmed):
            if raw is not None:
                oldest_ms = min(oldest_ms, parse_id(raw)[0])
                continue
            if shard not in self._first_ms:
                first = cast("list[tuple[bytes, Any]]", self._client.xrange(log_key(shard), count=1))
                if first:
                    self._first_ms[shard] = parse_id(first[0][0])[0]
            oldest_ms = min(oldest_ms, self._first_ms.get(shard, oldest_ms))
        return oldest_ms

    def _run(self) -> None:
        while True:
            try:
                self.step()
            except redis.RedisError as error:
                logger.info("the append-only file cannot be looked after: %s", error)
            if self._stopping.wait(self._poll_s):
                return
