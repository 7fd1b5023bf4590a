"""Bytes <-> columns: every entry of a shard log, and every entry of a push queue.

All of it is msgpack. Control entries are maps of named values; a ping batch is a small map around one block of
little-endian binary columns, so that it is decoded without copying:

    {"v": 1, "n": rows, "width": bytes of every id | nil, "at": bool, "pad": 0..7 zero bytes, "columns": bytes}

    columns   observed_at_ms i64[n] · at_ms i64[n], if "at" · lat_e7 i32[n] · lng_e7 i32[n]
              · id_end u32[n], unless "width" · partner u16[n] · id_bytes u8[...]

The widest come first, and `pad` lets the block begin at a multiple of 8 bytes in the payload (CPython places the bytes
of a `bytes` object at a multiple of 16): every column is then aligned for its type. Numba compiles a kernel anew for
unaligned columns, so a payload that is not aligned is copied once instead. Decoded columns are read-only views.

What is wrong with an entry as a whole is a `MalformedEntry`, whatever the bytes: nothing here recurses, and nothing is
allocated from a length that a payload merely claims. What is wrong with single pings is not: see `screen_pings`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import msgpack
import numpy as np
import numpy.typing as npt

from flows import wire_kernels as kernels
from flows.alert_json import REVISION_MAX, check_alert, check_alert_id, check_outcome, check_partner_name
from flows.ping_payload import ping_payload
from geoindex.columns import I32, I64, ID_BYTES_MAX, PARTNER_COUNT_MAX, U8, U16, U32, PingBatch, Push
from geoindex.entries import (
    FORMAT_VERSION,
    KINDS,
    Alert,
    AlertClose,
    AlertRevision,
    LogEntry,
    Schedule,
    Settings,
    Tick,
)
from geoindex.kernels import shard_of_ids
from geoindex.rings import check_schedule

SETTINGS = b"settings"
PINGS = b"pings"
PUBLISH = b"publish"
UPDATE = b"update"
CLOSE = b"close"
TICK = b"tick"

PING_BYTES_MAX = 64 << 20
"""A ping batch; ours are under 2 MB (`flows.log.PINGS_PER_ENTRY_MAX`)."""
SETTINGS_BYTES_MAX = 1 << 20
ALERT_BYTES_MAX = 64 << 10
"""An audience of a thousand partners is 32 KB."""
PUSH_BYTES_MAX = 8 << 20

_FIELDS_MAX = 16
_ID_ROWS_MAX = 1 << 16

REFUSAL_REASONS = ("id_length", "id_utf8", "latitude", "longitude", "partner", "from_the_future", "too_old")
"""Why a ping is set aside. The last two are found by the shard machine, which knows the clock."""
_SCREEN_REASONS = {
    "id_length": kernels.ID_LENGTH,
    "id_utf8": kernels.ID_UTF8,
    "latitude": kernels.LATITUDE,
    "longitude": kernels.LONGITUDE,
    "partner": kernels.PARTNER,
}

_WALK_REASONS = {
    kernels.TRUNCATED: "msgpack ends too early, or a length promises more than there is",
    kernels.TOO_DEEP: f"msgpack must not nest deeper than {kernels.DEPTH_MAX}",
    kernels.TOO_MANY_VALUES: "msgpack holds too many values",
    kernels.UNKNOWN_TYPE: "msgpack extension types are not used here",
    kernels.TRAILING_BYTES: "bytes follow the msgpack map",
    kernels.NOT_A_MAP: "must be a msgpack map",
    kernels.TOO_MANY_FIELDS: f"must have at most {_FIELDS_MAX} fields",
    kernels.KEY_NOT_TEXT: "field names must be msgpack strings",
}

_EMPTY_I64: I64 = np.empty(0, np.int64)
_INT64_MAX = (1 << 63) - 1


class MalformedEntry(ValueError):
    """Bytes that are no entry of their kind. The reason is fit for a log line: bounded, and without device ids."""


@dataclass(frozen=True, slots=True)
class PushEntry:
    """One entry of a push queue as a partner reads it. `at_ms`: the shard clock, ms since 1970 (UTC)."""

    alert_id: str
    revision: int
    kind: str
    ring_km: float
    at_ms: int
    device_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PingColumns:
    """A ping batch as it was sent: columns of the right lengths, rows not screened yet. Columns as in `PingBatch`."""

    partner: U16
    id_bytes: U8
    id_end: U32
    lat_e7: I32
    lng_e7: I32
    observed_at_ms: I64
    at_ms: I64 | None = None

    def __len__(self) -> int:
        return len(self.partner)


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode_entry(entry: LogEntry) -> tuple[bytes, bytes]:
    """One log entry -> its kind (the stream entry's field) and its payload (the field's value).

    An `AlertRevision` must have the event "publish" or "update". Rows of a ping batch are not screened.
    """
    match entry:
        case PingBatch():
            return PINGS, encode_pings(entry)
        case Tick():
            return TICK, _pack({"v": FORMAT_VERSION})
        case Settings():
            return SETTINGS, _pack(_settings_fields(entry))
        case AlertRevision():
            assert entry.event in ("publish", "update"), f"event must be publish or update, got {entry.event!r}"
            return entry.event.encode(), _pack(_revision_fields(entry))
        case AlertClose():
            return CLOSE, _pack(
                {
                    "v": FORMAT_VERSION,
                    "desk_id": list(entry.desk_id),
                    "alert_id": entry.alert_id,
                    "revision": entry.revision,
                    "outcome": entry.outcome,
                }
            )


def encode_pings(batch: PingBatch) -> bytes:
    """A ping batch -> payload. Ids of one common length go as `width`, without their ends: 4 bytes less a ping."""
    width = int(kernels.common_width(batch.id_end))
    if not 1 <= width <= ID_BYTES_MAX:
        width = 0
    return ping_payload(batch, width)


def encode_push(push: Push) -> bytes:
    """One push -> the payload of its queue entry: a msgpack map, `device_ids` an array of strings."""
    head = (
        push_head(push.alert_id, push.revision, push.kind, push.ring_km)
        + _pack(push.at_ms)
        + _pack("device_ids")
        + _array_header(len(push.id_end))
    )
    out = np.empty(len(head) + len(push.id_bytes) + 2 * len(push.id_end), np.uint8)
    out[: len(head)] = np.frombuffer(head, np.uint8)
    stop = kernels.write_texts(push.id_bytes, push.id_end, out, len(head))
    return out[:stop].tobytes()


def push_head(alert_id: str, revision: int, kind: str, ring_km: float) -> bytes:
    """The payload of a push up to the time: what pushes of one alert and moment have in common."""
    return (
        b"\x86"
        + _pack("alert_id")
        + _pack(alert_id)
        + _pack("revision")
        + _pack(revision)
        + _pack("kind")
        + _pack(kind)
        + _pack("ring_km")
        + _pack(float(ring_km))
        + _pack("at")
    )


def _settings_fields(settings: Settings) -> dict[str, object]:
    return {
        "format_version": settings.format_version,
        "emission_version": settings.emission_version,
        "shard_count": settings.shard_count,
        "hash_name": settings.hash_name,
        "hash_key": settings.hash_key,
        "live_window_ms": settings.live_window_ms,
        "future_tolerance_ms": settings.future_tolerance_ms,
        "push_ids_max": settings.push_ids_max,
        "default_schedule": [list(step) for step in settings.default_schedule],
        "partners": list(settings.partners),
    }


def _revision_fields(entry: AlertRevision) -> dict[str, object]:
    alert = entry.alert
    return {
        "v": FORMAT_VERSION,
        "desk_id": list(entry.desk_id),
        "alert_id": alert.alert_id,
        "revision": alert.revision,
        "lat": float(alert.lat),
        "lng": float(alert.lng),
        "missing_since_ms": alert.missing_since_ms,
        "schedule": [[None if hours is None else float(hours), float(km)] for hours, km in alert.schedule],
        "expires_at_ms": alert.expires_at_ms,
        "status": alert.status,
        "audience": None if alert.audience is None else list(alert.audience),
    }


def _pack(value: object) -> bytes:
    return cast(bytes, msgpack.packb(value))


def _array_header(count: int) -> bytes:
    if count < 16:
        return bytes([0x90 | count])
    if count < 1 << 16:
        return b"\xdc" + count.to_bytes(2, "big")
    return b"\xdd" + count.to_bytes(4, "big")


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode_entry(kind: bytes, payload: bytes) -> LogEntry | PingColumns:
    """A stream entry's field and value -> the log entry; a ping batch as `PingColumns`, to be screened.

    Raises MalformedEntry, and nothing else, for any bytes that are no entry of that kind.
    """
    if kind == PINGS:
        return decode_pings(payload)
    if kind == TICK:
        _version(_fields(payload, ALERT_BYTES_MAX, ("v",)))
        return Tick()
    if kind == SETTINGS:
        return _decode_settings(payload)
    if kind in (PUBLISH, UPDATE):
        return _decode_revision(kind.decode(), payload)
    if kind == CLOSE:
        return _decode_close(payload)
    raise MalformedEntry(f"unknown entry kind {kind[:32]!r}")


def decode_pings(payload: bytes) -> PingColumns:
    """A ping batch's payload -> columns: read-only views into `payload`, copied only if it is not aligned.

    Checked: the map, the version, that the block of columns has exactly the length its header calls for, that id ends
    never fall and end with the ids. Not checked: values of single rows (`screen_pings` does, faster, for all).
    Raises MalformedEntry.
    """
    if len(payload) > PING_BYTES_MAX:
        raise MalformedEntry(f"a ping batch must not exceed {PING_BYTES_MAX} bytes, got {len(payload)}")
    raw = np.frombuffer(payload, np.uint8)
    span = np.empty((_FIELDS_MAX, kernels.SPAN_COLUMNS), np.int64)
    count = int(kernels.map_fields(raw, span, 2 * _FIELDS_MAX))
    if count < 0:
        raise MalformedEntry(_WALK_REASONS[count])
    fields = {bytes(payload[field[0] : field[1]]): field for field in span[:count].tolist()}
    if fields.keys() != _PING_FIELDS or count != len(_PING_FIELDS):
        raise MalformedEntry(f"a ping batch must have the fields {', '.join(_PING_FIELD_NAMES)}, once each")
    version, rows, width = (fields[name][kernels.NUMBER] for name in (b"v", b"n", b"width"))
    if version != FORMAT_VERSION:
        raise MalformedEntry(f"format version must be {FORMAT_VERSION}, got {version}")
    if rows < 0:
        raise MalformedEntry("'n' must be the number of pings")
    if payload[fields[b"width"][kernels.VALUE_START]] == _NIL:
        width = 0
    elif not 1 <= width <= ID_BYTES_MAX:
        raise MalformedEntry(f"'width' must be nil or 1 to {ID_BYTES_MAX} bytes")
    at_kind = payload[fields[b"at"][kernels.VALUE_START]]
    if at_kind not in (_FALSE, _TRUE):
        raise MalformedEntry("'at' must be true or false")
    with_at = at_kind == _TRUE
    columns = fields[b"columns"]
    if not _BIN_8 <= payload[columns[kernels.VALUE_START]] <= _BIN_32:
        raise MalformedEntry("'columns' must be msgpack binary")
    start, stop = columns[kernels.CONTENT_START], columns[kernels.VALUE_STOP]

    fixed_bytes = rows * (8 + 8 * with_at + 4 + 4 + (0 if width else 4) + 2)
    id_bytes_total = stop - start - fixed_bytes
    if id_bytes_total < 0 or (width and id_bytes_total != width * rows):
        raise MalformedEntry(f"'columns' has {stop - start} bytes, which does not match {rows} pings")
    at = start

    def column(dtype: np.dtype[Any], count: int) -> Any:
        nonlocal at
        view = raw[at : at + count * dtype.itemsize].view(dtype)
        at += view.nbytes
        return view if view.flags.aligned else _read_only(view.copy())

    observed_at_ms = column(_I64, rows)
    at_ms = column(_I64, rows) if with_at else None
    lat_e7 = column(_I32, rows)
    lng_e7 = column(_I32, rows)
    if width:
        id_end = _read_only(np.arange(width, rows * width + 1, width, dtype=np.uint32))
    else:
        id_end = column(_U32, rows)
    partner = column(_U16, rows)
    id_bytes = column(_U8, id_bytes_total)
    if not width and not kernels.ends_fit(id_end, id_bytes_total):
        raise MalformedEntry("id ends must not fall, and the last must be the length of the ids")
    return PingColumns(partner, id_bytes, id_end, lat_e7, lng_e7, observed_at_ms, at_ms)


_PING_FIELD_NAMES = ("v", "n", "width", "at", "pad", "columns")
_I64, _I32, _U32, _U16, _U8 = (np.dtype(name) for name in ("<i8", "<i4", "<u4", "<u2", "u1"))
_NIL, _FALSE, _TRUE, _BIN_8, _BIN_32 = 0xC0, 0xC2, 0xC3, 0xC4, 0xC6
_PING_FIELDS = {name.encode() for name in _PING_FIELD_NAMES}


def decode_push(payload: bytes) -> PushEntry:
    """The payload of a push queue's entry. Fields that a later version may add are ignored. Raises MalformedEntry."""
    fields = _fields(payload, PUSH_BYTES_MAX, _PUSH_FIELDS, others_allowed=True)
    kind, ring_km, device_ids = fields["kind"], fields["ring_km"], fields["device_ids"]
    if kind not in KINDS:
        raise MalformedEntry(f"kind must be one of {', '.join(KINDS)}, got {_brief(kind)}")
    if not _is_number(ring_km) or not 0 <= ring_km < float("inf"):
        raise MalformedEntry(f"ring_km must be a finite number, got {_brief(ring_km)}")
    if not isinstance(device_ids, list) or not all(isinstance(device_id, str) for device_id in device_ids):
        raise MalformedEntry("device_ids must be an array of strings")
    return PushEntry(
        alert_id=_alert_id(fields),
        revision=_integer(fields, "revision", 1, REVISION_MAX),
        kind=kind,
        ring_km=float(ring_km),
        at_ms=_integer(fields, "at", 0),
        device_ids=tuple(device_ids),
    )


