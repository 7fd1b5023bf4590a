"""Bytes <-> columns."""

from __future__ import annotations

import contextlib
import struct
import time
import tracemalloc
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows import wire
from flows.wire import (
    MalformedEntry,
    PingColumns,
    PushEntry,
    decode_entry,
    decode_pings,
    decode_push,
    encode_entry,
    encode_pings,
    encode_push,
    screen_pings,
    slice_pings,
    split_by_shard,
)
from geoindex.columns import PingBatch, Push, pack_ids
from geoindex.entries import DEFAULT_SCHEDULE, Alert, AlertClose, AlertRevision, LogEntry, Settings, Tick
from geoindex.kernels import shard_of_ids

SETTINGS = Settings(shard_count=4, partners=("amap", "didi"), hash_key=(1 << 64) - 1)
ALERT = Alert(
    alert_id="a17",
    revision=3,
    lat=30.25,
    lng=-114.5,
    missing_since_ms=1_700_000_000_000,
    schedule=((0.5, 100.0), (None, 500.0)),
    expires_at_ms=1_700_259_200_000,
    status="exercise",
    audience=("amap",),
)
REVISION = AlertRevision("update", ALERT, (1_700_000_000_001, 2))
CLOSE = AlertClose("a17", None, "found", (1_700_000_000_002, 0))


def pings(
    ids: list[str] | None = None, partners: int = 2, with_at: bool = False, rows: int = 3, seed: int = 0
) -> PingBatch:
    ids = [f"phone-{index}" for index in range(rows)] if ids is None else ids
    rows = len(ids)
    random = np.random.default_rng(seed)
    id_bytes, id_end = pack_ids(ids)
    return PingBatch(
        partner=random.integers(0, partners, rows).astype(np.uint16),
        id_bytes=id_bytes,
        id_end=id_end,
        lat_e7=random.integers(-900_000_000, 900_000_001, rows).astype(np.int32),
        lng_e7=random.integers(-1_800_000_000, 1_800_000_001, rows).astype(np.int32),
        observed_at_ms=random.integers(0, 1 << 41, rows),
        at_ms=random.integers(0, 1 << 41, rows) if with_at else None,
    )


def assert_same_pings(left: PingBatch | PingColumns, right: PingBatch | PingColumns) -> None:
    for name in ("partner", "id_bytes", "id_end", "lat_e7", "lng_e7", "observed_at_ms"):
        assert np.array_equal(getattr(left, name), getattr(right, name)), name
    assert (left.at_ms is None) == (right.at_ms is None)
    if left.at_ms is not None and right.at_ms is not None:
        assert np.array_equal(left.at_ms, right.at_ms)


def malformed(kind: bytes, payload: bytes) -> str:
    with pytest.raises(MalformedEntry) as caught:
        decode_entry(kind, payload)
    return str(caught.value)


# --- bytes pinned by hand ---------------------------------------------------------------------------------------------

