"""The body of a request -> pings, and for each one that is none its position and reason.

    JSON      [{"device_id": "...", "lat": 39.9, "lng": 116.4, "observed_at": 1760000000000}, ...]
    NDJSON    one such object a line; empty lines are passed over, and counted in positions
    columns   one ping batch in msgpack, as `flows.wire` describes it: for those who send millions

`observed_at`: ms since 1970, or ISO 8601 (without an offset: UTC). Members of other names are passed over.

A ping that is none costs its neighbours nothing, not even one that is no JSON: a body is read at once by msgspec, and
only if that fails row by row, between the commas that a scan for brackets and quotes has found. The body as a whole is
refused only if there are no rows in it to be told apart: no array, one that ends in the middle, columns of wrong
lengths. An empty body is refused too: an empty array is how to send nothing.

The partner of a ping is the account it came through. The column of that name in a ping batch is read past.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from operator import attrgetter

import msgspec
import numpy as np

from flows.alert_json import TIME_MS_MAX, event_time_ms
from flows.wire import (
    PING_BYTES_MAX,
    MalformedEntry,
    batch_of,
    decode_pings,
    encode_pings,
    judge_pings,
    keep_pings,
)
from flows.wire_kernels import ID_LENGTH, ID_UTF8, LATITUDE, LONGITUDE, VERDICT_COUNT
from gateway import ping_kernels as kernels
from gateway.compression import BodyTooLarge, MalformedBody
from gateway.datum import Datum, pings_in_wgs84
from geoindex.columns import E7, F64, I64, LAT_E7_MAX, LNG_E7_MAX, U8, PingBatch, pack_ids

PINGS_PER_BODY_MAX = 250_000
REFUSALS_LISTED_MAX = 1_000
"""In an answer; the rest is counted."""
LOOKED_INTO_BYTES_MAX = 4_096
"""A row longer than this, and no ping, is not taken apart to see why."""
CLOCK_SLACK_MS = 10_000
"""The shard machine judges by the time of the log entry, which comes a little later than the request: whoever is within
this of its limits is let through to it."""

MALFORMED, FIELD_MISSING, ID_TYPE, OBSERVED_AT, FROM_THE_FUTURE, TOO_OLD = range(VERDICT_COUNT, VERDICT_COUNT + 6)
"""Verdicts on a row beyond those of `flows.wire_kernels`."""

REASONS: dict[int, tuple[str, str]] = {
    ID_LENGTH: ("id_length", "device_id must have 1 to 64 bytes in UTF-8"),
    ID_UTF8: ("id_utf8", "device_id must be UTF-8"),
    LATITUDE: ("latitude", "lat must be a number from -90 to 90"),
    LONGITUDE: ("longitude", "lng must be a number from -180 to 180"),
    MALFORMED: ("malformed", "a ping must be a JSON object, in UTF-8, with numbers in range"),
    FIELD_MISSING: ("field_missing", "a ping must have device_id, lat, lng and observed_at"),
    ID_TYPE: ("id_type", "device_id must be text"),
    OBSERVED_AT: ("observed_at", "observed_at must be ms since 1970 or an ISO 8601 time, before the year 10000"),
    FROM_THE_FUTURE: ("from_the_future", "observed_at must not be ahead of the server's clock"),
    TOO_OLD: ("too_old", "observed_at must not be older than the live window"),
}
"""Reason, and the same in words, by verdict."""


class Format(StrEnum):
    """Content-Type of a body of pings."""

    JSON = "application/json"
    NDJSON = "application/x-ndjson"
    COLUMNS = "application/vnd.tuanyuan.pings+msgpack"


@dataclass(frozen=True, slots=True)
class Terms:
    """What a body's pings are taken under."""

    partner_index: int
    """In the settings: that of the account."""
    datum: Datum
    oldest_ms: int
    newest_ms: int
    """Of `observed_at`, both included: what is beyond is certain to be set aside by the shard machine."""