_PUSH_FIELDS = ("alert_id", "revision", "kind", "ring_km", "at", "device_ids")


def _decode_settings(payload: bytes) -> Settings:
    names = tuple(_settings_fields(Settings()))
    fields = _fields(payload, SETTINGS_BYTES_MAX, names, value_count_max=PARTNER_COUNT_MAX + 1024)
    if fields["format_version"] != FORMAT_VERSION or isinstance(fields["format_version"], bool):
        raise MalformedEntry(f"format version must be {FORMAT_VERSION}, got {_brief(fields['format_version'])}")
    hash_name = fields["hash_name"]
    if not isinstance(hash_name, str) or not 1 <= len(hash_name) <= 64:
        raise MalformedEntry(f"hash_name must be a name, got {_brief(hash_name)}")
    try:
        return Settings(
            shard_count=_integer(fields, "shard_count", 1, 1 << 16),
            partners=_partner_names(fields["partners"], "partners"),
            live_window_ms=_integer(fields, "live_window_ms", 1),
            future_tolerance_ms=_integer(fields, "future_tolerance_ms", 0),
            push_ids_max=_integer(fields, "push_ids_max", 1, _ID_ROWS_MAX),
            default_schedule=_schedule(fields["default_schedule"]),
            hash_name=hash_name,
            hash_key=_integer(fields, "hash_key", 0, (1 << 64) - 1),
            format_version=FORMAT_VERSION,
            emission_version=_integer(fields, "emission_version", 0),
        )
    except MalformedEntry:
        raise
    except ValueError as error:
        raise MalformedEntry(str(error)) from None


