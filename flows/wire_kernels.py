"""The loops behind `flows.wire`: walking msgpack without building it, checking and moving columns, writing pushes.

Kernels that read untrusted bytes, or columns that were only checked for structure, say what must hold before they are
called, and read nothing outside the arrays they are given.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from geoindex.columns import I32, I64, ID_BYTES_MAX, LAT_E7_MAX, LNG_E7_MAX, U8, U16, U32
from geoindex.kernels import copy_id
from geoindex.numba_typing import Int, inline_kernel, kernel, load_u64

# --- msgpack ----------------------------------------------------------------------------------------------------------

DEPTH_MAX = 8
"""Containers inside containers. Our own entries nest 3 deep (map -> schedule -> step)."""

# What `map_fields` answers instead of a number of fields.
TRUNCATED = -1
TOO_DEEP = -2
TOO_MANY_VALUES = -3
UNKNOWN_TYPE = -4
TRAILING_BYTES = -5
NOT_A_MAP = -6
TOO_MANY_FIELDS = -7
KEY_NOT_TEXT = -8

# Columns of the span table that `map_fields` fills: one row a field, positions in the payload.
KEY_START, KEY_STOP, VALUE_START, CONTENT_START, VALUE_STOP, NUMBER = range(6)
SPAN_COLUMNS = 6
"""NUMBER: the value of a field that is a whole number from 0 to 2^32 - 1, otherwise -1."""


@inline_kernel
def _number(raw: U8, at: Int, size: Int) -> np.int64:
    """`size` (1, 2, 4) big-endian bytes at `at`, which must lie inside `raw`."""
    value = np.int64(0)
    for index in range(at, at + size):
        value = (value << np.int64(8)) | np.int64(raw[index])
    return value


@kernel
def map_fields(raw: U8, span: I64, value_count_max: int) -> Int:
    """Walk one msgpack map that must fill `raw` u8[n] exactly; its fields' positions -> `span` i64[fields_max, 6].

    Returns the number of fields, or one of the negative answers above. Reads each byte at most once, builds nothing
    and never recurses, so a nesting bomb or a length of 4 GB costs what its few bytes cost.
    Extension types (timestamps too) are refused: no entry holds one.
    """
    stop = np.int64(raw.shape[0])
    left = np.empty(DEPTH_MAX, np.int64)  # values still to come in each open container
    depth = 0
    at = np.int64(0)
    value_count = 0
    field_count = 0
    in_value = False  # at depth 1: the next value is a field's value, not its key
    while True:
        # One value begins at `at`.
        if at >= stop:
            return TRUNCATED
        value_count += 1
        if value_count > value_count_max:
            return TOO_MANY_VALUES
        kind = raw[at]
        head = at
        at += 1
        length_size = 0
        length = np.int64(0)  # bytes of content
        children = np.int64(-1)
        is_map = False
        is_text = False
        if kind <= 0x7F or kind >= 0xE0 or kind == 0xC0 or kind == 0xC2 or kind == 0xC3:
            pass  # small integer, nil, false, true
        elif kind <= 0x8F:
            children = np.int64(kind & 0x0F)
            is_map = True
        elif kind <= 0x9F:
            children = np.int64(kind & 0x0F)
        elif kind <= 0xBF:
            length = np.int64(kind & 0x1F)
            is_text = True
        elif 0xC4 <= kind <= 0xC6:  # bin 8, 16, 32
            length_size = 1 << (kind - 0xC4)
        elif kind == 0xCA or kind == 0xD2 or kind == 0xCE:  # float 32, int 32, uint 32
            length = np.int64(4)
        elif kind == 0xCB or kind == 0xD3 or kind == 0xCF:  # float 64, int 64, uint 64
            length = np.int64(8)
        elif kind == 0xCC or kind == 0xD0:
            length = np.int64(1)
        elif kind == 0xCD or kind == 0xD1:
            length = np.int64(2)
        elif 0xD9 <= kind <= 0xDB:  # str 8, 16, 32
            length_size = 1 << (kind - 0xD9)
            is_text = True
        elif kind == 0xDC or kind == 0xDD:  # array 16, 32
            length_size = 2 << (kind - 0xDC)
            children = np.int64(0)
        elif kind == 0xDE or kind == 0xDF:  # map 16, 32
            length_size = 2 << (kind - 0xDE)
            children = np.int64(0)
            is_map = True
        else:
            return UNKNOWN_TYPE
        if length_size:
            if at + length_size > stop:
                return TRUNCATED
            size = _number(raw, at, length_size)
            at += length_size
            if children == 0:
                children = size
            else:
                length = size
        content = at
        if length > stop - at:
            return TRUNCATED
        at += length

        number = np.int64(-1)
        if kind <= 0x7F:
            number = np.int64(kind)
        elif 0xCC <= kind <= 0xCE:
            number = _number(raw, content, at - content)

        if depth == 0:
            if not is_map:
                return NOT_A_MAP
            if children > span.shape[0]:
                return TOO_MANY_FIELDS
        elif depth == 1:
            if in_value:
                span[field_count, VALUE_START] = head
                span[field_count, CONTENT_START] = content
                span[field_count, NUMBER] = number
                span[field_count, VALUE_STOP] = at  # of a container: corrected when it closes
                field_count += 1
            else:
                if not is_text:
                    return KEY_NOT_TEXT
                span[field_count, KEY_START] = content
                span[field_count, KEY_STOP] = at
            in_value = not in_value
        if depth:
            left[depth - 1] -= 1
        if children >= 0:
            # A child needs a byte at least: a header that promises more than is left is refused here.
            values = children * np.int64(2) if is_map else children
            if values > stop - at:
                return TRUNCATED
            if depth == DEPTH_MAX:
                return TOO_DEEP
            left[depth] = values
            depth += 1
        while depth and left[depth - 1] == 0:
            depth -= 1
            if depth == 1:
                span[field_count - 1, VALUE_STOP] = at
        if depth == 0:
            return field_count if at == stop else TRAILING_BYTES


@inline_kernel
def _write_text(raw: U8, start: Int, stop: Int, out: U8, at: Int) -> Int:
    """Bytes `start` to `stop` of `raw`, 1 to 64 of them, as a msgpack string; returns the position behind it."""
    size = stop - start
    if size < 32:
        out[at] = np.uint8(0xA0 | size)
        at += 1
    else:
        out[at] = np.uint8(0xD9)
        out[at + 1] = np.uint8(size)
        at += 2
    return copy_id(raw, start, stop, out, at, len(out))


@inline_kernel
def _copy(raw: U8, start: Int, stop: Int, out: U8, at: Int) -> Int:
    """Bytes `start` to `stop` of `raw` into `out` from `at` on; returns the position behind them."""
    for index in range(stop - start):
        out[at + index] = raw[start + index]
    return at + stop - start


@kernel
def write_texts(id_bytes: U8, id_end: U32, out: U8, at: int) -> Int:
    """Each id as a msgpack string into `out` u8[.] from position `at` on; returns the position behind the last.

    Ids of 1 to 64 bytes; `out` must have room for len(id_bytes) + 2 * len(id_end) bytes.
    """
    start = np.int64(0)
    position: Int = np.int64(at)
    for row in range(id_end.shape[0]):
        stop = np.int64(id_end[row])
        position = _write_text(id_bytes, start, stop, out, position)
        start = stop
    return position


# --- commands ---------------------------------------------------------------------------------------------------------

_DOLLAR, _CR, _LF, _DASH, _ZERO = 36, 13, 10, 45, 48
_KIND = np.frombuffer(b"$5\r\nalert\r\n", np.uint8)
_DEVICE_IDS = np.frombuffer(b"\xaadevice_ids", np.uint8)


@inline_kernel
def _digit_count(value: np.uint64) -> Int:
    count = np.int64(1)
    while value >= np.uint64(10):
        value //= np.uint64(10)
        count += 1
    return count


@inline_kernel
def _write_digits(value: np.uint64, out: U8, at: Int) -> Int:
    """A whole number in decimal; returns the position behind it."""
    count = _digit_count(value)
    for place in range(count):
        out[at + count - 1 - place] = np.uint8(_ZERO + value % np.uint64(10))
        value //= np.uint64(10)
    return at + count


@inline_kernel
def _write_size(size: Int, out: U8, at: Int) -> Int:
    """The server's protocol before `size` bytes: `$<size>`, and the end of a line."""
    out[at] = _DOLLAR
    return _write_line_end(out, _write_digits(np.uint64(size), out, at + 1))


