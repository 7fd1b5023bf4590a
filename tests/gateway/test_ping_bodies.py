"""Bodies of pings: what is good comes through as it is, what is not is named, and costs its neighbours nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.wire import encode_pings
from gateway import ping_bodies
from gateway.compression import BodyTooLarge, MalformedBody
from gateway.datum import Datum, to_wgs84
from gateway.ping_bodies import (
    LOOKED_INTO_BYTES_MAX,
    PINGS_PER_BODY_MAX,
    REASONS,
    BodyPings,
    Format,
    Terms,
    read_pings,
)
from geoindex.columns import PingBatch
from tests.geoindex.machines import batch_of
from tests.reference.events import PingEvent

NOW_MS = 1_760_000_000_000
TERMS = Terms(5, Datum.WGS84, NOW_MS - 1_000_000, NOW_MS + 1_000)
GOOD = {"device_id": "phone", "lat": 30.2592, "lng": 120.1304, "observed_at": NOW_MS}


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def read(value: Any, format: Format = Format.JSON, terms: Terms = TERMS) -> BodyPings:
    raw = value if isinstance(value, bytes) else dumps(value)
    return read_pings(raw, format, terms)


def rows(found: BodyPings) -> list[tuple[int, str, int, int, int]]:
    pings = found.pings
    return [
        (
            int(pings.partner[row]),
            pings.device_id(row),
            int(pings.lat_e7[row]),
            int(pings.lng_e7[row]),
            int(pings.observed_at_ms[row]),
        )
        for row in range(len(pings))
    ]


def refused(found: BodyPings) -> list[tuple[int, str]]:
    return [(position, reason) for position, reason, _ in found.refusals()]


def columns(*pings: tuple[str | bytes, int, int, int], with_at: bool = False) -> bytes:
    """Ids as they are, good or not."""
    ids = [name if isinstance(name, bytes) else name.encode() for name, *_ in pings]
    times = np.array([at_ms for *_, at_ms in pings], np.int64)
    return encode_pings(
        PingBatch(
            np.zeros(len(pings), np.uint16),
            np.frombuffer(b"".join(ids), np.uint8),
            np.cumsum([len(name) for name in ids]).astype(np.uint32),
            np.array([lat for _, lat, _, _ in pings], np.int32),
            np.array([lng for _, _, lng, _ in pings], np.int32),
            times,
            times if with_at else None,
        )
    )


# ---- what is good


def test_an_array_becomes_columns_in_its_order() -> None:
    found = read([GOOD, GOOD | {"device_id": "乙", "lat": -90, "lng": 180, "observed_at": NOW_MS - 1}])
    assert rows(found) == [(5, "phone", 302592000, 1201304000, NOW_MS), (5, "乙", -900000000, 1800000000, NOW_MS - 1)]
    assert (found.received, found.refused) == (2, 0)


@pytest.mark.parametrize(
    ("written", "ms"),
    [
        (NOW_MS, NOW_MS),
        (float(NOW_MS), NOW_MS),
        (str(NOW_MS), NOW_MS),
        ("2025-10-09T08:53:20Z", NOW_MS),
        ("2025-10-09T16:53:20+08:00", NOW_MS),
        ("2025-10-09T08:53:20", NOW_MS),
        ("2025-10-09 08:53:19.9999", NOW_MS - 1),
    ],
)
def test_times_are_ms_or_iso_8601(written: object, ms: int) -> None:
    assert rows(read([GOOD | {"observed_at": written}]))[0][-1] == ms


def test_other_members_are_passed_over_whatever_they_hold() -> None:
    more = GOOD | {"speed": 3.5, "tags": [[{"a": []}]], "partner": "somebody else"}
    assert rows(read([more])) == rows(read([GOOD]))


def test_coordinates_are_rounded_to_a_centimetre() -> None:
    found = read([GOOD | {"lat": 30.00000004999, "lng": -0.00000005001}])
    assert rows(found)[0][2:4] == (300000000, -1)


def test_lines_are_read_with_and_without_a_last_line_end_and_with_empty_ones() -> None:
    line = dumps(GOOD)
    for body in (line, line + b"\n", line + b"\r\n", b"\n \n" + line + b"\n\n"):
        found = read(body, Format.NDJSON)
        assert rows(found) == rows(read([GOOD]))
        assert (found.received, found.refused) == (1, 0)


def test_columns_are_taken_without_a_copy_and_without_their_partner() -> None:
    found = read(columns(("a", 1, 2, NOW_MS), ("bb", -3, 4, NOW_MS - 5)), Format.COLUMNS)
    assert rows(found) == [(5, "a", 1, 2, NOW_MS), (5, "bb", -3, 4, NOW_MS - 5)]
    assert not found.pings.lat_e7.flags.owndata


@pytest.mark.parametrize("format", [Format.JSON, Format.COLUMNS])
def test_every_format_is_converted_from_the_datum_of_the_account(format: Format) -> None:
    terms = Terms(0, Datum.GCJ02, 0, NOW_MS)
    body = dumps([GOOD]) if format is Format.JSON else columns(("phone", 302592000, 1201304000, NOW_MS))
    expected = to_wgs84(Datum.GCJ02, np.array([302592000], np.int32), np.array([1201304000], np.int32))
    assert rows(read(body, format, terms))[0][2:4] == (expected[0][0], expected[1][0])


# ---- what is not


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device_id": ""}, "id_length"),
        ({"device_id": "x" * 65}, "id_length"),
        ({"device_id": "团" * 22}, "id_length"),
        ({"device_id": 7}, "id_type"),
        ({"device_id": None}, "id_type"),
        ({"lat": 90.0000001}, "latitude"),
        ({"lat": -91}, "latitude"),
        ({"lat": "30"}, "latitude"),
        ({"lat": True}, "latitude"),
        ({"lat": None}, "latitude"),
        ({"lat": 1e300}, "latitude"),
        ({"lng": 180.5}, "longitude"),
        ({"lng": [120]}, "longitude"),
        ({"observed_at": "yesterday"}, "observed_at"),
        ({"observed_at": None}, "observed_at"),
        ({"observed_at": True}, "observed_at"),
        ({"observed_at": NOW_MS + 0.5}, "observed_at"),
        ({"observed_at": 1 << 62}, "observed_at"),
        ({"observed_at": NOW_MS + 1_001}, "from_the_future"),
        ({"observed_at": NOW_MS - 1_000_001}, "too_old"),
        ({"observed_at": -1}, "too_old"),
        ({"observed_at": "1969-12-31"}, "too_old"),
    ],
)
def test_a_ping_that_is_none_is_named_and_its_neighbours_are_taken(change: dict[str, object], reason: str) -> None:
    body = [GOOD, GOOD | change, GOOD | {"device_id": "last"}]
    expected = rows(read([GOOD, GOOD | {"device_id": "last"}]))
    for found in (read(body), read(b"\n".join(map(dumps, body)), Format.NDJSON)):
        assert refused(found) == [(1, reason)]
        assert rows(found) == expected
        assert found.received == 3
        assert found.refused_by_reason() == {reason: 1}


@pytest.mark.parametrize("missing", list(GOOD))
def test_a_member_that_is_missing_is_said(missing: str) -> None:
    found = read([{name: value for name, value in GOOD.items() if name != missing}, GOOD])
    assert refused(found) == [(0, "field_missing")]


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        b'{"device_id":"a","lat":NaN,"lng":2,"observed_at":3}',
        b'{"device_id":"a","lat":1e999,"lng":2,"observed_at":3}',
        b'{"device_id":"\\ud800","lat":1,"lng":2,"observed_at":3}',
        b'{"device_id":"\xff","lat":1,"lng":2,"observed_at":3}',
        b'{"device_id":"a","lat":1,"lng":2,"observed_at":3]',
        b"{'device_id':'a'}",
        b'{"a":' + b"[" * 2_000 + b"]" * 2_000 + b"}",
        b'{"device_id":"a","lat":1,"lng":2,"observed_at":' + b"9" * 5_000 + b"}",
        b'{"x":"' + b"y" * LOOKED_INTO_BYTES_MAX + b'"}',
    ],
)
def test_an_element_that_is_no_object_does_not_hide_the_next(broken: bytes) -> None:
    good = dumps(GOOD)
    found = read(b"[" + good + b"," + broken + b",\n" + good + b"]")
    assert rows(found) == rows(read([GOOD, GOOD]))
    assert [position for position, _ in refused(found)] == [1]
    assert set(found.refused_by_reason()) <= {"malformed", "observed_at"}
    if broken.strip():
        found = read(good + b"\n" + broken + b"\n" + good, Format.NDJSON)
        assert rows(found) == rows(read([GOOD, GOOD]))
        assert [position for position, _ in refused(found)] == [1]


def test_positions_of_lines_count_empty_ones() -> None:
    good = dumps(GOOD)
    found = read(b"\n" + good + b"\n\n{}\n" + dumps(GOOD | {"lat": 99}), Format.NDJSON)
    assert refused(found) == [(3, "field_missing"), (4, "latitude")]
    assert found.received == 3


def test_columns_are_judged_row_by_row() -> None:
    body = columns(
        ("a", 1, 2, NOW_MS),
        ("", 1, 2, NOW_MS),
        (b"\xff\xfe", 1, 2, NOW_MS),
        ("d", 900000001, 2, NOW_MS),
        ("e", 1, -1800000001, NOW_MS),
        ("f", 1, 2, NOW_MS + 1_001),
        ("g", 1, 2, -(1 << 63)),
        ("h" * 65, 1, 2, NOW_MS),
        ("i", 900000000, -1800000000, NOW_MS + 1_000),
    )
    found = read(body, Format.COLUMNS)
    assert refused(found) == [
        (1, "id_length"),
        (2, "id_utf8"),
        (3, "latitude"),
        (4, "longitude"),
        (5, "from_the_future"),
        (6, "too_old"),
        (7, "id_length"),
    ]
    assert [device_id for _, device_id, *_ in rows(found)] == ["a", "i"]


def test_refusals_of_both_kinds_are_listed_by_position() -> None:
    found = read([{}, GOOD | {"lat": 91}, None, GOOD | {"lng": 181}, GOOD])
    assert refused(found) == [(0, "field_missing"), (1, "latitude"), (2, "malformed"), (3, "longitude")]


def test_every_verdict_has_a_reason_and_words() -> None:
    assert len({reason for reason, _ in REASONS.values()}) == len(REASONS)
    assert all("must" in words for _, words in REASONS.values())


# ---- bodies as a whole


@pytest.mark.parametrize(
    ("body", "format", "words"),
    [
        (b"", Format.JSON, "empty"),
        (b"", Format.NDJSON, "empty"),
        (b"", Format.COLUMNS, "empty"),
        (b"   ", Format.JSON, "array"),
        (b"{}", Format.JSON, "array"),
        (b"\xef\xbb\xbf[]", Format.JSON, "array"),
        (b"[", Format.JSON, "middle"),
        (b'["', Format.JSON, "middle"),
        (b'["\\"]', Format.JSON, "middle"),
        (b"[[]", Format.JSON, "middle"),
        (b"[" * 100_000, Format.JSON, "middle"),
        (b"[] x", Format.JSON, "follow"),
        (b"[][]", Format.JSON, "follow"),
        (b"\x80", Format.COLUMNS, "fields"),
        (b"hello", Format.COLUMNS, "msgpack"),
        (columns(("a", 1, 2, 3)) + b"\0", Format.COLUMNS, "follow"),
        (columns(("a", 1, 2, 3))[:-1], Format.COLUMNS, "ends too early"),
        (columns(("a", 1, 2, 3), with_at=True), Format.COLUMNS, "'at' must be false"),
    ],
)
def test_a_body_whose_pings_cannot_be_told_apart_is_refused(body: bytes, format: Format, words: str) -> None:
    with pytest.raises(MalformedBody, match=words):
        read(body, format)


@pytest.mark.parametrize("body", [b"[]", b" [ ] \r\n", b"[\t]"])
def test_an_empty_array_holds_no_pings(body: bytes) -> None:
    assert read(body).received == 0
    assert read(columns(), Format.COLUMNS).received == 0


def test_a_body_with_too_many_pings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping_bodies, "PINGS_PER_BODY_MAX", 3)
    line = dumps(GOOD)
    bodies = {
        Format.JSON: [dumps([GOOD] * 3), dumps([GOOD] * 4)],
        Format.NDJSON: [b"\n".join([line] * 3), b"\n".join([line] * 4)],
        Format.COLUMNS: [columns(*[("a", 1, 2, NOW_MS)] * 3), columns(*[("a", 1, 2, NOW_MS)] * 4)],
    }
    for format, (most, more) in bodies.items():
        assert len(read(most, format).pings) == 3
        with pytest.raises(BodyTooLarge, match="at most 3 pings"):
            read(more, format)


def test_millions_of_empty_elements_are_refused_without_making_them() -> None:
    for body, format in ((b"[" + b"0," * PINGS_PER_BODY_MAX + b"0]", Format.JSON), (b"\n" * 300_000, Format.NDJSON)):
        with pytest.raises(BodyTooLarge):
            read(body, format)


# ---- one at a time and all at once are the same

IDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=70)
ANY_PING = st.fixed_dictionaries(
    {
        "device_id": st.one_of(IDS, st.integers()),
        "lat": st.one_of(st.floats(-100, 100), st.integers(-100, 100), st.none()),
        "lng": st.one_of(st.floats(-200, 200), st.text(max_size=3)),
        "observed_at": st.one_of(
            st.integers(NOW_MS - 2_000_000, NOW_MS + 2_000),
            st.just("2025-10-09T08:53:20Z"),
            st.floats(allow_nan=False, allow_infinity=False),
            st.integers(-(1 << 70), 1 << 70),
            st.just(-(1 << 63)),
        ),
    }
)
ANY_ELEMENT: st.SearchStrategy[Any] = st.one_of(
    ANY_PING, ANY_PING, st.just(GOOD), st.sampled_from([None, 7, "x", [], {}, {"lat": 1}])
)


@given(elements=st.lists(ANY_ELEMENT, max_size=12))
def test_a_ping_is_judged_alike_whatever_stands_beside_it(elements: list[Any]) -> None:
    together = read(elements)
    expected: list[Any] = []
    expected_refused: list[tuple[int, str]] = []
    for position, element in enumerate(elements):
        alone = read([element])
        expected += rows(alone)
        expected_refused += [(position, reason) for _, reason in refused(alone)]
    assert rows(together) == expected
    assert refused(together) == expected_refused
    assert together.received == len(elements)
    if elements:
        as_lines = read(b"\n".join(map(dumps, elements)), Format.NDJSON)
        assert (rows(as_lines), refused(as_lines)) == (rows(together), refused(together))


@given(
    elements=st.lists(
        st.dictionaries(st.sampled_from([*GOOD, "x"]), st.sampled_from(["", '"', "\\", "]},{[", 1.5, 2, None, NOW_MS]))
    ),
    spaces=st.sampled_from([b"", b" ", b"\n\t"]),
)
def test_elements_are_told_apart_whatever_their_texts_hold(elements: list[Any], spaces: bytes) -> None:
    body = spaces + b"[" + (spaces + b"," + spaces).join(map(dumps, elements)) + spaces + b"]" + spaces
    starts, stops, positions = ping_bodies._elements(body)
    assert [json.loads(body[start:stop]) for start, stop in zip(starts, stops, strict=True)] == elements
    assert positions.tolist() == list(range(len(elements)))


def test_what_a_partner_sends_as_columns_is_what_it_sends_as_json() -> None:
    events = [
        PingEvent(
            "amap",
            f"phone-{row % 7}-{row:0{1 + row % 40}d}",
            300000000 + 977 * row,
            1200000000 - 31 * row,
            NOW_MS - row,
        )
        for row in range(500)
    ]
    as_json = [
        {
            "device_id": one.device_id,
            "lat": one.lat_e7 / 1e7,
            "lng": one.lng_e7 / 1e7,
            "observed_at": one.observed_at_ms,
        }
        for one in events
    ]
    from_columns = read(encode_pings(batch_of(events, ("amap",))), Format.COLUMNS)
    assert rows(read(as_json)) == rows(from_columns)
