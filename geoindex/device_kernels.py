"""Loops over the device table: find, insert, wipe, free, gather.

    index      u32[lines * 16]  lines of 16 entries, one cache line each; 0: empty, else 5-bit tag << 27 | row + 1.
                              An entry stands in its home line, scaled(fingerprint, lines), or, where that is full,
                              in the next line that is not; within a line as near behind its home lane as there is
                              room
    records    RECORD[rows]   one cache line a device; `id_length` 0: the row is free
    cell       u32[rows]      dense cell number, NO_CELL where there is no location
    told       u64[rows, words]
    heap       u8             what exceeds 12 bytes of each id, in units of 4 bytes, with a free list a size
    free_rows  u32            stack of freed rows, `counts[FREE]` of them
    counts     i64            see the indices below

The layout of `index` and `heap` changes no output; which row a device has does (pushes go out in row order), so
rows are given and freed only where the log says so.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from geoindex.cell_kernels import at
from geoindex.columns import I64, U8, U32, U64
from geoindex.kernels import copy_id, scaled
from geoindex.numba_typing import inline_kernel, lanes_equal, lean_kernel, lowest_bit, prefetch

HEAD_BYTES = 12
"""Bytes of an id kept in its record."""
TAIL_UNIT_BYTES = 4
TAIL_UNITS_MAX = 13

RECORD = np.dtype(
    [
        ("fingerprint_a", "<u8"),
        ("fingerprint_b", "<u8"),
        ("observed_at_ms", "<i8"),
        ("lat_e7", "<i4"),
        ("lng_e7", "<i4"),
        ("anchor_lat_e7", "<i4"),
        ("anchor_lng_e7", "<i4"),
        ("stay_lat", "<u2"),
        ("stay_lng", "<u2"),
        ("partner", "<u2"),
        ("id_length", "u1"),
        ("waiting", "u1"),
        ("tail", "<u4"),
        ("head", "u1", (HEAD_BYTES,)),
    ],
    align=False,
)
assert RECORD.itemsize == 64, "a record is one cache line"

NO_TIME = np.iinfo(np.int64).min
"""`observed_at_ms` of a device without a location."""
NO_CELL = np.uint32(0xFFFFFFFF)

TAG_SHIFT = 27
ROWS_MAX = (1 << TAG_SHIFT) - 1
ROW_MASK = ROWS_MAX
TAG_MASK = (1 << (32 - TAG_SHIFT)) - 1

LINE_SLOTS = 16
"""Entries of a line of the index: 64 bytes, which must begin at a multiple of 64."""
LINE_MASK = (1 << LINE_SLOTS) - 1
HOME_LANE_SHIFT = 5
"""Bits of the fingerprint behind the tag's; `scaled` takes the highest."""
PLACE_AHEAD_ROWS = 16

# Indices into `counts`.
ROWS = 0  # rows ever given: the scans' end
FREE = 1  # of them, free again
LOCATED = 2  # devices with a location
HEAP_UNITS = 3  # units of `heap` ever given
FREE_TAIL = 4  # + units: head of that size's free list (unit + 1; 0: none)
COUNTS = FREE_TAIL + TAIL_UNITS_MAX + 1

Records = npt.NDArray[np.void]


class DeviceColumns(NamedTuple):
    """The arrays of one shard's device table, as kernels take them."""

    index: U32
    records: Records
    cell: U32
    told: U64
    heap: U8
    free_rows: U32
    counts: I64


@inline_kernel
def tag_of(a: np.uint64) -> int:
    """Five bits of a fingerprint, 1 to 31: an empty entry has none of them."""
    return np.int64(max(a & np.uint64(TAG_MASK), np.uint64(1)))