def _decode_revision(event: str, payload: bytes) -> AlertRevision:
    fields = _fields(payload, ALERT_BYTES_MAX, _REVISION_FIELDS)
    _version(fields)
    lat, lng, status, audience = fields["lat"], fields["lng"], fields["status"], fields["audience"]
    if not _is_number(lat) or not _is_number(lng):
        raise MalformedEntry("lat and lng must be numbers")
    if not isinstance(status, str):
        raise MalformedEntry(f"status must be text, got {_brief(status)}")
    try:
        alert = Alert(
            alert_id=_alert_id(fields),
            revision=_integer(fields, "revision", 1, REVISION_MAX),
            lat=float(lat),
            lng=float(lng),
            missing_since_ms=_integer(fields, "missing_since_ms", -_INT64_MAX),
            schedule=_schedule(fields["schedule"]),
            expires_at_ms=_integer(fields, "expires_at_ms", -_INT64_MAX),
            status=status,
            audience=None if audience is None else _partner_names(audience, "audience"),
        )
        check_alert(alert)
    except MalformedEntry:
        raise
    except ValueError as error:
        raise MalformedEntry(str(error)) from None
    return AlertRevision(event, alert, _desk_id(fields))


_REVISION_FIELDS = (
    "v",
    "desk_id",
    "alert_id",
    "revision",
    "lat",
    "lng",
    "missing_since_ms",
    "schedule",
    "expires_at_ms",
    "status",
    "audience",
)


