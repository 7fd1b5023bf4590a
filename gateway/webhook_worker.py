"""Delivers one partner's pushes to its webhook: reads queues, sends what the plan says, writes down what came of it.

    queues ──fill──> plan (`gateway.webhook_plan`) ──send──> receiver (`gateway.webhook_sender`)
      ^                                                          │
      └── acknowledged and counted <── accepted ─────────────────┤
    dead letters <──────────────────── given up ─────────────────┤
    webhook-tries:{desk}:<partner> <── failures that count ──────┘

It is alone: whoever delivers to a partner holds `webhook-lease:{desk}:<partner>`, and begins no request that could
outlive the lease. While a webhook is active nobody polls, so all that is pending in the group is its own, and is taken
over at the start, whoever it was handed to before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import anyio.to_thread
import orjson
import redis

from flows.consumers import CLAIM_AFTER_S, push_of
from flows.dead_letters import Corpse, bury, dead_key, original, put_back
from flows.log import LogId, format_id, parse_id, push_key
from flows.metrics import Metrics
from flows.server import worth_a_line
from flows.wire import MalformedEntry
from gateway.handover import GROUP, EntryName, acknowledge, shard_of
from gateway.watcher import QueueWatcher
from gateway.webhook_plan import WINDOW, DeliveryPlan, Entry, Fate, Pace
from gateway.webhook_sender import Answer, Outcome, WebhookSender
from gateway.webhook_settings import signed_headers, tries_key

logger = logging.getLogger(__name__)

LOOK_EVERY_S = CLAIM_AFTER_S / 10
"""How often it looks for what became pending otherwise: replayed dead letters."""
LEASE_S = 20.0
"""Beyond the longest request: so long after a gateway's death another one takes over, at most."""
RENEW_EVERY_S = 3.0

_RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class Lease:
    """The right to deliver to one partner. For one thread at a time."""

    def __init__(self, client: redis.Redis, partner: str, holder: str, lease_s: float) -> None:
        self._client = client
        self._key = f"webhook-lease:{{desk}}:{partner}"
        self._holder = holder
        self._lease_ms = round(lease_s * 1000)
        self.until_s = 0.0
        """By this machine's monotonic clock, and rather too early."""

    def take(self) -> bool:
        """Whether it is ours now. Raises redis.RedisError."""
        began_s = time.monotonic()
        taken = self._client.set(self._key, self._holder, nx=True, px=self._lease_ms)
        return self._held(bool(taken), began_s)

    def renew(self) -> bool:
        """Whether it still is. Raises redis.RedisError."""
        began_s = time.monotonic()
        return self._held(bool(self._client.eval(_RENEW, 1, self._key, self._holder, str(self._lease_ms))), began_s)

    def release(self) -> None:
        """Let another one have it. Raises redis.RedisError."""
        self.until_s = 0.0
        self._client.eval(_RELEASE, 1, self._key, self._holder)

    def _held(self, held: bool, began_s: float) -> bool:
        self.until_s = began_s + self._lease_ms / 1000 if held else 0.0
        return held


@dataclass(frozen=True, slots=True)
class Terms:
    """What a worker works under."""

    partner: str
    partner_index: int
    shard_count: int
    consumer: str
    """This process's own name in the group."""
    timeout_s: float
    secrets: Callable[[], Sequence[str]]
    pace: Pace
    look_every_s: float


# --- the queues, from a thread ----------------------------------------------------------------------------------------