PINNED_TWO_PINGS = (
    b"\x86\xa1v\x01\xa1n\x02\xa5width\xc0\xa2at\xc2"
    # 22 bytes so far; with these 18 the columns begin at byte 40
    b"\xa3pad\xc4\x03\x00\x00\x00\xa7columns\xc6\x00\x00\x00\x30"
    + struct.pack("<qq", 1_700_000_000_000, -1)  # observed_at_ms
    + struct.pack("<ii", 300_000_000, -1)  # lat_e7
    + struct.pack("<ii", 1_140_000_000, 1)  # lng_e7
    + struct.pack("<II", 1, 4)  # id_end
    + struct.pack("<HH", 0, 258)  # partner
    + b"abcd"
)
PINNED: list[tuple[LogEntry, bytes, bytes]] = [
    (Tick(), b"tick", b"\x81\xa1v\x01"),
    (
        CLOSE,
        b"close",
        b"\x85\xa1v\x01\xa7desk_id\x92\xcf\x00\x00\x01\x8b\xcf\xe5\x68\x02\x00\xa8alert_id\xa3a17\xa8revision\xc0"
        b"\xa7outcome\xa5found",
    ),
    (
        REVISION,
        b"update",
        b"\x8b\xa1v\x01\xa7desk_id\x92\xcf\x00\x00\x01\x8b\xcf\xe5\x68\x01\x02\xa8alert_id\xa3a17\xa8revision\x03"
        b"\xa3lat\xcb\x40\x3e\x40\x00\x00\x00\x00\x00\xa3lng\xcb\xc0\x5c\xa0\x00\x00\x00\x00\x00"
        b"\xb0missing_since_ms\xcf\x00\x00\x01\x8b\xcf\xe5\x68\x00"
        b"\xa8schedule\x92\x92\xcb\x3f\xe0\x00\x00\x00\x00\x00\x00\xcb\x40\x59\x00\x00\x00\x00\x00\x00"
        b"\x92\xc0\xcb\x40\x7f\x40\x00\x00\x00\x00\x00"
        b"\xadexpires_at_ms\xcf\x00\x00\x01\x8b\xdf\x58\x7c\x00\xa6status\xa8exercise\xa8audience\x91\xa4amap",
    ),
    (
        replace(SETTINGS, default_schedule=((None, 100.0),)),
        b"settings",
        b"\x8a\xaeformat_version\x01\xb0emission_version\x01\xabshard_count\x04\xa9hash_name\xa6mum128"
        b"\xa8hash_key\xcf\xff\xff\xff\xff\xff\xff\xff\xff\xaelive_window_ms\xce\x01\x49\x97\x00"
        b"\xb3future_tolerance_ms\xce\x00\x04\x93\xe0\xacpush_ids_max\xcd\x03\xe8"
        b"\xb0default_schedule\x91\x92\xc0\xcb\x40\x59\x00\x00\x00\x00\x00\x00\xa8partners\x92\xa4amap\xa4didi",
    ),
]


@pytest.mark.parametrize(("entry", "kind", "payload"), PINNED, ids=lambda value: type(value).__name__)
def test_control_entries_have_the_bytes_pinned_by_hand(entry: LogEntry, kind: bytes, payload: bytes) -> None:
    assert encode_entry(entry) == (kind, payload)
    assert decode_entry(kind, payload) == entry


def test_ping_batch_has_the_bytes_pinned_by_hand() -> None:
    id_bytes, id_end = pack_ids(["a", "bcd"])
    batch = PingBatch(
        np.array([0, 258], np.uint16),
        id_bytes,
        id_end,
        np.array([300_000_000, -1], np.int32),
        np.array([1_140_000_000, 1], np.int32),
        np.array([1_700_000_000_000, -1], np.int64),
    )
    assert encode_entry(batch) == (b"pings", PINNED_TWO_PINGS)
    assert_same_pings(decode_pings(PINNED_TWO_PINGS), batch)


def test_any_msgpack_library_reads_a_ping_batch() -> None:
    fields = msgpack.unpackb(PINNED_TWO_PINGS)
    assert fields["n"] == 2
    assert fields["columns"][-4:] == b"abcd"


def test_push_entry_has_the_bytes_pinned_by_hand() -> None:
    id_bytes, id_end = pack_ids(["a", "x" * 31, "y" * 32, "团圆"])
    push = Push(0, "a17", 2, "alert", 100.0, 1_700_000_000_000, id_bytes, id_end)
    payload = (
        b"\x86\xa8alert_id\xa3a17\xa8revision\x02\xa4kind\xa5alert\xa7ring_km\xcb\x40\x59\x00\x00\x00\x00\x00\x00"
        b"\xa2at\xcf\x00\x00\x01\x8b\xcf\xe5\x68\x00\xaadevice_ids\x94\xa1a\xbf" + b"x" * 31 + b"\xd9\x20" + b"y" * 32
    ) + b"\xa6\xe5\x9b\xa2\xe5\x9c\x86"
    assert encode_push(push) == payload
    ids = ("a", "x" * 31, "y" * 32, "团圆")
    assert decode_push(payload) == PushEntry("a17", 2, "alert", 100.0, 1_700_000_000_000, ids)


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_at", [False, True])
@pytest.mark.parametrize("ids", [[], ["x"], ["same", "size"], ["", "ab", "c" * 64, "d" * 65], ["\x80" * 3, "团圆"]])
def test_ping_batch_comes_back_as_it_was(ids: list[str], with_at: bool) -> None:
    batch = pings(ids, with_at=with_at)
    assert_same_pings(decode_pings(encode_pings(batch)), batch)