def _decode_close(payload: bytes) -> AlertClose:
    fields = _fields(payload, ALERT_BYTES_MAX, ("v", "desk_id", "alert_id", "revision", "outcome"))
    _version(fields)
    try:
        outcome = check_outcome(fields["outcome"])
    except ValueError as error:
        raise MalformedEntry(str(error)) from None
    revision = None if fields["revision"] is None else _integer(fields, "revision", 1, REVISION_MAX)
    return AlertClose(_alert_id(fields), revision, outcome, _desk_id(fields))


# --- pieces of a decoder ----------------------------------------------------------------------------------------------


def _fields(
    payload: bytes,
    bytes_max: int,
    names: tuple[str, ...],
    *,
    others_allowed: bool = False,
    value_count_max: int = _ID_ROWS_MAX + 64,
) -> dict[str, object]:
    """The fields of a msgpack map with exactly (or, if `others_allowed`, at least) these names, each once."""
    if len(payload) > bytes_max:
        raise MalformedEntry(f"must not exceed {bytes_max} bytes, got {len(payload)}")
    span = np.empty((_FIELDS_MAX, kernels.SPAN_COLUMNS), np.int64)
    count = int(kernels.map_fields(np.frombuffer(payload, np.uint8), span, value_count_max))
    if count < 0:
        raise MalformedEntry(_WALK_REASONS[count])
    unpacked = _unpack(payload)
    assert isinstance(unpacked, dict), "a walked map unpacks to a dict"
    fields = cast(dict[str, object], unpacked)
    if len(fields) != count:
        raise MalformedEntry("a field must not be given twice")
    missing = [name for name in names if name not in fields]
    if missing:
        raise MalformedEntry(f"field {missing[0]!r} is missing")
    unknown = [name for name in fields if name not in names]
    if unknown and not others_allowed:
        raise MalformedEntry(f"unknown field {_brief(unknown[0])}")
    return fields


