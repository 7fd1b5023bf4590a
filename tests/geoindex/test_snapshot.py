"""A restored machine goes on as if nothing had happened: the same pushes, cut into the same queue entries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoindex.alerts import AlertIndex
from geoindex.columns import Push
from geoindex.device_kernels import RECORD
from geoindex.devices import DeviceTable
from geoindex.entries import LogEntry, Settings, Tick
from geoindex.shard import SettingsRefused, ShardMachine
from geoindex.snapshot import Column, MachineState, Snapshot, copied, fill_from, fits, put, room_bytes
from tests.geoindex.machines import batch_of, is_well_formed
from tests.reference.events import Log, PingEvent
from tests.reference.generator import HORIZONS_MS, generate_log, logs

Timed = tuple[int, LogEntry]


def log_entries(log: Log, rng: np.random.Generator, recorded: bool) -> Iterator[Timed]:
    """A shard's log: pings in batches cut at random; `recorded`: with clocks of their own, over many moments."""
    partners = log.settings.partners
    rows: list[tuple[int, PingEvent]] = []

    def batch() -> Timed:
        times_ms = [at_ms for at_ms, _ in rows]
        pings = batch_of([ping for _, ping in rows], partners, times_ms if recorded else None)
        rows.clear()
        return times_ms[-1], pings

    yield 0, log.settings
    for at_ms, event in log.events:
        if isinstance(event, PingEvent):
            if not is_well_formed(event, partners):
                continue
            if rows and (rng.random() < 0.15 or (not recorded and rows[-1][0] != at_ms)):
                yield batch()
            rows.append((at_ms, event))
            continue
        if rows:
            yield batch()
        if isinstance(event, Settings):
            partners = event.partners
        yield at_ms, event
    if rows:
        yield batch()


PlainPush = tuple[int, str, int, str, float, int, bytes, tuple[int, ...]]


def plain(pushes: Iterable[Push]) -> list[PlainPush]:
    """Everything of the pushes that a queue gets to see, comparable."""
    return [
        (
            push.partner,
            push.alert_id,
            push.revision,
            push.kind,
            push.ring_km,
            push.at_ms,
            push.id_bytes.tobytes(),
            tuple(push.id_end.tolist()),
        )
        for push in pushes
    ]


def again(machine: ShardMachine) -> ShardMachine:
    """The machine after a snapshot and a restart."""
    snapshot = machine.snapshot()
    return ShardMachine.restored(snapshot.state, fill_from(snapshot.columns))


def assert_same(one: ShardMachine, other: ShardMachine) -> None:
    assert one.state() == other.state()
    assert one.open_alerts() == other.open_alerts()
    columns, others = one.columns(), other.columns()
    assert columns.keys() == others.keys()
    for name, column in columns.items():
        assert column.tobytes() == others[name].tobytes(), name


def assert_restarts_change_nothing(log: Log, seed: int, recorded: bool, restart_share: float) -> int:
    """Run a log with and without restarts; returns how many pushes there were."""
    rng = np.random.default_rng(seed)
    entries = list(log_entries(log, rng, recorded))
    straight, restarted = ShardMachine(), ShardMachine()
    pushes = 0
    for at_ms, entry in entries:
        expected = plain(straight.apply(at_ms, entry))
        pushes += len(expected)
        assert plain(restarted.apply(at_ms, entry)) == expected
        if rng.random() < restart_share:
            restarted = again(restarted)
    assert_same(straight, restarted)
    return pushes


@settings(max_examples=30, deadline=None)
@given(log=logs(), seed=st.integers(0, 2**32 - 1), recorded=st.booleans())
def test_a_restart_at_any_entry_changes_no_push(log: Log, seed: int, recorded: bool) -> None:
    assert_restarts_change_nothing(log, seed, recorded, restart_share=0.5)


@pytest.mark.parametrize("seed", range(24))
def test_restarts_during_a_long_adversarial_log_change_no_push(seed: int) -> None:
    log = generate_log(np.random.default_rng(seed), device_count=30)
    assert assert_restarts_change_nothing(log, seed, seed % 2 == 0, restart_share=0.1) > 10


def test_restarts_with_more_open_alerts_than_bits_in_a_word_change_no_push() -> None:
    log = generate_log(np.random.default_rng(5), event_count=1200, alert_count_max=130, horizon_ms=HORIZONS_MS[0])
    assert assert_restarts_change_nothing(log, 5, True, restart_share=0.05) > 100