def test_ids_of_one_length_are_sent_without_their_ends() -> None:
    fixed, varying = pings([f"{index:08}" for index in range(100)]), pings(["a"] + ["b" * 9] * 99)
    assert msgpack.unpackb(encode_pings(fixed))["width"] == 8
    assert msgpack.unpackb(encode_pings(varying))["width"] is None
    assert len(encode_pings(fixed)) < len(encode_pings(varying)) - 4 * 99


@pytest.mark.parametrize("ids", [[f"{index:08}" for index in range(5)], ["a", "bcd", "e" * 64]])
@pytest.mark.parametrize("with_at", [False, True])
def test_decoded_columns_are_aligned_read_only_views(ids: list[str], with_at: bool) -> None:
    payload = encode_pings(pings(ids, with_at=with_at))
    columns = decode_pings(payload)
    raw = np.frombuffer(payload, np.uint8)
    for name in PingColumns.__slots__:
        column = getattr(columns, name)
        if column is not None:
            assert column.flags.aligned, name
            assert not column.flags.writeable, name
            if name != "id_end":
                assert np.shares_memory(column, raw), name


def test_unaligned_payload_is_copied_into_aligned_columns() -> None:
    batch = pings(["a", "bcd"])
    fields = msgpack.unpackb(encode_pings(batch))
    columns = decode_pings(msgpack.packb(fields | {"pad": b"\x00" * 4}))
    assert_same_pings(columns, batch)
    assert columns.observed_at_ms.flags.aligned


def test_fields_of_a_ping_batch_may_come_in_any_order() -> None:
    batch = pings(["a", "bcd"], with_at=True)
    fields = msgpack.unpackb(encode_pings(batch))
    assert_same_pings(decode_pings(msgpack.packb(dict(reversed(fields.items())))), batch)


names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=16)
times_ms = st.integers(0, 253_402_300_000_000)


@st.composite
def alerts(draw: st.DrawFn) -> Alert:
    missing_since_ms = draw(st.integers(0, 2_000_000_000_000))
    audience = draw(st.none() | st.lists(names, min_size=1, max_size=3, unique=True).map(tuple))
    return Alert(
        draw(names),
        draw(st.integers(1, 1 << 40)),
        draw(st.floats(-90, 90)),
        draw(st.floats(-180, 180)),
        missing_since_ms,
        draw(st.sampled_from([DEFAULT_SCHEDULE, ((None, 12.5),), ((1 / 3, 1.0), (None, 2.0))])),
        missing_since_ms + draw(st.integers(1, 1 << 40)),
        draw(st.sampled_from(["actual", "exercise"])) if audience else "actual",
        audience,
    )


@given(
    st.one_of(
        st.builds(AlertRevision, st.sampled_from(["publish", "update"]), alerts(), st.tuples(times_ms, times_ms)),
        st.builds(
            AlertClose,
            names,
            st.none() | st.integers(1, 1 << 40),
            st.sampled_from(["found", "false_report", "cancelled"]),
            st.tuples(times_ms, times_ms),
        ),
    )
)
def test_alert_events_come_back_as_they_were(entry: LogEntry) -> None:
    assert decode_entry(*encode_entry(entry)) == entry


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=16), max_size=40))
def test_any_msgpack_library_reads_the_ids_of_a_push(ids: list[str]) -> None:
    push = Push(0, "a", 1, "resolved", 12.5, 7, *pack_ids(ids))
    assert msgpack.unpackb(encode_push(push)) == {
        "alert_id": "a",
        "revision": 1,
        "kind": "resolved",
        "ring_km": 12.5,
        "at": 7,
        "device_ids": ids,
    }
    assert decode_push(encode_push(push)).device_ids == tuple(ids)


@pytest.mark.parametrize("count", [0, 15, 16, 1000, 65_535, 65_536])
def test_push_of_any_number_of_ids_is_readable(count: int) -> None:
    push = Push(0, "a", 1, "alert", 1.0, 7, *pack_ids(["x"] * count))
    assert len(msgpack.unpackb(encode_push(push))["device_ids"]) == count


# --- what is refused --------------------------------------------------------------------------------------------------


def with_fields(payload: bytes, **changed: object) -> bytes:
    return bytes(msgpack.packb(msgpack.unpackb(payload) | changed))


def without(payload: bytes, name: str) -> bytes:
    fields = msgpack.unpackb(payload)
    del fields[name]
    return bytes(msgpack.packb(fields))


