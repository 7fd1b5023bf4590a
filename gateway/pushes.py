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
import logging
import os
import secrets
import socket
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import anyio.from_thread
import anyio.to_thread
import msgpack
import orjson
import redis
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from flows.clock import CLOCK, Clock
from flows.consumers import CLAIM_AFTER_S, Consumer, Delivery
from flows.metrics import METRICS, Metrics
from gateway.errors import Problem, responses
from gateway.handover import (
    ENTRY_NAME_PATTERN,
    GROUP,
    EntryName,
    acknowledge,
    count_delivered,
    leave_group,
    name_of,
)
from gateway.identity import PartnerDep
from gateway.runtime import Gateway, gateway_of
from gateway.watcher import QueueWatcher
from gateway.webhook_settings import Webhook, read_webhook
from geoindex.entries import Settings

logger = logging.getLogger(__name__)

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
        self._watcher = watcher
        self.partner = partner
        self.shard_count = shard_count
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
            async with self._watcher.watching(self.partner, self.shard_count) as event:
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
            async with asyncio.timeout(left_s):
                return await self._turn.acquire()
        except TimeoutError:
            return False

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
    """The queues of all partners that ask this gateway."""

    def __init__(
        self,
        client: redis.Redis,
        loop: asyncio.AbstractEventLoop,
        metrics: Metrics = METRICS,
        clock: Clock = CLOCK,
        claim_after_s: float = CLAIM_AFTER_S,
    ) -> None:
        """`loop`: that of all who ask."""
        self._client = client
        self.watcher = QueueWatcher(client, loop, metrics, clock)
        self._metrics = metrics
        self._clock = clock
        self._claim_after_s = claim_after_s
        self._queues: dict[str, PushQueue] = {}
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        """This process's name in the groups. New in every life: what another life was given is claimed."""

    def start(self) -> None:
        """Start the thread that waits for all."""
        self.watcher.start()

    def stop(self) -> None:
        """End it; this process's name leaves the groups where nothing is pending under it."""
        self.watcher.stop()
        for queue in self._queues.values():
            try:
                leave_group(self._client, queue.partner, queue.shard_count, self.consumer)
            except redis.RedisError as error:
                logger.warning("%s stays in the group of %s: %s", self.consumer, queue.partner, error)
                return

    def of(self, partner: str, settings: Settings) -> PushQueue:
        """The queue of one partner."""
        queue = self._queues.get(partner)
        if queue is None:
            queue = self._queues[partner] = PushQueue(
                self._client,
                self.watcher,
                partner,
                settings.shard_count,
                settings.push_ids_max,
                self.consumer,
                self._metrics,
                self._clock,
                self._claim_after_s,
            )
        return queue


def start(gateway: Gateway) -> PushQueues:
    """Called by the gateway in a thread of its loop, before the first request."""
    queues = PushQueues(gateway.client, anyio.from_thread.run(_running_loop), gateway.metrics, gateway.clock)
    queues.start()
    return queues


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


# --- what travels -----------------------------------------------------------------------------------------------------

EXAMPLE_ID = "s3:p0:1764000000000-16777217"
Strict = ConfigDict(extra="forbid", strict=True)


class PushOut(BaseModel):
    """One entry of a push queue: devices that are told one thing."""

    model_config = Strict

    id: str = Field(
        description="Of the entry: the same at every delivery. Deduplicate on it, and acknowledge with it.",
        pattern=ENTRY_NAME_PATTERN,
        examples=[EXAMPLE_ID],
    )
    alert_id: str = Field(min_length=1, max_length=64, examples=["330106-20261124-0001"])
    revision: int = Field(ge=1, description="Of the alert; rises with every edit.", examples=[1])
    kind: Literal["alert", "update", "resolved"] = Field(
        description="`alert`: told for the first time; `update`: what was told has changed; `resolved`: the search has "
        "ended. For one device and alert they come in this order.",
        examples=["alert"],
    )
    ring_km: float = Field(ge=0, description="Radius of the ring at that moment.", examples=[100.0])
    at: int = Field(ge=0, description="When the shard decided it: ms since 1970, UTC.", examples=[1764000000000])
    device_ids: list[str] = Field(
        description="Whom to tell.", max_length=DEVICES_MAX, examples=[["phone-1", "phone-2"]]
    )
    delivery_count: int = Field(ge=1, description="How often it was handed over, this time included.", examples=[1])


class PushesOut(BaseModel):
    """What a poll brings."""

    model_config = Strict

    pushes: list[PushOut] = Field(max_length=ENTRIES_MAX, description="In the order of each shard; may be empty.")
    claim_after_s: float = Field(
        description="What is not acknowledged within so many seconds comes again, to whoever asks.", examples=[60.0]
    )


class AckIn(BaseModel):
    """Entries that have been dealt with."""

    model_config = Strict

    ids: list[Annotated[str, Field(max_length=100)]] = Field(
        min_length=1, max_length=ACK_IDS_MAX, description="As they came.", examples=[[EXAMPLE_ID]]
    )


class RefusedId(BaseModel):
    """An id that could not be acknowledged."""

    model_config = Strict

    id: str = Field(max_length=100, examples=["s3:p1:1764000000000-16777217"])
    reason: Literal["malformed", "not_yours", "unknown"] = Field(
        description="`malformed`: no entry's id; `not_yours`: of another partner's queue; `unknown`: never handed "
        "over, or acknowledged before, or among the dead letters.",
        examples=["not_yours"],
    )