def test_a_snapshot_is_left_alone_by_later_entries() -> None:
    log = generate_log(np.random.default_rng(3), device_count=30)
    entries = list(log_entries(log, np.random.default_rng(3), True))
    machine, twin = ShardMachine(), ShardMachine()
    for at_ms, entry in entries[: len(entries) // 2]:
        machine.apply(at_ms, entry)
        twin.apply(at_ms, entry)
    snapshot = machine.snapshot()
    for at_ms, entry in entries[len(entries) // 2 :]:
        machine.apply(at_ms, entry)
    assert_same(ShardMachine.restored(snapshot.state, fill_from(snapshot.columns)), twin)


def some_machine(seed: int = 8) -> ShardMachine:
    """A machine with devices, alerts that told some of them, and free rows."""
    log = generate_log(np.random.default_rng(seed), device_count=30, horizon_ms=HORIZONS_MS[1])
    machine = ShardMachine()
    for at_ms, entry in log_entries(log, np.random.default_rng(seed), False):
        machine.apply(at_ms, entry)
    return machine


def test_the_worked_machine_has_something_in_every_column() -> None:
    """Else the tests above prove little."""
    machine = some_machine()
    for name, column in machine.columns().items():
        assert column.view(np.uint8).any(), name
    state = machine.state()
    assert state.alerts and state.closed


def test_nothing_is_restored_from_before_the_first_entry() -> None:
    machine = again(ShardMachine())
    with pytest.raises(SettingsRefused, match="must begin with a settings entry"):
        machine.apply(1, Tick())


def test_every_attribute_is_either_state_or_made_anew() -> None:
    """Whoever adds one decides which; state goes into `MachineState` or `columns_in_use`."""
    state = {
        "clock_ms",
        "counters",
        "_settings",
        "_devices",
        "_alerts",
        "_closed",
        "_ended",
        "_last_desk_id",
        "_sweep_due_ms",
    }
    made_anew = {"_secrets", "_due_ms", "_hit_row", "_hit_slot", "_hit_ping", "_scratch", "_told_as"}
    made_anew |= {"accepted_by_partner"}  # of the last entry, for metrics
    assert set(vars(ShardMachine())) == state | made_anew
    assert set(vars(DeviceTable())) == {"columns", "rows_max", "_told_words", "_wider_told"}
    saved = set(DeviceTable().columns_in_use())
    assert set(DeviceTable().columns._fields) - {"index", "counts"} == saved
    assert set(vars(AlertIndex())) == {"open", "_partners", "_by_slot", "_due", "_zone_rows_used", "columns"}


# ---- columns


def test_columns_are_copied_into_the_room_that_is_given() -> None:
    columns = some_machine().columns()
    room = np.full(room_bytes(columns) + 1000, 7, np.uint8)
    copies = copied(columns, room)
    for name, column in columns.items():
        assert np.shares_memory(copies[name], room) or not len(column)
        assert copies[name].tobytes() == column.tobytes()
        assert copies[name].dtype == column.dtype
    assert (room[-1000:] == 7).all()


def test_a_room_that_is_too_small_is_not_used() -> None:
    columns = some_machine().columns()
    room = np.zeros(room_bytes(columns) - 1, np.uint8)
    copies = copied(columns, room)
    assert not room.any()
    assert copies["records"].tobytes() == columns["records"].tobytes()


def test_room_asked_for_is_room_enough() -> None:
    machine = some_machine()
    room = np.zeros(machine.snapshot_bytes, np.uint8)
    snapshot: Snapshot = machine.snapshot(room)
    assert np.shares_memory(snapshot.columns["records"], room)


def rearranged(records: Column) -> Column:
    """The same records as another version of the program might lay them out."""
    names = [name for name in RECORD.names or () if not name.startswith("spare")]
    other = np.zeros(len(records), np.dtype([(name, RECORD[name]) for name in reversed(names)]))
    for name in names:
        other[name] = records[name]
    return other


def test_records_of_another_layout_with_the_same_fields_are_taken_over() -> None:
    machine = some_machine()
    snapshot = machine.snapshot()
    columns = {**snapshot.columns, "records": rearranged(snapshot.columns["records"])}
    assert columns["records"].dtype != RECORD
    assert_same(ShardMachine.restored(snapshot.state, fill_from(columns)), machine)


def test_records_that_lack_a_field_are_refused() -> None:
    names = [name for name in RECORD.names or () if name != "partner"]
    stored = np.zeros(3, np.dtype([(name, RECORD[name]) for name in names]))
    assert not fits(stored.dtype, RECORD)
    with pytest.raises(ValueError, match="must have the fields of"):
        put(stored, np.zeros(3, RECORD))


def test_a_column_of_another_length_or_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have the shape \(3,\), got \(4,\)"):
        put(np.zeros(4, np.uint32), np.zeros(3, np.uint32))
    with pytest.raises(ValueError, match="must have the fields of uint32, got uint64"):
        put(np.zeros(3, np.uint64), np.zeros(3, np.uint32))


def test_counts_of_another_layout_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a device table must have \d+ counts, got 2"):
        DeviceTable.restored((0, 0), 1, fill_from({}))


def test_more_devices_than_a_table_can_hold_are_refused() -> None:
    state: MachineState = some_machine().state()
    with pytest.raises(MemoryError, match="at most 1 devices in a shard"):
        DeviceTable.restored(state.table_counts, state.told_words, fill_from({}), rows_max=1)
