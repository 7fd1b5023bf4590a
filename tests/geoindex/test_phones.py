"""Counting kernels against plain loops, and what a machine knows of those whom its alerts told."""

from __future__ import annotations

from collections import Counter

import h3
import numpy as np
import pytest

from geoindex.cells import cells_of, coarse_to_h3
from geoindex.columns import Push, PushColumns
from geoindex.device_kernels import NO_TIME
from geoindex.entries import DEFAULT_SCHEDULE, HOUR_MS, Alert, AlertClose, AlertRevision, Settings, Tick
from geoindex.figure_kernels import add_pushed
from geoindex.phones import PhoneCounts
from geoindex.shard import ENDED_KEPT_MS, ShardMachine
from geoindex.snapshot import EndedAlert, fill_from
from tests.geoindex.machines import batch_of
from tests.geoindex.test_snapshot import log_entries
from tests.reference.events import PingEvent
from tests.reference.generator import HORIZONS_MS, generate_log

PARTNERS = ("amap", "ditu", "zhifu")
T0_MS = 1_700_000_000_000 - 1_700_000_000_000 % 60_000


def generated_machine(seed: int) -> ShardMachine:
    machine = ShardMachine()
    log = generate_log(np.random.default_rng(seed), device_count=60, horizon_ms=HORIZONS_MS[0])
    for at_ms, entry in log_entries(log, np.random.default_rng(seed), False):
        machine.apply(at_ms, entry)
    return machine