@inline_kernel
def home_slot(a: np.uint64, slots: int) -> int:
    """First slot of a fingerprint's home line: what to prefetch."""
    return scaled(a, np.uint64(slots // LINE_SLOTS)) * LINE_SLOTS


@inline_kernel
def from_home_lane(lanes: np.uint64, a: np.uint64) -> np.uint64:
    """A set of lanes, u16, turned so that bit 0 is the fingerprint's home lane."""
    return ((lanes | lanes << np.uint64(LINE_SLOTS)) >> home_lane(a)) & np.uint64(LINE_MASK)


@inline_kernel
def home_lane(a: np.uint64) -> np.uint64:
    """Where in a line a fingerprint's entry would like to be: then the first of equal tags is nearly always its own."""
    return (a >> np.uint64(HOME_LANE_SHIFT)) & np.uint64(LINE_SLOTS - 1)


@inline_kernel
def nearest_slot(line: int, turned: np.uint64, a: np.uint64) -> int:
    """The slot of the first lane in a turned set that is not empty."""
    return line + np.int64((home_lane(a) + np.uint64(lowest_bit(turned))) & np.uint64(LINE_SLOTS - 1))


@inline_kernel
def next_line(line: int, slots: int) -> int:
    """The line behind a line, cyclically."""
    line += LINE_SLOTS
    return 0 if line == slots else line


@inline_kernel
def find(index: U32, records: Records, a: np.uint64, b: np.uint64) -> int:
    """Row of the device with fingerprint (a, b), or -1."""
    slots = len(index)
    line = home_slot(a, slots)
    tag = tag_of(a)
    while True:
        lanes = from_home_lane(lanes_equal(index, line, TAG_SHIFT, tag), a)
        while lanes != 0:
            row = np.int64(index[at(nearest_slot(line, lanes, a))] & ROW_MASK) - 1
            if records[at(row)].fingerprint_a == a and records[at(row)].fingerprint_b == b:
                return row
            lanes &= lanes - np.uint64(1)
        if lanes_equal(index, line, 0, 0) != 0:
            return np.int64(-1)
        line = next_line(line, slots)


@inline_kernel
def candidate(index: U32, a: np.uint64) -> int:
    """The first row whose tag fits, or -1: a guess good enough to prefetch by, without touching a record."""
    slots = len(index)
    line = home_slot(a, slots)
    tag = tag_of(a)
    while True:
        lanes = from_home_lane(lanes_equal(index, line, TAG_SHIFT, tag), a)
        if lanes != 0:
            return np.int64(index[at(nearest_slot(line, lanes, a))] & ROW_MASK) - 1
        if lanes_equal(index, line, 0, 0) != 0:
            return np.int64(-1)
        line = next_line(line, slots)


@inline_kernel
def ask_for_candidates(index: U32, records: Records, a: np.uint64) -> None:
    """Prefetch the records of all rows whose tag fits: what `find` will compare."""
    slots = len(index)
    line = home_slot(a, slots)
    tag = tag_of(a)
    while True:
        lanes = lanes_equal(index, line, TAG_SHIFT, tag)
        while lanes != 0:
            prefetch(records, np.int64(index[at(line + lowest_bit(lanes))] & ROW_MASK) - 1)
            lanes &= lanes - np.uint64(1)
        if lanes_equal(index, line, 0, 0) != 0:
            return
        line = next_line(line, slots)


@inline_kernel
def place(index: U32, a: np.uint64, row: int) -> None:
    """Write the index entry of a row that is not in it. There is always an empty slot."""
    slots = len(index)
    line = home_slot(a, slots)
    empty = from_home_lane(lanes_equal(index, line, 0, 0), a)
    while empty == 0:
        line = next_line(line, slots)
        empty = from_home_lane(lanes_equal(index, line, 0, 0), a)
    index[nearest_slot(line, empty, a)] = np.uint32(tag_of(a) << TAG_SHIFT) | np.uint32(row + 1)


@lean_kernel
def place_all(index: U32, records: Records, counts: I64) -> None:
    """Fill an empty index from the records."""
    rows = counts[ROWS]
    for row in range(rows):
        if row + PLACE_AHEAD_ROWS < rows:
            prefetch(index, home_slot(records[row + PLACE_AHEAD_ROWS].fingerprint_a, len(index)))
        if records[row].id_length != 0:
            place(index, records[row].fingerprint_a, row)


@inline_kernel
def unplace(index: U32, records: Records, a: np.uint64, row: int) -> None:
    """Remove a row's index entry, and let an entry that had to go further move back into its place.

    Between an entry's home line and the line it stands in all lines are full: that is why a search may end at a line
    with room. So if the line was full, an entry from the lines behind it whose home lies at or before the gap moves in
    (Knuth, TAOCP 3, 6.4, algorithm R, by lines instead of slots), which may leave a gap in a line that was full, too.
    """
    slots = len(index)
    line = home_slot(a, slots)
    entry = np.uint32(tag_of(a) << TAG_SHIFT) | np.uint32(row + 1)
    lanes = lanes_equal(index, line, 0, entry)
    while lanes == 0:
        line = next_line(line, slots)
        lanes = lanes_equal(index, line, 0, entry)
    was_full = lanes_equal(index, line, 0, 0) == 0
    gap, gap_slot = line, line + lowest_bit(lanes)
    index[gap_slot] = 0
    while was_full:
        line = next_line(line, slots)
        if line == gap:
            return
        full = lanes_equal(index, line, 0, 0) == 0
        for slot in range(line, line + LINE_SLOTS):
            if index[slot] == 0:
                continue
            home = home_slot(records[np.int64(index[slot] & ROW_MASK) - 1].fingerprint_a, slots)
            # It may move to the gap unless its home lies (cyclically) behind the gap, up to where it stands.
            behind = (gap < home <= line) if gap < line else (home > gap or home <= line)
            if not behind:
                index[gap_slot] = index[slot]
                index[slot] = 0
                gap, gap_slot = line, slot
                break
        was_full = full


@inline_kernel
def insert(
    table: DeviceColumns, a: np.uint64, b: np.uint64, partner: np.uint16, id_bytes: U8, start: int, stop: int
) -> int:
    """Give a row to a device that has none. The caller has made sure of room in every array."""
    counts, heap = table.counts, table.heap
    if counts[FREE] > 0:
        counts[FREE] -= 1
        row = np.int64(table.free_rows[counts[FREE]])
    else:
        row = counts[ROWS]
        counts[ROWS] += 1
        # Memory is had here, a page at a time, not for all rows when an alert's ring first meets the table.
        table.told[row, 0] = 0
    record = table.records[row]
    length = stop - start
    record.fingerprint_a = a
    record.fingerprint_b = b
    record.observed_at_ms = NO_TIME
    record.lat_e7 = 0
    record.lng_e7 = 0
    record.anchor_lat_e7 = 0
    record.anchor_lng_e7 = 0
    record.stay_lat = 0
    record.stay_lng = 0
    record.partner = partner
    record.id_length = length
    record.waiting = 0
    record.tail = 0
    for offset in range(min(length, HEAD_BYTES)):
        record.head[offset] = id_bytes[start + offset]
    if length > HEAD_BYTES:
        units = (length - HEAD_BYTES + TAIL_UNIT_BYTES - 1) // TAIL_UNIT_BYTES
        unit = counts[FREE_TAIL + units] - 1
        if unit >= 0:
            byte = unit * TAIL_UNIT_BYTES
            counts[FREE_TAIL + units] = (
                np.int64(heap[byte])
                | np.int64(heap[byte + 1]) << 8
                | np.int64(heap[byte + 2]) << 16
                | np.int64(heap[byte + 3]) << 24
            )
        else:
            unit = counts[HEAP_UNITS]
            counts[HEAP_UNITS] += units
            byte = unit * TAIL_UNIT_BYTES
        record.tail = unit
        for offset in range(length - HEAD_BYTES):
            heap[byte + offset] = id_bytes[start + HEAD_BYTES + offset]
    table.cell[row] = NO_CELL
    place(table.index, a, row)
    return row


@inline_kernel
def free(table: DeviceColumns, row: int) -> None:
    """Take a device out: its id is overwritten, its row goes onto the stack."""
    counts, heap = table.counts, table.heap
    record = table.records[row]
    unplace(table.index, table.records, record.fingerprint_a, row)
    length = np.int64(record.id_length)
    if length > HEAD_BYTES:
        units = (length - HEAD_BYTES + TAIL_UNIT_BYTES - 1) // TAIL_UNIT_BYTES
        unit = np.int64(record.tail)
        byte = unit * TAIL_UNIT_BYTES
        following = counts[FREE_TAIL + units]
        for offset in range(units * TAIL_UNIT_BYTES):
            heap[byte + offset] = np.uint8((following >> (8 * offset)) & 0xFF) if offset < TAIL_UNIT_BYTES else 0
        counts[FREE_TAIL + units] = unit + 1
    for offset in range(HEAD_BYTES):
        record.head[offset] = 0
    record.fingerprint_a = 0
    record.fingerprint_b = 0
    record.partner = 0
    record.id_length = 0
    record.tail = 0
    table.free_rows[counts[FREE]] = row
    counts[FREE] += 1


@lean_kernel
def sweep(table: DeviceColumns, expired_before_ms: int) -> None:
    """Wipe every location observed before that time, and free each device that no open alert has told."""
    words = table.told.shape[1]
    counts = table.counts
    for row in range(counts[ROWS]):
        record = table.records[row]
        if record.id_length == 0:
            continue
        if record.observed_at_ms != NO_TIME:
            if record.observed_at_ms >= expired_before_ms:
                continue
            record.observed_at_ms = NO_TIME
            record.lat_e7 = 0
            record.lng_e7 = 0
            record.anchor_lat_e7 = 0
            record.anchor_lng_e7 = 0
            record.stay_lat = 0
            record.stay_lng = 0
            table.cell[row] = NO_CELL
            counts[LOCATED] -= 1
        told = np.uint64(0)
        for word in range(words):
            told |= table.told[row, word]
        if told == 0:
            free(table, row)


@lean_kernel
def rows_told(told: U64, word: int, bit: np.uint64, row_count: int, rows: U32) -> int:
    """Rows told of the alert `bit` of one word of `told`, ascending -> `rows`; returns how many."""
    found = 0
    for row in range(row_count):
        rows[found] = row
        found += np.int64((told[row, word] >> bit) & np.uint64(1))
    return found


@lean_kernel
def forget_told(told: U64, word: int, bit: np.uint64, row_count: int) -> None:
    """Clear one alert's bit everywhere, so that the bit can serve another alert."""
    keep = ~(np.uint64(1) << bit)
    for row in range(row_count):
        told[row, word] &= keep


@lean_kernel
def partners_of(records: Records, rows: U32, partner: npt.NDArray[np.uint16]) -> None:
    """Partner of each row -> `partner` u16[n]."""
    for position in range(len(rows)):
        if position + 16 < len(rows):
            prefetch(records, rows[position + 16])
        partner[position] = records[rows[position]].partner


@lean_kernel
def id_ends(records: Records, rows: U32, id_end: U32) -> None:
    """End of each row's id in the bytes of all -> `id_end` u32[n]."""
    end = 0
    for position in range(len(rows)):
        if position + 16 < len(rows):
            prefetch(records, rows[position + 16])
        end += np.int64(records[rows[position]].id_length)
        id_end[position] = end


@inline_kernel
def copy_id_of(records: Records, heap: U8, row: int, id_bytes: U8, byte: int) -> int:
    """A row's id -> `id_bytes` from `byte` on; returns the position behind it.

    What follows in `id_bytes` may be overwritten, as by `copy_id`.
    """
    record = records[row]
    length = np.int64(record.id_length)
    if byte + HEAD_BYTES > len(id_bytes):
        for offset in range(length):
            id_bytes[byte + offset] = record.head[offset]
        return byte + length
    for offset in range(HEAD_BYTES):
        id_bytes[byte + offset] = record.head[offset]
    if length <= HEAD_BYTES:
        return byte + length
    tail = np.int64(record.tail) * TAIL_UNIT_BYTES
    return copy_id(heap, tail, tail + length - HEAD_BYTES, id_bytes, byte + HEAD_BYTES, len(id_bytes))


@lean_kernel
def gather_ids(records: Records, heap: U8, rows: U32, id_bytes: U8) -> None:
    """Ids of rows, end to end -> `id_bytes` u8[id_end[-1]]."""
    byte = 0
    for position in range(len(rows)):
        if position + 32 < len(rows):
            prefetch(records, rows[position + 32])
        if position + 16 < len(rows):
            prefetch(heap, np.int64(records[rows[position + 16]].tail) * TAIL_UNIT_BYTES)
        byte = copy_id_of(records, heap, rows[position], id_bytes, byte)
