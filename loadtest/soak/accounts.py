"""The accounts at the end: what stands in the queues, held against two other answers to the same question.

The first: what a fresh machine makes of each log from its first entry on must stand in the queues, entry by entry and
id by id. The second: `flows.audit`, which knows nothing of machines, finds nothing missed, extra or doubled. Besides:
nobody who was alerted is left without the end of a closed alert, and what was acknowledged to an officer is there.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from flows.audit import OwedPush, OwedPushes, compare
from flows.log import RawEntry, format_id, parse_id, push_key
from flows.match import Entry, decode, step
from flows.push_commands import push_id
from flows.wire import MalformedEntry, PingColumns, decode_entry, decode_push, encode_push, screen_pings
from geoindex.entries import AlertClose, AlertRevision, Settings
from geoindex.shard import ShardMachine

ALERT_KINDS = (b"publish", b"update", b"close")
StreamEntries = list[tuple[bytes, dict[bytes, bytes]]]
"""Ids and fields, as the server gives them."""


@dataclass(frozen=True, slots=True)
class Account:
    """What the queues hold beside what was owed. All but `pushes` must be 0."""

    pushes: int
    missed: int
    extra: int
    duplicate: int
    unretracted: int
    """Devices that were sent the `alert` of a closed alert and not its `resolved`."""
    differing: int
    """Queue entries that are not, id by id and byte by byte, what a replay of the whole log gives."""
    examples: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        return not (self.missed or self.extra or self.duplicate or self.unretracted or self.differing)

    def line(self) -> str:
        return (
            f"{self.pushes:,} pushes, {self.missed} missed, {self.extra} extra, {self.duplicate} duplicate, "
            f"{self.unretracted} unretracted, {self.differing} entries differing"
        )


def account(logs: dict[int, StreamEntries], queues: dict[str, StreamEntries], partners: Sequence[str]) -> Account:
    """`logs` from their first entries on, by shard; `queues` by key."""
    told = told_in(queues)
    found = compare(owed_by(logs), told)
    unretracted = _unretracted(told, {alert_id for entries in logs.values() for alert_id in closed_in(entries)})
    replayed = queues_of(logs, partners)
    differing = sum(
        len(set(map(_frozen, replayed.get(key, []))) ^ set(map(_frozen, queues.get(key, []))))
        for key in replayed.keys() | queues.keys()
    )
    examples = [f"missed: {push}" for push in found.missed[:3]] + [f"extra: {push}" for push in found.extra[:3]]
    examples += [f"duplicate: {push}" for push in found.duplicate[:3]]
    examples += [f"unretracted: {device}" for device in sorted(unretracted)[:3]]
    return Account(
        found.pushes,
        len(found.missed),
        len(found.extra),
        len(found.duplicate),
        len(unretracted),
        differing,
        tuple(examples),
    )


def owed_by(logs: dict[int, StreamEntries]) -> list[OwedPush]:
    """What the logs owe, by `flows.audit`; malformed entries owe nothing."""
    pushes: list[OwedPush] = []
    for entries in logs.values():
        audit = OwedPushes()
        partner_count = 0
        for raw_id, fields in entries:
            try:
                ((kind, payload),) = fields.items()
                entry = decode_entry(kind, payload)
            except ValueError:
                continue
            if isinstance(entry, Settings):
                partner_count = len(entry.partners)
            if isinstance(entry, PingColumns):
                entry, _ = screen_pings(entry, partner_count)
            audit.apply(parse_id(raw_id)[0], entry)
        pushes += audit.pushes
    return pushes


def closed_in(entries: StreamEntries) -> set[str]:
    """Ids of the alerts that are closed somewhere in a log."""
    return {event.alert_id for event in alert_events(entries) if isinstance(event, AlertClose)}


def alert_events(entries: StreamEntries) -> Iterator[AlertRevision | AlertClose]:
    """The alert events of a log, in order."""
    for _, fields in entries:
        for kind, payload in fields.items():
            with contextlib.suppress(MalformedEntry):
                event = decode_entry(kind, payload) if kind in ALERT_KINDS else None
                if isinstance(event, AlertRevision | AlertClose):
                    yield event


def told_in(queues: dict[str, StreamEntries]) -> list[OwedPush]:
    """What the queues hold, device by device."""
    told: list[OwedPush] = []
    for key, entries in queues.items():
        partner = key.rpartition(":")[2]
        for _, fields in entries:
            push = decode_push(next(iter(fields.values())))
            told += [
                OwedPush(push.kind, push.alert_id, push.revision, partner, device_id) for device_id in push.device_ids
            ]
    return told


def queues_of(logs: dict[int, StreamEntries], partners: Sequence[str]) -> dict[str, StreamEntries]:
    """What one machine a shard, fed from the first entry to the last, puts into the queues of these partners."""
    queues: dict[str, StreamEntries] = {push_key(shard, partner): [] for shard in logs for partner in partners}
    for shard, entries in logs.items():
        machine = ShardMachine()
        for raw_id, fields in entries:
            kind, payload = next(iter(fields.items())) if len(fields) == 1 else (b"", b"")
            log_id = parse_id(raw_id)
            entry = decode(RawEntry(shard, *log_id, kind, payload, ""))
            assert isinstance(entry, Entry)
            numbers: dict[str, int] = defaultdict(int)
            for push in step(machine, entry).pushes:
                key = push_key(shard, partners[push.partner])
                numbers[key] += 1
                entry_id = format_id(push_id(log_id, numbers[key])).encode()
                queues[key].append((entry_id, {push.kind.encode(): encode_push(push)}))
    return queues


def _unretracted(told: Iterable[OwedPush], closed: set[str]) -> set[tuple[str, str, str]]:
    """(alert, partner, device) that heard of a closed alert and not of its end."""
    alerted: set[tuple[str, str, str]] = set()
    resolved: set[tuple[str, str, str]] = set()
    for push in told:
        device = push.alert_id, push.partner, push.device_id
        if push.kind == "alert" and push.alert_id in closed:
            alerted.add(device)
        elif push.kind == "resolved":
            resolved.add(device)
    return alerted - resolved


def _frozen(entry: tuple[bytes, dict[bytes, bytes]]) -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    return entry[0], tuple(entry[1].items())
