"""The device table against a dictionary."""

from __future__ import annotations

import mmap
import resource

import numpy as np
import pytest

from geoindex import device_kernels as kernels
from geoindex.cell_kernels import signed
from geoindex.columns import U8, U16, U32, U64, pack_ids
from geoindex.device_kernels import NO_TIME, RECORD, DeviceColumns
from geoindex.devices import DeviceTable
from geoindex.kernels import hash_id, hash_secrets
from geoindex.numba_typing import kernel
from geoindex.snapshot import copied, fill_from

SECRETS = hash_secrets(7)


@kernel
def _find_or_insert(
    table: DeviceColumns, partner: U16, id_bytes: U8, id_end: U32, secrets: U64, observed_at_ms: int, rows: U32
) -> None:
    start = 0
    for position in range(len(id_end)):
        stop = signed(id_end[position])
        a, b = hash_id(id_bytes, start, stop, partner[position], secrets)
        row = kernels.find(table.index, table.records, a, b)
        if row < 0:
            row = kernels.insert(table, a, b, partner[position], id_bytes, start, stop)
            table.counts[kernels.LOCATED] += 1
        table.records[row].observed_at_ms = observed_at_ms
        rows[position] = row
        start = stop


def _put(table: DeviceTable, devices: list[tuple[int, str]], observed_at_ms: int) -> list[int]:
    """Rows of (partner, id) pairs, given in order where new."""
    table.make_room(len(devices))
    id_bytes, id_end = pack_ids([device_id for _, device_id in devices])
    rows = np.empty(len(devices), np.uint32)
    partner = np.array([partner for partner, _ in devices], np.uint16)
    _find_or_insert(table.columns, partner, id_bytes, id_end, SECRETS, observed_at_ms, rows)
    return rows.tolist()


def _ids(table: DeviceTable, rows: list[int]) -> list[str]:
    id_bytes, id_end = table.ids_of(np.array(rows, np.uint32))
    starts = [0, *id_end.tolist()[:-1]]
    return [id_bytes[start:stop].tobytes().decode() for start, stop in zip(starts, id_end.tolist(), strict=True)]


def test_a_record_is_one_cache_line() -> None:
    assert RECORD.itemsize == 64


def test_rows_are_given_in_the_order_of_first_sight() -> None:
    table = DeviceTable()
    assert _put(table, [(0, "a"), (0, "b"), (0, "a"), (1, "a"), (0, "c")], 1) == [0, 1, 0, 2, 3]
    assert table.size.device_count == 4


@pytest.mark.parametrize("length", range(1, 65))
def test_ids_of_every_length_come_back_as_they_went_in(length: int) -> None:
    table = DeviceTable()
    ids = [f"{index:x}".rjust(length, "前" if length % 3 == 0 else "-")[-length:] for index in range(8)]
    ids = [device_id.encode()[:length].decode(errors="ignore") or "x" for device_id in ids]
    rows = _put(table, [(3, device_id) for device_id in ids], 1)
    assert _ids(table, rows) == ids
    assert table.partners_of(np.array(rows, np.uint32)).tolist() == [3] * len(ids)


def test_a_swept_device_is_gone_and_its_id_overwritten() -> None:
    table = DeviceTable()
    _put(table, [(0, "an id that is longer than twelve bytes"), (0, "short")], 100)
    table.sweep(101)
    assert table.size.device_count == 0
    assert not table.columns.index.any()
    assert not table.columns.records["head"].ravel()[: 2 * 12].any()
    # Of the heap's unit only the free list's link may be left.
    assert not table.columns.heap[4:28].any()


def test_a_location_of_exactly_the_limit_stays() -> None:
    table = DeviceTable()
    _put(table, [(0, "a")], 100)
    table.sweep(100)
    assert table.size.device_count == 1


