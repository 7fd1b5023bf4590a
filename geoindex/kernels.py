"""Hashing of device ids: the one function behind shards and the device table.

`mum128`: two independent lanes, each folding the 128-bit product of (8 bytes of id xor secret) and (state xor
secret) into 64 bits, after the multiply-and-fold idea of wyhash (Wang Yi, https://github.com/wangyi-fudan/wyhash,
public domain). 128 bits identify a device: among 10^9 devices two share a fingerprint with probability 1.5e-21
(n^2 / 2^129), and the secret keeps anybody from making two ids that do.
"""

from __future__ import annotations

import numpy as np

from geoindex.columns import U8, U16, U32, U64
from geoindex.numba_typing import inline_kernel, kernel, load_u32, load_u64, mulhi_lo

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def hash_secrets(key: int) -> U64:
    """The deployment's key (u64) -> six secrets, u64[6], by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    mask = (1 << 64) - 1
    secrets = np.empty(6, np.uint64)
    state = key & mask
    for index in range(6):
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
    """Fingerprint of device `id_bytes[start:stop]` of a partner, 1 to 64 bytes -> two u64."""
    size = stop - start
    head = np.uint64(size) | (np.uint64(partner) << np.uint64(8))
    lane_a = secrets[0] ^ head
    lane_b = secrets[1] ^ head
    position = start
    while position + 8 < stop:
        word = load_u64(id_bytes, position)
        lane_a = fold(word ^ secrets[2], lane_a ^ secrets[3])
        lane_b = fold(word ^ secrets[4], lane_b ^ secrets[5])
        position += 8
    # The last 1 to 8 bytes; with 8 or more in all they overlap what came before, which needs no masks.
    if size >= 8:
        word = load_u64(id_bytes, stop - 8)
    elif size >= 4:
        word = load_u32(id_bytes, start) | (load_u32(id_bytes, stop - 4) << np.uint64(32))
    else:
        word = (
            np.uint64(id_bytes[start])
            | (np.uint64(id_bytes[start + (size >> 1)]) << np.uint64(8))
            | (np.uint64(id_bytes[stop - 1]) << np.uint64(16))
        )
    lane_a = fold(word ^ secrets[2], lane_a ^ secrets[3])
    lane_b = fold(word ^ secrets[4], lane_b ^ secrets[5])
    return fold(lane_a ^ secrets[1], lane_b ^ secrets[3]), fold(lane_b ^ secrets[0], lane_a ^ secrets[4])


@inline_kernel
def scaled(hash_value: np.uint64, size: np.uint64) -> int:
    """A u64 hash -> [0, size) without a division (Lemire, ACM TOMACS 2019, doi:10.1145/3230636)."""
    high, _ = mulhi_lo(hash_value, size)
    return np.int64(high)


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
