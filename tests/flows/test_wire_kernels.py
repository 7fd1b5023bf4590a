"""The loops behind the wire, against plain Python."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import wire_kernels as kernels
from geoindex.columns import pack_ids

values: st.SearchStrategy[object] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=10,
)


def walk(payload: bytes, fields_max: int = 16, value_count_max: int = 1000) -> tuple[int, list[list[int]]]:
    span = np.full((fields_max, kernels.SPAN_COLUMNS), -7, np.int64)
    count = int(kernels.map_fields(np.frombuffer(payload, np.uint8), span, value_count_max))
    return count, span[: max(0, count)].tolist()


@given(st.dictionaries(st.text(max_size=40), values, max_size=8))
def test_fields_of_a_map_are_where_msgpack_finds_them(fields: dict[str, object]) -> None:
    payload = msgpack.packb(fields)
    count, spans = walk(payload)
    if count == kernels.TOO_DEEP:
        return
    assert count == len(fields)
    for (name, value), span in zip(fields.items(), spans, strict=True):
        assert payload[span[kernels.KEY_START] : span[kernels.KEY_STOP]].decode() == name
        assert msgpack.unpackb(payload[span[kernels.VALUE_START] : span[kernels.VALUE_STOP]]) == value
        if isinstance(value, str | bytes):
            raw = value.encode() if isinstance(value, str) else value
            assert payload[span[kernels.CONTENT_START] : span[kernels.VALUE_STOP]] == raw
        is_number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32
        assert span[kernels.NUMBER] == (value if is_number else -1)


@given(st.dictionaries(st.text(max_size=4), values, max_size=4), st.data())
def test_map_cut_short_is_truncated(fields: dict[str, object], data: st.DataObject) -> None:
    payload = msgpack.packb(fields)
    if walk(payload)[0] < 0:
        return
    cut = data.draw(st.integers(0, len(payload) - 1))
    assert walk(payload[:cut])[0] == kernels.TRUNCATED
    assert walk(payload + b"\x00")[0] == kernels.TRAILING_BYTES


@pytest.mark.parametrize(("depth", "fits"), [(kernels.DEPTH_MAX, True), (kernels.DEPTH_MAX + 1, False)])
def test_nesting_is_bounded(depth: int, fits: bool) -> None:
    payload = b"\x81\xa1a" + b"\x91" * (depth - 2) + b"\x90"
    assert walk(payload)[0] == (1 if fits else kernels.TOO_DEEP)


def test_fields_and_values_are_bounded() -> None:
    payload = msgpack.packb({str(number): number for number in range(5)})
    assert walk(payload, fields_max=5, value_count_max=11)[0] == 5
    assert walk(payload, fields_max=4)[0] == kernels.TOO_MANY_FIELDS
    assert walk(payload, value_count_max=10)[0] == kernels.TOO_MANY_VALUES


@given(st.binary(max_size=100))
def test_ascii_is_seen_as_python_sees_it(raw: bytes) -> None:
    assert kernels.is_ascii(np.frombuffer(raw, np.uint8)) == raw.isascii()


@pytest.mark.parametrize("place", [0, 7, 8, 31, 32, 63, 64, 70])
def test_one_high_bit_anywhere_is_seen(place: int) -> None:
    raw = np.full(71, ord("x"), np.uint8)
    assert kernels.is_ascii(raw)
    raw[place] = 0x80
    assert not kernels.is_ascii(raw)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=16), max_size=20))
def test_ids_are_written_as_msgpack_writes_them(ids: list[str]) -> None:
    id_bytes, id_end = pack_ids(ids)
    out = np.zeros(len(id_bytes) + 2 * len(ids) + 3, np.uint8)
    stop = kernels.write_texts(id_bytes, id_end, out, 3)
    assert out[3:stop].tobytes() == b"".join(msgpack.packb(device_id) for device_id in ids)


@pytest.mark.parametrize(
    ("ends", "total", "fit"),
    [([], 0, True), ([], 1, False), ([3], 3, True), ([3, 3, 7], 7, True), ([3, 2, 7], 7, False), ([3, 7], 8, False)],
)
def test_id_ends_fit_when_they_never_fall_and_reach_the_total(ends: list[int], total: int, fit: bool) -> None:
    assert kernels.ends_fit(np.array(ends, np.uint32), total) == fit


@pytest.mark.parametrize(
    ("ends", "width"), [([], 0), ([5], 5), ([2, 4, 6], 2), ([2, 4, 7], 0), ([3, 4, 5], 0), ([0, 0], 0)]
)
def test_common_width_is_the_length_all_ids_share(ends: list[int], width: int) -> None:
    assert kernels.common_width(np.array(ends, np.uint32)) == width
