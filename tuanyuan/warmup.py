"""One small run through every kernel, so that Numba compiles and caches them all before they are needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flows.file_clock import NO_CLOCK, clock_of_arrivals, clock_of_observations
from flows.log import RawEntry
from flows.match import Entry, decode, step
from flows.push_commands import PushCommands
from flows.wire import encode_entry, encode_pings, slice_pings, split_by_shard
from gateway import intake
from geoindex.cells import cell_centers
from geoindex.columns import PingBatch
from geoindex.entries import DEFAULT_SCHEDULE, HOUR_MS, Alert, AlertClose, AlertRevision, LogEntry, Settings, Tick
from geoindex.figure_kernels import add_pushed
from geoindex.phones import PhoneCounts
from geoindex.shard import ShardMachine
from loadtest.world import World

_NOW_MS = 1_700_000_000_000


def run_every_kernel() -> None:
    """Recorded and live batches, an alert from publish to close, a sweep: what every process will do later."""
    world = World(1, 500)
    world.home_places(np.zeros(1, np.uint32))
    world.positions()
    settings = Settings(shard_count=1, partners=world.partner_names)
    machine = ShardMachine()
    place = world.densest_place()
    alert = Alert("warm-up", 1, place.lat, place.lng, _NOW_MS, DEFAULT_SCHEDULE, _NOW_MS + 72 * HOUR_MS)
    live = world.batch(500, _NOW_MS)
    (recorded,) = split_by_shard(_recorded(world.batch(500, _NOW_MS + 1)), settings)
    assert recorded is not None
    entries: list[LogEntry] = [
        settings,
        next(iter(world.first_sight(_NOW_MS, 500))),
        live,
        AlertRevision("publish", alert, (1, 0)),
        # Phones that were never seen before meet the ring by their pings; one ping that is none is left out.
        World(2, 500).batch(500, _NOW_MS + 1),
        _with_a_bad_row(World(3, 500).batch(500, _NOW_MS + 1)),
        recorded,
        Tick(),
        AlertRevision("update", _revised(alert), (2, 0)),
        AlertClose("warm-up", None, "found", (3, 0)),
        Tick(),
    ]
    times_ms = [
        0,
        *(_NOW_MS + step_ms for step_ms in (0, 0, 1, 1, 1, 2, 2 * HOUR_MS, 3 * HOUR_MS, 3 * HOUR_MS, 20 * HOUR_MS)),
    ]
    for seq, (at_ms, entry) in enumerate(zip(times_ms, entries, strict=True)):
        kind, payload = encode_entry(entry)
        decoded = decode(RawEntry(0, at_ms, seq, kind, payload, ""))
        assert isinstance(decoded, Entry)
        caused = step(machine, decoded)
        _count(machine)
        numbers = np.zeros(len(caused.partners), np.int64)
        PushCommands(0).add((at_ms, seq), caused.pushes.segments, caused.partners, numbers)
    # What a sender does, with columns of its own: Numba tells them from those that were decoded.
    two_shards = replace(settings, shard_count=2)
    for batch in (live, _recorded(live)):
        for part in split_by_shard(batch, two_shards):
            assert part is not None
            encode_pings(slice_pings(part, 1, len(part)))
    intake.run_every_kernel()
    at_ms_column = np.empty(1, np.int64)
    accepted = np.empty(1, np.bool_)
    one = np.zeros(1, np.int64)
    cell_centers(np.zeros(1, np.uint32))  # as the gateway asks
    clock_of_arrivals(one, one, NO_CLOCK, 1, at_ms_column, accepted)
    clock_of_observations(one, 1, NO_CLOCK, 1, at_ms_column, accepted)


def _count(machine: ShardMachine) -> None:
    """What a flow counts besides (`flows.figures`)."""
    phones = PhoneCounts(places=2)  # so that it grows
    phones.add_rows(machine.device_table, 0, machine.device_table.row_count, 0)
    machine.told_counts()
    nothing = np.zeros(0, np.uint32)
    add_pushed(nothing, np.zeros(0, np.uint16), nothing, np.zeros((1, 1), np.int64))


def _recorded(batch: PingBatch) -> PingBatch:
    at_ms = np.full(len(batch), _NOW_MS + 2, np.int64)
    return PingBatch(
        batch.partner, batch.id_bytes, batch.id_end, batch.lat_e7, batch.lng_e7, batch.observed_at_ms, at_ms
    )


def _with_a_bad_row(batch: PingBatch) -> PingBatch:
    lat_e7 = batch.lat_e7.copy()
    lat_e7[0] = 910_000_000
    return replace(batch, lat_e7=lat_e7)


def _revised(alert: Alert) -> Alert:
    return Alert(alert.alert_id, 2, alert.lat, alert.lng, alert.missing_since_ms, alert.schedule, alert.expires_at_ms)
