"""How partners read their push queues: consumer groups, claims after a timeout, and an end for what kills its reader.

    queue ──> read ──> handed over ──> acknowledge
                ^           │ not acknowledged: its consumer died, or gave it back
                └── again ──┴── for the fifth time, or no push at all: to the dead letters (`flows.dead_letters`)

Delivery is at least once: whoever reads deduplicates on `stream` and `entry_id`. How often an entry was handed over is
counted by the server, in the group's list of pending entries, so the count outlives every consumer.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import redis

from flows.clock import CLOCK, Clock
from flows.dead_letters import Corpse, bury, dead_key, original, put_back
from flows.log import LogId, format_id, parse_id, push_key
from flows.metrics import METRICS, Metrics
from flows.wire import MalformedEntry, PushEntry, decode_push

logger = logging.getLogger(__name__)

CLAIM_AFTER_S = 60.0
"""A push that its consumer has not acknowledged for this long is given to another one."""
DELIVERIES_MAX = 5
"""A push that was handed over so often, and never acknowledged, is taken out: it may be what kills its consumers."""
_NAME = re.compile(r"[^\s\x00-\x1f\x7f]{1,128}")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One queue entry as it was handed to a consumer. To be acknowledged when it has been dealt with."""

    stream: str
    entry_id: LogId
    """Stream and id are the same at every delivery, also of a dead letter that is replayed."""
    push: PushEntry
    delivery_count: int
    """How often it was handed to a consumer of the group, this time included."""
    dead_id: LogId | None = None
    """Its id among the dead letters, if it is replayed from there."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """An entry that was handed over and not acknowledged."""

    stream: str
    entry_id: str
    delivery_count: int


_Stored = tuple[_Pending, "Mapping[bytes, bytes] | None"]
"""A pending entry and its fields; None: trimmed away since."""


class Consumer:
    """One consumer of a partner's queues, over all shards. At least once: whoever reads deduplicates on stream and id.

        consumer = Consumer(client, "amap", shard_count)
        while True:
            for delivery in consumer.read():
                ...
                consumer.acknowledge([delivery])

    For one thread. Methods raise redis.RedisError; reading again later loses nothing.
    """

    def __init__(
        self,
        client: redis.Redis,
        partner: str,
        shard_count: int,
        group: str = "default",
        consumer: str = "consumer",
        claim_after_s: float = CLAIM_AFTER_S,
        metrics: Metrics = METRICS,
        clock: Clock = CLOCK,
    ) -> None:
        """`group`: who shares the work; each group gets every push. `consumer`: a name unique in the group.

        Raises ValueError for names with spaces.
        """
        for name, value in (("group", group), ("consumer", consumer)):
            if not _NAME.fullmatch(value):
                raise ValueError(f"{name} must have 1 to 128 characters and no spaces, got {value[:140]!r}")
        self._client = client
        self._partner = partner
        self._streams = [push_key(shard, partner) for shard in range(shard_count)]
        self._dead_streams = [dead_key(shard, partner) for shard in range(shard_count)]
        self._queue_of = dict(zip(self._dead_streams, self._streams, strict=True))
        self._group, self._consumer = group, consumer
        self._metrics = metrics
        self._clock = clock
        self._claim_after_ms = round(claim_after_s * 1000)
        self._claim_at_s = 0.0
        self._turn = 0
        """The shard whose new entries `take` hands out first: each gets its turn."""
        self._unfinished = dict.fromkeys(self._streams, "-")
        """Where to go on in what this consumer was given before and did not acknowledge."""

    def create_groups(self) -> None:
        """Make sure that the group exists on every shard's queue, from its beginning. Does nothing the second time."""
        for stream in self._streams:
            try:
                self._client.xgroup_create(stream, self._group, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    def read(self, entries_max: int = 100, block_s: float = 1.0) -> list[Delivery]:
        """The next entries: first those of an earlier life of this consumer, then others' that were given up, then new.

        Waits up to `block_s` (at most 5; 0: not at all) when there is nothing. `entries_max`: per shard.
        """
        found = self._own_unfinished(entries_max) or self._claimed(entries_max)
        if found:
            return found
        block_ms = max(1, round(min(block_s, 5.0) * 1000)) if block_s else None
        return self._handed_over(self._new(self._streams, entries_max, block_ms) or [])

    def take(self, entries_max: int, devices_max: int, devices_each_max: int) -> list[Delivery]:
        """As `read` without a wait, bounded over all shards: by entries, and by the devices that they name.

        For consumers whose name is new in every life: what an earlier life was given comes again as a claim.
        `devices_each_max`: of one entry (`Settings.push_ids_max`), not above `devices_max`. An entry's size is known
        only once it has been handed over, so no more are asked for at a time than could all be of that size.
        """
        assert entries_max >= 1 and devices_max >= devices_each_max >= 1
        room = min(entries_max, devices_max // devices_each_max)
        found = self._claimed(room, room)
        streams = self._streams[self._turn :] + self._streams[: self._turn]
        self._turn = (self._turn + 1) % len(self._streams)
        while streams:
            left = devices_max - sum(len(delivery.push.device_ids) for delivery in found)
            room = min(entries_max - len(found), left // devices_each_max)
            if room <= 0:
                break
            asked, each = streams[:room], max(1, room // len(streams))
            fresh = self._new(asked, each, None)
            if fresh is None:
                break
            found += self._handed_over(fresh)
            # Those that gave all they were asked for may have more; the others are empty.
            counts = Counter(pending.stream for pending, _ in fresh)
            streams = streams[room:] + [stream for stream in asked if counts[stream] == each]
        return found

    def acknowledge(self, deliveries: Iterable[Delivery]) -> int:
        """These have been dealt with; how many were still this group's to acknowledge."""
        ids: dict[str, list[str]] = {}
        replayed: list[Delivery] = []
        for delivery in deliveries:
            if delivery.dead_id is None:
                ids.setdefault(delivery.stream, []).append(format_id(delivery.entry_id))
            else:
                replayed.append(delivery)
        with self._client.pipeline(transaction=False) as pipeline:
            for stream, entry_ids in ids.items():
                pipeline.xack(stream, self._group, *entry_ids)
            count = sum(cast(list[int], pipeline.execute()))
        for delivery in replayed:
            assert delivery.dead_id is not None
            dead, dead_id = self._dead_of(delivery.stream), format_id(delivery.dead_id)
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.xack(dead, self._group, dead_id)
                pipeline.xdel(dead, dead_id)
                count += cast(int, pipeline.execute()[0])
        return count

    def give_back(self, deliveries: Iterable[Delivery]) -> None:
        """These will not be dealt with here: whoever of the group reads next gets them, without a wait.

        It does not count as a delivery: looking at a push must not bring it among the dead letters.
        """
        with self._client.pipeline(transaction=False) as pipeline:
            for delivery in deliveries:
                replayed = delivery.dead_id is not None
                pipeline.xclaim(
                    self._dead_of(delivery.stream) if replayed else delivery.stream,
                    self._group,
                    self._consumer,
                    0,
                    cast(Any, [format_id(delivery.dead_id or delivery.entry_id)]),
                    idle=self._claim_after_ms + 1,
                    retrycount=delivery.delivery_count - 1,
                    justid=True,
                )
            pipeline.execute()
        self._claim_at_s = 0.0

    def _new(self, streams: Sequence[str], entries_max: int, block_ms: int | None) -> list[_Stored] | None:
        """Entries that nobody of the group was given yet. None if the group did not exist; it does then."""
        try:
            reply = self._client.xreadgroup(
                self._group, self._consumer, dict.fromkeys(streams, ">"), count=entries_max, block=block_ms
            )
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self.create_groups()
            return None
        return [
            (_Pending(stream.decode(), raw_id.decode(), 1), fields)
            for stream, entries in cast(Any, reply) or []
            for raw_id, fields in entries
        ]

    # --- what was handed over before --------------------------------------------------------------------------------

    def _own_unfinished(self, entries_max: int) -> list[Delivery]:
        if not self._unfinished:
            return []
        found = self._pending({stream: (start, None) for stream, start in self._unfinished.items()}, entries_max)
        if found is None:
            self._unfinished = {}  # of a group that did not exist
            return []
        # Streams are gone through in order, so the last one seen of each is the latest.
        self._unfinished = {pending.stream: f"({pending.entry_id}" for pending in found}
        return self._again(found, 0)

    def _claimed(self, entries_max: int, total_max: int | None = None) -> list[Delivery]:
        """What other consumers were given and did not acknowledge in time; asked for ten times in that time."""
        now_s = self._clock.monotonic_s()
        if now_s < self._claim_at_s:
            return []
        self._claim_at_s = now_s + self._claim_after_ms / 10_000
        idle_ms = self._claim_after_ms
        found = self._pending(dict.fromkeys((*self._streams, *self._dead_streams), ("-", idle_ms)), entries_max)
        if found and total_max is not None and len(found) > total_max:
            self._claim_at_s = now_s  # the rest at the next call; what is claimed now is not idle then
            found = found[:total_max]
        return self._again(found or [], idle_ms)

    def _pending(self, wanted: Mapping[str, tuple[str, int | None]], entries_max: int) -> list[_Pending] | None:
        """Pending entries of streams, from an id on: idle for so many ms, or (None) this consumer's own.

        None if the group did not exist; it does then. No group on dead letters: nothing of them is replayed.
        """
        with self._client.pipeline(transaction=False) as pipeline:
            for stream, (start, idle_ms) in wanted.items():
                owner = self._consumer if idle_ms is None else None
                pipeline.xpending_range(stream, self._group, start, "+", entries_max, owner, idle_ms)
            replies = pipeline.execute(raise_on_error=False)
        found: list[_Pending] = []
        for stream, reply in zip(wanted, replies, strict=True):
            if isinstance(reply, redis.ResponseError):
                if "NOGROUP" not in str(reply):
                    raise reply
                if stream in self._queue_of:
                    continue
                self.create_groups()
                return None
            found += [_Pending(stream, one["message_id"].decode(), one["times_delivered"]) for one in reply]
        return found

    def _again(self, found: Iterable[_Pending], idle_ms: int) -> list[Delivery]:
        """Hand pending entries over once more, to this consumer, unless that has happened too often."""
        by_stream: dict[str, dict[str, _Pending]] = {}
        for pending in found:
            if pending.delivery_count >= DELIVERIES_MAX:
                self._give_up(pending, f"delivered {pending.delivery_count} times and never acknowledged")
            else:
                by_stream.setdefault(pending.stream, {})[pending.entry_id] = pending
        if not by_stream:
            return []
        with self._client.pipeline(transaction=False) as pipeline:
            for stream, entries in by_stream.items():
                # One that another consumer has claimed meanwhile is not idle any more, and stays with it.
                pipeline.xclaim(stream, self._group, self._consumer, idle_ms, cast(Any, list(entries)))
            replies = pipeline.execute()
        return self._handed_over(
            (_Pending(stream, raw_id.decode(), entries[raw_id.decode()].delivery_count + 1), fields)
            for (stream, entries), reply in zip(by_stream.items(), replies, strict=True)
            for raw_id, fields in reply
        )

    # --- what a consumer gets ---------------------------------------------------------------------------------------

    def _handed_over(self, entries: Iterable[_Stored]) -> list[Delivery]:
        """Deliveries, in order; what is no push goes to the dead letters."""
        return list(self._deliveries(entries))

    def _deliveries(self, entries: Iterable[_Stored]) -> Iterator[Delivery]:
        for pending, stored in entries:
            if stored is None:
                continue  # trimmed away since it was delivered
            stream, entry_id, fields = pending.stream, parse_id(pending.entry_id), stored
            dead_id: LogId | None = None
            if pending.stream in self._queue_of:
                stream, dead_id = self._queue_of[pending.stream], entry_id
                entry_id, fields = original(stored)
            try:
                yield Delivery(stream, entry_id, push_of(fields), pending.delivery_count, dead_id)
            except MalformedEntry as malformed:
                self._give_up(pending, f"cannot be decoded: {malformed}")

    def _give_up(self, pending: _Pending, reason: str) -> None:
        """Nobody of the group gets this entry again, unless an operator replays it."""
        words = f"{self._partner}: entry {pending.entry_id} of {pending.stream}, group {self._group!r}"
        if pending.stream in self._queue_of:
            if put_back(self._client, pending.stream, self._group, pending.entry_id):
                self._metrics.count("dead_letters_total", partner=self._partner)
                logger.error("%s: stays among the dead letters: replayed, and %s", words, reason)
            return
        corpse = Corpse(pending.stream, pending.entry_id, self._group, pending.delivery_count, reason)
        if bury(self._client, corpse):
            self._metrics.count("dead_letters_total", partner=self._partner)
            logger.error("%s: goes to the dead letters: %s", words, reason)

    def _dead_of(self, stream: str) -> str:
        return self._dead_streams[self._streams.index(stream)]


def push_of(fields: Mapping[bytes, bytes]) -> PushEntry:
    """The push that a queue entry's fields hold. Raises MalformedEntry."""
    if len(fields) != 1:
        raise MalformedEntry(f"must have one field, got {len(fields)}")
    (payload,) = fields.values()
    return decode_push(payload)