def counted_slowly(machine: ShardMachine, live_from_ms: int) -> dict[tuple[int, int], int]:
    """By (zone, partner), from the locations themselves."""
    counts: Counter[tuple[int, int]] = Counter()
    for record in machine.columns()["records"]:
        if record["id_length"] and record["observed_at_ms"] != NO_TIME and record["observed_at_ms"] >= live_from_ms:
            (cell,) = cells_of(np.array([record["lat_e7"]], np.int32), np.array([record["lng_e7"]], np.int32))
            counts[int(cell) // 49, int(record["partner"])] += 1
    return counts


@pytest.mark.parametrize("seed", range(6))
def test_phones_are_counted_as_a_plain_loop_does(seed: int) -> None:
    machine = generated_machine(seed)
    table = machine.device_table
    records = machine.columns()["records"]
    observed = np.sort(records["observed_at_ms"][records["observed_at_ms"] != NO_TIME])
    for live_from_ms in (0, int(observed[len(observed) // 2]) if len(observed) else 0, 1 << 60):
        counts = PhoneCounts(places=2)  # grows on the way
        middle = table.row_count // 2
        counts.add_rows(table, 0, middle, live_from_ms)
        counts.add_rows(table, middle, table.row_count, live_from_ms)
        found = counts.columns()
        rows = list(zip(zip(found.zone.tolist(), found.partner.tolist(), strict=True), found.count, strict=True))
        assert dict(rows) == counted_slowly(machine, live_from_ms)
        assert [pair for pair, _ in rows] == sorted({pair for pair, _ in rows})
        assert (found.zone.dtype, found.partner.dtype, found.count.dtype) == (np.uint32, np.uint16, np.uint32)


def test_the_generated_machines_have_phones_to_count() -> None:
    """Else the test above proves little."""
    assert sum(sum(counted_slowly(generated_machine(seed), 0).values()) for seed in range(6)) > 60


def test_many_pairs_grow_the_table_and_lose_no_phone() -> None:
    rng = np.random.default_rng(1)
    machine = ShardMachine()
    machine.apply(T0_MS, Settings(shard_count=1, partners=PARTNERS))
    places = rng.uniform((-60e7, -170e7), (60e7, 170e7), (5000, 2)).astype(int).tolist()
    pings = [PingEvent(PARTNERS[number % 3], f"p{number}", *place, T0_MS) for number, place in enumerate(places)]
    machine.apply(T0_MS, batch_of(pings, PARTNERS))
    counts = PhoneCounts(places=2)
    counts.add_rows(machine.device_table, 0, 5000, 0)
    found = counts.columns()
    assert int(found.count.sum()) == 5000
    assert len(found.zone) > 4000
    assert counts.places >= 2 * len(found.zone)


def test_pushed_ids_are_counted_by_alert_and_partner() -> None:
    """Four pushes with 3, 1, 5 and 2 ids."""
    sums = np.zeros((4, 2), np.int64)
    sums[3, 1] = 10
    alert, partner = np.array([1, 3, 1, 3], np.uint32), np.array([0, 1, 0, 1], np.uint16)
    add_pushed(alert, partner, np.array([3, 4, 9, 11], np.uint32), sums)
    assert sums.tolist() == [[0, 0], [8, 0], [0, 0], [0, 13]]


# ---- who was told


def pushed(pushes: list[Push | PushColumns], partners: tuple[str, ...], kind: str) -> Counter[tuple[str, str]]:
    """Devices by alert and partner."""
    counts: Counter[tuple[str, str]] = Counter()
    for segment in pushes:
        for push in segment if isinstance(segment, PushColumns) else [segment]:
            if push.kind == kind:
                counts[push.alert_id, partners[push.partner]] += len(push.id_end)
    return counts


@pytest.mark.parametrize("seed", range(8))
def test_told_counts_are_those_of_the_alert_pushes_of_open_alerts(seed: int) -> None:
    log = generate_log(np.random.default_rng(seed), device_count=60)
    machine = ShardMachine()
    told: Counter[tuple[str, str]] = Counter()
    for at_ms, entry in log_entries(log, np.random.default_rng(seed), False):
        pushes = machine.apply(at_ms, entry)
        told += pushed(list(pushes.segments), machine.settings.partners, "alert")
        partners = machine.settings.partners
        counted = {
            (alert_id, partners[index]): int(counts[index])
            for alert_id, counts in machine.told_counts().items()
            for index in np.flatnonzero(counts)
        }
        open_ids = {alert.alert_id for alert in machine.open_alerts()}
        assert counted == {pair: count for pair, count in told.items() if pair[0] in open_ids}
    assert told


def closed_machine() -> ShardMachine:
    """Two phones of amap and one of zhifu told about an alert that is over, nobody about another."""
    machine = ShardMachine()
    machine.apply(T0_MS, Settings(shard_count=1, partners=PARTNERS))
    names = (("amap", "a"), ("amap", "b"), ("zhifu", "c"))
    machine.apply(T0_MS, batch_of([PingEvent(*name, 400000000, 1160000000, T0_MS) for name in names], PARTNERS))
    for number, (alert_id, lng) in enumerate((("near", 116.0), ("far", 20.0))):
        alert = Alert(alert_id, 1, 40.0, lng, T0_MS, DEFAULT_SCHEDULE, T0_MS + 72 * HOUR_MS)
        machine.apply(T0_MS, AlertRevision("publish", alert, (number + 1, 0)))
    for number, alert_id in enumerate(("near", "far", "unknown")):
        machine.apply(T0_MS + 1, AlertClose(alert_id, None, "found", (number + 3, 0)))
    return machine


def test_whom_a_closed_alert_told_is_known_for_a_day() -> None:
    machine = closed_machine()
    assert machine.told_counts() == {}
    ended = (EndedAlert("near", T0_MS + 1, (2, 0, 1)),)
    assert machine.ended_alerts() == ended
    machine.apply(T0_MS + ENDED_KEPT_MS, Tick())
    assert machine.ended_alerts() == ended
    machine.apply(T0_MS + ENDED_KEPT_MS + 60_000, Tick())
    assert machine.ended_alerts() == ()


def test_whom_a_closed_alert_told_outlives_a_restart() -> None:
    machine = closed_machine()
    snapshot = machine.snapshot()
    again = ShardMachine.restored(snapshot.state, fill_from(snapshot.columns))
    assert again.ended_alerts() == machine.ended_alerts() != ()


# ---- cells for maps


def test_ancestors_of_zones_have_their_h3_index() -> None:
    lat_e7 = np.array([399000000, -338600000, 10000000], np.int32)
    lng_e7 = np.array([1164000000, 1512000000, -780000000], np.int32)
    zones = cells_of(lat_e7, lng_e7) // np.uint32(49)
    for resolution in range(6):
        coarse = zones // np.uint32(7 ** (5 - resolution))
        expected = [
            h3.str_to_int(h3.cell_to_parent(h3.latlng_to_cell(lat / 1e7, lng / 1e7, 7), resolution))
            for lat, lng in zip(lat_e7.tolist(), lng_e7.tolist(), strict=True)
        ]
        assert coarse_to_h3(coarse, resolution).tolist() == expected
    with pytest.raises(ValueError, match="resolution: must be from 0 to 5, got 6"):
        coarse_to_h3(zones, 6)
