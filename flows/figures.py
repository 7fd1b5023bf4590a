"""What a flow tells the gateway besides pushes: where live phones are (`density`), whom alerts have told (`tallies`).

    worker     begin, after_entry: counts, between two entries
    "figures"  once a second: writes what has been counted, with a client of the process

Nothing rests on these figures: no push, no checkpoint, no `done`. A write that fails is counted and logged; a density
is then forgotten, a tally waits for the next second. Should the counting itself fail, the flow goes on without it, and
an alarm says so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

import redis

from flows.clock import CLOCK, Clock
from flows.density import EXPIRY_S, DensityCounter, density_key, encode_density
from flows.log import LogId
from flows.match import ShardPushes
from flows.metrics import METRICS, Metrics
from flows.tallies import WRITE_IF_NEWER, TallyCounter, tally_key
from geoindex.shard import ShardMachine

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0


class Figures:
    """Counts and publishes for the shards of one process, from a thread of its own."""

    def __init__(
        self,
        client: redis.Redis,
        shards: Iterable[int],
        metrics: Metrics = METRICS,
        clock: Clock = CLOCK,
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._clock = clock
        self._density = DensityCounter(metrics, clock)
        self._tallies = TallyCounter()
        started_ms = round(clock.now_ms())
        self._counted_ms = dict.fromkeys(shards, started_ms)
        """When the density that was last written was counted, by shard."""
        self._has_failed = False
        self._was_down = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="figures", daemon=True)

    # Called by the flow, in the thread that runs the shard's machine.

    def begin(self, shard: int, machine: ShardMachine, position: LogId) -> None:
        """A shard starts, or starts anew, with this machine behind log entry `position`."""
        if not self._has_failed:
            try:
                self._density.begin(shard)
                self._tallies.begin(shard, machine, position)
            except Exception as error:
                self._fail(error)

    def after_entry(self, caused: ShardPushes, machine: ShardMachine) -> None:
        """A machine has seen an entry, and the next one waits."""
        if not self._has_failed:
            try:
                self._tallies.after_entry(caused)
                self._density.after_entry(caused.raw, machine)
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Pushes come first: go on without figures, and say so until somebody starts the flow anew."""
        self._has_failed = True
        logger.error("figures have failed; the flow goes on without them", exc_info=error)
        self._metrics.alarms.set("figures", "phones and told devices are not counted any more; the log says why")

    # The publishing thread.

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Publish once more and stop."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self.publish()

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            self.publish()

    def publish(self) -> None:
        """Write what has been counted since the last call. A failure is counted and logged, never raised."""
        if self._has_failed:
            return
        try:
            problems = self._write_tallies() + self._write_density()
        except Exception as error:
            self._fail(error)
            return
        if problems and not self._was_down:
            logger.warning("figures cannot be published: %s", problems[0])
        self._was_down = bool(problems)

    def _write_tallies(self) -> list[str]:
        """Those that have changed, a script a shard; what went wrong."""
        taken = self._tallies.take()
        if not taken:
            return []
        problems: list[str] = []
        replies: list[object]
        try:
            with self._client.pipeline(transaction=False) as pipeline:
                for tallies in taken:
                    pipeline.eval(WRITE_IF_NEWER, 1, tally_key(tallies.shard), *map(_argument, tallies.arguments))
                replies = pipeline.execute(raise_on_error=False)
        except redis.RedisError as error:
            replies = [error] * len(taken)
        for tallies, reply in zip(taken, replies, strict=True):
            if isinstance(reply, Exception):
                self._metrics.count("figure_write_errors_total", figure="tally")
                self._tallies.put_back(tallies)
                problems.append(str(reply))
            else:
                self._tallies.written(tallies)
        return problems

    def _write_density(self) -> list[str]:
        """Counts that have ended, one at a time: each may have megabytes. What went wrong."""
        problems: list[str] = []
        for density in self._density.take():
            try:
                self._client.set(density_key(density.shard), encode_density(density), ex=EXPIRY_S)
                self._counted_ms[density.shard] = density.at_ms
            except redis.RedisError as error:
                self._metrics.count("figure_write_errors_total", figure="density")
                problems.append(str(error))
        return problems

    def set_gauges(self) -> None:
        """How old the density is that stands on the server."""
        now_ms = self._clock.now_ms()
        for shard, counted_ms in self._counted_ms.items():
            self._metrics.gauge("density_age_ms", max(0.0, now_ms - counted_ms), shard=str(shard))


def _argument(argument: str | bytes | int) -> str:
    """redis-py's `eval` is annotated for str alone, and takes all of these."""
    return argument  # type: ignore[return-value]
