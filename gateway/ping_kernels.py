"""The loop behind `gateway.ping_bodies`: where the elements of a JSON array are, without building any."""

from __future__ import annotations

import numpy as np

from geoindex.columns import I64, U8
from geoindex.numba_typing import kernel

# What `split_array` answers instead of a number of elements.
NOT_AN_ARRAY = -1
UNFINISHED = -2
TRAILING_BYTES = -3
TOO_MANY = -4

_QUOTE, _BACKSLASH, _COMMA = 34, 92, 44
_OPEN_BRACKET, _CLOSE_BRACKET, _OPEN_BRACE, _CLOSE_BRACE = 91, 93, 123, 125
_SPACES = (32, 9, 10, 13)


@kernel
def split_array(raw: U8, start: I64, stop: I64) -> int:
    """The elements of the JSON array that fills `raw` u8[n] -> their spans, `start` and `stop` i64[elements_max].

    Returns how many there are, or one of the negative answers above. Looks at strings and brackets only: what an
    element holds may be anything, an empty one included, so that a broken one does not hide where the next begins.
    Reads each byte once and counts brackets instead of descending.
    """
    size = raw.shape[0]
    at = 0
    while at < size and raw[at] in _SPACES:
        at += 1
    if at == size or raw[at] != _OPEN_BRACKET:
        return NOT_AN_ARRAY
    at += 1
    begin = at
    count = 0
    depth = np.int64(0)
    in_string = False
    blank = True  # nothing but spaces since the last comma
    while at < size:
        byte = raw[at]
        if in_string:
            if byte == _BACKSLASH:
                at += 1
            elif byte == _QUOTE:
                in_string = False
        elif byte == _QUOTE:
            in_string = True
            blank = False
        elif byte == _OPEN_BRACKET or byte == _OPEN_BRACE:
            depth += 1
            blank = False
        elif (byte == _CLOSE_BRACKET or byte == _CLOSE_BRACE) and depth > 0:
            depth -= 1
        elif byte == _COMMA or byte == _CLOSE_BRACKET:
            if depth == 0:
                if byte == _COMMA or count or not blank:
                    if count == start.shape[0]:
                        return TOO_MANY
                    start[count] = begin
                    stop[count] = at
                    count += 1
                if byte == _CLOSE_BRACKET:
                    at += 1
                    while at < size and raw[at] in _SPACES:
                        at += 1
                    return count if at == size else TRAILING_BYTES
                begin = at + 1
                blank = True
        elif byte not in _SPACES:
            blank = False
        at += 1
    return UNFINISHED