@inline_kernel
def _write_line_end(out: U8, at: Int) -> Int:
    out[at] = _CR
    out[at + 1] = _LF
    return at + 2


@inline_kernel
def _write_big_endian(value: np.uint64, size: Int, out: U8, at: Int) -> Int:
    for place in range(size):
        out[at + place] = np.uint8((value >> np.uint64(8 * (size - 1 - place))) & np.uint64(0xFF))
    return at + size


@inline_kernel
def _write_number(value: np.uint64, out: U8, at: Int) -> Int:
    """A whole number as msgpack writes it: in as few bytes as it needs."""
    if value < np.uint64(0x80):
        out[at] = np.uint8(value)
        return at + 1
    if value < np.uint64(1 << 8):
        out[at] = 0xCC
        return _write_big_endian(value, 1, out, at + 1)
    if value < np.uint64(1 << 16):
        out[at] = 0xCD
        return _write_big_endian(value, 2, out, at + 1)
    if value < np.uint64(1 << 32):
        out[at] = 0xCE
        return _write_big_endian(value, 4, out, at + 1)
    out[at] = 0xCF
    return _write_big_endian(value, 8, out, at + 1)


@inline_kernel
def _write_array_header(count: Int, out: U8, at: Int) -> Int:
    if count < 16:
        out[at] = np.uint8(0x90 | count)
        return at + 1
    if count < 1 << 16:
        out[at] = 0xDC
        return _write_big_endian(np.uint64(count), 2, out, at + 1)
    out[at] = 0xDD
    return _write_big_endian(np.uint64(count), 4, out, at + 1)


