"""Handing pushes over by HTTP: names of queue entries, acknowledging them, and counting what was handed over.

    push:{s3}:amap ──take──> delivered ──acknowledge──> off the group's list, and counted in handed:{s3}, in one script
    dead:{s3}:amap ──replayed ─^              └─ a dead letter that was replayed is deleted as well

Long polls and webhooks are two ways to the same consumer group: a push is handed over once, whichever way its partner
has chosen, and who changes the way neither loses nor repeats what is on it. A group of their own for webhooks would
keep every queue for the way that is no longer used, and count a push twice.

`handed:{s3}` counts devices by alert, partner, kind of push and what happened to it. It has the shard's tag, not the
desk's, because only then one script can acknowledge and count on a cluster; whoever asks adds the shards up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgpack
import redis

from flows.consumers import Delivery
from flows.dead_letters import dead_key
from flows.log import LogId, format_id, push_key
from geoindex.entries import KINDS

GROUP = "api"
"""The consumer group behind long polls and webhooks."""
ACKNOWLEDGED_AT_ONCE = 50
"""Entries of one script: the server does nothing else meanwhile."""
DELIVERED, ACKNOWLEDGED = "delivered", "acknowledged"
_NAME = re.compile(r"s(0|[1-9][0-9]{0,4}):p(0|[1-9][0-9]{0,4}):(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})")
ENTRY_NAME_PATTERN = f"^{_NAME.pattern}$"

# An entry that is on the group's list is taken off and counted; one that is not may be a dead letter that was replayed.
# Counting must also work while the server is full, or the queues that fill it could not be emptied.
_ACKNOWLEDGE = """#!lua flags=allow-oom
local queue, dead, handed = KEYS[1], KEYS[2], KEYS[3]
local group, partner = ARGV[1], ARGV[2]
local replayed = nil

local function replayed_letters()
  local letters = {}
  local pending = redis.pcall('XPENDING', dead, group, '-', '+', 1000)
  if pending.err then return letters end
  for _, one in ipairs(pending) do
    local found = redis.call('XRANGE', dead, one[1], one[1])
    if found[1] then
      local fields = found[1][2]
      local letter = {}
      for at = 1, #fields, 2 do letter[fields[at]] = fields[at + 1] end
      letters[letter['id']] = {one[1], letter['entry']}
    end
  end
  return letters
end

-- msgpack binary at a position, and what follows it: the decoder here knows texts only.
local function binary(packed, at)
  local width, size = 2 ^ (packed:byte(at) - 0xc4), 0
  for index = at + 1, at + width do size = size * 256 + packed:byte(index) end
  return packed:sub(at + width + 1, at + width + size), at + width + size + 1
end

