"""Devices told and told of the end, alert by alert: counted from pushes, and never turned back on the server."""

from __future__ import annotations

from typing import Any, cast

import msgpack
import numpy as np
import pytest
import redis

from flows.figures import Figures
from flows.log import FIRST, LogId, RawEntry
from flows.match import ShardNotes, ShardPushes
from flows.metrics import Metrics
from flows.tallies import TALLY_EXPIRY_S, TallyCounter, read_tallies, tally_key
from geoindex.columns import Push, PushColumns, Pushes, pack_ids
from geoindex.entries import DEFAULT_SCHEDULE, HOUR_MS, Alert, AlertClose, AlertRevision, Settings
from geoindex.shard import ShardMachine
from tests.flows.waiting import memory_limit
from tests.geoindex.machines import batch_of
from tests.reference.events import PingEvent

PARTNERS = ("amap", "ditu")
T0_MS = 1_700_000_000_000
SHARD = 1


def push(partner: int, alert_id: str, kind: str, devices: int) -> Push:
    return Push(partner, alert_id, 1, kind, 1.0, T0_MS, *pack_ids([f"d{number}" for number in range(devices)]))


def columns(alerts: tuple[str | None, ...], rows: list[tuple[int, int, int]]) -> PushColumns:
    """`rows`: alert slot, partner, devices."""
    alert, partner, devices = zip(*rows, strict=True)
    id_bytes, id_end = pack_ids([f"d{number}" for number in range(sum(devices))])
    return PushColumns(
        tuple(None if name is None else (name, 1, 1.0) for name in alerts),
        np.array(alert, np.uint32),
        np.array(partner, np.uint16),
        np.full(len(rows), T0_MS, np.int64),
        np.cumsum(devices).astype(np.uint32),
        id_bytes,
        id_end,
    )


def caused(log_id: LogId, *segments: Push | PushColumns, partners: tuple[str, ...] = PARTNERS) -> ShardPushes:
    return ShardPushes(RawEntry(SHARD, *log_id, b"", b"", "run"), Pushes(segments), partners, ShardNotes())


def started(client: redis.Redis, metrics: Metrics | None = None) -> Figures:
    figures = Figures(client, [SHARD], metrics or Metrics())
    figures.begin(SHARD, ShardMachine(), FIRST)
    return figures


def settled(counter: TallyCounter) -> dict[str, dict[str, Any]]:
    """What would be written now, by alert."""
    written: dict[str, dict[str, Any]] = {}
    for taken in counter.take():
        arguments = taken.arguments[1:]
        for position in range(0, len(arguments), 4):
            written[str(arguments[position])] = msgpack.unpackb(cast(bytes, arguments[position + 1]))
        counter.written(taken)
    return written


def counting() -> TallyCounter:
    counter = TallyCounter()
    counter.begin(SHARD, ShardMachine(), FIRST)
    return counter


def test_pushes_of_every_form_are_counted_by_alert_partner_and_kind() -> None:
    counter = counting()
    counter.after_entry(caused((1, 0), push(0, "a", "alert", 3), push(1, "a", "alert", 2), push(0, "b", "alert", 1)))
    in_columns = columns(("b", None, "a"), [(2, 1, 4), (0, 0, 1), (2, 1, 5), (2, 0, 1)])
    counter.after_entry(caused((2, 5), in_columns, push(0, "b", "update", 9)))
    assert settled(counter) == {
        "a": {"told": {"amap": 4, "ditu": 11}, "resolved": {}, "at_ms": 2, "log_id": [2, 5]},
        "b": {"told": {"amap": 2}, "resolved": {}, "at_ms": 2, "log_id": [2, 5]},
    }
    assert settled(counter) == {}
    counter.after_entry(caused((3, 0), push(0, "b", "resolved", 2)))
    assert settled(counter) == {"b": {"told": {"amap": 2}, "resolved": {"amap": 2}, "at_ms": 3, "log_id": [3, 0]}}


def test_columns_are_counted_under_the_alerts_and_partners_of_their_time() -> None:
    """A slot goes to another alert, and the list of partners grows, before anything is written."""
    counter = counting()
    for number in range(3):
        counter.after_entry(caused((number, 0), columns(("a", "b"), [(0, 0, 2), (1, 1, 1)])))
    counter.after_entry(caused((9, 0), columns(("c", "b"), [(0, 0, 5), (1, 2, 7)]), partners=(*PARTNERS, "new")))
    told = {alert_id: tally["told"] for alert_id, tally in settled(counter).items()}
    assert told == {"a": {"amap": 6}, "b": {"ditu": 3, "new": 7}, "c": {"amap": 5}}


def test_what_could_not_be_written_is_written_with_what_comes_after() -> None:
    counter = counting()
    counter.after_entry(caused((1, 0), push(0, "a", "alert", 3)))
    (taken,) = counter.take()
    counter.after_entry(caused((2, 0), push(0, "b", "alert", 1)))
    counter.put_back(taken)
    assert {alert_id: tally["told"] for alert_id, tally in settled(counter).items()} == {
        "a": {"amap": 3},
        "b": {"amap": 1},
    }


def test_a_closed_alert_is_forgotten_when_it_is_written_and_not_before() -> None:
    counter = counting()
    counter.after_entry(caused((1, 0), push(0, "a", "alert", 3), push(0, "a", "resolved", 3)))
    (taken,) = counter.take()
    counter.put_back(taken)
    assert taken.lane.tallies.keys() == {"a"}
    assert settled(counter)["a"]["resolved"] == {"amap": 3}
    assert not taken.lane.tallies and not taken.lane.closed