GOOD_PINGS = encode_pings(pings(["a", "bcd"]))
GOOD_REVISION = encode_entry(REVISION)[1]
GOOD_CLOSE = encode_entry(CLOSE)[1]
GOOD_SETTINGS = encode_entry(SETTINGS)[1]


@pytest.mark.parametrize(
    ("kind", "payload", "reason"),
    [
        (b"nonsense", b"", "unknown entry kind b'nonsense'"),
        (b"", b"", "unknown entry kind b''"),
        (b"tick", b"", "msgpack ends too early, or a length promises more than there is"),
        (b"tick", b"\x81\xa1v\x02", "format version must be 1, got 2"),
        (b"tick", b"\x81\xa1v\xc3", "format version must be 1, got True"),
        (b"tick", b"\x81\xa1v\x01\x00", "bytes follow the msgpack map"),
        (b"tick", b"\x82\xa1v\x01\xa1v\x01", "a field must not be given twice"),
        (b"tick", b"\x82\xa1v\x01\xa1w\x01", "unknown field 'w'"),
        (b"tick", b"\x80", "field 'v' is missing"),
        (b"tick", b"\x91\x01", "must be a msgpack map"),
        (b"tick", b"\x81\x01\x01", "field names must be msgpack strings"),
        (b"tick", b"\x81\xa1\xff\x01", "text must be UTF-8"),
        (b"tick", b"\x81\xa1v\xc1", "msgpack extension types are not used here"),
        (b"tick", b"\x81\xa1v\xd6\xff\x00\x00\x00\x00", "msgpack extension types are not used here"),
        (b"close", with_fields(GOOD_CLOSE, outcome="lost"), "outcome must be one of"),
        (b"close", with_fields(GOOD_CLOSE, outcome=["found"]), "outcome must be one of"),
        (b"close", with_fields(GOOD_CLOSE, revision=0), "revision must be an integer from 1 to"),
        (b"close", with_fields(GOOD_CLOSE, revision=True), "revision must be an integer from 1 to"),
        (b"close", with_fields(GOOD_CLOSE, desk_id=[1]), "desk_id must be two integers, got list of 1"),
        (b"close", with_fields(GOOD_CLOSE, desk_id=[1, -1]), "desk_id must be two integers"),
        (b"close", with_fields(GOOD_CLOSE, alert_id="x" * 65), "alert_id must have 1 to 64 characters, got 65"),
        (b"close", without(GOOD_CLOSE, "outcome"), "field 'outcome' is missing"),
        (b"publish", with_fields(GOOD_REVISION, lat=float("nan")), "lat must be from -90 to 90 degrees, got nan"),
        (b"publish", with_fields(GOOD_REVISION, lat=91), "lat must be from -90 to 90 degrees, got 91.0"),
        (b"publish", with_fields(GOOD_REVISION, lng="1"), "lat and lng must be numbers"),
        (b"publish", with_fields(GOOD_REVISION, schedule=[]), "schedule must have a step, got none"),
        (b"publish", with_fields(GOOD_REVISION, schedule=[[3, 1], [2, 4], [None, 5]]), "schedule hours must rise"),
        (b"publish", with_fields(GOOD_REVISION, schedule=[[None, 1, 2]]), "schedule must be an array of [hours, km]"),
        (b"publish", with_fields(GOOD_REVISION, expires_at_ms=0), "expires_at must be after missing_since"),
        (b"publish", with_fields(GOOD_REVISION, status="real"), "status must be one of actual, exercise, got 'real'"),
        (b"publish", with_fields(GOOD_REVISION, audience=None), "an exercise must name its partners in audience"),
        (b"publish", with_fields(GOOD_REVISION, audience=["a", "a"]), "audience must not name a partner twice"),
        (b"settings", with_fields(GOOD_SETTINGS, format_version=2), "format version must be 1, got 2"),
        (b"settings", with_fields(GOOD_SETTINGS, shard_count=0), "shard_count must be an integer from 1 to 65536"),
        (b"settings", with_fields(GOOD_SETTINGS, partners=["a", ""]), "partners: a partner's name must have 1 to 64"),
        (b"settings", with_fields(GOOD_SETTINGS, partners=["a", "a"]), "partners must not name a partner twice"),
        (b"settings", with_fields(GOOD_SETTINGS, hash_key=-1), "hash_key must be an integer from 0 to"),
        (b"settings", bytes(2 << 20), "must not exceed 1048576 bytes, got 2097152"),
        (b"pings", with_fields(GOOD_PINGS, v=2), "format version must be 1, got 2"),
        (b"pings", with_fields(GOOD_PINGS, n=-1), "'n' must be the number of pings"),
        (b"pings", with_fields(GOOD_PINGS, n=2.0), "'n' must be the number of pings"),
        (b"pings", with_fields(GOOD_PINGS, n=3), "'columns' has 48 bytes, which does not match 3 pings"),
        (b"pings", with_fields(GOOD_PINGS, n=(1 << 32) - 1), "'columns' has 48 bytes, which does not match"),
        (b"pings", with_fields(GOOD_PINGS, n=1), "the last must be the length of the ids"),
        (b"pings", with_fields(GOOD_PINGS, width=2), "'columns' has 48 bytes, which does not match 2 pings"),
        (b"pings", with_fields(GOOD_PINGS, width=65), "'width' must be nil or 1 to 64 bytes"),
        (b"pings", with_fields(GOOD_PINGS, at=1), "'at' must be true or false"),
        (b"pings", with_fields(GOOD_PINGS, columns="x" * 48), "'columns' must be msgpack binary"),
        (b"pings", with_fields(GOOD_PINGS, more=1), "a ping batch must have the fields"),
        (b"pings", without(GOOD_PINGS, "pad"), "a ping batch must have the fields"),
    ],
)
def test_malformed_entry_is_refused_with_its_reason(kind: bytes, payload: bytes, reason: str) -> None:
    assert reason in malformed(kind, payload)