def _unpack(packed: bytes) -> object:
    """Unpack bytes that `map_fields` has walked, or a value of a few bytes."""
    try:
        value: object = msgpack.unpackb(packed, raw=False, strict_map_key=True)
    except UnicodeDecodeError:
        raise MalformedEntry("text must be UTF-8") from None
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise MalformedEntry(f"no valid msgpack ({type(error).__name__})") from None
    return value


def _version(fields: dict[str, object]) -> None:
    version = fields["v"]
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise MalformedEntry(f"format version must be {FORMAT_VERSION}, got {_brief(version)}")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integer(fields: dict[str, object], name: str, least: int, most: int = _INT64_MAX) -> int:
    value = fields[name]
    if not _is_int(value) or not least <= value <= most:
        raise MalformedEntry(f"{name} must be an integer from {least} to {most}, got {_brief(value)}")
    return value


def _alert_id(fields: dict[str, object]) -> str:
    try:
        return check_alert_id(fields["alert_id"])
    except ValueError as error:
        raise MalformedEntry(str(error)) from None


def _desk_id(fields: dict[str, object]) -> tuple[int, int]:
    desk_id = fields["desk_id"]
    if (
        not isinstance(desk_id, list)
        or len(desk_id) != 2
        or not all(_is_int(part) and 0 <= part < 1 << 64 for part in desk_id)
    ):
        raise MalformedEntry(f"desk_id must be two integers, got {_brief(desk_id)}")
    return desk_id[0], desk_id[1]


