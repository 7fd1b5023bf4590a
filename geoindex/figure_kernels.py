"""Loops that count what is in a device table, and what pushes say. They change nothing that is matched."""

from __future__ import annotations

import numpy as np

from geoindex.cell_kernels import CELLS_PER_ZONE
from geoindex.columns import I64, U16, U32, U64
from geoindex.device_kernels import NO_CELL, Records
from geoindex.numba_typing import kernel, lean_kernel, lowest_bit

PARTNER_BITS = 16
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: multiplicative hashing (Knuth, TAOCP 3, 6.4)."""


@lean_kernel
def count_phones(
    cell: U32, records: Records, first: int, stop: int, live_from_ms: int, keys: U64, counts: U32, used: int
) -> tuple[int, int]:
    """Add the live phones among the rows `first` to `stop` to a table of counts by zone and partner.

    keys: u64[2^k], `zone << 16 | partner` plus 1, 0: free; counts: u32[2^k]; used: of their places.
    Returns the first row not counted (`stop`, unless half of the table is used) and the places in use.
    """
    mask = np.int64(len(keys) - 1)
    shift = np.uint64(64)
    size = len(keys)
    while size > 1:
        size >>= 1
        shift -= np.uint64(1)
    for row in range(first, stop):
        here = cell[row]
        if here == NO_CELL:
            continue
        record = records[row]
        if record.observed_at_ms < live_from_ms:
            continue
        if 2 * used >= len(keys):
            return row, used
        zone = np.uint64(here // np.uint32(CELLS_PER_ZONE))
        key = (zone << np.uint64(PARTNER_BITS) | np.uint64(record.partner)) + np.uint64(1)
        place = np.int64((key * GOLDEN) >> shift)
        while keys[place] != key:
            if keys[place] == 0:
                keys[place] = key
                used += 1
                break
            place = (place + 1) & mask
        counts[place] += np.uint32(1)
    return stop, used


@lean_kernel
def move_counts(keys: U64, counts: U32, new_keys: U64, new_counts: U32) -> None:
    """Everything that a table of `count_phones` holds -> another, empty and larger."""
    mask = np.int64(len(new_keys) - 1)
    shift = np.uint64(64)
    size = len(new_keys)
    while size > 1:
        size >>= 1
        shift -= np.uint64(1)
    for old in range(len(keys)):
        key = keys[old]
        if key == 0:
            continue
        place = np.int64((key * GOLDEN) >> shift)
        while new_keys[place] != 0:
            place = (place + 1) & mask
        new_keys[place] = key
        new_counts[place] = counts[old]


@lean_kernel
def count_told(records: Records, told: U64, row_count: int, sums: I64) -> None:
    """Devices told, by alert slot and partner: added to `sums` i64[slots, partners]."""
    for row in range(row_count):
        for word in range(told.shape[1]):
            rest = told[row, word]
            while rest != 0:
                bit = lowest_bit(rest)
                rest &= rest - np.uint64(1)
                sums[word * 64 + bit, records[row].partner] += 1


@kernel
def add_pushed(alert: U32, partner: U16, id_stop: U32, sums: I64) -> None:
    """Ids of push columns (`columns.PushColumns`), by alert and partner: added to `sums` i64[alerts, partners]."""
    start = np.int64(0)
    for push in range(len(alert)):
        stop = np.int64(id_stop[push])
        sums[alert[push], partner[push]] += stop - start
        start = stop