def test_id_ends_that_fall_are_refused() -> None:
    payload = bytearray(GOOD_PINGS)
    at = payload.index(struct.pack("<II", 1, 4))
    payload[at : at + 8] = struct.pack("<II", 5, 4)
    assert "id ends must not fall" in malformed(b"pings", bytes(payload))


@pytest.mark.parametrize("kind", [b"settings", b"pings", b"publish", b"update", b"close", b"tick"])
@pytest.mark.parametrize(
    "payload",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\xa1v\xdd\xff\xff\xff\xff",
        b"\x81\xa7columns\xc6\xff\xff\xff\xff",
        b"\x81\xdb\xff\xff\xff\xff",
        b"\x91" * 500_000,
        b"\x81\xa1v" + b"\x91" * 500_000,
        b"\x81\xa1v\xdd\x00\x07\xa1\x20" + b"\xc0" * 500_000,
        b"\x81\xa1v" + b"\x81\xa0" * 250_000,
        b"\xde\xff\xff" + b"\xa0\xc0" * 65_535,
    ],
    ids=lambda payload: f"{payload[:8].hex()}..{len(payload)}",
)
def test_bombs_are_refused_in_10_ms_and_1_mb(kind: bytes, payload: bytes) -> None:
    malformed(kind, b"\x81")  # compiled
    tracemalloc.start()
    started_s = time.perf_counter()
    malformed(kind, payload)
    took_s = time.perf_counter() - started_s
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took_s <= 0.010
    assert peak_bytes <= 1 << 20


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_entry_or_malformed(payload: bytes) -> None:
    for kind in (b"settings", b"pings", b"publish", b"update", b"close", b"tick"):
        with contextlib.suppress(MalformedEntry):
            decode_entry(kind, payload)
    with contextlib.suppress(MalformedEntry):
        decode_push(payload)


values: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400)
@given(st.sampled_from([GOOD_SETTINGS, GOOD_REVISION, GOOD_CLOSE, GOOD_PINGS]), st.data())
def test_any_value_in_any_field_is_an_entry_or_malformed(payload: bytes, data: st.DataObject) -> None:
    fields = msgpack.unpackb(payload)
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(values)
    for kind in (b"settings", b"pings", b"publish", b"close"):
        with contextlib.suppress(MalformedEntry):
            decode_entry(kind, msgpack.packb(fields))