def machine_with_an_open_and_a_closed_alert() -> ShardMachine:
    """`open` told two phones of amap and one of ditu, `closed` as well."""
    machine = ShardMachine()
    machine.apply(T0_MS, Settings(shard_count=2, partners=PARTNERS))
    names = (("amap", "a"), ("amap", "b"), ("ditu", "c"))
    machine.apply(T0_MS, batch_of([PingEvent(*name, 400000000, 1160000000, T0_MS) for name in names], PARTNERS))
    for number, alert_id in enumerate(("open", "closed")):
        alert = Alert(alert_id, 1, 40.0, 116.0, T0_MS, DEFAULT_SCHEDULE, T0_MS + 72 * HOUR_MS)
        machine.apply(T0_MS, AlertRevision("publish", alert, (number + 1, 0)))
    machine.apply(T0_MS + 5, AlertClose("closed", None, "found", (3, 0)))
    return machine


def test_a_shard_that_starts_from_a_checkpoint_knows_whom_its_alerts_told() -> None:
    counter = TallyCounter()
    counter.begin(SHARD, machine_with_an_open_and_a_closed_alert(), (T0_MS + 5, 2))
    told = {"amap": 2, "ditu": 1}
    at = {"at_ms": T0_MS + 5, "log_id": [T0_MS + 5, 2]}
    assert settled(counter) == {
        "open": {"told": told, "resolved": {}, **at},
        "closed": {"told": told, "resolved": told, **at},
    }
    counter.after_entry(caused((T0_MS + 9, 0), push(1, "open", "alert", 1)))
    assert settled(counter)["open"]["told"] == {"amap": 2, "ditu": 2}


# ---- on the server


def test_tallies_of_all_shards_are_added_up(client: redis.Redis) -> None:
    one = {"told": {"amap": 5, "ditu": 1}, "resolved": {"amap": 5}, "at_ms": 1, "log_id": [1, 0]}
    other = {"told": {"amap": 2}, "resolved": {"zhifu": 3}, "at_ms": 1, "log_id": [1, 0]}
    client.hset(tally_key(0), "a", cast(str, msgpack.packb(one)))
    client.hset(tally_key(2), "a", cast(str, msgpack.packb(other)))
    assert read_tallies(client, 3, "a") == {"amap": (7, 5), "ditu": (1, 0), "zhifu": (0, 3)}
    assert read_tallies(client, 3, "unknown") == {}
    assert tally_key(2) == "tally:{s2}"


def test_tallies_are_written_and_kept_for_more_than_a_year(client: redis.Redis) -> None:
    figures = started(client)
    figures.after_entry(caused((1, 0), push(0, "a", "alert", 3), push(0, "ä 1", "alert", 2)), ready_machine())
    figures.publish()
    assert read_tallies(client, 2, "a") == {"amap": (3, 0)}
    assert read_tallies(client, 2, "ä 1") == {"amap": (2, 0)}
    (seconds_left,) = cast(Any, client).httl(tally_key(SHARD), "a")
    assert 366 * 86_400 < seconds_left <= TALLY_EXPIRY_S


def ready_machine() -> ShardMachine:
    machine = ShardMachine()
    machine.apply(0, Settings(shard_count=2, partners=PARTNERS))
    return machine


@pytest.mark.parametrize(
    ("log_id", "is_written"),
    [
        ((999, 11), False),
        ((1000, 9), False),
        ((1000, 10), True),
        ((1000, 11), True),
        ((1001, 0), True),
        ((9, 0), False),
    ],
)
def test_a_replay_or_a_worker_that_is_behind_does_not_turn_a_tally_back(
    client: redis.Redis, log_id: LogId, is_written: bool
) -> None:
    """Log ids are compared as numbers."""
    ahead, behind = started(client), started(client)
    ahead.after_entry(caused((1000, 10), push(0, "a", "alert", 9)), ready_machine())
    ahead.publish()
    behind.after_entry(caused(log_id, push(0, "a", "alert", 5)), ready_machine())
    behind.publish()
    assert read_tallies(client, 2, "a") == {"amap": (5 if is_written else 9, 0)}


def test_a_field_that_is_no_tally_is_written_over(client: redis.Redis) -> None:
    figures = started(client)
    for number, rubbish in enumerate((b"\xc1", b"", b"\x01", cast(bytes, msgpack.packb({"log_id": 7})))):
        client.hset(tally_key(SHARD), "a", cast(str, rubbish))
        figures.after_entry(caused((number, 0), push(0, "a", "alert", 1)), ready_machine())
        figures.publish()
        assert read_tallies(client, 2, "a") == {"amap": (number + 1, 0)}


def test_a_full_server_is_counted_and_said_once_and_written_later(
    client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    figures = started(client, metrics)
    with memory_limit(client, 1):
        for number in range(2):
            figures.after_entry(caused((number, 0), push(0, "a", "alert", 1)), ready_machine())
            figures.publish()
    assert metrics.value("figure_write_errors_total", figure="tally") == 2
    assert caplog.text.count("figures cannot be published") == 1
    assert read_tallies(client, 2, "a") == {}
    figures.publish()
    assert read_tallies(client, 2, "a") == {"amap": (2, 0)}