@kernel
def write_push_commands(
    command_bytes: U8,
    command_end: U32,
    head_bytes: U8,
    head_end: U32,
    ms: int,
    seq_base: np.uint64,
    numbers: I64,
    alert: U32,
    partner: U16,
    at_ms: I64,
    id_stop: U32,
    id_bytes: U8,
    id_end: U32,
    out: U8,
) -> Int:
    """One XADD a push into `out`, which has room for all; returns how many bytes.

    command_bytes, command_end: the beginning of the command to each partner, key included. head_bytes, head_end: the
    payload's beginning for each alert, up to its time. ms, seq_base: ids are `<ms>-<seq_base | number>`. numbers:
    i64[partners], the last number given out; counted on. The rest: columns of `PushColumns`.
    """
    at: Int = np.int64(0)
    first_id = np.int64(0)
    ms_digits = _digit_count(np.uint64(ms))
    for push in range(len(alert)):
        to = np.int64(partner[push])
        numbers[to] += 1
        at = _copy(command_bytes, np.int64(command_end[to - 1]) if to else 0, np.int64(command_end[to]), out, at)
        sequence = seq_base | np.uint64(numbers[to])
        at = _write_size(ms_digits + 1 + _digit_count(sequence), out, at)
        at = _write_digits(np.uint64(ms), out, at)
        out[at] = _DASH
        at = _write_line_end(out, _write_digits(sequence, out, at + 1))
        at = _copy(_KIND, 0, len(_KIND), out, at)
        # The payload's size stands before it: written behind the longest size first, and moved up then.
        start = at + 24
        about = np.int64(alert[push])
        stop = _copy(head_bytes, np.int64(head_end[about - 1]) if about else 0, np.int64(head_end[about]), out, start)
        stop = _write_number(np.uint64(at_ms[push]), out, stop)
        stop = _copy(_DEVICE_IDS, 0, len(_DEVICE_IDS), out, stop)
        last_id = np.int64(id_stop[push])
        stop = _write_array_header(last_id - first_id, out, stop)
        byte = np.int64(id_end[first_id - 1]) if first_id else np.int64(0)
        for row in range(first_id, last_id):
            end = np.int64(id_end[row])
            stop = _write_text(id_bytes, byte, end, out, stop)
            byte = end
        first_id = last_id
        at = _write_size(stop - start, out, at)
        at = _write_line_end(out, _copy(out, start, stop, out, at))
    return at


