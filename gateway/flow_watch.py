"""What a gateway has to know of the flow, looked at once a second: settings, server's clock, how far behind it is.

    settings   partners are appended now and then; how old, and how far ahead, a ping may be
    done:{s}   the last entry of the log whose pushes are all in the queues
    lag        age of the first entry behind it, by the server's clock; 0 if there is none

A flow that runs finishes at least a tick a second, so a shard whose `done` is younger than the limit needs no second
look. Only where it is older is the entry behind it fetched, for its id: where there is none, nothing waits.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any, cast

import redis

from flows.clock import CLOCK, Clock
from flows.guards import PingsRefused
from flows.log import FIRST, LogId, SettingsMismatch, done_key, format_id, log_key, parse_id, read_settings
from flows.metrics import METRICS, Metrics
from flows.server import worth_a_line
from geoindex.entries import Settings

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
STALE_S = 10.0
"""What was seen this long ago is not known any more."""


class FlowBehind(PingsRefused):
    """The flow does not keep up, or does not run, or was never started."""

    retry_after_s = 5.0


@dataclass(frozen=True, slots=True)
class _Seen:
    """One look."""

    settings: Settings | None
    at_s: float
    """By the clock that never jumps."""
    ahead_ms: float
    """The server's clock minus ours."""
    lag_ms: float
    """Of the shard that is furthest behind, or of the first one found beyond the limit."""
    shard: int


class FlowWatch:
    """Watches from a thread of its own. Thread-safe."""

    def __init__(self, client: redis.Redis, lag_s_max: float, metrics: Metrics = METRICS, clock: Clock = CLOCK) -> None:
        """`lag_s_max`: pings are refused above it; 0: never."""
        self._client = client
        self._lag_ms_max = 1000 * lag_s_max
        self._metrics = metrics
        self._clock = clock
        self._seen: _Seen | None = None
        self._failures = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flow-watch", daemon=True)

    def start(self) -> None:
        """Look now, and once a second from now on."""
        self.look()
        self._thread.start()

    def stop(self, timeout_s: float = 15.0) -> None:
        """Stop looking."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def check(self) -> Settings:
        """The settings in force. Raises FlowBehind if pings have to wait."""
        seen = self._seen
        if seen is None or self._clock.monotonic_s() - seen.at_s > STALE_S:
            raise FlowBehind("no pings are taken now: how far the flow is behind has not been seen lately")
        if seen.settings is None:
            raise FlowBehind("no pings are taken now: there are no logs yet; the flow has to be started once")
        if self._lag_ms_max and seen.lag_ms > self._lag_ms_max:
            raise FlowBehind(
                f"no pings are taken now: the flow is {seen.lag_ms / 1000:.0f} s behind in shard {seen.shard}, "
                f"more than {self._lag_ms_max / 1000:g} s; is it running?"
            )
        return seen.settings

    def now_ms(self) -> int:
        """The server's clock, as far as it can be told without asking: ms since 1970. Ours before the first look."""
        seen = self._seen
        return round(self._clock.now_ms() + (0.0 if seen is None else seen.ahead_ms))

    def look(self) -> None:
        """One look, whether the server answers or not."""
        try:
            self._seen = self._look()
            self._failures = 0
        except (redis.RedisError, SettingsMismatch) as error:
            self._failures += 1
            if worth_a_line(self._failures):
                logger.warning("how far the flow is behind cannot be seen (try %d): %s", self._failures, error)

    def _look(self) -> _Seen:
        settings = read_settings(self._client)
        shards = range(0 if settings is None else settings.shard_count)
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            for shard in shards:
                pipeline.get(done_key(shard))
            asked_ms = self._clock.now_ms()
            (seconds, microseconds), *found = pipeline.execute()
            ours_ms = (asked_ms + self._clock.now_ms()) / 2
        server_ms = seconds * 1000 + microseconds / 1000
        lag_ms, lagging = 0.0, 0
        for shard, raw in zip(shards, found, strict=True):
            done = FIRST if raw is None else parse_id(raw)
            if server_ms - done[0] <= self._lag_ms_max:
                continue
            behind = self._first_behind(shard, done)
            if behind is not None and server_ms - behind[0] > lag_ms:
                lag_ms, lagging = server_ms - behind[0], shard
                if lag_ms > self._lag_ms_max:
                    break  # one is enough: entries may be large
        self._metrics.gauge("intake_flow_lag_ms", lag_ms)
        return _Seen(settings, self._clock.monotonic_s(), server_ms - ours_ms, lag_ms, lagging)

    def _first_behind(self, shard: int, done: LogId) -> LogId | None:
        start = "-" if done == FIRST else f"({format_id(done)}"
        entries = cast(list[Any], self._client.xrange(log_key(shard), min=start, count=1))
        return parse_id(entries[0][0]) if entries else None

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            self.look()
