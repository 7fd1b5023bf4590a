"""One thread that waits for all: whoever waits for pushes of a partner is woken when one comes.

    coroutines ──watching──> partners somebody waits for ──> XREAD BLOCK on the tails of their queues, in one thread
                     ^                                             │
                     └────────── their events are set ────────────┘

A waiting client costs an event, no thread and no connection. While nothing comes the thread sends one command in five
seconds; while nobody waits it sends none. What is read here is thrown away: only reading through the group hands a push
over. A partner's queues are looked at from a moment on, and whoever has been waiting is woken then, once, to look for
himself: so a push that came just before is not slept through.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio.to_thread
import redis

from flows.clock import CLOCK, Clock
from flows.log import push_key
from flows.metrics import METRICS, Metrics
from flows.server import worth_a_line

logger = logging.getLogger(__name__)

BLOCK_MS = 5_000
"""Below the client's answer timeout."""
PAUSE_S = 0.01
"""Between two reads. A busy queue wakes its waiters a hundred times a second at most; reading 1,536 tails for each push
would cost the server more than the pushes do."""
LINGER_S = 5.0
"""How long queues are watched for after the last one who waited: pollers come again at once."""
UNBLOCK_EVERY_S = 0.002


class QueueWatcher:
    """Wakes coroutines of one event loop."""

    def __init__(
        self,
        client: redis.Redis,
        loop: asyncio.AbstractEventLoop,
        metrics: Metrics = METRICS,
        clock: Clock = CLOCK,
    ) -> None:
        self._client = client
        self._loop = loop
        self._metrics = metrics
        self._clock = clock
        self._changed = threading.Condition()
        # All of these are under its lock.
        self._events: dict[str, set[asyncio.Event]] = {}
        self._shard_counts: dict[str, int] = {}
        self._leave_at_s: dict[str, float] = {}
        """Partners that nobody waits for any more."""
        self._tails: dict[str, dict[str, str]] = {}
        """By partner whose queues are watched: their streams' last known ids."""
        self._blocked_id: int | None = None
        """Of the connection that may be blocked now, in a read that does not know of partners that came since."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="queue-watcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wake everybody. Blocks."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._interrupt(lambda: not self._thread.is_alive())
        self._thread.join(10)

    @asynccontextmanager
    async def watching(self, partner: str, shard_count: int) -> AsyncIterator[asyncio.Event]:
        """An event that is set when pushes of the partner may have come, and first when they are being watched for.

        Whoever waits clears it and then looks: in this order.
        """
        event = asyncio.Event()
        with self._changed:
            self._events.setdefault(partner, set()).add(event)
            self._shard_counts[partner] = shard_count
            self._leave_at_s.pop(partner, None)
            known = partner in self._tails
            self._changed.notify()
            self._gauge()
        try:
            if known:
                event.set()
            else:
                await anyio.to_thread.run_sync(self._interrupt, lambda: partner in self._tails or self._stopping)
            yield event
        finally:
            with self._changed:
                others = self._events[partner]
                others.discard(event)
                if not others:
                    del self._events[partner]
                    self._leave_at_s[partner] = self._clock.monotonic_s() + LINGER_S
                self._gauge()

    def _gauge(self) -> None:
        self._metrics.gauge("push_waits", sum(map(len, self._events.values())))

    def _interrupt(self, done: Callable[[], bool]) -> None:
        """End the thread's read, so that it begins one that knows more.

        It may be about to read: then there is nothing to end yet, hence again and again, for a moment.
        """
        for _ in range(round(1 / UNBLOCK_EVERY_S)):
            with self._changed:
                if done():
                    return
                blocked_id = self._blocked_id
            if blocked_id is not None:
                try:
                    if cast(Any, self._client).client_unblock(blocked_id):
                        return
                except redis.RedisError:
                    return  # the thread's own read fails as well, and begins again
            threading.Event().wait(UNBLOCK_EVERY_S)

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        connection: redis.Redis | None = None
        while self._somebody_waits():
            try:
                if connection is None:
                    connection = redis.Redis(
                        connection_pool=self._client.connection_pool, single_connection_client=True
                    )
                self._round(connection)
                failures = 0
                self._pause(PAUSE_S)
            except redis.RedisError as error:
                failures += 1
                self._metrics.count("push_watch_errors_total")
                if worth_a_line(failures):
                    logger.warning("queues cannot be watched (try %d): %s", failures, error)
                with self._changed:
                    self._blocked_id = None
                    self._tails = {}  # from the beginning, on a new connection: it may be another run of the server
                    self._wake(self._events)
                if connection is not None:
                    connection.close()
                connection = None
                self._pause(min(1.0, 0.1 * 2 ** min(failures, 8)))
        if connection is not None:
            connection.close()
        with self._changed:
            self._wake(self._events)

    def _somebody_waits(self) -> bool:
        """Whether to go on; waits, at no cost, while nobody does."""
        with self._changed:
            while not self._stopping:
                now_s = self._clock.monotonic_s()
                for partner in [partner for partner, at_s in self._leave_at_s.items() if at_s <= now_s]:
                    del self._leave_at_s[partner]
                    self._tails.pop(partner, None)
                if self._events:
                    return True
                self._changed.wait(LINGER_S if self._leave_at_s else None)
        return False

    def _round(self, connection: redis.Redis) -> None:
        """Begin to watch for partners that came, then wait for the first push, or for an interruption."""
        with self._changed:
            fresh = [partner for partner in self._events if partner not in self._tails]
        found = {partner: self._learn_tails(connection, partner) for partner in fresh}
        blocked_id = connection.client_id()
        with self._changed:
            self._tails |= found
            self._wake(fresh)
            tails = {stream: tail for streams in self._tails.values() for stream, tail in streams.items()}
            # From here on somebody may end the read: whoever comes now is not in it.
            self._blocked_id = blocked_id
            if self._stopping:
                return
        try:
            reply = cast(Any, connection.xread(cast(Any, tails), count=1, block=BLOCK_MS))
        finally:
            with self._changed:
                self._blocked_id = None
        partner_of = {stream: partner for partner, streams in self._tails.items() for stream in streams}
        with self._changed:
            woken: set[str] = set()
            for key, entries in reply or []:
                stream = key.decode()
                partner = partner_of[stream]
                self._tails[partner][stream] = entries[-1][0].decode()
                woken.add(partner)
            self._wake(woken)

    def _learn_tails(self, connection: redis.Redis, partner: str) -> dict[str, str]:
        streams = [push_key(shard, partner) for shard in range(self._shard_counts[partner])]
        with connection.pipeline(transaction=False) as pipeline:
            for stream in streams:
                cast(Any, pipeline).xinfo_stream(stream)
            replies = pipeline.execute(raise_on_error=False)
        tails = {}
        for stream, reply in zip(streams, replies, strict=True):
            if isinstance(reply, redis.ResponseError) and "no such key" in str(reply):
                tails[stream] = "0-0"
            elif isinstance(reply, Exception):
                raise reply
            else:
                tails[stream] = reply["last-generated-id"].decode()
        return tails

    def _wake(self, partners: Iterable[str]) -> None:
        """Under the lock."""
        events = [event for partner in partners for event in self._events.get(partner, ())]
        if events:
            try:
                self._loop.call_soon_threadsafe(_set_all, events)
            except RuntimeError:
                logger.debug("the loop has ended before its waiters")

    def _pause(self, duration_s: float) -> None:
        with self._changed:
            if not self._stopping:
                self._changed.wait(duration_s)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