@settings(max_examples=300)
@given(st.data())
def test_damaged_entries_are_entries_or_malformed(data: st.DataObject) -> None:
    payload = bytearray(data.draw(st.sampled_from([GOOD_SETTINGS, GOOD_REVISION, GOOD_PINGS, PINNED_TWO_PINGS])))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(payload[: data.draw(st.integers(0, len(payload)))])
    for kind in (b"settings", b"pings", b"publish"):
        try:
            decoded = decode_entry(kind, cut)
        except MalformedEntry:
            continue
        if isinstance(decoded, PingColumns):
            screen_pings(decoded, 2)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"kind": "hello"}, "kind must be one of alert, update, resolved, got 'hello'"),
        ({"kind": ["alert"]}, "kind must be one of"),
        ({"ring_km": float("nan")}, "ring_km must be a finite number"),
        ({"ring_km": float("inf")}, "ring_km must be a finite number"),
        ({"at": -1}, "at must be an integer from 0"),
        ({"device_ids": "a"}, "device_ids must be an array of strings"),
        ({"device_ids": [1]}, "device_ids must be an array of strings"),
        ({"revision": 0}, "revision must be an integer from 1"),
        ({"alert_id": ""}, "alert_id must have 1 to 64 characters, got 0"),
    ],
)
def test_malformed_push_is_refused_with_its_reason(changed: dict[str, object], reason: str) -> None:
    good = encode_push(Push(0, "a", 1, "alert", 1.0, 7, *pack_ids(["x"])))
    with pytest.raises(MalformedEntry) as caught:
        decode_push(with_fields(good, **changed))
    assert reason in str(caught.value)


def test_push_with_a_field_of_a_later_version_is_readable() -> None:
    good = encode_push(Push(0, "a", 1, "alert", 1.0, 7, *pack_ids(["x"])))
    assert decode_push(with_fields(good, severity="high")).device_ids == ("x",)


# --- screening --------------------------------------------------------------------------------------------------------


def columns_of(batch: PingBatch, **changed: object) -> PingColumns:
    columns = {name: getattr(batch, name) for name in PingColumns.__slots__}
    return PingColumns(
        **{name: np.array(value, columns[name].dtype) for name, value in changed.items()}
        | {name: value for name, value in columns.items() if name not in changed}
    )


def test_batch_of_good_rows_is_not_copied() -> None:
    columns = decode_pings(encode_pings(pings(rows=50)))
    batch, refused = screen_pings(columns, 2)
    assert refused == {}
    assert np.shares_memory(batch.observed_at_ms, columns.observed_at_ms)
    assert_same_pings(batch, columns)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"lat_e7": [0, 900_000_001, 0]}, "latitude"),
        ({"lat_e7": [0, -900_000_001, 0]}, "latitude"),
        ({"lng_e7": [0, 1_800_000_001, 0]}, "longitude"),
        ({"lng_e7": [0, -1_800_000_001, 0]}, "longitude"),
        ({"lng_e7": [0, -(1 << 31), 0]}, "longitude"),
        ({"partner": [0, 2, 1]}, "partner"),
        ({"partner": [0, 65_535, 1]}, "partner"),
    ],
)
def test_bad_row_is_set_aside_and_counted(changed: dict[str, list[int]], reason: str) -> None:
    batch = pings(["first", "second", "third"], with_at=True)
    good, refused = screen_pings(columns_of(batch, **changed), 2)
    assert refused == {reason: 1}
    assert [good.device_id(row) for row in range(2)] == ["first", "third"]
    assert good.observed_at_ms.tolist() == batch.observed_at_ms[[0, 2]].tolist()
    assert good.at_ms is not None
    assert batch.at_ms is not None
    assert good.at_ms.tolist() == batch.at_ms[[0, 2]].tolist()


@pytest.mark.parametrize("edge", [(900_000_000, 1_800_000_000), (-900_000_000, -1_800_000_000)])
def test_edges_of_the_world_are_in_it(edge: tuple[int, int]) -> None:
    columns = columns_of(pings(["a"]), lat_e7=[edge[0]], lng_e7=[edge[1]], partner=[1])
    assert screen_pings(columns, 2)[1] == {}


@pytest.mark.parametrize("raw", [b"", b"x" * 65])
def test_id_of_a_wrong_length_is_set_aside(raw: bytes) -> None:
    batch = pings(["before", raw.decode(), "after"])
    good, refused = screen_pings(decode_pings(encode_pings(batch)), 2)
    assert refused == {"id_length": 1}
    assert [good.device_id(row) for row in range(2)] == ["before", "after"]


