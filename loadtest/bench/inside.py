"""What a shard machine knows of its devices, read out for comparison: the one place that looks behind its interface.

Rows of the device table are state (they decide the order of pushes): the n-th device first seen has row n, as long as
nothing was freed. So a machine that was fed `Traffic.first_sight` has the phone of ping n in row n; `check_ids` makes
sure.
"""

from __future__ import annotations

from collections.abc import Sequence

import h3
import numpy as np

from geoindex.cells import cells_to_h3
from geoindex.columns import I64, U32, U64
from geoindex.shard import ShardMachine
from loadtest.bench.brute_force import BruteForce, PackedRows
from loadtest.bench.traffic import ActiveAlert, Traffic

RESOLUTION = 7
CHUNK_ROWS = 1 << 20


def cells_of(machine: ShardMachine, rows: I64) -> U64:
    """The H3 cell kept for each device, u64[n]."""
    return cells_to_h3(np.ascontiguousarray(machine._devices.columns.cell[rows]))


def cover_bytes(machine: ShardMachine) -> int:
    """Memory of the open alerts' covers."""
    columns = machine._alerts.columns
    return int(columns.zone_row.nbytes + machine._alerts._zone_rows_used * columns.zone_mask[0].nbytes)


def told_bytes(machine: ShardMachine) -> int:
    """Memory of all devices' told bits."""
    return int(machine._devices.columns_in_use()["told"].nbytes)


def told_of(machine: ShardMachine, alerts: Sequence[ActiveAlert], rows: I64) -> PackedRows:
    """Which of the alerts each device was told, packed as in `brute_force`."""
    told = machine._devices.columns.told
    bits = np.zeros((len(rows), len(alerts)), np.bool_)
    words = [told[rows, word] for word in range(told.shape[1])]
    for position, active in enumerate(alerts):
        word, bit = divmod(machine._alerts.open[active.alert.alert_id].slot, 64)
        bits[:, position] = words[word] >> np.uint64(bit) & np.uint64(1) != 0
    return np.packbits(bits, axis=1, bitorder="little")


def verify(
    machine: ShardMachine, traffic: Traffic, alerts: Sequence[ActiveAlert], expected: BruteForce, cell_sample: int
) -> list[str]:
    """Compare devices with brute force: told sets of all that it knows, cells of a sample; returns what is wrong."""
    phone_of_row = traffic.senders(0, traffic.phone_count)
    if expected.phones is not None:
        known = np.flatnonzero(np.isin(phone_of_row, expected.phones))
        expected_row = np.searchsorted(expected.phones, phone_of_row[known])
    else:
        known = np.arange(traffic.phone_count)
        expected_row = phone_of_row.astype(np.int64)
    faults: list[str] = []
    wrong_told = 0
    for start in range(0, len(known), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        told = told_of(machine, alerts, known[chunk])
        wrong_told += int((told != expected.told[expected_row[chunk]]).any(axis=1).sum())
    if wrong_told:
        faults.append(f"{wrong_told} of {len(known)} devices were not told what brute force says")

    step = max(1, len(known) // cell_sample)
    rows, expected_rows = known[::step], expected_row[::step]
    wrong_ids = check_ids(machine, traffic, rows, phone_of_row[rows])
    if wrong_ids:
        faults.append(f"{wrong_ids} of {len(rows)} rows hold another device than the one first seen there")
    lat, lng = expected.lat_e7[expected_rows] / 1e7, expected.lng_e7[expected_rows] / 1e7
    by_library = [
        h3.str_to_int(h3.latlng_to_cell(*place, RESOLUTION)) for place in zip(lat.tolist(), lng.tolist(), strict=True)
    ]
    wrong_cells = int((cells_of(machine, rows) != np.array(by_library, np.uint64)).sum())
    if wrong_cells:
        faults.append(f"{wrong_cells} of {len(rows)} devices are kept in another cell than the h3 library's")
    return faults


def check_ids(machine: ShardMachine, traffic: Traffic, rows: I64, phones: U32) -> int:
    """How many of the rows do not hold the device of that phone."""
    found_bytes, found_end = machine._devices.ids_of(rows.astype(np.uint32))
    partner, id_bytes, id_end = traffic.world.phone_ids(phones)
    if not np.array_equal(found_end, id_end) or not np.array_equal(found_bytes, id_bytes):
        return len(rows)
    return int((machine._devices.partners_of(rows.astype(np.uint32)) != partner).sum())
