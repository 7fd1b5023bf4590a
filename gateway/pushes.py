"""How partners take their pushes by HTTP: a long poll, and its acknowledgement.

    GET  /v1/pushes?max=100&wait=30    what waits now, or the first that comes within so many seconds
    POST /v1/pushes/ack                these have been dealt with

    request ──> one read ── nothing? ──> its turn among those who wait ──> woken (`gateway.watcher`) ──> one read ──> …

Behind it is the consumer group of `gateway.handover`, over all shards: delivery is at least once, ids are the same at
every delivery, what is not acknowledged within a minute comes again, to whoever asks, through whichever gateway. Of
those who wait for one partner's pushes only the first looks when some come; the others follow as long as there are any.

A client that goes away while it waits gets nothing handed over: what was read for it in that moment is given back, and
the next who asks has it at once. Only what goes down with the answer on its way comes again after the minute.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import anyio.to_thread
import msgpack
import orjson
import redis
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from flows.clock import CLOCK, Clock
from flows.consumers import CLAIM_AFTER_S, Consumer, Delivery
from flows.metrics import METRICS, Metrics
from gateway.accounts import Caller, PartnerAccount
from gateway.errors import Problem, responses
from gateway.handover import ENTRY_NAME_PATTERN, GROUP, EntryName, acknowledge, count_delivered, name_of
from gateway.identity import partner_caller
from gateway.watcher import QueueWatcher

ENTRIES_MAX = 1_000
"""Of one answer."""
DEVICES_MAX = 100_000
"""Of one answer: 7 MB of ids at most."""
ACK_IDS_MAX = 10_000
WAIT_S_MAX = 60.0
LOOK_EVERY_S = CLAIM_AFTER_S / 10
"""Whoever waits looks so often for what another consumer has let lie; a push that comes wakes him before."""
MSGPACK = "application/msgpack"


# --- the queue of one partner -----------------------------------------------------------------------------------------


class PushQueue:
    """A partner's pushes, for any number of coroutines of one event loop."""

    def __init__(
        self,
        client: redis.Redis,
        watcher: QueueWatcher,
        partner: str,
        shard_count: int,
        devices_each_max: int,
        consumer: str,
        metrics: Metrics = METRICS,
        clock: Clock = CLOCK,
        claim_after_s: float = CLAIM_AFTER_S,
    ) -> None:
        """`consumer`: this process's own name, new in every life. `devices_each_max`: `Settings.push_ids_max`."""
        self._client = client
        self._watcher = watcher
        self._partner = partner
        self._devices_each_max = devices_each_max
        self._clock = clock
        self._look_every_s = min(LOOK_EVERY_S, claim_after_s / 10)
        self._consumer = Consumer(client, partner, shard_count, GROUP, consumer, claim_after_s, metrics, clock)
        self._reading = asyncio.Lock()
        """The consumer is for one thread at a time."""
        self._turn = asyncio.Lock()
        """Of the one who waits for a push to come. It is first come, first served."""

    async def take(self, entries_max: int, wait_s: float = 0.0) -> list[Delivery]:
        """The next entries, bounded by their devices as well; waits for the first if there are none.

        Cancelled, it hands nothing over: what it had read goes to the next who asks. Raises redis.RedisError.
        """
        found = await self._read(entries_max)
        end_s = self._clock.monotonic_s() + wait_s
        if found or not await self._acquired_turn(end_s):
            return found
        try:
            async with self._watcher.watching(self._partner) as event:
                while not found and (left_s := end_s - self._clock.monotonic_s()) > 0:
                    await _set(event, min(left_s, self._look_every_s))
                    event.clear()
                    found = await self._read(entries_max)
            return found
        finally:
            self._turn.release()

    async def give_back(self, deliveries: Sequence[Delivery]) -> None:
        """These reached nobody: the next who asks gets them at once."""
        if deliveries:
            async with self._reading:
                await anyio.to_thread.run_sync(self._consumer.give_back, deliveries)

    async def _acquired_turn(self, end_s: float) -> bool:
        left_s = end_s - self._clock.monotonic_s()
        if left_s <= 0:
            return False
        try:
            await asyncio.wait_for(self._turn.acquire(), left_s)
        except TimeoutError:
            return False
        return True

    async def _read(self, entries_max: int) -> list[Delivery]:
        async with self._reading:
            reading = asyncio.ensure_future(
                anyio.to_thread.run_sync(self._consumer.take, entries_max, DEVICES_MAX, self._devices_each_max)
            )
            try:
                return await asyncio.shield(reading)
            except asyncio.CancelledError:
                deliveries = await reading
                if deliveries:
                    await anyio.to_thread.run_sync(self._consumer.give_back, deliveries)
                raise


async def _set(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event is set, or for so long."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass


class PushQueues:
    """The queues of all partners that ask this gateway. Started and stopped with it, from its event loop."""

    def __init__(
        self,
        client: redis.Redis,
        shard_count: int,
        devices_each_max: int,
        metrics: Metrics = METRICS,
        clock: Clock = CLOCK,
        claim_after_s: float = CLAIM_AFTER_S,
    ) -> None:
        self.client = client
        self.shard_count = shard_count
        self.watcher = QueueWatcher(client, shard_count, metrics, clock)
        self._devices_each_max = devices_each_max
        self._metrics = metrics
        self._clock = clock
        self._claim_after_s = claim_after_s
        self._queues: dict[str, PushQueue] = {}
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        """This process's name in the groups. New in every life: what another life was given is claimed."""

    def start(self) -> None:
        """Ready for coroutines of the running loop."""
        self.watcher.start()

    async def stop(self) -> None:
        """Everybody who waits is answered; this process's name leaves the groups where nothing is pending under it."""
        await self.watcher.stop()
        await anyio.to_thread.run_sync(self._leave_groups)

    def of(self, partner: str) -> PushQueue:
        """The queue of one partner."""
        queue = self._queues.get(partner)
        if queue is None:
            queue = self._queues[partner] = PushQueue(
                self.client,
                self.watcher,
                partner,
                self.shard_count,
                self._devices_each_max,
                self.consumer,
                self._metrics,
                self._clock,
                self._claim_after_s,
            )
        return queue

    def _leave_groups(self) -> None:
        for partner in self._queues:
            forget_consumers(self.client, partner, self.shard_count, self.consumer)