BAD_UTF8 = [
    b"\x80",
    b"\xc3",
    b"\xc0\xaf",  # overlong
    b"\xe0\x80\xaf",
    b"\xed\xa0\x80",  # a surrogate
    b"\xf0\x80\x80\xaf",
    b"\xf4\x90\x80\x80",  # beyond U+10FFFF
    b"\xf8\x88\x80\x80\x80",
    b"\xe5\x9b",
    b"\xff",
]


@pytest.mark.parametrize("raw", BAD_UTF8, ids=lambda raw: raw.hex())
def test_id_that_is_not_utf8_is_set_aside(raw: bytes) -> None:
    blob = b"good" + raw + "团圆".encode()
    ends = np.cumsum([4, len(raw), 6]).astype(np.uint32)
    columns = columns_of(pings(["a", "b", "c"]), id_bytes=np.frombuffer(blob, np.uint8), id_end=ends)
    good, refused = screen_pings(columns, 2)
    assert refused == {"id_utf8": 1}
    assert [good.device_id(row) for row in range(2)] == ["good", "团圆"]


def test_character_split_between_two_ids_spoils_both() -> None:
    blob = np.frombuffer("团".encode(), np.uint8)
    columns = columns_of(pings(["a", "b"]), id_bytes=blob, id_end=np.array([1, 3], np.uint32))
    good, refused = screen_pings(columns, 2)
    assert refused == {"id_utf8": 2}
    assert len(good) == 0


@given(st.lists(st.binary(max_size=70), min_size=1, max_size=20))
def test_screening_agrees_with_python_on_ids(raws: list[bytes]) -> None:
    def is_good(raw: bytes) -> bool:
        try:
            raw.decode()
        except UnicodeDecodeError:
            return False
        return 1 <= len(raw) <= 64

    blob = np.frombuffer(b"".join(raws), np.uint8) if any(raws) else np.empty(0, np.uint8)
    ends = np.cumsum([len(raw) for raw in raws]).astype(np.uint32)
    columns = columns_of(pings(["x"] * len(raws)), id_bytes=blob, id_end=ends)
    good, refused = screen_pings(columns, 2)
    kept = [raw.decode() for raw in raws if is_good(raw)]
    assert [good.device_id(row) for row in range(len(good))] == kept
    assert sum(refused.values()) == len(raws) - len(kept)


def test_no_partner_is_known_before_there_are_any() -> None:
    good, refused = screen_pings(columns_of(pings(["a", "b"])), 0)
    assert (len(good), refused) == (0, {"partner": 2})


def test_every_reason_for_refusal_has_a_fixed_name() -> None:
    assert set(wire._SCREEN_REASONS) < set(wire.REFUSAL_REASONS)


# --- rows by shard ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_at", [False, True])
@pytest.mark.parametrize("shard_count", [1, 3, 8, 64])
def test_split_keeps_every_ping_once_and_in_order(shard_count: int, with_at: bool) -> None:
    batch = pings([f"phone-{index % 50}-{'x' * (index % 7)}" for index in range(500)], with_at=with_at)
    parts = split_by_shard(batch, replace(SETTINGS, shard_count=shard_count))
    shards = shard_of_ids(batch.partner, batch.id_bytes, batch.id_end, SETTINGS.hash_key, shard_count)
    assert len(parts) == shard_count
    for shard, part in enumerate(parts):
        rows = np.flatnonzero(shards == shard)
        if part is None:
            assert len(rows) == 0
            continue
        assert [part.device_id(row) for row in range(len(part))] == [batch.device_id(int(row)) for row in rows]
        for name in ("partner", "lat_e7", "lng_e7", "observed_at_ms", "at_ms"):
            if getattr(batch, name) is not None:
                assert np.array_equal(getattr(part, name), getattr(batch, name)[rows]), name


def test_split_of_nothing_is_nothing() -> None:
    assert split_by_shard(pings([]), SETTINGS) == [None] * 4
    assert split_by_shard(pings([]), replace(SETTINGS, shard_count=1)) == [None]


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (2, 4), (3, 3), (0, 0), (4, 5)])
def test_slice_holds_the_rows_it_names(start: int, stop: int) -> None:
    batch = pings(["a", "bc", "def", "g", "hi"], with_at=True)
    part = slice_pings(batch, start, stop)
    assert [part.device_id(row) for row in range(len(part))] == ["a", "bc", "def", "g", "hi"][start:stop]
    assert part.observed_at_ms.tolist() == batch.observed_at_ms[start:stop].tolist()