local function count(payload)
  local decoded, push = pcall(cmsgpack.unpack, payload)
  if not decoded or type(push) ~= 'table' then return end
  local name = cmsgpack.pack({push['alert_id'], partner, push['kind'], 'acknowledged'})
  redis.call('HINCRBY', handed, name, #push['device_ids'])
end

local answers = {}
for index = 3, #ARGV do
  local id = ARGV[index]
  local acknowledged = redis.call('XACK', queue, group, id)
  if acknowledged == 1 then
    local found = redis.call('XRANGE', queue, id, id)
    if found[1] then count(found[1][2][2]) end
  else
    if replayed == nil then replayed = replayed_letters() end
    local letter = replayed[id]
    if letter then
      acknowledged = redis.call('XACK', dead, group, letter[1])
      redis.call('XDEL', dead, letter[1])
      local _, at = binary(letter[2], 3)  -- one pair in one array: a field's name and its value
      count((binary(letter[2], at)))
      replayed[id] = nil
    end
  end
  answers[#answers + 1] = acknowledged
end
return answers
"""


@dataclass(frozen=True, slots=True, order=True)
class EntryName:
    """One queue entry, as partners and gateways name it: `s3:p0:1700000000000-16777217`."""

    shard: int
    partner_index: int
    """Of the settings' list, to which partners are only ever appended."""
    entry_id: LogId

    def __str__(self) -> str:
        return f"s{self.shard}:p{self.partner_index}:{format_id(self.entry_id)}"

    @classmethod
    def parse(cls, text: str) -> EntryName:
        """Raises ValueError."""
        found = _NAME.fullmatch(text)
        if found is None:
            raise ValueError(f"an entry's id must be like s3:p0:1700000000000-16777217, got {text[:80]!r}")
        shard, partner_index, ms, sequence = map(int, found.groups())
        return cls(shard, partner_index, (ms, sequence))


def shard_of(stream: str) -> int:
    """The shard of a queue, or of its dead letters."""
    return int(stream[stream.index("{s") + 2 : stream.index("}")])


def name_of(delivery: Delivery, partner_index: int) -> EntryName:
    """The name of an entry that was handed over; the same at every delivery."""
    return EntryName(shard_of(delivery.stream), partner_index, delivery.entry_id)


def acknowledge(client: redis.Redis, partner: str, names: Iterable[EntryName]) -> set[EntryName]:
    """Take entries of this partner's queues off the group's list, and count them; which of them were on it.

    The others were acknowledged before, or never handed over. `names`: shards must exist. Raises redis.RedisError.
    """
    by_shard: dict[int, list[EntryName]] = {}
    for name in dict.fromkeys(names):
        by_shard.setdefault(name.shard, []).append(name)
    found: set[EntryName] = set()
    script = client.register_script(_ACKNOWLEDGE)
    for shard, of_shard in by_shard.items():
        keys = [push_key(shard, partner), dead_key(shard, partner), handed_key(shard)]
        for start in range(0, len(of_shard), ACKNOWLEDGED_AT_ONCE):
            part = of_shard[start : start + ACKNOWLEDGED_AT_ONCE]
            answers = script(keys, [GROUP, partner, *(format_id(name.entry_id) for name in part)])
            found.update(name for name, answer in zip(part, cast(list[int], answers), strict=True) if answer)
    return found


_LEAVE = """
for _, key in ipairs(KEYS) do
  local consumers = redis.pcall('XINFO', 'CONSUMERS', key, ARGV[1])
  if not consumers.err then
    for _, flat in ipairs(consumers) do
      local consumer = {}
      for at = 1, #flat, 2 do consumer[flat[at]] = flat[at + 1] end
      if consumer['pending'] == 0 and (consumer['name'] == ARGV[2] or consumer['idle'] > tonumber(ARGV[3])) then
        redis.call('XGROUP', 'DELCONSUMER', key, ARGV[1], consumer['name'])
      end
    end
  end
end
"""
FORGOTTEN_MS = 24 * 3_600_000
"""A consumer that has nothing and has not asked for so long is the name of a process that died."""


def leave_group(client: redis.Redis, partner: str, shard_count: int, consumer: str) -> None:
    """Take a consumer's name off the group, where nothing is pending under it; and names that nobody uses any more."""
    script = client.register_script(_LEAVE)
    for shard in range(shard_count):
        script([push_key(shard, partner), dead_key(shard, partner)], [GROUP, consumer, FORGOTTEN_MS])


# --- what was handed over ---------------------------------------------------------------------------------------------


def handed_key(shard: int) -> str:
    """Hash: msgpack of [alert id, partner, kind, "delivered" or "acknowledged"] -> devices."""
    return f"handed:{{s{shard}}}"


@dataclass(frozen=True, slots=True)
class Handed:
    """Devices of one alert and partner by kind of push (`alert`, `update`, `resolved`)."""

    delivered: Mapping[str, int] = field(default_factory=dict)
    """Handed over at least once. May lack what a gateway handed over in the moment it died."""
    acknowledged: Mapping[str, int] = field(default_factory=dict)
    """Exact: counted with the acknowledgement, once for each entry."""


def count_delivered(client: redis.Redis, partner: str, deliveries: Iterable[Delivery]) -> None:
    """Count what is handed over for the first time."""
    counts: dict[tuple[int, bytes], int] = {}
    for delivery in deliveries:
        if delivery.delivery_count == 1 and delivery.dead_id is None:
            push = delivery.push
            key = shard_of(delivery.stream), handed_field(push.alert_id, partner, push.kind, DELIVERED)
            counts[key] = counts.get(key, 0) + len(push.device_ids)
    if not counts:
        return
    with client.pipeline(transaction=False) as pipeline:
        for (shard, name), count in counts.items():
            pipeline.hincrby(handed_key(shard), cast(Any, name), count)
        replies = pipeline.execute(raise_on_error=False)
    for reply in replies:
        # A server that is full does not count, but the pushes have to go out all the same.
        if isinstance(reply, Exception) and not isinstance(reply, redis.OutOfMemoryError):
            raise reply


def handed_over(client: redis.Redis, shard_count: int, alert_id: str, partners: Sequence[str]) -> dict[str, Handed]:
    """What was delivered and acknowledged of one alert, by partner. Raises redis.RedisError."""
    names = [(partner, kind, what) for partner in partners for kind in KINDS for what in (DELIVERED, ACKNOWLEDGED)]
    if not names:
        return {}
    fields = [handed_field(alert_id, *name) for name in names]
    with client.pipeline(transaction=False) as pipeline:
        for shard in range(shard_count):
            pipeline.hmget(handed_key(shard), cast(Any, fields))
        replies = cast(list[list[bytes | None]], pipeline.execute())
    sums = {name: sum(int(reply[index] or 0) for reply in replies) for index, name in enumerate(names)}
    handed: dict[str, Handed] = {}
    for partner in partners:
        acknowledged = {kind: sums[partner, kind, ACKNOWLEDGED] for kind in KINDS}
        # What was acknowledged had been delivered, whatever was counted then.
        delivered = {kind: max(sums[partner, kind, DELIVERED], acknowledged[kind]) for kind in KINDS}
        handed[partner] = Handed(delivered, acknowledged)
    return handed


def forget_handed(client: redis.Redis, shard_count: int, alert_id: str, partners: Sequence[str]) -> None:
    """Drop an alert's counts: some time after it was closed, when they are kept elsewhere."""
    fields = [
        handed_field(alert_id, partner, kind, what)
        for partner in partners
        for kind in KINDS
        for what in (DELIVERED, ACKNOWLEDGED)
    ]
    if fields:
        with client.pipeline(transaction=False) as pipeline:
            for shard in range(shard_count):
                pipeline.hdel(handed_key(shard), *cast(Any, fields))
            pipeline.execute()


def handed_field(alert_id: str, partner: str, kind: str, what: str) -> bytes:
    """The field of `handed_key`; `what`: DELIVERED or ACKNOWLEDGED."""
    return cast(bytes, msgpack.packb([alert_id, partner, kind, what]))