@dataclass(frozen=True, slots=True)
class BodyPings:
    """What a body holds. `pings`: the good ones, in WGS-84, order kept."""

    pings: PingBatch
    received: int
    refused_positions: I64
    """Ascending: of a ping in its array or batch, or of its line, from 0."""
    refused_verdicts: U8

    @property
    def refused(self) -> int:
        return len(self.refused_positions)

    def refused_by_reason(self) -> dict[str, int]:
        """How many, by reason."""
        counts = np.bincount(self.refused_verdicts)
        return {REASONS[code][0]: int(counts[code]) for code in np.flatnonzero(counts).tolist()}

    def refusals(self) -> Iterable[tuple[int, str, str]]:
        """Position, reason and words of the first ones, REFUSALS_LISTED_MAX at most."""
        positions = self.refused_positions[:REFUSALS_LISTED_MAX].tolist()
        verdicts = self.refused_verdicts[:REFUSALS_LISTED_MAX].tolist()
        return [(position, *REASONS[verdict]) for position, verdict in zip(positions, verdicts, strict=True)]


def frozen(pings: PingBatch) -> PingBatch:
    """The same batch, its columns read-only from now on, as those that are views of a body are anyway.

    Numba compiles a kernel for each kind of array that it meets; so it meets one.
    """
    for column in (
        pings.partner, pings.id_bytes, pings.id_end, pings.lat_e7, pings.lng_e7, pings.observed_at_ms
    ):  # fmt: skip
        column.flags.writeable = False
    return pings


def read_pings(raw: bytes, format: Format, terms: Terms) -> BodyPings:
    """The pings of a body that is not compressed. Raises MalformedBody, BodyTooLarge."""
    if not raw:
        raise MalformedBody("the body must not be empty; an empty array holds no pings")
    if format is Format.COLUMNS:
        return _judged(_columns(raw, terms), terms)
    rows = _rows(raw, format)
    return _judged(_batch(rows, terms), terms)


# --- rows of JSON -----------------------------------------------------------------------------------------------------


class _Ping(msgspec.Struct, gc=False):
    device_id: str
    lat: float
    lng: float
    observed_at: int | float | str


_ARRAY = msgspec.json.Decoder(list[_Ping])
_OBJECT = msgspec.json.Decoder(_Ping)
_ANYTHING = msgspec.json.Decoder()
_NO_JSON = (msgspec.MsgspecError, ValueError, RecursionError)
"""What msgspec raises for bytes that are not what was asked for; ValueError for text that is not UTF-8, and for whole
numbers of thousands of digits."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that were read, and those that could not be."""

    good: list[_Ping]
    good_positions: I64
    bad_positions: I64
    bad_verdicts: U8


def _rows(raw: bytes, format: Format) -> _Rows:
    # Every row is an object, so there are no more rows than braces.
    if raw.count(b"{") <= PINGS_PER_BODY_MAX:
        try:
            if format is Format.JSON:
                return _all_good(_ARRAY.decode(raw))
            rows = _OBJECT.decode_lines(raw)
            if len(rows) == _line_count(raw):
                return _all_good(rows)
        except _NO_JSON:
            pass  # which row it was is found below
    starts, stops, positions = _lines(raw) if format is Format.NDJSON else _elements(raw)
    return _one_by_one(raw, starts, stops, positions)


def _all_good(rows: list[_Ping]) -> _Rows:
    return _Rows(rows, np.arange(len(rows)), np.empty(0, np.int64), np.empty(0, np.uint8))


def _elements(raw: bytes) -> tuple[I64, I64, I64]:
    """Where the elements of a JSON array begin and end, and their positions."""
    starts, stops = np.empty(PINGS_PER_BODY_MAX, np.int64), np.empty(PINGS_PER_BODY_MAX, np.int64)
    count = kernels.split_array(np.frombuffer(raw, np.uint8), starts, stops)
    if count == kernels.NOT_AN_ARRAY:
        raise MalformedBody("the body must be a JSON array of pings, beginning with [")
    if count == kernels.UNFINISHED:
        raise MalformedBody("the JSON array must end with ]; the body ends in the middle of it")
    if count == kernels.TRAILING_BYTES:
        raise MalformedBody("nothing may follow the JSON array")
    if count == kernels.TOO_MANY:
        raise _too_many()
    return starts[:count], stops[:count], np.arange(count)