class DeliveryQueues:
    """The group's side of one partner's queues and dead letters. Blocks; for one thread at a time."""

    def __init__(self, client: redis.Redis, terms: Terms, metrics: Metrics) -> None:
        self._client = client
        self._terms = terms
        self._metrics = metrics
        shards = range(terms.shard_count)
        self._queues = [push_key(shard, terms.partner) for shard in shards]
        self._dead = [dead_key(shard, terms.partner) for shard in shards]
        self._tries: dict[str, int] = {}
        self._adopted: set[str] = set()
        """Queues of which all that is pending is on its way: only of these new entries are read."""

    def begin(self) -> None:
        """Make the group, and learn how often entries failed in an earlier life. Raises redis.RedisError."""
        for queue in self._queues:
            try:
                self._client.xgroup_create(queue, GROUP, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
        stored = cast("dict[bytes, bytes]", self._client.hgetall(tries_key(self._terms.partner)))
        self._tries = {name.decode(): int(tries) for name, tries in stored.items()}

    def fill(self, plan: DeliveryPlan, look: bool) -> list[Entry]:
        """Entries that the plan has room for, oldest first. `look`: also at what became pending otherwise.

        Raises redis.RedisError.
        """
        if look:
            self._adopted.clear()
        found: list[Entry] = []
        asked = [queue for queue in self._queues if queue not in self._adopted and plan.room(queue) > 0]
        found += self._pending(plan, asked + (self._dead if look else []))
        rooms: dict[int, list[str]] = {}
        for queue in self._adopted:
            room = plan.room(queue) - sum(entry.stream == queue for entry in found)
            if room > 0:
                rooms.setdefault(room, []).append(queue)
        for room, queues in rooms.items():
            reply = self._client.xreadgroup(
                GROUP, self._terms.consumer, cast(Any, dict.fromkeys(queues, ">")), count=room
            )
            for raw_key, entries in cast(Any, reply) or []:
                found += self._entries(raw_key.decode(), entries)
        return found

    def _pending(self, plan: DeliveryPlan, streams: Sequence[str]) -> list[Entry]:
        """What is pending and not on its way, claimed, whoever has it."""
        with self._client.pipeline(transaction=False) as pipeline:
            for stream in streams:
                pipeline.xpending_range(stream, GROUP, "-", "+", 2 * WINDOW)
            replies = pipeline.execute(raise_on_error=False)
        found: list[Entry] = []
        for stream, reply in zip(streams, replies, strict=True):
            if isinstance(reply, redis.ResponseError):
                if "NOGROUP" in str(reply) and stream in self._dead:
                    continue  # nothing was ever replayed
                raise reply
            ids = [one["message_id"].decode() for one in reply]
            unknown = [pending_id for pending_id in ids if not plan.holds(stream, parse_id(pending_id))]
            wanted = unknown[: max(0, plan.room(stream))]
            if stream not in self._dead and len(wanted) == len(unknown) and len(ids) < 2 * WINDOW:
                self._adopted.add(stream)
            if wanted:
                claimed = self._client.xclaim(stream, GROUP, self._terms.consumer, 0, cast(Any, wanted), retrycount=1)
                found += self._entries(stream, cast(Any, claimed))
        return found

    def _entries(self, stream: str, stored: Iterable[tuple[bytes, Mapping[bytes, bytes]]]) -> list[Entry]:
        """What is no push goes to the dead letters."""
        found = []
        for raw_id, fields in stored:
            pending_id = entry_id = parse_id(raw_id)
            if stream.startswith("dead:"):
                entry_id, fields = original(fields)
            name = EntryName(shard_of(stream), self._terms.partner_index, entry_id)
            try:
                push = push_of(fields)
            except MalformedEntry as malformed:
                self._give_up(stream, pending_id, 1, f"cannot be decoded: {malformed}")
                continue
            found.append(Entry(stream, pending_id, name, push, tries=self._tries.get(str(name), 0)))
        return found

    def settle(self, done: Sequence[Entry], failed: Sequence[Entry], given_up: Sequence[Entry]) -> None:
        """Write down what came of entries. May be repeated. Raises redis.RedisError."""
        acknowledge(self._client, self._terms.partner, (entry.name for entry in done))
        for entry in given_up:
            self._give_up(entry.stream, entry.pending_id, entry.tries, f"not accepted: {entry.reason}")
        key = tries_key(self._terms.partner)
        over = [str(entry.name) for entry in (*done, *given_up) if str(entry.name) in self._tries]
        if over:
            self._client.hdel(key, *over)
            for name in over:
                self._tries.pop(name, None)
        changed = {
            str(entry.name): entry.tries for entry in failed if self._tries.get(str(entry.name), 0) != entry.tries
        }
        if changed:
            self._client.hset(key, mapping=cast(Any, changed))
            self._tries |= changed

    def _give_up(self, stream: str, pending_id: LogId, tries: int, reason: str) -> None:
        raw_id = format_id(pending_id)
        if stream.startswith("dead:"):
            buried = put_back(self._client, stream, GROUP, raw_id)
        else:
            buried = bury(self._client, Corpse(stream, raw_id, GROUP, tries, reason))
        if buried:
            self._metrics.count("dead_letters_total", partner=self._terms.partner)
            logger.error("%s: entry %s of %s goes to the dead letters: %s", self._terms.partner, raw_id, stream, reason)

    def give_back(self, entries: Iterable[Entry]) -> None:
        """These are nobody's: whoever comes next has them at once, as if they had not been handed over."""
        with self._client.pipeline(transaction=False) as pipeline:
            for entry in entries:
                pipeline.xclaim(
                    entry.stream,
                    GROUP,
                    self._terms.consumer,
                    0,
                    cast(Any, [format_id(entry.pending_id)]),
                    idle=round(CLAIM_AFTER_S * 1000) + 1,
                    retrycount=0,
                    justid=True,
                )
            pipeline.execute(raise_on_error=False)


# --- the worker -------------------------------------------------------------------------------------------------------


def push_event(entry: Entry) -> bytes:
    """The body of a delivery, in the shape that Standard Webhooks suggests."""
    push = entry.push
    return orjson.dumps(
        {
            "type": f"push.{push.kind}",
            "timestamp": _iso(push.at_ms),
            "data": {
                "id": str(entry.name),
                "alert_id": push.alert_id,
                "revision": push.revision,
                "kind": push.kind,
                "ring_km": push.ring_km,
                "at": push.at_ms,
                "device_ids": push.device_ids,
            },
        }
    )


def test_event(partner: str, now_ms: float) -> bytes:
    """The body of a test event: to be answered with 2xx, and nothing else."""
    return orjson.dumps({"type": "webhook.test", "timestamp": _iso(now_ms), "data": {"partner": partner}})


def _iso(at_ms: float) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class WebhookWorker:
    """Runs until it is stopped, loses its lease, or the receiver wants no more (`gone`)."""

    def __init__(
        self,
        client: redis.Redis,
        watcher: QueueWatcher,
        sender: WebhookSender,
        lease: Lease,
        terms: Terms,
        metrics: Metrics,
        now_ms: Callable[[], float],
    ) -> None:
        self._watcher = watcher
        self._sender = sender
        self._lease = lease
        self._terms = terms
        self._metrics = metrics
        self._now_ms = now_ms
        self._queues = DeliveryQueues(client, terms, metrics)
        self._plan = DeliveryPlan(terms.pace)
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        """Something was answered, came, or is to stop."""
        self._answers: list[tuple[Entry | None, Answer]] = []
        """None: of a test event."""
        self._requests: set[asyncio.Task[None]] = set()
        self.gone = False
        """The receiver answered 410."""

    def stop(self) -> None:
        """Begin no more requests; `run` returns when those on their way are answered."""
        self._stopping.set()
        self._changed.set()

    async def run(self) -> None:
        """Deliver. Never raises for what server and receiver do."""
        failures = 0
        begun = False
        try:
            async with self._watcher.watching(self._terms.partner, self._terms.shard_count) as came:
                while not self._stopping.is_set() and not self.gone:
                    try:
                        if not begun:
                            await anyio.to_thread.run_sync(self._queues.begin)
                            begun = True
                        await self._deliver(came)
                        return
                    except redis.RedisError as error:
                        failures, begun = failures + 1, False
                        if worth_a_line(failures):
                            logger.warning("%s: webhook waits for the server: %s", self._terms.partner, error)
                        if time.monotonic() >= self._lease.until_s:
                            return
                        await _set(self._stopping, 0.5)
        finally:
            await self._end()

    async def _deliver(self, came: asyncio.Event) -> None:
        look_at_s = renew_at_s = 0.0
        fill = True
        while not self._stopping.is_set() and not self.gone:
            now_s = time.monotonic()
            if now_s >= renew_at_s:
                if not await anyio.to_thread.run_sync(self._lease.renew):
                    logger.warning("%s: another gateway delivers to the webhook", self._terms.partner)
                    return
                renew_at_s = now_s + RENEW_EVERY_S
            look = now_s >= look_at_s
            if look:
                look_at_s = now_s + self._terms.look_every_s
            if came.is_set() or look or fill:
                came.clear()
                entries = await anyio.to_thread.run_sync(self._queues.fill, self._plan, look)
                self._plan.add(entries)
            await self._send()
            self._metrics.gauge("webhook_entries_on_their_way", len(self._plan), partner=self._terms.partner)
            next_s = self._plan.next_s(time.monotonic())
            until_s = min(at_s for at_s in (look_at_s, renew_at_s, next_s) if at_s is not None)
            await self._something(came, until_s - time.monotonic())
            fill = await self._settle()

    async def _something(self, came: asyncio.Event, timeout_s: float) -> None:
        """Until an answer or a push comes, or for so long."""
        if timeout_s <= 0 or came.is_set():
            await asyncio.sleep(0)
            return
        waits = [asyncio.ensure_future(came.wait()), asyncio.ensure_future(self._changed.wait())]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._changed.clear()

    async def _send(self) -> None:
        now_s = time.monotonic()
        if now_s + self._terms.timeout_s >= self._lease.until_s:
            return  # it could outlive the lease
        for entry in self._plan.to_send(now_s):
            self._begin(entry, str(entry.name), push_event(entry))
        if self._plan.to_probe(now_s):
            now_ms = self._now_ms()
            self._begin(None, f"test:{self._terms.partner_index}-{now_ms:.0f}", test_event(self._terms.partner, now_ms))

    def _begin(self, entry: Entry | None, message_id: str, body: bytes) -> None:
        request = asyncio.ensure_future(self._post(entry, message_id, body))
        self._requests.add(request)
        request.add_done_callback(self._requests.discard)

    async def _post(self, entry: Entry | None, message_id: str, body: bytes) -> None:
        began_s = time.monotonic()
        headers = signed_headers(self._terms.secrets(), message_id, body, self._now_ms())
        answer = await self._sender.post(body, headers)
        kind = "test" if entry is None else "push"
        self._metrics.count(
            "webhook_deliveries_total", partner=self._terms.partner, kind=kind, outcome=answer.outcome.value
        )
        self._metrics.observe("webhook_delivery_ms", (time.monotonic() - began_s) * 1000)
        self._answers.append((entry, answer))
        self._changed.set()

    async def _settle(self) -> bool:
        """Deal with all answers so far; whether that has made room."""
        answers, self._answers = self._answers, []
        done: list[Entry] = []
        failed: list[Entry] = []
        given_up: list[Entry] = []
        was_down = self._plan.down
        for entry, answer in answers:
            now_s = time.monotonic()
            if answer.outcome is Outcome.GONE:
                self.gone = True
            if entry is None:
                given_up += self._plan.probed(answer, now_s)
                continue
            fate = self._plan.answered(entry, answer, now_s)
            {Fate.DONE: done, Fate.AGAIN: failed, Fate.GIVEN_UP: given_up}[fate].append(entry)
        if self._plan.down != was_down:
            logger.warning("%s: webhook is %s", self._terms.partner, "down" if self._plan.down else "up again")
            self._metrics.gauge("webhook_down", int(self._plan.down), partner=self._terms.partner)
        if done or failed or given_up:
            await self._written(done, failed, given_up)
        return bool(done or given_up)

    async def _written(self, done: list[Entry], failed: list[Entry], given_up: list[Entry]) -> None:
        """Until it is: an entry that was accepted and not acknowledged would be sent again."""
        failures = 0
        while True:
            try:
                await anyio.to_thread.run_sync(self._queues.settle, done, failed, given_up)
                return
            except redis.RedisError as error:
                failures += 1
                if worth_a_line(failures):
                    logger.warning("%s: deliveries cannot be acknowledged: %s", self._terms.partner, error)
                if time.monotonic() >= self._lease.until_s:
                    raise  # they will be sent again: at least once
                await _set(self._stopping, 0.5)
                if self._stopping.is_set() and failures > 3:
                    raise

    async def _end(self) -> None:
        while self._requests:
            await asyncio.wait(set(self._requests))
        try:
            await self._settle()
            await anyio.to_thread.run_sync(self._queues.give_back, list(self._plan))
            await anyio.to_thread.run_sync(self._lease.release)
        except redis.RedisError as error:
            logger.warning("%s: webhook ends without the server: %s", self._terms.partner, error)
        await self._sender.close()


async def _set(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
