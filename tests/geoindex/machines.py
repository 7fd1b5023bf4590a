"""Runs a log of single events through shard machines, cut into batches in any way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from geoindex.columns import LAT_E7_MAX, LNG_E7_MAX, PingBatch, pack_ids
from geoindex.entries import AlertClose, AlertRevision, LogEntry, Settings, Tick
from geoindex.kernels import shard_of_ids
from geoindex.shard import ShardMachine
from tests.reference.events import Event, PingEvent
from tests.reference.matcher import DevicePush

Cut = Callable[[], bool]
"""Asked before each ping that could join the batch before it: begin a new batch here?"""


def one_batch_a_ping() -> bool:
    return True


def batch_of(pings: list[PingEvent], partners: tuple[str, ...], at_ms: list[int] | None = None) -> PingBatch:
    id_bytes, id_end = pack_ids([ping.device_id for ping in pings])
    return PingBatch(
        partner=np.array([partners.index(ping.partner_name) for ping in pings], np.uint16),
        id_bytes=id_bytes,
        id_end=id_end,
        lat_e7=np.array([ping.lat_e7 for ping in pings], np.int32),
        lng_e7=np.array([ping.lng_e7 for ping in pings], np.int32),
        observed_at_ms=np.array([ping.observed_at_ms for ping in pings], np.int64),
        at_ms=None if at_ms is None else np.array(at_ms, np.int64),
    )


def is_well_formed(ping: PingEvent, partners: tuple[str, ...]) -> bool:
    """What the wire lets through to the machine."""
    return (
        1 <= len(ping.device_id.encode()) <= 64
        and abs(ping.lat_e7) <= LAT_E7_MAX
        and abs(ping.lng_e7) <= LNG_E7_MAX
        and ping.partner_name in partners
    )


def run_machines(
    settings: Settings,
    events: Sequence[tuple[int, Event]],
    *,
    shards: int = 1,
    cut: Cut = one_batch_a_ping,
    recorded: bool = False,
) -> list[DevicePush]:
    """Pushes of all shards. `recorded`: rows carry their own clock, so that a batch may span moments."""
    settings = replace(settings, shard_count=shards)
    machines = [ShardMachine() for _ in range(shards)]
    pushes: list[DevicePush] = []
    partners = settings.partners
    waiting: list[list[tuple[int, PingEvent]]] = [[] for _ in range(shards)]

    def apply(shard: int, at_ms: int, entry: LogEntry) -> None:
        for push in machines[shard].apply(at_ms, entry):
            pushes.extend(
                DevicePush(
                    push.at_ms, push.kind, push.alert_id, push.revision, partners[push.partner], name, push.ring_km
                )
                for name in push.device_ids()
            )

    def flush(shard: int) -> None:
        rows = waiting[shard]
        if rows:
            times_ms = [at_ms for at_ms, _ in rows]
            batch = batch_of([ping for _, ping in rows], partners, times_ms if recorded else None)
            apply(shard, times_ms[-1], batch)
            waiting[shard] = []

    for shard in range(shards):
        apply(shard, 0, settings)
    for at_ms, event in events:
        match event:
            case PingEvent():
                if not is_well_formed(event, partners):
                    # Its row is set aside before it reaches a machine; the rest of its entry, its time, does.
                    for shard in range(shards):
                        flush(shard)
                        apply(shard, at_ms, batch_of([], partners))
                    continue
                id_bytes, id_end = pack_ids([event.device_id])
                partner = np.array([partners.index(event.partner_name)], np.uint16)
                shard = int(shard_of_ids(partner, id_bytes, id_end, settings.hash_key, shards)[0])
                rows = waiting[shard]
                if rows and (cut() or (not recorded and rows[-1][0] != at_ms)):
                    flush(shard)
                waiting[shard].append((at_ms, event))
            case Settings() | AlertRevision() | AlertClose() | Tick():
                entry = replace(event, shard_count=shards) if isinstance(event, Settings) else event
                if isinstance(entry, Settings):
                    partners = entry.partners
                for shard in range(shards):
                    flush(shard)
                    apply(shard, at_ms, entry)
    for shard in range(shards):
        flush(shard)
        # As the reader of a silent log does: no shard is left behind the time that another one's entry has revealed.
        if events:
            apply(shard, events[-1][0], Tick())
    return pushes