def _line_count(raw: bytes) -> int:
    return raw.count(b"\n") + (not raw.endswith(b"\n"))


def _lines(raw: bytes) -> tuple[I64, I64, I64]:
    """Where the lines begin and end, and their positions; without those that hold nothing but spaces."""
    if _line_count(raw) > PINGS_PER_BODY_MAX:
        raise _too_many()
    ends = np.flatnonzero(np.frombuffer(raw, np.uint8) == ord("\n"))
    starts, stops = np.append(0, ends + 1), np.append(ends, len(raw))
    spans = zip(starts.tolist(), stops.tolist(), strict=True)
    filled = np.array([bool(raw[start:stop].strip(b" \t\r")) for start, stop in spans], np.bool_)
    return starts[filled], stops[filled], np.flatnonzero(filled)


def _one_by_one(raw: bytes, starts: I64, stops: I64, positions: I64) -> _Rows:
    view = memoryview(raw)
    rows: list[_Ping] = []
    verdict = np.zeros(len(starts), np.uint8)
    for index, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        try:
            rows.append(_OBJECT.decode(view[start:stop]))
        except _NO_JSON:
            verdict[index] = _what_is_wrong(view[start:stop])
    bad = verdict != 0
    return _Rows(rows, positions[~bad], positions[bad], verdict[bad])


def _what_is_wrong(row: memoryview) -> int:
    """The verdict on a row that is no ping."""
    if len(row) > LOOKED_INTO_BYTES_MAX:
        return MALFORMED
    try:
        fields = _ANYTHING.decode(row)
    except _NO_JSON:
        return MALFORMED
    if not isinstance(fields, dict):
        return MALFORMED
    if not fields.keys() >= {"device_id", "lat", "lng", "observed_at"}:
        return FIELD_MISSING
    if not isinstance(fields["device_id"], str):
        return ID_TYPE
    for name, verdict in (("lat", LATITUDE), ("lng", LONGITUDE)):
        if isinstance(fields[name], bool) or not isinstance(fields[name], int | float):
            return verdict
    if isinstance(fields["observed_at"], bool) or not isinstance(fields["observed_at"], int | float | str):
        return OBSERVED_AT
    return MALFORMED


def _too_many() -> BodyTooLarge:
    return BodyTooLarge(f"a body must hold at most {PINGS_PER_BODY_MAX} pings")


# --- columns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Unjudged:
    """A batch with what is known to be wrong already. Columns of the batch: u8[n] verdicts, i64[n] positions."""

    batch: PingBatch
    verdict: U8 | None
    positions: I64 | None
    """None: 0, 1, 2 ..."""
    bad_positions: I64
    bad_verdicts: U8


def _batch(rows: _Rows, terms: Terms) -> _Unjudged:
    """Rows as columns. A coordinate out of range becomes one that is still out of range as a whole number."""
    pings = rows.good
    id_bytes, id_end = _ids(list(map(_DEVICE_ID, pings)))
    times_ms, verdict = _times(list(map(_OBSERVED_AT, pings)))
    batch = PingBatch(
        np.full(len(pings), terms.partner_index, np.uint16),
        id_bytes,
        id_end,
        _scaled(np.array(list(map(_LAT, pings)), np.float64), 90.0, LAT_E7_MAX),
        _scaled(np.array(list(map(_LNG, pings)), np.float64), 180.0, LNG_E7_MAX),
        times_ms,
    )
    return _Unjudged(frozen(batch), verdict, rows.good_positions, rows.bad_positions, rows.bad_verdicts)


_DEVICE_ID, _LAT, _LNG, _OBSERVED_AT = map(attrgetter, ("device_id", "lat", "lng", "observed_at"))


def _ids(ids: list[str]) -> tuple[U8, np.ndarray[tuple[int], np.dtype[np.uint32]]]:
    """As `pack_ids`, quickly where all are ASCII: as many bytes as characters."""
    text = "".join(ids)
    if not text.isascii():
        return pack_ids(ids)
    ends = np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids))).astype(np.uint32)
    return np.frombuffer(text.encode(), np.uint8), ends


