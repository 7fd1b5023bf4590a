"""The decorators compile and cache; the two instructions do what they say."""

from __future__ import annotations

import random
from typing import Any, cast

import numba
import numpy as np

from geoindex.columns import U8, U64
from geoindex.kernels import copy_id
from geoindex.numba_typing import Int, copy_64, inline_kernel, kernel, mulhi_lo, prefetch


@kernel
def _multiply_all(a: U64, b: U64, high: U64, low: U64) -> None:
    for i in range(len(a)):
        high[i], low[i] = mulhi_lo(a[i], b[i])


@inline_kernel
def _twice(value: int) -> int:
    return value * 2


@kernel
def _sum_with_prefetch(values: U64) -> int:
    total = 0
    for i in range(len(values)):
        prefetch(values, i + 16)
        total += _twice(int(values[i]))
    return total


@kernel
def _prefetch_row(table: U64, index: int) -> int:
    prefetch(table, index)
    prefetch(table, np.uint32(index))
    return int(table[index, 1])


@kernel
def _copy_block(source: U8, start: int, target: U8, place: int) -> None:
    copy_64(source, start, target, place)


@kernel
def _copy_ids(source: U8, ends: U64, target: U8, place: Int, room: int) -> Int:
    start: Int = 0
    for end in ends:
        place = copy_id(source, start, np.int64(end), target, place, room)
        start = np.int64(end)
    return place


def test_mulhi_lo_gives_the_whole_128_bit_product() -> None:
    source = random.Random(1)
    edge = [0, 1, 2, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    pairs = [(a, b) for a in edge for b in edge] + [
        (source.getrandbits(64), source.getrandbits(64)) for _ in range(1000)
    ]
    a = np.array([pair[0] for pair in pairs], dtype=np.uint64)
    b = np.array([pair[1] for pair in pairs], dtype=np.uint64)
    high, low = np.empty_like(a), np.empty_like(a)
    _multiply_all(a, b, high, low)
    assert [(int(h) << 64) | int(x) for h, x in zip(high, low, strict=True)] == [x * y for x, y in pairs]


def test_prefetch_changes_nothing_and_may_point_beyond_the_array() -> None:
    values = np.arange(1000, dtype=np.uint64)
    assert _sum_with_prefetch(values) == 999 * 1000


def test_prefetch_takes_tables_of_rows_and_every_integer_type() -> None:
    table = np.arange(20, dtype=np.uint64).reshape(10, 2)
    assert _prefetch_row(table, 3) == 7


def _compiled_afresh() -> Any:
    """The same loop outside the cache, which keeps no code to look at."""
    loop = numba.njit(cast(Any, _sum_with_prefetch).py_func)
    loop(np.arange(10, dtype=np.uint64))
    return loop


def test_prefetch_reaches_the_machine_code() -> None:
    (assembly,) = _compiled_afresh().inspect_asm().values()
    assert "prefetch" in assembly or "prfm" in assembly


def test_inline_kernels_leave_no_call_behind() -> None:
    (code,) = _compiled_afresh().inspect_llvm().values()
    assert not [line for line in code.splitlines() if " call " in line and "_twice" in line]


def test_copy_64_copies_64_bytes_and_nothing_beside_them() -> None:
    source = np.arange(100, dtype=np.uint8)
    for start, place in ((0, 0), (36, 0), (0, 36), (7, 13)):
        target = np.full(100, 255, np.uint8)
        _copy_block(source, start, target, place)
        assert target.tolist() == [255] * place + list(range(start, start + 64)) + [255] * (36 - place)


def test_ids_are_copied_end_to_end_and_nothing_behind_their_room() -> None:
    draw = np.random.default_rng(7)
    for lengths in ([1], [64], [64, 64], [63, 1], list(range(1, 65)), draw.integers(1, 65, 200).tolist()):
        ends = np.cumsum(lengths).astype(np.uint64)
        source = draw.integers(1, 250, int(ends[-1]), dtype=np.uint8)
        target = np.full(len(source) + 200, 255, np.uint8)
        stop = _copy_ids(source, ends, target, 3, 3 + len(source))
        assert stop == 3 + len(source)
        assert target[3:stop].tobytes() == source.tobytes()
        assert set(target[:3].tolist()) | set(target[stop:].tolist()) == {255}
