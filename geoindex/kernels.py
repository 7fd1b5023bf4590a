"""Hashing and copying of device ids.

One hash function is behind shards and the device table.

`mum128`: two lanes, each folding 128-bit products of pairs of (8 bytes of id xor secret) into 64 bits, after the
multiply-and-fold idea of wyhash (Wang Yi, https://github.com/wangyi-fudan/wyhash, public domain). 128 bits identify
a device: among 10^9 devices two share a fingerprint with probability 1.5e-21 (n^2 / 2^129), and the secret keeps
anybody from making two ids that do.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from geoindex.columns import U8, U16, U32, U64
from geoindex.numba_typing import BLOCK_BYTES, Int, copy_64, inline_kernel, kernel, load_u32, load_u64, mulhi_lo

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
SECRET_COUNT = 16


@lru_cache(maxsize=16)
def hash_secrets(key: int) -> U64:
    """The deployment's key (u64) -> sixteen secrets, u64[16], by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).

    The same array for the same key: to be read only.
    """
    mask = (1 << 64) - 1
    secrets = np.empty(SECRET_COUNT, np.uint64)
    state = key & mask
    for index in range(SECRET_COUNT):
        state = (state + int(_GOLDEN)) & mask
        z = ((state ^ (state >> 30)) * int(_MIX_1)) & mask
        z = ((z ^ (z >> 27)) * int(_MIX_2)) & mask
        secrets[index] = z ^ (z >> 31)
    return secrets


@inline_kernel
def fold(a: np.uint64, b: np.uint64) -> np.uint64:
    """High half xor low half of the product of two u64."""
    high, low = mulhi_lo(a, b)
    return high ^ low


@inline_kernel
def hash_id(id_bytes: U8, start: int, stop: int, partner: int, secrets: U64) -> tuple[np.uint64, np.uint64]:
    """Fingerprint of device `id_bytes[start:stop]` of a partner, 1 to 64 bytes -> two u64.

    Six words of the id, chosen by its length, overlapping where there is less; longer ids add two from the middle. All
    ids of 16 to 48 bytes take one path without a branch: a loop over the words cost 9 ns more, mostly for its
    mispredicted end.
    """
    size = stop - start
    head = np.uint64(size) | (np.uint64(partner) << np.uint64(8))
    if size >= 16:
        first = load_u64(id_bytes, start)
        second = load_u64(id_bytes, start + 8)
        middle = min(16, size - 16)
        third = load_u64(id_bytes, start + middle)
        fourth = load_u64(id_bytes, start + middle + 8)
        fifth = load_u64(id_bytes, stop - 16)
        sixth = load_u64(id_bytes, stop - 8)
        if size > 48:
            head ^= fold(load_u64(id_bytes, start + 32) ^ secrets[0], load_u64(id_bytes, start + 40) ^ secrets[1])
    else:
        if size >= 8:
            first = load_u64(id_bytes, start)
            second = load_u64(id_bytes, stop - 8)
        elif size >= 4:
            first = load_u32(id_bytes, start)
            second = load_u32(id_bytes, stop - 4)
        else:
            first = np.uint64(id_bytes[start]) | (np.uint64(id_bytes[start + (size >> 1)]) << np.uint64(8))
            second = np.uint64(id_bytes[stop - 1])
        third, fourth, fifth, sixth = first, second, first, second
    # Each lane multiplies every word by another, under secrets of its own.
    lane_a = fold(first ^ secrets[2], second ^ secrets[3])
    lane_a ^= fold(third ^ secrets[4], fourth ^ secrets[5])
    lane_a ^= fold(fifth ^ secrets[6], sixth ^ secrets[7])
    lane_b = fold(first ^ secrets[8], fourth ^ secrets[9])
    lane_b ^= fold(third ^ secrets[10], sixth ^ secrets[11])
    lane_b ^= fold(fifth ^ secrets[12], second ^ secrets[13])
    return fold(lane_a ^ head, secrets[14] ^ lane_b), fold(lane_b ^ head, secrets[15] ^ lane_a)


@inline_kernel
def scaled(hash_value: np.uint64, size: np.uint64) -> int:
    """A u64 hash -> [0, size) without a division (Lemire, ACM TOMACS 2019, doi:10.1145/3230636)."""
    high, _ = mulhi_lo(hash_value, size)
    return np.int64(high)


@inline_kernel
def copy_id(source: U8, start: Int, stop: Int, target: U8, place: Int, room: Int) -> Int:
    """Bytes `start` to `stop` of `source`, at most 64, into `target` from `place` on; returns the place behind them.

    What follows up to `target[room]` may be overwritten, by up to 64 bytes in all: ids stand end to end, and the next
    one is written later. A loop over the bytes of one id costs 13 to 50 ns, mostly for its mispredicted end.
    """
    if start + BLOCK_BYTES <= len(source) and place + BLOCK_BYTES <= room:
        copy_64(source, start, target, place)
    else:
        for offset in range(stop - start):
            target[place + offset] = source[start + offset]
    return place + stop - start


@kernel
def _shards(partner: U16, id_bytes: U8, id_end: U32, secrets: U64, shard_count: int, shard: U16) -> None:
    """Shard of each row -> `shard` u16[n]. The second word of the fingerprint: the first one places in the index."""
    start = 0
    for row in range(len(id_end)):
        stop = np.int64(id_end[row])
        _, high = hash_id(id_bytes, start, stop, partner[row], secrets)
        shard[row] = scaled(high, np.uint64(shard_count))
        start = stop


def shard_of_ids(partner: U16, id_bytes: U8, id_end: U32, key: int, shard_count: int) -> U16:
    """Shard of each device, u16[n] in [0, shard_count). Columns as in `columns.PingBatch`, ids of 1 to 64 bytes."""
    shard = np.empty(len(id_end), np.uint16)
    _shards(partner, id_bytes, id_end, hash_secrets(key), shard_count, shard)
    return shard