def _scaled(degrees: F64, limit: float, limit_e7: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    inside = np.abs(degrees) <= limit
    return np.where(inside, np.rint(np.where(inside, degrees, 0.0) * E7), limit_e7 + 1).astype(np.int32)


def _times(times: list[int | float | str]) -> tuple[I64, U8 | None]:
    """Times in ms, i64[n], and verdicts, if any is none: 0 or OBSERVED_AT."""
    if set(map(type, times)) <= {int}:
        try:
            times_ms = np.array(times, np.int64)
        except OverflowError:
            pass  # which one it was is found below
        else:
            wrong = (times_ms > TIME_MS_MAX) | (times_ms < -TIME_MS_MAX)
            return times_ms, np.where(wrong, np.uint8(OBSERVED_AT), np.uint8(0)) if wrong.any() else None
    times_ms = np.zeros(len(times), np.int64)
    verdict = np.zeros(len(times), np.uint8)
    for index, time in enumerate(times):
        try:
            times_ms[index] = event_time_ms(time, "observed_at")
        except (ValueError, OverflowError):
            verdict[index] = OBSERVED_AT
    return times_ms, verdict


def _columns(raw: bytes, terms: Terms) -> _Unjudged:
    if len(raw) > PING_BYTES_MAX:
        raise BodyTooLarge(f"a ping batch must not exceed {PING_BYTES_MAX} bytes")
    try:
        columns = decode_pings(raw)
    except MalformedEntry as malformed:
        raise MalformedBody(str(malformed)) from None
    if len(columns) > PINGS_PER_BODY_MAX:
        raise _too_many()
    if columns.at_ms is not None:
        raise MalformedBody("'at' must be false: a clock in the rows is for recordings")
    batch = frozen(batch_of(replace(columns, partner=np.full(len(columns), terms.partner_index, np.uint16))))
    return _Unjudged(batch, None, None, np.empty(0, np.int64), np.empty(0, np.uint8))


# --- judging ----------------------------------------------------------------------------------------------------------


def _judged(found: _Unjudged, terms: Terms) -> BodyPings:
    """Set aside what breaks rule 2, convert the rest to WGS-84. The first reason found is the one given."""
    batch, times_ms = found.batch, found.batch.observed_at_ms
    verdict = judge_pings(batch, terms.partner_index + 1)
    late = len(batch) > 0 and (int(times_ms.min()) < terms.oldest_ms or int(times_ms.max()) > terms.newest_ms)
    if verdict is not None or found.verdict is not None or late:
        if verdict is None:
            verdict = np.zeros(len(batch), np.uint8)
        if found.verdict is not None:
            verdict = np.where(verdict == 0, found.verdict, verdict)
        verdict[(verdict == 0) & (times_ms > terms.newest_ms)] = FROM_THE_FUTURE
        verdict[(verdict == 0) & (times_ms < terms.oldest_ms)] = TOO_OLD
    received = len(batch) + len(found.bad_positions)
    if verdict is None or not verdict.any():
        pings = frozen(pings_in_wgs84(terms.datum, batch))
        return BodyPings(pings, received, found.bad_positions, found.bad_verdicts)
    refused = np.flatnonzero(verdict)
    positions = refused if found.positions is None else found.positions[refused]
    positions = np.concatenate([found.bad_positions, positions])
    verdicts = np.concatenate([found.bad_verdicts, verdict[refused]])
    order = np.argsort(positions, kind="stable")
    pings = frozen(pings_in_wgs84(terms.datum, keep_pings(batch, verdict)))
    return BodyPings(pings, received, positions[order], verdicts[order])


def run_every_kernel() -> list[PingBatch]:
    """Read a small body of every kind, so that the kernels are compiled and loaded; what came out of them."""
    pings = [{"device_id": name, "lat": lat, "lng": 120, "observed_at": 1} for name, lat in (("a", 30), ("bb", 100))]
    raw = msgspec.json.encode(pings)
    terms = [Terms(0, datum, 0, 2) for datum in Datum]
    found = [read_pings(raw, Format.JSON, one).pings for one in terms]
    found.append(read_pings(raw[:-1] + b",0]", Format.JSON, terms[0]).pings)
    return found + [read_pings(encode_pings(found[0]), Format.COLUMNS, one).pings for one in terms]