class AckOut(BaseModel):
    """What came of an acknowledgement."""

    model_config = Strict

    acknowledged: int = Field(ge=0, description="Entries taken off, now and for good.", examples=[1])
    refused: list[RefusedId] = Field(max_length=ACK_IDS_MAX, description="In the order they came; each once.")


def push_fields(delivery: Delivery, partner_index: int) -> dict[str, Any]:
    """A delivery as it travels (`PushOut`)."""
    push = delivery.push
    return {
        "id": str(name_of(delivery, partner_index)),
        "alert_id": push.alert_id,
        "revision": push.revision,
        "kind": push.kind,
        "ring_km": push.ring_km,
        "at": push.at_ms,
        "device_ids": push.device_ids,
        "delivery_count": delivery.delivery_count,
    }


# --- endpoints --------------------------------------------------------------------------------------------------------

router = APIRouter(prefix="/v1/pushes", tags=["pushes"])


@router.get(
    "",
    summary="Take pushes, waiting for the first if there are none",
    response_model=PushesOut,
    responses={
        200: {"content": {MSGPACK: {"schema": {"$ref": "#/components/schemas/PushesOut"}}}},
        **responses(400, 401, 403, 409, 422, 429, 503),
    },
)
async def take_pushes(
    request: Request,
    caller: PartnerDep,
    entries_max: Annotated[
        int, Query(alias="max", ge=1, le=ENTRIES_MAX, description="Entries at most; fewer if they name many devices.")
    ] = 100,
    wait: Annotated[
        float,
        Query(ge=0, le=WAIT_S_MAX, description="Seconds to wait for the first push. The gateway may answer earlier."),
    ] = 0.0,
) -> Response:
    """The next pushes, as JSON or, with `Accept: application/msgpack`, as msgpack.

    At least once: what is not acknowledged comes again after `claim_after_s`, under the same id, and after five vain
    deliveries goes to the dead letters. An answer without pushes is no end: ask again. Any number of clients may ask at
    once; each push goes to one of them. While a webhook is active, it has the pushes: 409.
    """
    gateway = gateway_of(request)
    partner = caller.account
    settings, hook = await anyio.to_thread.run_sync(_before_poll, gateway, partner.name)
    if hook is not None and hook.state == "active":
        raise Problem(
            409, "webhook-active", "pushes go to the webhook; delete it (DELETE /v1/webhook) to take them here"
        )
    queue = gateway.service(PushQueues).of(partner.name, settings)
    taking = asyncio.ensure_future(queue.take(entries_max, min(wait, gateway.config.wait_s_max)))
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((taking, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not taking.done():
            taking.cancel()
            await asyncio.wait((taking,))
        deliveries = [] if taking.cancelled() else taking.result()
        if leaving.done():
            await queue.give_back(deliveries)
            gateway.metrics.count("push_polls_total", outcome="gone")
            return Response(status_code=204)  # nobody reads it
    finally:
        leaving.cancel()
        taking.cancel()
    await anyio.to_thread.run_sync(count_delivered, gateway.client, partner.name, deliveries)
    gateway.metrics.count("push_polls_total", outcome="pushes" if deliveries else "empty")
    answer = {
        "pushes": [push_fields(delivery, partner.index) for delivery in deliveries],
        "claim_after_s": CLAIM_AFTER_S,
    }
    if MSGPACK in request.headers.get("accept", ""):
        return Response(cast(bytes, msgpack.packb(answer)), media_type=MSGPACK)
    return Response(orjson.dumps(answer), media_type="application/json")


def _before_poll(gateway: Gateway, partner: str) -> tuple[Settings, Webhook | None]:
    return gateway.settings(), read_webhook(gateway.client, partner)


async def _gone(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.post(
    "/ack",
    summary="Acknowledge pushes that have been dealt with",
    responses=responses(400, 401, 403, 413, 422, 429, 503),
)
def acknowledge_pushes(request: Request, caller: PartnerDep, body: AckIn) -> AckOut:
    """Takes these entries off. May be repeated: an id that was acknowledged before is then `unknown`.

    One bad id does no harm to the others.
    """
    gateway = gateway_of(request)
    partner = caller.account
    shard_count = gateway.settings().shard_count
    names: dict[str, EntryName] = {}
    refused: dict[str, RefusedId] = {}
    for text in dict.fromkeys(body.ids):
        try:
            name = EntryName.parse(text)
        except ValueError:
            refused[text] = RefusedId(id=text, reason="malformed")
            continue
        if name.partner_index != partner.index:
            refused[text] = RefusedId(id=text, reason="not_yours")
        elif name.shard >= shard_count:
            refused[text] = RefusedId(id=text, reason="unknown")
        else:
            names[text] = name
    done = acknowledge(gateway.client, partner.name, names.values())
    for text, name in names.items():
        if name not in done:
            refused[text] = RefusedId(id=text, reason="unknown")
    gateway.metrics.count("push_acks_total", len(done))
    return AckOut(
        acknowledged=len(done), refused=[refused[text] for text in dict.fromkeys(body.ids) if text in refused]
    )