# --- ids --------------------------------------------------------------------------------------------------------------


@kernel
def ends_fit(id_end: U32, id_bytes_total: int) -> bool:
    """Whether `id_end` u32[n] never falls and ends with `id_bytes_total` (with 0 when n = 0)."""
    falls = 0
    for row in range(1, id_end.shape[0]):
        falls += id_end[row] < id_end[row - 1]
    last = np.int64(id_end[id_end.shape[0] - 1]) if id_end.shape[0] else np.int64(0)
    return bool(falls == 0 and last == id_bytes_total)


@kernel
def common_width(id_end: U32) -> Int:
    """The length all ids share, in bytes, or 0 when they share none (or there are none)."""
    if id_end.shape[0] == 0:
        return 0
    width = id_end[0]
    others = 0
    for row in range(1, id_end.shape[0]):
        others += (id_end[row] - id_end[row - 1]) != width
    return np.int64(width) if others == 0 else np.int64(0)


@kernel
def is_ascii(raw: U8) -> bool:
    """Whether no byte of `raw` u8[n] has its high bit set. Eight bytes a load, four loads a turn: 0.03 ns a byte."""
    high = np.uint64(0)
    size = raw.shape[0]
    at = 0
    while at + 32 <= size:
        high |= load_u64(raw, at) | load_u64(raw, at + 8) | load_u64(raw, at + 16) | load_u64(raw, at + 24)
        at += 32
    tail = np.uint8(0)
    while at < size:
        tail |= raw[at]
        at += 1
    return bool((high & np.uint64(0x8080808080808080)) == 0 and tail < 0x80)


@inline_kernel
def _is_utf8(raw: U8, start: Int, stop: Int) -> bool:
    """Whether `raw[start:stop]` is well-formed UTF-8 (Unicode 16, table 3-7: no overlong forms, no surrogates)."""
    at = start
    while at < stop:
        lead = raw[at]
        if lead < 0x80:
            at += 1
            continue
        second_min = np.uint8(0x80)
        second_max = np.uint8(0xBF)
        if 0xC2 <= lead <= 0xDF:
            size = 2
        elif 0xE0 <= lead <= 0xEF:
            size = 3
            if lead == 0xE0:
                second_min = np.uint8(0xA0)
            elif lead == 0xED:
                second_max = np.uint8(0x9F)
        elif 0xF0 <= lead <= 0xF4:
            size = 4
            if lead == 0xF0:
                second_min = np.uint8(0x90)
            elif lead == 0xF4:
                second_max = np.uint8(0x8F)
        else:
            return False
        if at + size > stop or raw[at + 1] < second_min or raw[at + 1] > second_max:
            return False
        for index in range(at + 2, at + size):
            if raw[index] < 0x80 or raw[index] > 0xBF:
                return False
        at += size
    return True


# --- screening --------------------------------------------------------------------------------------------------------

GOOD, ID_LENGTH, ID_UTF8, LATITUDE, LONGITUDE, PARTNER = range(6)
"""Verdicts on a row; the first that holds, in this order, is the one given."""
VERDICT_COUNT = 6


@kernel
def any_row_suspect(partner: U16, id_bytes: U8, id_end: U32, lat_e7: I32, lng_e7: I32, partner_count: int) -> bool:
    """Whether `judge_rows` has to be called. Columns as in `columns.PingBatch`, `id_end` never falling.

    One branch-free pass a column, which LLVM turns into vector code; a non-ASCII id also makes its batch suspect.
    """
    rows = partner.shape[0]
    wrong = np.uint32(0)
    before = np.uint32(0)
    for row in range(rows):
        wrong |= np.uint32((id_end[row] - before - np.uint32(1)) >= np.uint32(ID_BYTES_MAX))
        before = id_end[row]
    for row in range(rows):
        wrong |= np.uint32(
            (lat_e7[row] > LAT_E7_MAX)
            | (lat_e7[row] < -LAT_E7_MAX)
            | (lng_e7[row] > LNG_E7_MAX)
            | (lng_e7[row] < -LNG_E7_MAX)
        )
    partner_max = np.uint16(0)
    for row in range(rows):
        partner_max = max(partner_max, partner[row])
    return bool(wrong != 0 or (rows > 0 and partner_max >= partner_count) or not is_ascii(id_bytes))