def _partner_names(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > PARTNER_COUNT_MAX:
        raise MalformedEntry(f"{name} must be an array of at most {PARTNER_COUNT_MAX} partner names")
    try:
        names = tuple(check_partner_name(partner) for partner in value)
    except ValueError as error:
        raise MalformedEntry(f"{name}: {error}") from None
    if len(set(names)) != len(names):
        raise MalformedEntry(f"{name} must not name a partner twice")
    return names


def _schedule(value: object) -> Schedule:
    """Structure here, rules in `geoindex.rings.check_schedule`."""
    if not isinstance(value, list):
        raise MalformedEntry("schedule must be an array of [hours, km]")
    for step in value:
        if (
            not isinstance(step, list)
            or len(step) != 2
            or not (step[0] is None or _is_number(step[0]))
            or not _is_number(step[1])
        ):
            raise MalformedEntry("schedule must be an array of [hours, km]")
    schedule = tuple((None if hours is None else float(hours), float(km)) for hours, km in value)
    try:
        check_schedule(schedule, "entry")
    except ValueError as error:
        raise MalformedEntry(str(error).removeprefix("entry: ")) from None
    return schedule


def _brief(value: object) -> str:
    """A value for a message: short, whatever was sent."""
    if isinstance(value, list | dict | bytes):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 48 else text[:45] + "..."


def _read_only(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    column.flags.writeable = False
    return column


# --- rows -------------------------------------------------------------------------------------------------------------


def screen_pings(pings: PingColumns, partner_count: int) -> tuple[PingBatch, dict[str, int]]:
    """Set aside the pings that break rule 2 on their own: no clock is needed to see it.

    Returns the same columns as a batch when all rows are good (a few ns a ping), otherwise a copy of the good rows,
    order kept; and how many were set aside, by reason (only reasons that occurred).
    `partner_count`: length of the settings' list at this place of the log.
    """
    batch = batch_of(pings)
    verdict = judge_pings(batch, partner_count)
    if verdict is None:
        return batch, {}
    counts = np.bincount(verdict, minlength=kernels.VERDICT_COUNT).tolist()
    return keep_pings(batch, verdict), {
        reason: counts[code] for reason, code in _SCREEN_REASONS.items() if counts[code]
    }


def batch_of(pings: PingColumns) -> PingBatch:
    """The same columns as a batch, rows not screened."""
    return PingBatch(
        pings.partner, pings.id_bytes, pings.id_end, pings.lat_e7, pings.lng_e7, pings.observed_at_ms, pings.at_ms
    )


def judge_pings(batch: PingBatch, partner_count: int) -> U8 | None:
    """What is wrong with each row, u8[n], as `wire_kernels` numbers it (0: nothing); None: with no row anything."""
    columns = (batch.partner, batch.id_bytes, batch.id_end, batch.lat_e7, batch.lng_e7)
    if not kernels.any_row_suspect(*columns, partner_count):
        return None
    verdict = np.empty(len(batch), np.uint8)
    counts = np.empty(kernels.VERDICT_COUNT, np.int64)
    kernels.judge_rows(*columns, partner_count, verdict, counts)
    return verdict if counts[kernels.GOOD] < len(batch) else None


def keep_pings(batch: PingBatch, verdict: U8) -> PingBatch:
    """A copy of the rows whose `verdict` u8[n] is 0, order kept."""
    (good,) = _grouped(batch, verdict.astype(np.uint16), 1)
    return good or slice_pings(batch, 0, 0)


def split_by_shard(batch: PingBatch, settings: Settings) -> list[PingBatch | None]:
    """The batch's pings by shard, order kept; None where a shard has none. `batch` must be screened.

    One shard: the batch itself. More: views into one read-only copy.
    """
    if settings.shard_count == 1:
        return [batch if len(batch) else None]
    shard = shard_of_ids(batch.partner, batch.id_bytes, batch.id_end, settings.hash_key, settings.shard_count)
    return _grouped(batch, shard, settings.shard_count)


def slice_pings(batch: PingBatch, start: int, stop: int) -> PingBatch:
    """Rows [start, stop) of a batch: views, except the id ends."""
    first_byte = int(batch.id_end[start - 1]) if start else 0
    last_byte = int(batch.id_end[stop - 1]) if stop > start else first_byte
    return PingBatch(
        batch.partner[start:stop],
        batch.id_bytes[first_byte:last_byte],
        _read_only(batch.id_end[start:stop] - np.uint32(first_byte)),
        batch.lat_e7[start:stop],
        batch.lng_e7[start:stop],
        batch.observed_at_ms[start:stop],
        None if batch.at_ms is None else batch.at_ms[start:stop],
    )


def _grouped(batch: PingBatch, target: U16, target_count: int) -> list[PingBatch | None]:
    """Rows by `target` u16[n], order kept; rows whose target is `target_count` or more are left out."""
    row_start = np.empty(target_count + 1, np.int64)
    id_start = np.empty(target_count + 1, np.int64)
    kernels.count_rows(target, batch.id_end, row_start, id_start)
    rows, id_bytes_total = int(row_start[-1]), int(id_start[-1])
    with_at = batch.at_ms is not None
    partner = np.empty(rows, np.uint16)
    id_bytes = np.empty(id_bytes_total, np.uint8)
    id_end = np.empty(rows, np.uint32)
    lat_e7, lng_e7 = np.empty(rows, np.int32), np.empty(rows, np.int32)
    observed_at_ms = np.empty(rows, np.int64)
    at_ms = np.empty(rows if with_at else 0, np.int64)
    kernels.group_rows(
        target,
        row_start,
        id_start,
        batch.partner,
        batch.id_bytes,
        batch.id_end,
        batch.lat_e7,
        batch.lng_e7,
        batch.observed_at_ms,
        _EMPTY_I64 if batch.at_ms is None else batch.at_ms,
        partner,
        id_bytes,
        id_end,
        lat_e7,
        lng_e7,
        observed_at_ms,
        at_ms,
    )
    for column in (partner, id_bytes, id_end, lat_e7, lng_e7, observed_at_ms, at_ms):
        _read_only(column)
    groups: list[PingBatch | None] = []
    for index in range(target_count):
        first, last = int(row_start[index]), int(row_start[index + 1])
        if first == last:
            groups.append(None)
            continue
        groups.append(
            PingBatch(
                partner[first:last],
                id_bytes[int(id_start[index]) : int(id_start[index + 1])],
                id_end[first:last],
                lat_e7[first:last],
                lng_e7[first:last],
                observed_at_ms[first:last],
                at_ms[first:last] if with_at else None,
            )
        )
    return groups
