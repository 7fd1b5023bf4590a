"""The loops of the join: pings meet the cover, a new ring meets the table.

The pings of a batch go through a few steps in blocks: hash their ids; guess their rows; compare; look closely, many
together, where that says so. What a step needs of memory is asked for a block earlier, in a loop that does nothing
else: a processor may have to translate an address before it goes on behind a prefetch, and overlaps that with other
prefetches only if they stand close together.

The comparison is all there is for a phone that stayed inside its *stay box*: a rectangle around the *anchor* (where
the device was last looked at closely) in which neither its cell nor the answer of any ring it was not told about
can change. Half its sides, in 16e-7 degree: with r the clearance in metres,

    stay_lat = r / sqrt(2) / metres per unit        stay_lng = stay_lat / (cos(lat) + r / earth radius)

The box lies in the disc of radius r: a path of dlat and dlng is at most sqrt(dlat^2 + (cos_max * dlng)^2) long,
cos_max being the largest cosine of latitude on the way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from geoindex.cell_kernels import (
    BLOCK_POINTS,
    CELL,
    CELLS_PER_ZONE,
    CLEARANCE_M,
    EARTH_RADIUS_M,
    LAT_E7,
    LNG_E7,
    CellTables,
    PointBlock,
    X,
    Y,
    Z,
    at,
    locate_block,
    point_block,
    ring_clearance_m,
    unit_vector_e7,
)
from geoindex.columns import F64, I32, I64, U8, U16, U32, U64
from geoindex.device_kernels import (
    LOCATED,
    NO_CELL,
    NO_TIME,
    DeviceColumns,
    ask_for_candidates,
    candidate,
    copy_id_of,
    find,
    home_slot,
    insert,
)
from geoindex.kernels import hash_id
from geoindex.numba_typing import inline_kernel, kernel, lean_kernel, lowest_bit, prefetch

if TYPE_CHECKING:
    from geoindex.alerts import AlertColumns

STAY_UNIT_E7 = 16
STAY_MAX = 65535
STAY_UNIT_M = math.radians(STAY_UNIT_E7 * 1e-7) * EARTH_RADIUS_M
ROOT_HALF = math.sqrt(0.5)
POLE_COSINE = 1e-12
"""Keeps the division finite at the poles; a larger divisor makes a smaller box."""
BLOCK_PINGS = 64
"""Pings that go through a step together: what they need of memory is asked for in a loop that does nothing else."""
IDS_AHEAD_PINGS = 2 * BLOCK_PINGS
"""Ids are asked for so long before they are hashed: they come from memory, and the processor alone asks too late."""
LINE_BYTES = 64
RING_PINGS = 256
"""Of the ring that notes hashes and guesses: a power of two that holds three blocks."""
RING_MASK = RING_PINGS - 1
SCAN_ROWS = 1024
"""Of a scan, taken together."""
SLOW_PINGS = BLOCK_POINTS
"""Looked at closely together, so that what they need overlaps."""

# Indices into the counts of `apply_pings`.
ACCEPTED = 0
FROM_THE_FUTURE = 1
TOO_OLD = 2
HITS = 3
SLOW = 4
PING_COUNTS = 5
"""Behind them the accepted ones by partner: the ping's partner is at hand, and the sum waits for no memory."""


@lean_kernel
def mark_zones(zone_row: U32, zone_mask: U64, ranges: U32, kind: int, slot: int, covered: bool, rows_used: int) -> int:
    """Set or clear one alert's bit in every zone of `ranges` u32[n, 2]; returns the rows of `zone_mask` in use."""
    word = slot // 64
    mask = np.uint64(1) << np.uint64(slot % 64)
    for index in range(len(ranges)):
        for zone in range(ranges[index, 0], ranges[index, 1]):
            if zone_row[zone] == 0:
                zone_row[zone] = rows_used
                rows_used += 1
            row = zone_row[zone]
            if covered:
                zone_mask[row, kind, word] |= mask
            else:
                zone_mask[row, kind, word] &= ~mask
    return rows_used


class PingScratch(NamedTuple):
    """What `apply_pings` notes of pings that are under way: rings by position, and the pings that wait for a look."""

    fingerprint_a: U64
    fingerprint_b: U64
    guess: I64
    slow_ping: I64
    slow_row: I64
    slow_place: PointBlock
    stay_lat: F64
    stay_lng: F64