def test_a_told_device_keeps_its_id_when_its_location_expires() -> None:
    table = DeviceTable()
    row = _put(table, [(0, "a told device with a long id")], 100)[0]
    table.columns.told[row, 0] = 1 << 5
    table.sweep(101)
    assert table.columns.records[row]["observed_at_ms"] == NO_TIME
    assert _ids(table, [row]) == ["a told device with a long id"]
    assert table.rows_told(5).tolist() == [row]
    table.forget_told(5)
    table.sweep(101)
    assert table.size.device_count == 0


def test_told_survives_more_alerts_than_a_word_holds() -> None:
    table = DeviceTable()
    row = _put(table, [(0, "a")], 100)[0]
    table.columns.told[row, 0] = 1 << 63
    table.make_alert_room(65)
    table.columns.told[row, 1] = 1
    assert table.rows_told(63).tolist() == [row]
    assert table.rows_told(64).tolist() == [row]
    assert table.rows_told(62).tolist() == []


def test_room_made_ahead_for_alerts_takes_over_what_was_told_since() -> None:
    table = DeviceTable()
    _put(table, [(0, f"device {index}") for index in range(100)], 100)
    table.expect_alerts(65)
    table.expect_alerts(65)
    # More devices come, and more is told, before the room is needed.
    rows = _put(table, [(0, f"device {index}") for index in range(1000)], 100)
    assert table.told_words == 1
    table.columns.told[rows[-1], 0] = 1 << 63
    table.make_alert_room(130)
    assert table.columns.told.shape == (table.rows_max, table.told_words) == (table.rows_max, 3)
    assert table.rows_told(63).tolist() == [rows[-1]]
    assert [table.rows_told(slot).tolist() for slot in (62, 64, 127, 128, 191)] == [[], [], [], [], []]


def test_told_bits_have_memory_as_soon_as_their_rows_are_given() -> None:
    table = DeviceTable()
    rows = _put(table, [(0, f"device {index}") for index in range(100_000)], 100)
    told = table.columns.told[: len(rows), 0]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert int(told.sum()) == 0
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    assert faults < told.nbytes // mmap.PAGESIZE // 4


def test_a_full_shard_is_refused_by_name() -> None:
    table = DeviceTable(rows_max=3)
    _put(table, [(0, "a"), (0, "b"), (0, "c")], 1)
    with pytest.raises(MemoryError, match="at most 3 devices in a shard, got 4"):
        table.make_room(1)


def test_a_restored_table_finds_everyone_and_has_room_for_more_without_a_new_index() -> None:
    table = DeviceTable()
    devices = [(0, f"phone {number}") for number in range(20_000)]
    rows = _put(table, devices, 100)
    columns = copied(table.columns_in_use(), None)
    restored = DeviceTable.restored(table.columns.counts.tolist(), table.told_words, fill_from(columns))
    index = restored.columns.index
    restored.make_room(1_000)
    assert restored.columns.index is index
    assert len(devices) / len(index) < 0.75
    assert _put(restored, devices, 101) == rows


@pytest.mark.parametrize("seed", range(4))
def test_the_table_equals_a_dictionary_through_inserts_and_sweeps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = DeviceTable()
    rows_by_device: dict[tuple[int, str], int] = {}
    seen_ms: dict[tuple[int, str], int] = {}
    for now_ms in range(1, 60):
        names = [f"{number:0{1 + number % 40}d}" for number in rng.integers(0, 3000, 400).tolist()]
        devices = [(int(rng.integers(0, 3)), name) for name in names]
        for device, row in zip(devices, _put(table, devices, now_ms), strict=True):
            assert rows_by_device.setdefault(device, row) == row
            seen_ms[device] = now_ms
        if now_ms % 3 == 0:
            expired_before_ms = now_ms - int(rng.integers(0, 6))
            table.sweep(expired_before_ms)
            for device in [device for device, last_ms in seen_ms.items() if last_ms < expired_before_ms]:
                del rows_by_device[device], seen_ms[device]
        assert table.size.device_count == len(rows_by_device)
        assert len(set(rows_by_device.values())) == len(rows_by_device)
    rows = list(rows_by_device.values())
    assert _ids(table, rows) == [device_id for _, device_id in rows_by_device]
