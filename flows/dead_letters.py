"""Dead letters: pushes that were handed over too often and never acknowledged, or that are no pushes.

    push:{s3}:amap, pending in a group ──bury──> dead:{s3}:amap ──replay──> pending in that group again, there
                                                     │                        └─ acknowledged: gone
                                                     └─drop: gone               └─ five more times in vain: dead again

An entry of `dead:{s3}:amap` is written in one MULTI with the XACK that takes it off the group, on condition that it is
still pending and that nobody has written a dead letter of this queue meanwhile: so it dies once, whoever sees it die.
Its own id says when; the id of the push cannot be used for that, for pushes do not die in the order of their ids.

A replay hands the dead letter itself to the group (as a pending entry that nobody works on), not a copy in the queue:
nothing may be written there but what the log has caused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgpack
import redis

from flows.log import LogId, format_id, parse_id

READ_COUNT = 100
"""Dead letters of one read: up to 30 KB each."""
REPLAYED = "replayed"
"""Consumer that a replayed dead letter belongs to until a real one claims it."""
REPLAY_IDLE_MS = 30 * 24 * 3_600_000
"""How long a replayed one has been idle, as the group sees it: longer than anybody waits with a claim."""


def dead_key(shard: int, partner: str) -> str:
    """The shard's dead letters of one partner."""
    return f"dead:{{s{shard}}}:{partner}"


def _dead_key_of(queue: str) -> str:
    return "dead" + queue.removeprefix("push")


@dataclass(frozen=True, slots=True)
class Corpse:
    """A pending entry to be buried."""

    queue: str
    entry_id: str
    group: str
    delivery_count: int
    reason: str


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One that lies there."""

    shard: int
    partner: str
    dead_id: LogId
    """When it died, by the server's clock, and its name among the shard's dead letters."""
    entry_id: LogId
    """Of the push in its queue."""
    group: str
    delivery_count: int
    reason: str
    fields: Mapping[bytes, bytes]
    """The queue entry as it was."""
    replayed: bool
    """Whether it waits for a consumer of its group."""

    @property
    def name(self) -> str:
        """Unique among the partner's dead letters: `3/1700000000000-0`."""
        return f"{self.shard}/{format_id(self.dead_id)}"


def bury(client: redis.Redis, corpse: Corpse) -> bool:
    """Move a pending entry to the dead letters; whether it was this call that did. May be repeated."""
    queue, entry_id, group = corpse.queue, corpse.entry_id, corpse.group
    dead = _dead_key_of(queue)
    while True:
        with client.pipeline(transaction=True) as transaction:
            pipeline = cast(Any, transaction)
            pipeline.watch(dead)
            # Whoever was faster has changed `dead`, or had done so before, and then it is not pending any more.
            if not pipeline.xpending_range(queue, group, entry_id, entry_id, 1):
                return False
            entries = pipeline.xrange(queue, entry_id, entry_id)
            pipeline.multi()
            if entries:
                pipeline.xadd(dead, _fields(corpse, entries[0][1]))
            pipeline.xack(queue, group, entry_id)  # also of an entry that was trimmed away
            try:
                pipeline.execute()
            except redis.WatchError:
                continue
            return bool(entries)


def _fields(corpse: Corpse, stored: Mapping[bytes, bytes]) -> dict[Any, Any]:
    return {
        "id": corpse.entry_id,
        "group": corpse.group,
        "deliveries": corpse.delivery_count,
        "reason": corpse.reason,
        "entry": msgpack.packb(list(stored.items())),
    }


def original(stored: Mapping[bytes, bytes]) -> tuple[LogId, dict[bytes, bytes]]:
    """Id and fields of the queue entry that a dead letter was."""
    return parse_id(stored[b"id"]), dict(msgpack.unpackb(stored[b"entry"]))


def put_back(client: redis.Redis, dead: str, group: str, dead_id: str) -> bool:
    """A replayed dead letter has failed again: it lies where it lay, and nobody gets it."""
    return bool(client.xack(dead, group, dead_id))


# --- for operators ----------------------------------------------------------------------------------------------------


def dead_letters(client: redis.Redis, partner: str, shard_count: int) -> list[DeadLetter]:
    """A partner's dead letters, by shard and the time of their death."""
    found: list[DeadLetter] = []
    for shard in range(shard_count):
        after: LogId | None = None
        while page := dead_letters_of_shard(client, partner, shard, READ_COUNT, after):
            found += page
            after = page[-1].dead_id
    return found


def dead_letters_of_shard(
    client: redis.Redis, partner: str, shard: int, count: int, after: LogId | None = None
) -> list[DeadLetter]:
    """At most `count` of one shard, by the time of their death, from behind `after` on."""
    first = "-" if after is None else f"({format_id(after)}"
    return _letters(client, partner, shard, first, "+", count)


def dead_letter(client: redis.Redis, partner: str, shard: int, dead_id: LogId) -> DeadLetter | None:
    """The one of this name, if it lies there."""
    found = _letters(client, partner, shard, format_id(dead_id), format_id(dead_id), 1)
    return found[0] if found else None


def _letters(client: redis.Redis, partner: str, shard: int, first: str, last: str, count: int) -> list[DeadLetter]:
    key = dead_key(shard, partner)
    entries = cast(list[Any], client.xrange(key, min=first, max=last, count=count))
    if not entries:
        return []
    waiting = _waiting(client, key)
    found: list[DeadLetter] = []
    for raw_id, stored in entries:
        entry_id, fields = original(stored)
        found.append(
            DeadLetter(
                shard,
                partner,
                parse_id(raw_id),
                entry_id,
                stored[b"group"].decode(),
                int(stored[b"deliveries"]),
                stored[b"reason"].decode(),
                fields,
                raw_id in waiting,
            )
        )
    return found


def _waiting(client: redis.Redis, key: str) -> set[bytes]:
    """Ids of a stream's dead letters that were replayed and have not been acknowledged yet."""
    waiting: set[bytes] = set()
    try:
        groups = cast(list[dict[str, Any]], cast(Any, client).xinfo_groups(key))
    except redis.ResponseError as error:
        if "no such key" in str(error):
            return waiting
        raise
    for group in groups:
        if group["pending"]:
            pending = cast(Any, client).xpending_range(key, group["name"], "-", "+", group["pending"])
            waiting |= {one["message_id"] for one in pending}
    return waiting


def replay(client: redis.Redis, letters: Iterable[DeadLetter]) -> int:
    """Give dead letters to the consumers of their groups once more; how many. They count deliveries from zero.

    A running consumer gets one within a tenth of its time to claim (6 s by default). Once acknowledged it is gone.
    """
    count = 0
    for letter in letters:
        key = dead_key(letter.shard, letter.partner)
        try:
            # From its end: nothing of it is new to the group.
            client.xgroup_create(key, letter.group, id="$")
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        claimed = client.xclaim(
            key,
            letter.group,
            REPLAYED,
            0,
            cast(Any, [format_id(letter.dead_id)]),
            idle=REPLAY_IDLE_MS,
            retrycount=0,
            force=True,
            justid=True,
        )
        count += len(cast(list[bytes], claimed))
    return count


def drop(client: redis.Redis, letters: Iterable[DeadLetter]) -> int:
    """Delete dead letters for ever; how many."""
    count = 0
    for letter in letters:
        key, dead_id = dead_key(letter.shard, letter.partner), format_id(letter.dead_id)
        with client.pipeline(transaction=True) as pipeline:
            pipeline.xack(key, letter.group, dead_id)
            pipeline.xdel(key, dead_id)
            count += cast(int, pipeline.execute()[1])
    return count