def ping_scratch() -> PingScratch:
    """Arrays for `apply_pings`, whose kernel allocates nothing."""
    return PingScratch(
        fingerprint_a=np.empty(RING_PINGS, np.uint64),
        fingerprint_b=np.empty(RING_PINGS, np.uint64),
        guess=np.empty(RING_PINGS, np.int64),
        slow_ping=np.empty(SLOW_PINGS, np.int64),
        slow_row=np.empty(SLOW_PINGS, np.int64),
        slow_place=point_block(),
        stay_lat=np.empty(SLOW_PINGS),
        stay_lng=np.empty(SLOW_PINGS),
    )


@inline_kernel
def chord2(x: float, y: float, z: float, centre: Any, slot: int) -> float:
    """Squared chord between a unit vector and an alert's location."""
    dx = x - centre[slot, 0]
    dy = y - centre[slot, 1]
    dz = z - centre[slot, 2]
    return dx * dx + dy * dy + dz * dz


@inline_kernel
def meet_rings(
    table: DeviceColumns,
    alerts: AlertColumns,
    row: int,
    points: PointBlock,
    place: int,
    hit_row: U32,
    hit_slot: U32,
    hits: int,
) -> int:
    """Every ring that a device meets for the first time, appended as hits; each marks the device as told.

    points, place: which of the located points is the device's location. Its clearance becomes that of the rings as
    well, of which it was not told. Returns the new number of hits.
    """
    cell = points.whole[at(CELL + place)]
    if table.cell[row] != cell:
        table.cell[row] = cell
    mask_row = alerts.zone_row[cell // CELLS_PER_ZONE]
    if mask_row == 0:
        return hits
    partner = table.records[row].partner
    for word in range(alerts.audience.shape[1]):
        open_to = alerts.audience[partner, word] & ~table.told[row, word]
        told = alerts.zone_mask[mask_row, 0, word] & open_to
        rest = alerts.zone_mask[mask_row, 1, word] & open_to
        while rest != 0:
            bit = lowest_bit(rest)
            mask = np.uint64(1) << np.uint64(bit)
            rest ^= mask
            slot = word * 64 + bit
            distance2 = chord2(
                points.real[at(X + place)], points.real[at(Y + place)], points.real[at(Z + place)], alerts.centre, slot
            )
            if distance2 <= alerts.chord2_max[slot]:
                told |= mask
            else:
                points.real[at(CLEARANCE_M + place)] = min(
                    points.real[at(CLEARANCE_M + place)], ring_clearance_m(distance2, alerts.chord2_max[slot])
                )
        if told != 0:
            table.told[row, word] |= told
            while told != 0:
                bit = lowest_bit(told)
                told ^= np.uint64(1) << np.uint64(bit)
                hit_row[hits] = row
                hit_slot[hits] = word * 64 + bit
                hits += 1
    return hits


@lean_kernel
def find_stay_boxes(points: PointBlock, stay_lat: F64, stay_lng: F64) -> None:
    """Half the sides of the stay boxes of all points, in units of 16e-7 degree, at most `STAY_MAX`."""
    real = points.real
    for place in range(SLOW_PINGS):
        x, y = real[at(X + place)], real[at(Y + place)]
        clearance_m = real[at(CLEARANCE_M + place)]
        lat = clearance_m * (ROOT_HALF / STAY_UNIT_M)
        lng = lat / (math.sqrt(x * x + y * y) + clearance_m * (1.0 / EARTH_RADIUS_M) + POLE_COSINE)
        stay_lat[at(place)] = min(lat, STAY_MAX)
        stay_lng[at(place)] = min(lng, STAY_MAX)


@inline_kernel
def stays(record: Any, lat_e7: np.int32, lng_e7: np.int32) -> bool:
    """Does this location lie in the device's stay box? An empty box holds nothing, not even the anchor."""
    return (
        abs(np.int64(lat_e7) - record.anchor_lat_e7) < np.int64(record.stay_lat) * STAY_UNIT_E7
        and abs(np.int64(lng_e7) - record.anchor_lng_e7) < np.int64(record.stay_lng) * STAY_UNIT_E7
    )


@inline_kernel
def place_ping(table: DeviceColumns, row: int, observed: int, lat_e7: np.int32, lng_e7: np.int32) -> None:
    """Rule 1: the location is that of the largest `observed_at`, on a tie that of the later ping."""
    record = table.records[row]
    if observed >= record.observed_at_ms:
        if record.observed_at_ms == NO_TIME:
            table.counts[LOCATED] += 1
        record.observed_at_ms = observed
        record.lat_e7 = lat_e7
        record.lng_e7 = lng_e7


@inline_kernel
def look_closely(
    table: DeviceColumns,
    alerts: AlertColumns,
    tables: CellTables,
    secrets: U64,
    partner: U16,
    id_bytes: U8,
    id_end: U32,
    lat_e7: I32,
    lng_e7: I32,
    observed_at_ms: I64,
    scratch: PingScratch,
    slow: int,
    hit_row: U32,
    hit_slot: U32,
    hit_ping: U32,
    hits: int,
) -> int:
    """Place and settle the `slow` pings that wait in `scratch`, in order. Returns the new number of hits."""
    slow_row = scratch.slow_row
    points = scratch.slow_place
    zone_row = alerts.zone_row
    records = table.records
    for place in range(slow):
        if slow_row[at(place)] >= 0:
            prefetch(table.cell, slow_row[at(place)])
            prefetch(table.told, slow_row[at(place)])
    # Where is each device then? Where its ping says, or, if that was late, where it was.
    for place in range(slow):
        ping = scratch.slow_ping[at(place)]
        row = slow_row[at(place)]
        if row < 0:
            # A device that was unknown when its ping was compared; by now an earlier ping may have made it known.
            start = np.int64(id_end[ping - 1]) if ping > 0 else np.int64(0)
            end = np.int64(id_end[ping])
            a, b = hash_id(id_bytes, start, end, partner[ping], secrets)
            row = find(table.index, records, a, b)
            if row < 0:
                row = insert(table, a, b, partner[ping], id_bytes, start, end)
            slow_row[at(place)] = row
        place_ping(table, row, observed_at_ms[ping], lat_e7[ping], lng_e7[ping])
        record = records[at(row)]
        record.waiting = 0
        points.whole[at(LAT_E7 + place)] = record.lat_e7
        points.whole[at(LNG_E7 + place)] = record.lng_e7
    locate_block(points, slow, tables)
    for place in range(slow):
        prefetch(zone_row, points.whole[at(CELL + place)] // CELLS_PER_ZONE)
    for place in range(slow):
        prefetch(alerts.zone_mask, zone_row[at(points.whole[at(CELL + place)] // CELLS_PER_ZONE)])
    for place in range(slow):
        found = meet_rings(table, alerts, slow_row[at(place)], points, place, hit_row, hit_slot, hits)
        while hits < found:
            hit_ping[hits] = scratch.slow_ping[at(place)]
            hits += 1
    find_stay_boxes(points, scratch.stay_lat, scratch.stay_lng)
    for place in range(slow):
        record = records[at(slow_row[at(place)])]
        record.anchor_lat_e7 = points.whole[at(LAT_E7 + place)]
        record.anchor_lng_e7 = points.whole[at(LNG_E7 + place)]
        record.stay_lat = np.uint16(scratch.stay_lat[at(place)])
        record.stay_lng = np.uint16(scratch.stay_lng[at(place)])
    return hits


@inline_kernel
def _counted(counts: I64, hits: int, first: int, stop: int, refused_before: int) -> int:
    """The counts of pings `first` to `stop`, which are done: what was not refused was accepted. Returns `stop`."""
    counts[HITS] = hits
    counts[ACCEPTED] += stop - first - (counts[FROM_THE_FUTURE] + counts[TOO_OLD] - refused_before)
    return stop


@lean_kernel
def apply_pings(
    table: DeviceColumns,
    alerts: AlertColumns,
    tables: CellTables,
    secrets: U64,
    partner: U16,
    id_bytes: U8,
    id_end: U32,
    lat_e7: I32,
    lng_e7: I32,
    observed_at_ms: I64,
    at_ms: I64,
    at_step: int,
    first: int,
    stop: int,
    live_window_ms: int,
    future_tolerance_ms: int,
    hit_row: U32,
    hit_slot: U32,
    hit_ping: U32,
    counts: I64,
    scratch: PingScratch,
) -> int:
    """Apply the pings `first` to `stop` in order, until they are done or the hits might not fit any more.

    at_ms, at_step: the shard clock of ping i is `at_ms[i * at_step]`. No alert event, growth or sweep is due within.
    hit_row, hit_slot, hit_ping: matches, in order: device row, alert slot, position of the ping; counts[HITS] of them.
    There must be room for SLOW_PINGS pings that meet every alert, besides the counts[HITS] that are there already.
    counts: i64[PING_COUNTS + partners], added to; the last ones: accepted, by partner.
    Returns the position of the first ping not applied.
    """
    hits = counts[HITS]
    slots = alerts.audience.shape[1] * 64
    fingerprint_a = scratch.fingerprint_a
    fingerprint_b = scratch.fingerprint_b
    guess = scratch.guess
    slow_ping = scratch.slow_ping
    slow_row = scratch.slow_row
    index = table.index
    records = table.records
    refused = counts[FROM_THE_FUTURE] + counts[TOO_OLD]
    slow = 0
    hash_start = np.int64(id_end[first - 1]) if first > 0 else np.int64(0)
    for block in range(first - 2 * BLOCK_PINGS, stop, BLOCK_PINGS):
        # 1. Compare the fingerprints of this block. Where a guess was wrong, ask for every record that may be right.
        for ping in range(max(block, first), min(block + BLOCK_PINGS, stop)):
            row = guess[at(ping & RING_MASK)]
            if row >= 0:
                a = fingerprint_a[at(ping & RING_MASK)]
                b = fingerprint_b[at(ping & RING_MASK)]
                if records[at(row)].fingerprint_a != a or records[at(row)].fingerprint_b != b:
                    guess[at(ping & RING_MASK)] = -1
                    ask_for_candidates(index, records, a)
        # 2. Ask for the ids of a block that comes later; hash those of the block after the next, and ask for their
        #    index lines.
        hash_first = block + 2 * BLOCK_PINGS
        hash_stop = min(hash_first + BLOCK_PINGS, stop)
        ask_first = hash_first + IDS_AHEAD_PINGS
        ask_stop = min(ask_first + BLOCK_PINGS, stop)
        if ask_first < ask_stop:
            for byte in range(np.int64(id_end[at(ask_first)]), np.int64(id_end[at(ask_stop - 1)]), LINE_BYTES):
                prefetch(id_bytes, byte)
        for ping in range(hash_first, hash_stop):
            end = np.int64(id_end[at(ping)])
            a, b = hash_id(id_bytes, hash_start, end, partner[at(ping)], secrets)
            fingerprint_a[at(ping & RING_MASK)] = a
            fingerprint_b[at(ping & RING_MASK)] = b
            hash_start = end
        for ping in range(hash_first, hash_stop):
            prefetch(index, home_slot(fingerprint_a[at(ping & RING_MASK)], len(index)))
        # 3. Guess the rows of the next block, and ask for their records.
        guess_first = max(block + BLOCK_PINGS, first)
        guess_stop = min(block + 2 * BLOCK_PINGS, stop)
        for ping in range(guess_first, guess_stop):
            guess[at(ping & RING_MASK)] = candidate(index, fingerprint_a[at(ping & RING_MASK)])
        for ping in range(guess_first, guess_stop):
            if guess[at(ping & RING_MASK)] >= 0:
                prefetch(records, guess[at(ping & RING_MASK)])
        # 4. The pings of this block. One that stays in its box is done here; the others, with all later ones of
        #    their devices, wait for a close look, in order.
        for ping in range(max(block, first), min(block + BLOCK_PINGS, stop)):
            now_ms = at_ms[at(ping * at_step)]
            observed = observed_at_ms[at(ping)]
            if observed > now_ms + future_tolerance_ms:
                counts[FROM_THE_FUTURE] += 1
                continue
            if observed < now_ms - live_window_ms:
                counts[TOO_OLD] += 1
                continue
            counts[at(PING_COUNTS + partner[at(ping)])] += 1
            row = guess[at(ping & RING_MASK)]
            if row < 0:
                row = find(index, records, fingerprint_a[at(ping & RING_MASK)], fingerprint_b[at(ping & RING_MASK)])
            if row >= 0:
                record = records[at(row)]
                if record.waiting == 0:
                    if observed >= record.observed_at_ms:
                        if stays(record, lat_e7[at(ping)], lng_e7[at(ping)]):
                            record.observed_at_ms = observed
                            record.lat_e7 = lat_e7[at(ping)]
                            record.lng_e7 = lng_e7[at(ping)]
                            continue
                    elif record.stay_lat != 0 and record.stay_lng != 0:
                        # A late ping moves nothing, and nothing has changed for this device since it was settled.
                        continue
                record.waiting = 1
            slow_ping[at(slow)] = ping
            slow_row[at(slow)] = row
            slow += 1
            if slow == SLOW_PINGS:
                hits = look_closely(
                    table, alerts, tables, secrets, partner, id_bytes, id_end, lat_e7, lng_e7, observed_at_ms,
                    scratch, slow, hit_row, hit_slot, hit_ping, hits,
                )  # fmt: skip
                counts[SLOW] += slow
                slow = 0
                if hits + SLOW_PINGS * slots > len(hit_row):
                    return _counted(counts, hits, first, ping + 1, refused)
    hits = look_closely(
        table, alerts, tables, secrets, partner, id_bytes, id_end, lat_e7, lng_e7, observed_at_ms,
        scratch, slow, hit_row, hit_slot, hit_ping, hits,
    )  # fmt: skip
    counts[SLOW] += slow
    return _counted(counts, hits, first, stop, refused)


@lean_kernel
def scan_ring(
    table: DeviceColumns,
    alerts: AlertColumns,
    tables: CellTables,
    slot: int,
    live_from_ms: int,
    first: int,
    stop: int,
    hit_row: U32,
) -> int:
    """A ring that is new or has grown meets the rows `first` to `stop` of the table; several calls may share them out.

    hit_row: rows newly inside, ascending; has room for `stop - first`. Returns how many.

    Live devices of the audience that were not told and are inside are marked as told. For every other device in the
    cover that was not told, the stay box is emptied: its next ping is looked at closely.
    """
    word = slot // 64
    mask = np.uint64(1) << np.uint64(slot % 64)
    zone_row, zone_mask = alerts.zone_row, alerts.zone_mask
    cells = table.cell
    told = table.told
    records = table.records
    hits = 0
    for start in range(first, stop, SCAN_ROWS):
        # Rows in the cover first: they stand far apart, and what is asked of one overlaps with the others. They wait
        # where their hits will stand, for which there is always room.
        covered = hits
        for row in range(start, min(start + SCAN_ROWS, stop)):
            cell = cells[at(row)]
            if cell != NO_CELL:
                mask_row = zone_row[at(cell // CELLS_PER_ZONE)]
                if mask_row != 0 and (zone_mask[mask_row, 0, word] | zone_mask[mask_row, 1, word]) & mask != 0:
                    prefetch(told, row)
                    hit_row[at(covered)] = row
                    covered += 1
        untold = hits
        for place in range(hits, covered):
            row = at(hit_row[at(place)])
            if told[row, word] & mask == 0:
                prefetch(records, row)
                hit_row[at(untold)] = row
                untold += 1
        for place in range(hits, untold):
            row = at(hit_row[at(place)])
            record = records[row]
            if alerts.audience[record.partner, word] & mask == 0:
                continue
            if record.observed_at_ms >= live_from_ms:
                inside = zone_mask[zone_row[at(cells[row] // CELLS_PER_ZONE)], 0, word] & mask != 0
                if not inside:
                    x, y, z = unit_vector_e7(record.lat_e7, record.lng_e7, tables)
                    inside = chord2(x, y, z, alerts.centre, slot) <= alerts.chord2_max[slot]
                if inside:
                    told[row, word] |= mask
                    hit_row[at(hits)] = row
                    hits += 1
                    continue
            record.stay_lat = 0
            record.stay_lng = 0
    return hits


@kernel
def group_hits(
    table: DeviceColumns,
    hit_row: U32,
    hit_slot: U32,
    hit_ping: U32,
    at_ms: I64,
    at_step: int,
    push_ids_max: int,
    alert: U32,
    partner: U16,
    push_at_ms: I64,
    id_stop: U32,
    id_bytes: U8,
    id_end: U32,
) -> int:
    """Hits of pings, in the pings' order -> columns of pushes (`columns.PushColumns`); returns how many pushes.

    By moment, alert slot and partner, within these in the pings' order, at most `push_ids_max` ids each. Every output
    column has room for `len(hit_row)`, at least 1; `id_bytes` for 64 times as many.
    """
    hits = len(hit_row)
    records = table.records
    keys = np.empty(hits, np.int64)
    moment = 0
    for hit in range(hits):
        # Moments never run backwards: their number orders them. Slots and partners have 16 bits each at most.
        if hit > 0 and at_ms[np.int64(hit_ping[hit]) * at_step] != at_ms[np.int64(hit_ping[hit - 1]) * at_step]:
            moment += 1
        keys[hit] = (moment << 32) | (np.int64(hit_slot[hit]) << 16) | np.int64(records[hit_row[hit]].partner)
    order = np.argsort(keys, kind="mergesort")
    pushes = 0
    in_push = push_ids_max
    byte = 0
    for place in range(hits):
        hit = order[place]
        if in_push == push_ids_max or keys[hit] != keys[order[place - 1]]:
            alert[pushes] = hit_slot[hit]
            partner[pushes] = records[hit_row[hit]].partner
            push_at_ms[pushes] = at_ms[np.int64(hit_ping[hit]) * at_step]
            pushes += 1
            in_push = 0
        in_push += 1
        byte = copy_id_of(records, table.heap, hit_row[hit], id_bytes, byte)
        id_end[place] = byte
        id_stop[pushes - 1] = place + 1
    return pushes