@kernel
def judge_rows(
    partner: U16,
    id_bytes: U8,
    id_end: U32,
    lat_e7: I32,
    lng_e7: I32,
    partner_count: int,
    verdict: U8,
    count: I64,
) -> None:
    """The verdict on each row -> `verdict` u8[n], and how many rows got each -> `count` i64[VERDICT_COUNT]."""
    start = np.int64(0)
    count[:] = 0
    for row in range(partner.shape[0]):
        stop = np.int64(id_end[row])
        size = stop - start
        found = GOOD
        if size < 1 or size > ID_BYTES_MAX:
            found = ID_LENGTH
        elif not _is_utf8(id_bytes, start, stop):
            found = ID_UTF8
        elif lat_e7[row] > LAT_E7_MAX or lat_e7[row] < -LAT_E7_MAX:
            found = LATITUDE
        elif lng_e7[row] > LNG_E7_MAX or lng_e7[row] < -LNG_E7_MAX:
            found = LONGITUDE
        elif np.int64(partner[row]) >= partner_count:
            found = PARTNER
        verdict[row] = found
        count[found] += 1
        start = stop


# --- moving rows ------------------------------------------------------------------------------------------------------


@kernel
def count_rows(target: U16, id_end: U32, row_start: I64, id_start: I64) -> None:
    """Where each target's rows and id bytes begin when rows are grouped by `target` u16[n], order kept.

    -> `row_start` i64[targets + 1], `id_start` i64[targets + 1]; the last of each is the total.
    Rows whose target is not below `targets` are left out.
    """
    targets = row_start.shape[0] - 1
    row_start[:] = 0
    id_start[:] = 0
    before = np.int64(0)
    for row in range(target.shape[0]):
        stop = np.int64(id_end[row])
        if target[row] < targets:
            row_start[np.int64(target[row]) + 1] += 1
            id_start[np.int64(target[row]) + 1] += stop - before
        before = stop
    for index in range(targets):
        row_start[index + 1] += row_start[index]
        id_start[index + 1] += id_start[index]


@inline_kernel
def _move(column: Any, target: U16, targets: int, place: U32, out: Any) -> None:
    """`column[row]` -> `out[place[row]]` where the row's target is below `targets`; an empty column has no rows."""
    for row in range(column.shape[0]):
        if target[row] < targets:
            out[np.int64(place[row])] = column[row]


@kernel
def group_rows(
    target: U16,
    row_start: I64,
    id_start: I64,
    partner: U16,
    id_bytes: U8,
    id_end: U32,
    lat_e7: I32,
    lng_e7: I32,
    observed_at_ms: I64,
    at_ms: I64,
    partner_out: U16,
    id_bytes_out: U8,
    id_end_out: U32,
    lat_e7_out: I32,
    lng_e7_out: I32,
    observed_at_ms_out: I64,
    at_ms_out: I64,
) -> None:
    """Copy rows to where `count_rows` put their target, order kept within a target; `id_end_out` counts per target.

    `at_ms` and `at_ms_out`: empty when the batch has none. A pass a column, each writing to one place a target: all
    columns in one pass took twice the time.
    """
    rows = target.shape[0]
    targets = row_start.shape[0] - 1
    next_row = row_start.copy()
    next_id = id_start.copy()
    place = np.empty(rows, np.uint32)
    start = np.int64(0)
    for row in range(rows):
        stop = np.int64(id_end[row])
        to = np.int64(target[row])
        if to < targets:
            place[row] = next_row[to]
            new_id = copy_id(id_bytes, start, stop, id_bytes_out, next_id[to], id_start[to + 1])
            id_end_out[next_row[to]] = np.uint32(new_id - id_start[to])
            next_row[to] += 1
            next_id[to] = new_id
        start = stop
    _move(partner, target, targets, place, partner_out)
    _move(lat_e7, target, targets, place, lat_e7_out)
    _move(lng_e7, target, targets, place, lng_e7_out)
    _move(observed_at_ms, target, targets, place, observed_at_ms_out)
    _move(at_ms, target, targets, place, at_ms_out)
